"""A chat template as a function: what a conversation becomes, and what of it is trained on; one or many at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from sft_fast import _core
from sft_fast.data import check_number
from sft_fast.errors import InputError

if TYPE_CHECKING:  # numpy is a large part of the start-up, and preprocessing needs none
    import numpy as np
    from numpy.typing import NDArray

Messages = Sequence[dict[str, Any]]
"""The messages of a conversation, in OpenAI's shape."""
Conversation = Messages | dict[str, Any]
"""Messages, or a dict that has them as `messages` and may have `tools` beside them."""


class ChatTemplate:
    r"""The chat template of a model, with its tokenizer.

    The text equals that of `apply_chat_template(messages, tools=tools, tokenize=False)` of transformers, the ids those
    of the tokenizer on that text without special tokens around it, but for text in a message that spells a control
    token: see `encode`.

    Examples:
        >>> template = sft_fast.ChatTemplate.from_pretrained("path/to/model")
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> text, spans = template.render(messages)
        >>> text
        '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n'
        >>> [text.encode()[start:end] for start, end in spans]
        [b'Hello<|im_end|>']
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
        """A template that is built in, with the tokenizer of a model directory.

        Args:
            name: Such as `qwen2_5`, `chatml` or `llama3`.
            tokenizer: Directory of the model.

        Raises:
            TokenizerError: The directory has no tokenizer that can be read.
            TemplateError: There is no template of that name.

        Examples:
            >>> sft_fast.ChatTemplate.from_name("chatml", tokenizer="path/to/model").verdict["end_of_turn_trained"]
            True
        """
        return cls(_core.ChatTemplate(tokenizer, name))

    @classmethod
    def from_file(cls, path: str | PathLike[str], tokenizer: str | PathLike[str]) -> ChatTemplate:
        """The template in a file, with the tokenizer of a model directory.

        Args:
            path: A `.jinja` file.
            tokenizer: Directory of the model.

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

        Examples:
            >>> template = sft_fast.ChatTemplate.from_pretrained("path/to/model")
            >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
            >>> ids, mask = template.encode(messages)
            >>> ids.dtype, mask.dtype, len(ids) == len(mask)
            (dtype('uint32'), dtype('bool'), True)
        """
        return self._core.encode(_as_record(messages, tools), policies)

    def render_batch(
        self,
        conversations: Iterable[Conversation],
        tools: Sequence[Any] | None = None,
        *,
        num_threads: int | None = None,
        **policies: str | bool,
    ) -> list[tuple[str, list[tuple[int, int]]]]:
        """Render many conversations at once, on all cores, without the GIL: `render` of each, in order.

        Args:
            conversations: The messages of each, or dicts with `messages` and `tools`.
            tools: JSON schemas of tools that the model may call, in each that names none itself.
            num_threads: Threads that render; one for each core by default.
            policies: As for `render`.

        Returns:
            What `render` returns, for each conversation.

        Raises:
            InputError: The first conversation that is wrong; `location` begins with `conversations[i]`.
            ConfigError: An argument is wrong.

        Examples:
            >>> template = sft_fast.ChatTemplate.from_pretrained("path/to/model")
            >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
            >>> template.render_batch([messages, messages]) == [template.render(messages)] * 2
            True
        """
        return self._core.render_batch(_as_records(conversations, tools), policies, _threads(num_threads))

    def encode_batch(
        self,
        conversations: Iterable[Conversation],
        tools: Sequence[Any] | None = None,
        *,
        num_threads: int | None = None,
        **policies: str | bool,
    ) -> list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
        """Render and tokenise many conversations at once, on all cores, without the GIL: `encode` of each, in order.

        Args:
            conversations: The messages of each, or dicts with `messages` and `tools`.
            tools: JSON schemas of tools that the model may call, in each that names none itself.
            num_threads: Threads that work; one for each core by default.
            policies: As for `encode`.

        Returns:
            Token ids uint32 [n] and the label mask bool [n] of each conversation.

        Raises:
            InputError: The first conversation that is wrong; `location` begins with `conversations[i]`.
            ConfigError: An argument is wrong.

        Examples:
            >>> template = sft_fast.ChatTemplate.from_pretrained("path/to/model")
            >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
            >>> batch = template.encode_batch([messages] * 3, num_threads=2)
            >>> len(batch), sum(int(mask.sum()) for ids, mask in batch) > 0
            (3, True)
        """
        return self._core.encode_batch(_as_records(conversations, tools), policies, _threads(num_threads))


def _threads(num_threads: int | None) -> int | None:
    if num_threads is not None:
        check_number("num_threads", num_threads, 1, 1024)
    return num_threads


def _as_records(conversations: Iterable[Conversation], tools: Sequence[Any] | None) -> list[str]:
    records = []
    for index, conversation in enumerate(conversations):
        place = f"conversations[{index}]"
        if not isinstance(conversation, dict):
            records.append(_as_record(conversation, tools, place))
        elif "messages" in conversation:
            records.append(_as_record(conversation["messages"], conversation.get("tools") or tools, place))
        else:
            found = ", ".join(map(repr, conversation)) or "none"
            raise InputError(f"expected the key 'messages', found {found}", code="missing_key", location=place)
    return records


def _as_record(messages: Messages, tools: Sequence[Any] | None, location: str | None = None) -> str:
    record = {"messages": list(messages), "tools": None if tools is None else list(tools)}
    try:
        return json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"expected messages that JSON can hold: {error}", code="wrong_type", location=location
        ) from error
