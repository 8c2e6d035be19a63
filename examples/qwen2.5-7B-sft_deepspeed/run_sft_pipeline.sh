#!/usr/bin/env bash
# Fine-tunes Qwen2.5-7B on eight GPUs, from any directory. PYTHON names the interpreter; arguments are overrides:
#   bash examples/qwen2.5-7B-sft_deepspeed/run_sft_pipeline.sh sequence_length=4096
set -euo pipefail

CONFIG_PATH=$(dirname "${BASH_SOURCE[0]}")
CONFIG_NAME=sft_config

"${PYTHON:-python}" "$CONFIG_PATH/../start_sft_pipeline.py" \
    --config_path "$CONFIG_PATH" \
    --config_name "$CONFIG_NAME" \
    "$@"
