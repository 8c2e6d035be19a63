"""The configuration of a run: what it may hold (`schema`), how it is read (`load`), and what it means for ROLL's users.

Nothing here imports torch, Ray or the extension.
"""

from sft_fast.config.load import load_config, resolved_yaml
from sft_fast.config.schema import (
    DataArguments,
    ModelArguments,
    SFTConfig,
    StrategyArguments,
    TrainingArguments,
    ValidationConfig,
    WorkerConfig,
)

__all__ = [
    "DataArguments",
    "ModelArguments",
    "SFTConfig",
    "StrategyArguments",
    "TrainingArguments",
    "ValidationConfig",
    "WorkerConfig",
    "load_config",
    "resolved_yaml",
]
