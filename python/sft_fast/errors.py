"""Every exception that sft-fast raises on purpose: one root, one leaf for each kind of cause.

Each leaf is also the standard exception that a caller would expect (`ValueError`, `OSError`, `RuntimeError`), so
code that knows nothing of sft-fast still catches it. The Rust extension imports these classes and raises them.
Credentials inside addresses are left out of all that an error says.
"""

from __future__ import annotations

from typing import ClassVar

from sft_fast.redact import without_secrets


class SftFastError(Exception):
    """The root. Says what went wrong, where it was found, and what to do about it.

    Attributes:
        message: one sentence: what was expected and what was found.
        code: short stable name of the cause (`missing_key`), for programs that sort errors.
        path: file in which it was found, if there is one.
        line: line of that file, counted from 1.
        column: character of that line, counted from 1.
        location: place inside the value, such as `messages[3].role` or `sft_train.training_args.learning_rate`.
        hint: what the reader can do.

    Examples:
        >>> try:
        ...     sft_fast.preprocess_records([{"x": 1}], "none", tokenizer="path/to/model", sequence_length=256)
        ... except sft_fast.SftFastError as error:
        ...     print(type(error).__name__, error.code, error.path, error.line)
        InputError missing_key <records> 1
    """

    # What a command that ends with this error gives back to the shell: 2 where the input is at fault, else 1.
    exit_status: ClassVar[int] = 1
    # The `code` of an error whose raiser names none.
    default_code: ClassVar[str] = "error"

    # All but the message are optional and live in `__dict__`: that is what lets the exception be copied and pickled
    # (Ray sends it between processes) by the ordinary rules, `cls(*args)` and then its attributes.
    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        path: str | None = None,
        line: int | None = None,
        column: int | None = None,
        location: str | None = None,
        hint: str | None = None,
    ) -> None:
        message = without_secrets(message)
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.path = None if path is None else without_secrets(path)
        self.line = line
        self.column = column
        self.location = location
        self.hint = None if hint is None else without_secrets(hint)

    def __str__(self) -> str:
        """The whole text: `path:line:column: message (at location)`, then the hint on indented lines of its own."""
        position = [str(part) for part in (self.path, self.line, self.column) if part is not None]
        text = f"{':'.join(position)}: {self.message}" if position else self.message
        if self.location:
            text += f" (at {self.location})"
        if self.hint:
            text += "".join(f"\n  {line}" for line in self.hint.splitlines())
        return text


class InputError(SftFastError, ValueError):
    """A record is not what the options say it is: broken JSON, a missing key, a wrong type, an empty answer."""

    exit_status = 2
    default_code = "input"


class ConfigError(SftFastError, ValueError):
    """The configuration or an argument is wrong: an unknown key, a wrong type, a value out of range."""

    exit_status = 2
    default_code = "config"


class TemplateError(SftFastError, ValueError):
    """A chat template cannot be compiled, cannot be rendered, or cannot give an exact label mask."""

    exit_status = 2
    default_code = "template"


class TokenizerError(SftFastError, ValueError):
    """A tokenizer is missing, broken, or of a kind that is not supported."""

    exit_status = 2
    default_code = "tokenizer"


class DatasetError(SftFastError, ValueError):
    """A dataset on disk is incomplete, damaged, or does not fit what is asked of it."""

    exit_status = 2
    default_code = "dataset"


class FileError(SftFastError, OSError):
    """A file or directory cannot be found, read or written."""

    exit_status = 2
    default_code = "file"


class TrainError(SftFastError, RuntimeError):
    """A training run failed."""

    default_code = "train"


class ClusterError(SftFastError, RuntimeError):
    """The machines of a Ray cluster did not do what was asked of them."""

    default_code = "cluster"
