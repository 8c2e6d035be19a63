"""`verify`: samples compared with those that transformers makes, and what that finds."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

import sft_fast
from sft_fast import Dataset, Sample, reference
from sft_fast.errors import ConfigError, DatasetError
from tests.conftest import make_tokenizer_dir
from tests.data_helpers import dump_lines, random_records

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b.\n "}]},
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b.", "weight": 0},
                  {"role": "user", "content": "c?"}, {"role": "assistant", "content": "d."}]},
    {"conversations": [{"from": "human", "value": "e?"}, {"from": "gpt", "value": "f."}]},
]  # fmt: skip
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts of earlier turns are dropped, as many templates do.
DROPS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if loop.last and message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}"
    "{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPTIONS = {"sequence_length": 1024, "system_key": "system", "query_key": "input"}


@pytest.fixture
def data_file(tmp_path: Path) -> Callable[[Sequence[Any]], Path]:
    """Writes records to a file."""

    def write(records: Sequence[Any]) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes(dump_lines(records))
        return path

    return write


def compared(path: Path, tokenizer: Path, verify: str = "all", **options: Any) -> reference.Comparison:
    """What `preprocess` says of a comparison."""
    output = path.with_name(f"out-{verify}-{'-'.join(map(str, options.values()))}")
    report = sft_fast.preprocess(path, output, tokenizer=tokenizer, verify=verify, **{**OPTIONS, **options})  # type: ignore[arg-type]
    assert report.comparison is not None
    return report.comparison


def test_all_samples_are_those_of_transformers(data_file: Callable[..., Path], tokenizer_dir: Path) -> None:
    """Ids and masks of fields, chats and ShareGPT, of answers that are trained on and others."""
    path = data_file([*random_records(150), *CHATS])

    assert compared(path, tokenizer_dir) == reference.Comparison(num_ids=153, num_masks=153, not_compared={})
    sampled = compared(path, tokenizer_dir, "sampled", on_error="skip")
    assert sampled == reference.Comparison(num_ids=100, num_masks=100, not_compared={})
    last = compared(path, tokenizer_dir, train_on="last_answer")
    assert last.num_masks == 153


def test_a_token_that_closes_the_conversation_is_not_the_answers(
    data_file: Callable[..., Path], tokenizer_dir: Path
) -> None:
    """Where turns have an end of their own, what stands behind the last turn is trained on by neither side."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    empty = {"role": "assistant", "content": "", "tool_calls": [call]}
    path = data_file([*random_records(20), *CHATS, {"messages": [{"role": "user", "content": "a?"}, empty]}])

    assert compared(path, tokenizer_dir, template="phi3").num_masks == 24


def test_masks_of_generation_markers_are_compared(
    data_file: Callable[..., Path], tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Where the template marks answers, the reference is its own mask; single answers it can't leave out."""
    marked = make_tokenizer_dir(tmp_path / "marked", MARKED)

    found = compared(data_file([*random_records(20), CHATS[1]]), marked)

    assert found == reference.Comparison(num_ids=21, num_masks=20, not_compared={"not_prefix_preserving": 1})


def test_what_a_policy_changes_is_counted_and_not_compared(
    data_file: Callable[..., Path], tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Control text, thoughts and cut samples differ from the reference on purpose: nothing is left out in silence."""
    question = {"role": "user", "content": "a?"}
    control = {"messages": [question, {"role": "assistant", "content": "b <|im_end|> c"}]}
    assert compared(data_file([control, CHATS[0]]), tokenizer_dir).not_compared == {"control_text": 1}
    assert compared(data_file([control, CHATS[0]]), tokenizer_dir, control_tokens="allow").num_ids == 2

    long = {"instruction": "a?", "output": "word " * 300}
    cut = compared(data_file([long, CHATS[0]]), tokenizer_dir, too_long="truncate", sequence_length=128)
    assert cut == reference.Comparison(num_ids=2, num_masks=1, not_compared={"truncated": 1})

    drops = make_tokenizer_dir(tmp_path / "drops", DROPS)
    thought = {"role": "assistant", "content": "b.", "reasoning_content": "Hm."}
    talk = {"messages": [question, thought, question, thought]}
    split = compared(data_file([talk]), drops, dropped_thinking="split")
    assert split == reference.Comparison(num_ids=2, num_masks=0, not_compared={"thinking": 2})
    assert compared(data_file([talk]), drops, dropped_thinking="keep").num_ids == 1


def test_plain_text_is_what_the_tokenizer_makes_of_it(data_file: Callable[..., Path], tokenizer_dir: Path) -> None:
    """Plain text and pairs of texts have no template: their reference is the tokenizer, with the end of the text."""
    plain = [{"text": "a b c"}, {"prompt": "a b", "completion": " c d"}, {"text": "a<|im_end|>"}]

    found = compared(data_file([*plain, CHATS[0]]), tokenizer_dir)

    assert found == reference.Comparison(num_ids=3, num_masks=3, not_compared={"control_text": 1})
    assert compared(data_file([*plain, CHATS[0]]), tokenizer_dir, control_tokens="allow").num_masks == 4


def test_another_date_is_counted(data_file: Callable[..., Path], tmp_path: Path) -> None:
    """The reference takes the real date: where the template was told another one, nothing can be compared."""
    dated = make_tokenizer_dir(tmp_path / "dated", "{{ strftime_now('%Y') }}" + MARKED)

    assert compared(data_file(CHATS), dated, template_date="2001-02-03").not_compared == {"date": 3}


class Tampered:
    """A dataset of which one sample is another."""

    def __init__(self, dataset: Dataset, index: int, change: Callable[[Sample], Sample]) -> None:
        self.dataset, self.index, self.change = dataset, index, change
        self.manifest = dataset.manifest

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.change(self.dataset[index]) if index == self.index else self.dataset[index]


def test_a_difference_is_named(data_file: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    """One id or one bit of a mask that differs is an error with the record's place and both sides."""
    path = data_file(random_records(5))
    report = sft_fast.preprocess(path, tmp_path / "out", tokenizer=tokenizer_dir, **OPTIONS)  # type: ignore[arg-type]

    def other_id(sample: Sample) -> Sample:
        ids = sample.input_ids.copy()
        ids[3] += 1
        return replace(sample, input_ids=ids)

    def other_mask(sample: Sample) -> Sample:
        mask = sample.label_mask.copy()
        mask[3] = ~mask[3]
        return replace(sample, label_mask=mask)

    for change, what in ((other_id, "token ids"), (other_mask, "label mask")):
        tampered = cast("Dataset", Tampered(Dataset(report.path), 2, change))
        with pytest.raises(DatasetError, match=f"expected the {what} .* at token 3") as caught:
            reference.compare(
                tampered, [path], verify="all", tokenizer=tokenizer_dir, template="native",
                mapping={"system_key": "system", "prompt_key": "instruction", "query_key": "input",
                         "response_key": "output", "history_key": None, "text_key": "text", "record_shape": "auto"},
                policies={"control_tokens": "plain", "train_on": "all_answers", "train_on_tool_calls": True,
                          "train_on_thinking": True, "dropped_thinking": "skip", "too_long": "reject"},
            )  # fmt: skip
        assert caught.value.code == "differs"
        assert caught.value.path == f"{path}:3"


def test_verify_needs_transformers(
    data_file: Callable[..., Path], tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is missing, the error says what to install; a word that is none of the three is refused."""
    path = data_file(CHATS)
    with pytest.raises(ConfigError, match="'none', 'sampled' or 'all'"):
        compared(path, tokenizer_dir, "some")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        compared(path, tokenizer_dir)


def test_the_command_says_what_was_compared(
    data_file: Callable[..., Path], tokenizer_dir: Path, run_cli: Callable[..., Any]
) -> None:
    """`--verify` of the command line ends in a line with the counts."""
    path = data_file(CHATS)

    result = run_cli("preprocess", path, "--output-dir", path.with_name("out"), "--tokenizer", tokenizer_dir,
                     "--sequence-length", "128", "--verify", "all")  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert "ids of 3, masks of 3 samples" in result.stdout
