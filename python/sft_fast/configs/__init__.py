"""The configurations that ship with sft-fast: YAML files that Hydra finds as `pkg://sft_fast.configs`."""
