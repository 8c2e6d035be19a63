"""The shapes of records: how each is found out, what becomes of it, and plain text against what TRL makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sft_fast
from sft_fast.errors import ConfigError, InputError, TokenizerError
from tests.conftest import make_tokenizer_dir
from tests.data_helpers import PlainSample, dump_lines, make_dataset, plain_samples, random_records

CHAT = [{"role": "user", "content": "What is blue?"}, {"role": "assistant", "content": "The sea."}]
SHARED = [{"from": "human", "value": "What is blue?"}, {"from": "gpt", "value": "The sea."}]
# Each record holds the same turn, but for the last two, which no template frames.
RECORDS: dict[str, dict[str, Any]] = {
    "fields": {"instruction": "What is blue?", "output": "The sea.", "text": "something else"},
    "messages": {"messages": CHAT, "prompt": "What is blue?"},
    "conversations": {"conversations": SHARED, "id": 3},
    "prompt_completion": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "text": {"text": "The sea is wide and blue."},
}
PAIR = {"prompt": "What is the sea? ", "completion": "Wide and blue."}


@pytest.fixture(scope="module")
def framing_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose tokenizer puts a beginning before each text by itself."""
    from tokenizers import Tokenizer, processors

    directory = make_tokenizer_dir(tmp_path_factory.mktemp("framing"))
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    token = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[token])
    tokenizer.save(path)
    return directory


def samples_of(directory: Path, tokenizer: Path, records: list[Any], **options: Any) -> list[PlainSample]:
    """The samples of records, as lists."""
    return plain_samples(make_dataset(directory, tokenizer, records, **options))


def test_every_shape_is_found_and_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A file may mix all shapes: each record is read by its keys, and manifest, report and progress count them."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines([*RECORDS.values(), PAIR, "{", {"text": ""}]))
    seen: list[dict[str, int]] = []

    report = sft_fast.preprocess(
        path, tmp_path / "out", tokenizer=tokenizer_dir, sequence_length=128, on_error="skip",
        progress=lambda progress: seen.append(progress.records_by_shape),
    )  # fmt: skip

    expected = {"fields": 1, "messages": 1, "conversations": 1, "prompt_completion": 2, "text": 1}
    dataset = sft_fast.Dataset(report.path)
    assert report.records_by_shape == dataset.manifest["records_by_shape"] == seen[-1] == expected
    samples = plain_samples(dataset)
    assert samples[0] == samples[1] == samples[2] == samples[3]
    assert (report.num_samples, report.num_rejected) == (6, 2)


@pytest.mark.parametrize("shape", RECORDS)
def test_a_shape_can_be_set(shape: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Where the shape is set, its records become what they become by themselves, and any other is a named error."""
    first = samples_of(tmp_path / "auto", tokenizer_dir, [RECORDS[shape]])
    assert first == samples_of(tmp_path / "set", tokenizer_dir, [RECORDS[shape]], record_shape=shape)
    others = [
        record for name, record in RECORDS.items() if name != shape and not RECORDS[shape].keys() <= record.keys()
    ]
    if shape == "text":  # the fields have a text besides, which is then what is read
        assert samples_of(tmp_path / "fields", tokenizer_dir, [RECORDS["fields"]], record_shape=shape)
    for number, record in enumerate(others):
        with pytest.raises(InputError, match=f"expected a record of the shape '{shape}'") as caught:
            make_dataset(tmp_path / str(number), tokenizer_dir, [RECORDS[shape], record], record_shape=shape)
        assert (caught.value.code, caught.value.line, caught.value.column) == ("wrong_shape", 2, 1)
    with pytest.raises(ConfigError, match="record_shape"):
        make_dataset(tmp_path / "poem", tokenizer_dir, [RECORDS[shape]], record_shape="poem")


def test_the_command_says_the_shape(
    run_cli: Callable[..., Any], write_jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    """`sft-fast preprocess` says the shape as soon as it knows it, and the report has the counts."""
    path = write_jsonl("data.jsonl", [RECORDS["messages"], RECORDS["messages"], PAIR])
    arguments = ["preprocess", path, "--output-dir", "out", "--tokenizer", tokenizer_dir, "--sequence-length", "128"]

    result = run_cli(*arguments)
    assert result.returncode == 0, result.stderr
    assert "records of the shape messages" in result.stderr
    assert "messages 2, prompt_completion 1" in result.stdout
    refused = run_cli(*arguments, "--record-shape", "messages", "--overwrite")
    assert (refused.returncode, "data.jsonl:3:1: expected a record of the shape 'messages'" in refused.stderr) == (
        2,
        True,
    )


def test_plain_text_is_not_framed(framing_tokenizer: Path, tmp_path: Path) -> None:
    """A text becomes its tokens, those that the tokenizer adds, and one end, whether or not it has one; all train."""
    reference = PreTrainedTokenizerFast(tokenizer_file=str(framing_tokenizer / "tokenizer.json"))
    texts = ["The sea is blue.", " Two\n\nthree é 漢字 🙂\n", "a", "Paris.<|im_end|>"]
    expected = [reference(text.removesuffix("<|im_end|>") + "<|im_end|>")["input_ids"] for text in texts]

    for control_tokens in ("plain", "reject", "allow"):
        samples = samples_of(
            tmp_path / control_tokens, framing_tokenizer, [{"text": text} for text in texts],
            control_tokens=control_tokens,
        )  # fmt: skip
        assert samples == [(ids, [True] * len(ids)) for ids in expected]


def test_control_tokens_in_plain_text(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Text that was framed by a template before is ordinary text, unless control tokens are allowed in it."""
    framed = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThe sea.<|im_end|>"
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))

    [(ids, mask)] = samples_of(tmp_path / "allow", tokenizer_dir, [{"text": framed}], control_tokens="allow")
    assert (ids, all(mask)) == (reference(framed)["input_ids"], True)
    plain = make_dataset(tmp_path / "plain", tokenizer_dir, [{"text": framed}])
    assert reference.decode(plain[0].input_ids) == framed
    assert plain[0].input_ids.tolist().count(ids[0]) == 0
    assert plain.manifest["num_control_text"] == 1


def test_pairs_and_texts_are_those_of_trl(framing_tokenizer: Path, tmp_path: Path) -> None:
    """Ids and labels of texts and pairs are those of TRL's trainer, but for the newline behind a turn."""
    import datasets
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    kinds: list[list[dict[str, Any]]] = [
        [{"text": "The sea is blue."}, {"text": "  a\n"}],
        [
            PAIR,
            {"prompt": "Paris", "completion": " is the capital.\n"},
            {"prompt": "Add tw", "completion": "o and five"},
        ],
        [RECORDS["prompt_completion"], {"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]}],
    ]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(framing_tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    arguments = SFTConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], max_length=None)
    for number, records in enumerate(kinds):
        trainer = SFTTrainer(
            LlamaForCausalLM(config), args=arguments, train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
        )  # fmt: skip
        ours = samples_of(tmp_path / str(number), framing_tokenizer, records)
        assert trainer.train_dataset is not None
        for (ids, mask), row in zip(ours, trainer.train_dataset, strict=True):
            labels = [label != -100 for label in row["labels"]]
            if number == 2:
                labels[-1] = False  # the newline of the template
            assert (ids, mask) == (list(row["input_ids"]), labels)


def test_pairs_of_text_are_framed_where_their_keys_are_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Keys that are named hold the fields of a turn: the template frames it, whatever the keys are."""
    keys = {"prompt_key": "prompt", "response_key": "completion"}
    framed = samples_of(tmp_path / "framed", tokenizer_dir, [PAIR], **keys)
    turn = {"instruction": PAIR["prompt"], "output": PAIR["completion"]}
    assert framed == samples_of(tmp_path / "fields", tokenizer_dir, [turn])
    assert framed != samples_of(tmp_path / "plain", tokenizer_dir, [PAIR])


def test_plain_text_that_is_too_long(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Plain text that does not fit is rejected, or loses its end and is counted; it has no turn to end at."""
    text = {"text": "The sea is wide and blue. " * 20}
    whole = samples_of(tmp_path / "whole", tokenizer_dir, [text])
    cut = make_dataset(tmp_path / "cut", tokenizer_dir, [text], sequence_length=32, too_long="truncate")
    assert plain_samples(cut) == [(whole[0][0][:32], [True] * 32)]
    assert (cut.manifest["num_truncated"], cut.manifest["num_cut_answers"]) == (1, 1)
    for too_long in ("reject", "truncate_turns"):
        dataset = make_dataset(
            tmp_path / too_long, tokenizer_dir, [text, {"text": "a"}], sequence_length=32, too_long=too_long
        )
        assert dataset.manifest["rejected_by_reason"] == {"too_long": 1}


def test_plain_text_needs_an_end_but_no_template(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Without an `eos_token` plain text is an error that says so; with `template="none"` a model needs no template."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    with pytest.raises(TokenizerError, match="expected a tokenizer with an eos_token"):
        make_dataset(tmp_path / "endless", model, [{"text": "a"}], template="none")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}), "utf-8")
    expected = samples_of(tmp_path / "framed", tokenizer_dir, [{"text": "a"}])
    assert expected == samples_of(tmp_path / "none", model, [{"text": "a"}], template="none")
    with pytest.raises(InputError, match="the template is none"):
        make_dataset(tmp_path / "chat", model, [RECORDS["messages"]], template="none")


def test_history_becomes_turns(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Earlier turns of a record of fields are the turns that they are as messages, and are trained on."""
    turns = [("What is blue?", "The sea."), ("And wide?", "The sea, too.")]
    record = {"instruction": "Poem?", "output": "Never.", "history": turns, "system": "Be short."}
    messages = [{"role": "system", "content": "Be short."}] + [
        {"role": role, "content": text}
        for turn in (*turns, ("Poem?", "Never."))
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    found = samples_of(tmp_path / "fields", tokenizer_dir, [record], history_key="history")
    assert found == samples_of(tmp_path / "messages", tokenizer_dir, [{"messages": messages}])


def test_shapes_of_reused_samples_are_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Records that an older dataset knows count by their shape as if they had been read."""
    records = [*random_records(2000, seed=1), *({"text": f"{number} is five."} for number in range(1000))]
    dataset = make_dataset(tmp_path, tokenizer_dir, records)
    grown = make_dataset(tmp_path, tokenizer_dir, [*records, PAIR], overwrite=True)
    assert sum(dataset.manifest["records_by_shape"].values()) == 3000
    assert grown.manifest["records_by_shape"] == {**dataset.manifest["records_by_shape"], "prompt_completion": 1}
    segments = [json.loads(line) for line in Path(grown.path, "segments.jsonl").read_text().splitlines()]
    assert sum(sum((segment["shapes"] or {}).values()) for segment in segments) > 2000
