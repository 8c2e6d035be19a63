"""From raw conversations to a fine-tuned language model: fast, exact, and open about what it does.

The data layer is here; training is `sft_fast.train`, which this package does not import (nor torch, nor Ray).
"""

from sft_fast._core import Progress, __version__
from sft_fast.chat_template import ChatTemplate
from sft_fast.data import Dataset, Packing, Report, Sample, ensure_dataset, preprocess, verify
from sft_fast.errors import (
    ClusterError,
    ConfigError,
    DatasetError,
    FileError,
    InputError,
    SftFastError,
    TemplateError,
    TokenizerError,
    TrainError,
)
from sft_fast.mixing import Source
from sft_fast.records import preprocess_records

__all__ = [
    "ChatTemplate",
    "ClusterError",
    "ConfigError",
    "Dataset",
    "DatasetError",
    "FileError",
    "InputError",
    "Packing",
    "Progress",
    "Report",
    "Sample",
    "SftFastError",
    "Source",
    "TemplateError",
    "TokenizerError",
    "TrainError",
    "__version__",
    "ensure_dataset",
    "preprocess",
    "preprocess_records",
    "verify",
]
