"""Starts the SFT pipeline from a script: the same as `sft-fast train`, in the words of ROLL's start script.

python examples/start_sft_pipeline.py --config_path examples/qwen2.5-7B-sft_deepspeed --config_name sft_config
"""

import argparse

from sft_fast.cli import main


def start() -> None:
    """Reads the command line and runs the pipeline; does not return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", "--config-path", default=".", help="directory of the configuration")
    parser.add_argument("--config_name", "--config-name", default="sft_config", help="YAML file in it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    arguments = parser.parse_intermixed_args()
    path, name = arguments.config_path, arguments.config_name
    main(["train", "--config-path", path, "--config-name", name, *arguments.overrides])


if __name__ == "__main__":
    start()
