"""A chat template as a function: what a conversation becomes, and what of it is trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from sft_fast import _core

if TYPE_CHECKING:  # numpy is a large part of the start-up, and preprocessing needs none
    import numpy as np
    from numpy.typing import NDArray

Messages = Sequence[dict[str, Any]]


class ChatTemplate:
    """The chat template of a model, with its tokenizer.

    The text equals that of `apply_chat_template(messages, tools=tools, tokenize=False)` of transformers, the ids those
    of the tokenizer on that text without special tokens around it, but for text in a message that spells a control
    token: see `encode`.

    Examples:
        >>> template = ChatTemplate.from_pretrained("path/to/model")  # doctest: +SKIP
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> text, spans = template.render(messages)  # doctest: +SKIP
    """

    def __init__(self, core: _core.ChatTemplate) -> None:
        self._core = core

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str]) -> ChatTemplate:
        """The model's own template.

        Args:
            path: Directory of the model: `tokenizer.json`, and `chat_template.jinja` or `tokenizer_config.json`.

        Raises:
            TokenizerError: The directory has no tokenizer that can be read.
            TemplateError: It has no chat template, or one that can't be rendered faithfully.
        """
        return cls(_core.ChatTemplate(path, "native"))

    @classmethod
    def from_name(cls, name: str, tokenizer: str | PathLike[str]) -> ChatTemplate:
        """A named template such as `qwen2_5`, `chatml` or `llama3`, with the tokenizer of a model directory.

        Raises:
            TokenizerError: The directory has no tokenizer that can be read.
            TemplateError: There is no template of that name.
        """
        return cls(_core.ChatTemplate(tokenizer, name))

    @classmethod
    def from_file(cls, path: str | PathLike[str], tokenizer: str | PathLike[str]) -> ChatTemplate:
        """The template in a `.jinja` file, with the tokenizer of a model directory.

        Raises:
            TokenizerError: The directory has no tokenizer that can be read.
            TemplateError: The file can't be read as a template, or can't be rendered faithfully.
        """
        return cls(_core.ChatTemplate(tokenizer, str(path)))

    @property
    def source(self) -> str:
        """The Jinja text."""
        return self._core.source

    @property
    def why_not_fast(self) -> str | None:
        """Why the `tokenizers` library encodes, not the fast engine, where it does."""
        return self._core.why_not_fast

    @property
    def verdict(self) -> dict[str, Any]:
        """What is known of the template, as in the manifest: see `sft-fast validate`."""
        verdict: dict[str, Any] = json.loads(self._core.verdict())
        return verdict

    def render(
        self, messages: Messages, tools: Sequence[Any] | None = None, **policies: str | bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation.

        Args:
            messages: Messages in OpenAI's shape, at least one of the assistant.
            tools: JSON schemas of tools that the model may call.
            policies: What is trained on: arguments of `preprocess`.

        Returns:
            The text, and the spans `(start, end)` of it that are trained on, in bytes of its UTF-8 form.

        Raises:
            InputError: The conversation is wrong, or the template refuses it.
        """
        return self._core.render(_as_record(messages, tools), policies)

    def encode(
        self, messages: Messages, tools: Sequence[Any] | None = None, **policies: str | bool
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Render and tokenise a conversation.

        Args:
            messages: Messages in OpenAI's shape, at least one of the assistant.
            tools: JSON schemas of tools that the model may call.
            policies: What is trained on, and what text that spells a control token becomes: arguments of `preprocess`.

        Returns:
            Token ids uint32 [n], and the label mask bool [n]: true where a token is trained on.

        Raises:
            InputError: The conversation is wrong, or the template or the tokenizer refuses it.
        """
        return self._core.encode(_as_record(messages, tools), policies)


def _as_record(messages: Messages, tools: Sequence[Any] | None) -> str:
    return json.dumps({"messages": list(messages), "tools": None if tools is None else list(tools)}, allow_nan=False)
