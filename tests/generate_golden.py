"""Writes the golden files: what `transformers` and `tokenizers` make of conversations, nothing of sft-fast being used.

    python tests/generate_golden.py

reads `tests/golden/inputs` and the built-in templates, and writes the rest of `tests/golden`:

- `tokenizer/`: a byte-level BPE tokenizer, trained here on `TRAINING_TEXTS`;
- `NAME.json` for each template: of each conversation its text, its token ids and the runs `[first, end)` of tokens that
  are trained on (`labels`), or the type of the exception (`refused`);
- `versions.json`: the versions of the libraries, and the date that templates are told.

All answers are trained on. Where the template has `{% generation %}`, labels are the mask of `transformers`. Otherwise
an answer begins where the text of the messages before it, with the generation prompt, ends, and ends where the text of
the messages up to it does; where those texts do not tell, `labels` is null.
"""

import datetime
import importlib.metadata
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
DATE = "2026-11-24"
VOCAB_SIZE = 640
TRAINING_TEXTS = [
    "user assistant system tool tools function name description parameters arguments type object string properties",
    "What is the sum of two and three? It is five, and four and seven are eleven. Is it so? Yes, and no.",
    "The sea is wide and blue. Which colour has it at night? Tell me more of the night, please, in one word or two.",
    "You may call one or more functions to assist with the question of the user. They stand within the tags below.",
    "For each call, return an object with the name of the function and its arguments within such tags again.",
    "Today is Monday, the first of March. You are helpful, and created to answer. # Hello! (Good morning.) [1] {2}",
    "I think that nothing divides it: a prime. \n\n <think>\n thought \n</think>\n\n answer",
    "Straße, été, naïve; 中文 and 日本語; привет; 0 1 2 3 4 5 6 7 8 9 10 100 2026",
]
MARKS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "[END]",
]  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SPECIAL = [*MARKS, *TOKENS.values()]
OPENED_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?\Z")


def read_templates() -> dict[str, str]:
    """Name → Jinja text: those that are built in, and those of the inputs, whose names end with `.jinja`."""
    named = sorted((ROOT / "rust" / "core" / "src" / "template" / "named").glob("*.jinja"))
    own = sorted((GOLDEN / "inputs").glob("*.jinja"))
    return {path.stem: path.read_text("utf-8") for path in named} | {path.name: path.read_text("utf-8") for path in own}


def read_conversations() -> dict[str, dict[str, Any]]:
    """Name → conversation: its messages, and tools where it has some."""
    conversations: dict[str, dict[str, Any]] = json.loads((GOLDEN / "inputs" / "conversations.json").read_bytes())
    return conversations


def train_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Trains the tokenizer and writes it as a model directory has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENS) + "\n", "utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **TOKENS)


class Reference:
    """Transformers, with a tokenizer and a template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template

    def apply(self, messages: Sequence[Any], tools: Any, **variables: Any) -> Any:
        """`apply_chat_template`."""
        return self.tokenizer.apply_chat_template(list(messages), tools=tools, chat_template=self.template, **variables)

    def ask(self, messages: Sequence[Any], tools: Any, **variables: Any) -> str:
        """The text with the generation prompt; `apply_chat_template` itself takes no empty list of messages."""
        variables |= {"add_generation_prompt": True, **TOKENS}
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        [text], _ = chat_template_utils.render_jinja_template(
            [present], tools=tools, chat_template=self.template, **variables
        )
        return text

    def case(self, messages: Sequence[Any], tools: Any = None) -> dict[str, Any]:
        """What becomes of a conversation: `text`, `ids` and `labels`, or `refused`."""
        try:
            text = self.apply(messages, tools, tokenize=False)
            ids = self.apply(messages, tools, return_dict=False)
        except Exception as error:  # whatever a template raises
            return {"refused": type(error).__name__}
        if re.search(r"\{%-?\s*generation", self.template):
            variables = {"return_dict": True, "return_assistant_tokens_mask": True}
            mask = self.apply(messages, tools, **variables)["assistant_masks"]
        else:
            mask = self.prove(messages, tools, text)
        return {"text": text, "ids": ids, "labels": None if mask is None else to_runs(mask)}

    def prove(self, messages: Sequence[Any], tools: Any, text: str) -> list[bool] | None:
        """The mask by the texts of the conversation's beginnings: the tokens that touch an answer."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self.find_start(messages[:index], tools, text)
                end = None if start is None else self.find_end(messages[: index + 1], tools, text, start)
                if start is None or end is None:
                    return None
                spans.append((start, end))
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return [any(first < end and last > start for start, end in spans) for first, last in encoding.offsets]

    def find_start(self, before: Sequence[Any], tools: Any, text: str) -> int | None:
        """Where an answer behind these messages begins: behind a generation prompt, or the thought that it opens."""
        try:
            asked = self.ask(before, tools)
            silent = self.ask(before, tools, enable_thinking=False)
        except Exception:  # such as a template that wants a question
            return None
        prompts = (asked, silent, OPENED_THOUGHT.sub("", asked))
        return next((len(prompt) for prompt in prompts if text.startswith(prompt)), None)

    def find_end(self, messages: Sequence[Any], tools: Any, text: str, start: int) -> int | None:
        """Where the last of these messages, an answer that begins at `start`, ends in the whole text."""
        alone = self.apply(messages, tools, tokenize=False).rstrip()
        # A token that closes the conversation is not the answer's where the turn has a mark of its own.
        turn = alone.removesuffix(TOKENS["eos_token"]).rstrip()
        goes_on = self.ask(messages, tools)
        has_mark = len(turn) > start + len(str(messages[-1].get("content") or "").rstrip())
        if has_mark and goes_on.startswith(turn) and not goes_on.startswith(alone):
            alone = turn
        if text.startswith(alone):
            return len(alone)
        # Alone, the answer has more in front, such as a thought: then it ends with as many marks as there.
        mark = next((mark for mark in SPECIAL if alone.endswith(mark)), None)
        if mark is None:
            return None
        ends = [match.end() for match in re.finditer(re.escape(mark), text[start:])]
        num_marks = alone.count(mark, start)
        if len(ends) < num_marks or not alone.endswith(text[start : start + ends[num_marks - 1]]):
            return None
        return start + ends[num_marks - 1]


def to_runs(mask: Sequence[bool | int]) -> list[list[int]]:
    """The runs `[first, end)` of true elements."""
    edges = [index for index, (left, right) in enumerate(itertools.pairwise([0, *mask, 0])) if left != right]
    return [list(edges[index : index + 2]) for index in range(0, len(edges), 2)]


class PinnedDate(datetime.datetime):
    """The clock of templates."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "PinnedDate":
        """Midnight of `DATE`."""
        return cls.fromisoformat(DATE).replace(tzinfo=tz)


def generate(directory: Path) -> None:
    """Writes all golden files into an empty directory, one case a line."""
    tokenizer = train_tokenizer(directory / "tokenizer")
    conversations = read_conversations()
    with patch.object(chat_template_utils, "datetime", PinnedDate):
        for name, template in read_templates().items():
            reference = Reference(tokenizer, template)
            lines = [
                f"{json.dumps(key)}: {json.dumps(reference.case(**conversation), separators=(',', ':'))}"
                for key, conversation in conversations.items()
            ]
            (directory / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    versions = {name: importlib.metadata.version(name) for name in ("jinja2", "tokenizers", "transformers")}
    (directory / "versions.json").write_text(json.dumps({"date": DATE, **versions}, indent=2) + "\n", "utf-8")


def main() -> None:
    """Replaces the golden files by new ones."""
    for path in sorted(GOLDEN.rglob("*")):
        if path.is_file() and "inputs" not in path.parts:
            path.unlink()
    if (GOLDEN / "tokenizer").exists():
        (GOLDEN / "tokenizer").rmdir()
    generate(GOLDEN)


if __name__ == "__main__":
    main()
