"""Samples compared with those that `transformers` makes of the same conversations: `verify` of `preprocess`.

The reference is `PreTrainedTokenizerFast` with the chat template: rendered by Jinja in Python, the text encoded whole.
Its mask is that of `{% generation %}` where the template has it. For any other template an answer begins where the text
of the messages before it, with the generation prompt, ends; and it ends where the text of the messages up to it does,
or where its content stands with what that text has behind it. White space that the record has at the end of an answer
may be trained on or not. Nothing of the Rust side is used but the reading of files: a record's messages are those that
the template is given.
"""

from __future__ import annotations

import collections
import datetime
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from sft_fast import _core
from sft_fast.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from sft_fast.data import Dataset, Sample

NUM_SAMPLED = 100
"""Samples that `verify="sampled"` compares."""
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = re.compile(r"[<\[][^\s<\[]*think[^\s<\[]*[>\]]\s*(</[^\s<]*think[^\s<]*>\s*)?\Z", re.IGNORECASE)
Span = tuple[int, int, int]
"""Where an answer begins and ends, in characters, and where white space ends that may belong to it."""
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of comparing samples with the reference: those that are compared are equal."""

    num_ids: int
    """Samples whose token ids were compared."""
    num_masks: int
    """Samples whose label masks were compared."""
    not_compared: dict[str, int]
    """Samples of which something was not compared, by reason: there a policy wants something else."""


def compare(
    dataset: Dataset,
    files: Sequence[str | PathLike[str]],
    *,
    verify: Literal["sampled", "all"],
    tokenizer: str | PathLike[str],
    template: str,
    mapping: dict[str, Any],
    policies: dict[str, Any],
    file_names: Sequence[str | PathLike[str]] | None = None,
) -> Comparison:
    """Compare samples of a dataset with the reference.

    Args:
        dataset: The dataset.
        files: The files that it was made of.
        verify: `all` samples, or `NUM_SAMPLED` that are drawn with a fixed seed.
        tokenizer: Directory of the model.
        template: As `preprocess` takes it.
        mapping: The keys of fields, and `record_shape`.
        policies: The policies of the dataset, `too_long` among them.
        file_names: What the files are called in the dataset, if that is not their path.

    Raises:
        ConfigError: `transformers` is not installed.
        DatasetError: A sample differs, by the code `differs`; the error shows where.
    """
    reference = _Reference(tokenizer, template, policies, dataset.manifest)
    indices: Sequence[int] = range(len(dataset))
    if verify == "sampled" and len(dataset) > NUM_SAMPLED:
        indices = sorted(random.Random(0).sample(indices, NUM_SAMPLED))
    wanted = None if len(indices) == len(dataset) else {_place(dataset[index]) for index in indices}
    conversations = _core.Conversations(
        files, file_names=file_names, wanted=wanted,
        policies={key: value for key, value in policies.items() if key != "too_long"}, **mapping,
    )  # fmt: skip
    counts: collections.Counter[str] = collections.Counter()
    not_compared: collections.Counter[str] = collections.Counter()
    at = 0
    for path, line, text in _flat(conversations):
        conversation = None
        while at < len(indices) and _place(sample := dataset[indices[at]]) == (path, line):
            conversation = conversation or json.loads(text)
            reasons = reference.check(sample, conversation)
            counts["ids"] += "ids" not in reasons.values()
            counts["masks"] += not reasons
            not_compared.update(reasons.keys())
            at += 1
        if at == len(indices):
            break  # the rest of the files holds none of them
    if at < len(indices):
        message = "the record of this sample is not in the files"
        raise DatasetError(message, code="differs", path=dataset[indices[at]].source)
    return Comparison(num_ids=counts["ids"], num_masks=counts["masks"], not_compared=dict(not_compared))


def _place(sample: Sample) -> tuple[str, int]:
    path, _, line = sample.source.rpartition(":")
    return path, int(line)


def _flat(conversations: _core.Conversations) -> Iterator[tuple[str, int, str]]:
    for part in conversations:
        yield from part


def _masks(sample: Sample, offsets: list[tuple[int, int]], spans: list[Span]) -> tuple[list[bool], list[bool]]:
    """The mask of the reference and the sample's; they agree where the reference leaves it open."""
    found = sample.label_mask.tolist()
    expected = []
    for (first, last), is_label in zip(offsets, found, strict=True):
        is_within = any(first < end and last > start for start, end, _ in spans)
        is_open = any(end <= first < open_end for _, end, open_end in spans)
        expected.append(is_within or (is_open and is_label))
    return expected, found


class _Reference:
    """Transformers, with the model's tokenizer and the dataset's template."""

    def __init__(
        self, tokenizer: str | PathLike[str], template: str, policies: dict[str, Any], manifest: dict[str, Any]
    ) -> None:
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError as error:
            raise ConfigError(
                "expected transformers, which `verify` compares with, found it missing",
                code="missing_package",
                location="verify",
                hint="pip install transformers",
            ) from error
        core = None if template == "none" else _core.ChatTemplate(tokenizer, template)
        self._template = core.source if core else ""
        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(tokenizer), local_files_only=True)
        self._policies = policies
        is_dated = core is not None and json.loads(core.verdict())["date_dependent"]
        self._has_other_date = (
            is_dated and manifest["recipe"]["template_date"][:10] != datetime.date.today().isoformat()
        )
        added = self._tokenizer.added_tokens_decoder.values()
        is_control = re.compile(r"<[|｜].*[|｜]>").fullmatch
        self._control_tokens = [str(token) for token in added if token.special or is_control(str(token))]

    def check(self, sample: Sample, conversation: dict[str, Any]) -> dict[str, str]:
        """Compares a sample; returns what was not compared, `ids` (and mask) or `mask`, by reason."""
        if self._has_other_date:
            return {"date": "ids"}
        if self._policies["control_tokens"] != "allow" and self._spells_control(conversation):
            return {"control_text": "ids"}
        if "text" in conversation:
            return self._check_plain(sample, conversation["prompt"], conversation["text"])
        messages, tools = conversation["messages"], conversation["tools"]
        length, text, encoding = self._find(sample, messages, tools)
        is_whole = len(encoding.ids) == len(sample.input_ids)
        reason = self._why_no_mask(messages[:length], is_whole)
        if reason is None:
            spans = self._spans(messages[:length], conversation["is_trained"][:length], tools, text)
            if spans is None:
                reason = "not_prefix_preserving"
            else:
                self._same("label mask", sample, *_masks(sample, encoding.offsets, spans))
        return {} if reason is None else {reason: "mask"}

    def _check_plain(self, sample: Sample, prompt: str, text: str) -> dict[str, str]:
        """Compares a sample of plain text."""
        end = str(self._tokenizer.eos_token)
        encoding = self._tokenizer.backend_tokenizer.encode(prompt + text.removesuffix(end) + end)
        ids = sample.input_ids.tolist()
        if len(ids) < len(encoding.ids) and self._policies["too_long"] != "reject":
            self._same("token ids", sample, encoding.ids[: len(ids)], ids)
            return {"truncated": "mask"}
        self._same("token ids", sample, encoding.ids, ids)
        # What the tokenizer adds by itself has no characters, and belongs to the text if there is no prompt.
        is_text = [last > len(prompt) or (first == last and not prompt) for first, last in encoding.offsets]
        found = sample.label_mask.tolist()
        is_added = [first == last for first, last in encoding.offsets]
        expected = [
            label if added and prompt else want for want, label, added in zip(is_text, found, is_added, strict=True)
        ]
        self._same("label mask", sample, expected, found)
        return {}

    def _spells_control(self, conversation: dict[str, Any]) -> bool:
        text = json.dumps(conversation, ensure_ascii=False)
        return any(token in text for token in self._control_tokens)

    def _why_no_mask(self, messages: list[Any], is_whole: bool) -> str | None:
        policies = self._policies
        has_thoughts = any(
            message["role"] == "assistant"
            and (any(message.get(key) for key in _REASONING) or "</think>" in str(message.get("content")))
            for message in messages
        )
        if has_thoughts and (policies["dropped_thinking"] != "keep" or not policies["train_on_thinking"]):
            return "thinking"
        return None if is_whole else "truncated"

    def _render(self, messages: list[Any], tools: Any, **variables: Any) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self._template, tokenize=False, **variables
        )
        return text

    def _find(self, sample: Sample, messages: list[Any], tools: Any) -> tuple[int, str, Any]:
        """The conversation that the sample is of, whole or up to an answer: its messages, text and tokens."""
        ids = sample.input_ids.tolist()
        lengths = [len(messages)]
        if self._policies["dropped_thinking"] == "split" or self._policies["too_long"] == "truncate_turns":
            lengths += [n for n in range(len(messages) - 1, 0, -1) if messages[n - 1]["role"] == "assistant"]
        expected: list[int] = []
        for length in lengths:
            text = self._render(messages[:length], tools)
            encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            if encoding.ids == ids or (self._policies["too_long"] == "truncate" and encoding.ids[: len(ids)] == ids):
                return length, text, encoding
            expected = expected or encoding.ids
        self._same("token ids", sample, expected, ids)
        raise AssertionError("ids that are equal were found above")

    def _spans(self, messages: list[Any], is_trained: list[bool], tools: Any, text: str) -> list[Span] | None:
        """What is trained on, in characters of the text; `None` where the reference does not tell."""
        if _MARKERS.search(self._template):
            answers = [
                flag for message, flag in zip(messages, is_trained, strict=True) if message["role"] == "assistant"
            ]
            return self._marked(messages, tools) if all(answers) else None
        spans = []
        for index, flag in enumerate(is_trained):
            if not flag:
                continue
            start = self._start(messages[:index], tools, text)
            end = None if start is None else self._end(messages[: index + 1], tools, text, start)
            if start is None or end is None:
                return None
            content = str(messages[index].get("content") or "")
            spans.append((start, end, end + len(content) - len(content.rstrip())))
        return spans

    def _start(self, before: list[Any], tools: Any, text: str) -> int | None:
        """Where the text of the messages before an answer ends, with one of the generation prompts."""
        try:
            asked = self._render(before, tools, add_generation_prompt=True)
            silent = self._render(before, tools, add_generation_prompt=True, enable_thinking=False, thinking=False)
        except Exception:  # whatever a template raises: then the reference does not tell
            return None
        prompts = (asked, silent, _THOUGHT.sub("", asked))
        return next((len(prompt) for prompt in prompts if text.startswith(prompt)), None)

    def _end(self, messages: list[Any], tools: Any, text: str, start: int) -> int | None:
        """Where the last of the messages, an answer that begins at `start`, ends."""
        whole = self._render(messages, tools).rstrip()
        content = str(messages[-1].get("content") or "").strip()
        # A token that closes the conversation is not the answer's where the turn has an end of its own.
        turn = whole.removesuffix(self._tokenizer.eos_token or "").rstrip()
        if start < len(turn) < len(whole) and not (content and turn.endswith(content)):
            goes_on = self._render(messages, tools, add_generation_prompt=True)
            whole = turn if goes_on.startswith(turn) and not goes_on.startswith(whole) else whole
        if text.startswith(whole):
            return len(whole)
        # The text of the messages alone has another beginning, such as a thought that is shown at the end only.
        behind = whole[whole.rfind(content) + len(content) :] if content in whole else ""
        return start + len(content + behind) if behind and text.startswith(content + behind, start) else None

    def _marked(self, messages: list[Any], tools: Any) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        rendered: Any = render_jinja_template(
            [present], tools=tools, chat_template=self._template, return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )  # fmt: skip
        [spans] = rendered[1]
        return [(start, end, end) for start, end in spans if end > start]

    def _same(self, what: str, sample: Sample, expected: Sequence[int], found: Sequence[int]) -> None:
        if list(expected) == list(found):
            return
        pairs = enumerate(zip(expected, found, strict=False))
        at = next((index for index, (left, right) in pairs if left != right), min(len(expected), len(found)))
        ids = sample.input_ids.tolist()
        around = self._tokenizer.decode(ids[max(at - 8, 0) : at]), self._tokenizer.decode(ids[at : at + 4])
        raise DatasetError(
            f"expected the {what} that transformers makes, found another one at token {at}, behind {around[0]!r} and "
            f"at {around[1]!r}: expected {list(expected[at : at + 6])}, found {list(found[at : at + 6])}",
            code="differs",
            path=sample.source,
            hint="do not train on this data set; please report it, with the record and the template",
        )
