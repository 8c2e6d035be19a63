"""The records of the demo: enough of them, in the shapes they are named for, and validation kept apart."""

import json
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parent.parent / "data" / "demo"
NAMES = ("train", "chat", "validation")


def read(name: str) -> list[dict[str, Any]]:
    """The records of one file of the demo."""
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(what is asked, what is answered) of each turn, for either shape of record."""
    if "messages" not in record:
        return [("\n".join(filter(None, (record["instruction"], record["input"]))), record["output"])]
    texts = [message["content"] for message in record["messages"] if message["role"] != "system"]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_there_are_enough_records() -> None:
    """The sets are as large as the demo promises, with some records that have an input and some a system message."""
    train, chat, validation = map(read, NAMES)

    assert len(train) >= 180
    assert len(chat) >= 40
    assert len(validation) >= 24
    assert sum(record["input"] != "" for record in train) >= 10
    assert sum(record["messages"][0]["role"] == "system" for record in chat) >= 10


@pytest.mark.parametrize("name", ["train", "validation"])
def test_instruction_records_have_three_texts(name: str) -> None:
    """A record of instructions has exactly the three fields, all texts, none empty but the input."""
    for record in read(name):
        assert list(record) == ["instruction", "input", "output"]
        assert all(isinstance(text, str) and text == text.strip() for text in record.values())
        assert record["instruction"]
        assert record["output"]


def test_conversations_alternate() -> None:
    """A conversation is an optional system message and then two to four turns of user and assistant."""
    for record in read("chat"):
        assert list(record) == ["messages"]
        roles = [message["role"] for message in record["messages"]]
        num_turns = len(roles) // 2
        assert roles[-2 * num_turns :] == ["user", "assistant"] * num_turns
        assert roles[: -2 * num_turns] in ([], ["system"])
        assert 2 <= num_turns <= 4
        assert all(message["content"] == message["content"].strip() != "" for message in record["messages"])


def test_answers_are_short() -> None:
    """No answer is longer than a small model learns in minutes."""
    answers = [answer for name in NAMES for record in read(name) for _, answer in turns(record)]

    assert max(map(len, answers)) <= 250


def test_every_line_is_unique() -> None:
    """No record stands twice, in one file or in two."""
    lines = [line for name in NAMES for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    assert len(lines) == len(set(lines))


def test_validation_is_kept_apart() -> None:
    """No validation record asks a question of the training records, whatever its case and punctuation."""

    def key(question: str) -> str:
        """The question without what does not change its words."""
        return "".join(filter(str.isalnum, question.lower()))

    trained = {key(question) for name in ("train", "chat") for record in read(name) for question, _ in turns(record)}
    validated = {key(question) for record in read("validation") for question, _ in turns(record)}

    assert trained
    assert not trained & validated
