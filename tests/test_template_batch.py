"""Many conversations at once: what one call each gives, for any number of threads, and the first error."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import sft_fast
from sft_fast.errors import ConfigError, InputError
from tests.data_helpers import random_records

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.fixture(scope="module")
def template(tokenizer_dir: Path) -> sft_fast.ChatTemplate:
    """The template of the tiny model."""
    return sft_fast.ChatTemplate.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, Any]]]:
    """Many conversations of several turns."""
    return [record["messages"] for record in random_records(3000, seed=6) if "messages" in record]


@pytest.mark.parametrize("num_threads", [None, 1, 2, 7])
def test_a_batch_is_each_of_its_own(
    template: sft_fast.ChatTemplate, conversations: list[list[dict[str, Any]]], num_threads: int | None
) -> None:
    """Texts, spans, ids and masks of a batch are those of one call for each conversation, in order."""
    assert len(conversations) > 900
    assert template.render_batch(conversations, num_threads=num_threads) == [
        template.render(messages) for messages in conversations
    ]
    pairs = zip(template.encode_batch(conversations, num_threads=num_threads), conversations, strict=True)
    for (ids, mask), messages in pairs:
        expected_ids, expected_mask = template.encode(messages)
        assert (ids.dtype, mask.dtype) == (np.uint32, np.bool_)
        assert ids.tolist() == expected_ids.tolist()
        assert mask.tolist() == expected_mask.tolist()
        assert mask.any()


def test_a_batch_is_that_of_transformers(
    template: sft_fast.ChatTemplate, conversations: list[list[dict[str, Any]]], tokenizer_dir: Path
) -> None:
    """Texts and ids of a batch are those of one call of `apply_chat_template`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    assert [text for text, _ in template.render_batch(conversations)] == tokenizer.apply_chat_template(
        conversations, tokenize=False
    )
    ids = tokenizer.apply_chat_template(conversations, return_dict=True)["input_ids"]
    assert [found.tolist() for found, _ in template.encode_batch(conversations)] == ids


def test_tools_and_policies_reach_each_conversation(tokenizer_dir: Path, tmp_path: Path) -> None:
    """`tools` are for conversations that name none themselves, and policies for all."""
    path = tmp_path / "tools.jinja"
    source = "{{ tools | length if tools else 0 }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    path.write_text(source + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    template = sft_fast.ChatTemplate.from_file(path, tokenizer_dir)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    batch = [turns, {"messages": turns}, {"messages": turns * 2, "tools": TOOLS * 3}]

    rendered = template.render_batch(batch, TOOLS, train_on="last_answer")

    assert [text[0] for text, _ in rendered] == ["1", "1", "3"]
    assert [len(spans) for _, spans in rendered] == [1, 1, 1]
    assert [len(spans) for _, spans in template.render_batch(batch)] == [1, 1, 2]


def test_the_first_wrong_conversation_is_the_error(
    template: sft_fast.ChatTemplate, conversations: list[list[dict[str, Any]]]
) -> None:
    """Of several wrong conversations the first is raised, for any number of threads, with its number and its place."""
    batch = [*conversations[:200], [{"role": "robot"}], *conversations[:50], [{"role": "user", "content": "?"}]]
    for num_threads in (1, 2, 5, 1, 2, 5):
        with pytest.raises(InputError) as caught:
            template.encode_batch(batch, num_threads=num_threads)
        assert caught.value.location == "conversations[200].messages[0].role"

    with pytest.raises(InputError, match=r"JSON can hold.*\(at conversations\[1\]\)"):
        template.render_batch([conversations[0], [{"role": "user", "content": b"bytes"}]])
    with pytest.raises(InputError, match="'messages', found 'text'"):
        template.render_batch([{"text": "Hi"}])
    with pytest.raises(ConfigError, match="num_threads"):
        template.render_batch(conversations, num_threads=0)
    assert template.render_batch([]) == []


def test_other_threads_of_python_go_on(
    template: sft_fast.ChatTemplate, conversations: list[list[dict[str, Any]]]
) -> None:
    """While a batch is encoded, another thread of Python runs."""
    ticks: list[float] = []
    is_over = threading.Event()

    def tick() -> None:
        while not is_over.wait(0.001):
            ticks.append(time.monotonic())

    records = [template_record for template_record in conversations for _ in range(20)]
    serialized = sft_fast.chat_template._as_records(records, None)
    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    template._core.encode_batch(serialized, {}, 1)
    end = time.monotonic()
    is_over.set()
    thread.join()

    assert len([time for time in ticks if start < time < end]) > 3
