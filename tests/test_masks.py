"""What is trained on: by policy, by the record, and where a template changes earlier turns."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast.errors import InputError
from tests.conftest import make_tokenizer_dir
from tests.data_helpers import dump_lines, make_dataset
from tests.template_helpers import TEMPLATES, Message, call, compile_template, make_model_dir, say

# Templates that drop the thinking of earlier turns; the second opens a thought in its generation prompt.
DROPS = ["trl/qwen3", "trl/qwen3_5_think", "models/glm-4.7-flash", "models/glm-4.5v", "trl/nemotron_3_nano"]


@pytest.fixture(scope="module")
def model_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer, with the special tokens that templates print."""
    return make_model_dir(tmp_path_factory.mktemp("model"), tokenizer_dir)


def trained(template: sft_fast.ChatTemplate, messages: list[Message], **policies: str | bool) -> list[str]:
    """The texts that are trained on."""
    text, spans = template.render(messages, **policies)
    return [text.encode()[start:end].decode() for start, end in spans]


def thought(content: str, thinking: str) -> Message:
    """An answer with its thinking."""
    return say("assistant", content, reasoning_content=thinking)


TALK = [say("user", "one?"), thought("First.", "Hm."), say("user", "two?"), thought("Second.", "Well.")]


@pytest.mark.parametrize("name", DROPS)
def test_an_answer_without_its_thinking_is_not_trained_on(name: str, model_dir: Path) -> None:
    """`skip` trains on the last answer alone, `keep` on what is there, `reject` refuses, only where it is wanted."""
    template = compile_template(TEMPLATES[name], model_dir)

    [last] = trained(template, TALK)
    assert "Well." in last
    assert "Second." in last
    kept = trained(template, TALK, dropped_thinking="keep")
    assert len(kept) == 2
    assert "First." in kept[0]
    assert "Hm." not in kept[0]
    with pytest.raises(InputError, match="leaves out the thinking") as caught:
        template.render(TALK, dropped_thinking="reject")
    assert (caught.value.code, caught.value.location) == ("thinking_dropped", "messages[1]")
    # Without thinking in the record there is nothing to be left out.
    plain = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in TALK]
    assert len(trained(template, plain, dropped_thinking="reject")) == 2


def decoded(dataset: sft_fast.Dataset, directory: Path) -> list[tuple[str, list[str]]]:
    """Text of each sample, and the texts that are trained on."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    samples = []
    for sample in dataset:
        runs = itertools.groupby(
            zip(sample.input_ids.tolist(), sample.label_mask.tolist(), strict=True), lambda pair: pair[1]
        )
        labels = [[token for token, _ in pairs] for is_label, pairs in runs if is_label]
        text = tokenizer.decode(sample.input_ids.tolist(), skip_special_tokens=False)
        samples.append((text, [tokenizer.decode(ids, skip_special_tokens=False) for ids in labels]))
    return samples


@pytest.mark.parametrize("name", DROPS)
def test_split_trains_on_each_answer_once_as_the_model_writes_it(name: str, model_dir: Path, tmp_path: Path) -> None:
    """Each answer is trained on in one sample, behind what the model saw and with its thinking; the counts add up."""
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATES[name])
    template = sft_fast.ChatTemplate.from_file(path, model_dir)
    generator = random.Random(name)
    records = []
    for number in range(30):
        messages = []
        for turn in range(generator.randint(1, 4)):
            messages.append(say("user", f"question {number} {turn}"))
            answer = f"answer {number} {turn}."
            messages.append(
                thought(answer, f"thought {number} {turn}!") if generator.random() < 0.6 else say("assistant", answer)
            )
        records.append({"messages": messages})
    dataset = make_dataset(tmp_path, model_dir, records, template=str(path), dropped_thinking="split")

    samples = decoded(dataset, model_dir)
    manifest = dataset.manifest
    assert manifest["num_samples"] == len(samples) == manifest["num_records"] + manifest["num_split_samples"]
    assert manifest["num_split_samples"] > 10
    assert manifest["num_skipped_answers"] == 0
    labels = [label for _, texts in samples for label in texts]
    for number, record in enumerate(records):
        for message in record["messages"]:
            if message["role"] != "assistant":
                continue
            [label] = [label for label in labels if message["content"] in label]
            assert message.get("reasoning_content", "") in label
            until = record["messages"][: record["messages"].index(message) + 1]
            if "reasoning_content" in message:
                assert trained(template, until)[-1] == label, number
    skipped = make_dataset(tmp_path / "skip", model_dir, records, template=str(path))
    assert len(skipped) == 30
    assert skipped.manifest["num_skipped_answers"] == sum(
        "reasoning_content" in message for record in records for message in record["messages"][:-1]
    )


def test_thinking_that_is_nowhere_in_the_text(model_dir: Path, tmp_path: Path) -> None:
    """A template that knows no thinking: no sample, but an error that says why, or `keep`."""
    records = [{"messages": TALK[:2]}, {"messages": [TALK[0], say("assistant", "<think>\nHm.\n</think>\n\nFirst.")]}]
    options: dict[str, Any] = {"template": "chatml", "tokenizer": model_dir}
    with pytest.raises(InputError, match="leaves out the thinking"):
        make_dataset(tmp_path / "raise", records=records, **options)

    for policy in ("skip", "split"):
        dataset = make_dataset(tmp_path / policy, records=records, on_error="skip", dropped_thinking=policy, **options)
        assert dataset.manifest["rejected_by_reason"] == {"thinking_dropped": 1}
        # Thinking within the content is shown as the record has it.
        assert decoded(dataset, model_dir)[0][1] == ["<think>\nHm.\n</think>\n\nFirst.<|im_end|>"]
    assert len(make_dataset(tmp_path / "keep", records=records, dropped_thinking="keep", **options)) == 2


def test_an_answer_behind_a_changed_text_is_left_out_or_split(model_dir: Path) -> None:
    """A tool call loses its thought when a later turn comes; the answer behind it was written behind that thought."""
    template = compile_template(TEMPLATES["trl/qwen3_5_think"], model_dir)
    messages = [
        say("user", "weather?"),
        say("assistant", "I look.", tool_calls=[call("f", {})]),
        say("tool", "sun"),
        say("assistant", "Sunny."),
        say("user", "thanks"),
        say("assistant", "Welcome."),
    ]
    texts = trained(template, messages)
    assert [any(word in text for text in texts) for word in ("I look.", "Sunny.", "Welcome.")] == [True, False, True]
    with pytest.raises(InputError, match="the model would see"):
        template.render(messages, dropped_thinking="keep")
    assert "Sunny." in trained(template, messages[:4])[-1]


@pytest.mark.parametrize("name", [*DROPS, "trl/gptoss", "trl/qwen3_training", "trl/minimax_m3"])
def test_thoughts_can_be_left_out_of_the_training(name: str, model_dir: Path) -> None:
    """`train_on_thinking=False`: exactly what follows the thought is trained on, the end of the turn included."""
    source = TEMPLATES.get(name) or TEMPLATES["models/minimax-m3"]
    template = compile_template(source, model_dir)
    whole = trained(template, TALK[2:])[-1]
    [answer] = trained(template, TALK[2:], train_on_thinking=False)

    assert whole.endswith(answer)
    assert answer.startswith("Second.")
    assert "Well." in whole.removesuffix(answer)
    inline = [say("user", "q"), say("assistant", "<think>a</think>\nb")]
    assert trained(sft_fast.ChatTemplate.from_name("chatml", model_dir), inline, train_on_thinking=False) == [
        "b<|im_end|>"
    ]


def test_the_record_and_the_settings_choose_answers(model_dir: Path, tmp_path: Path) -> None:
    """`weight`, `train`, the last answer, tool calls: what is not chosen is not trained on; the text is the same."""
    template = sft_fast.ChatTemplate.from_name("qwen2_5", model_dir)
    messages = [
        say("user", "a"),
        say("assistant", "one", tool_calls=[call("f", {})]),
        say("tool", "b"),
        say("assistant", "two", weight=0),
        say("user", "c"),
        say("assistant", "three", train=True),
    ]
    text, _ = template.render(messages)
    bare = [{key: value for key, value in message.items() if key not in ("weight", "train")} for message in messages]
    assert template.render(bare)[0] == text
    words = {
        policy: [label.split("<")[0].split("\n")[0] for label in trained(template, messages, **dict([policy]))]
        for policy in (("train_on", "all_answers"), ("train_on", "last_answer"), ("train_on_tool_calls", False))
    }
    assert list(words.values()) == [["one", "three"], ["three"], ["three"]]

    # By plan the same as one by one, whatever the weights; and a record without anything to train on is counted.
    records = [
        {
            "messages": [
                say("user", "q"),
                say("assistant", "x", weight=first),
                say("user", "r"),
                say("assistant", "y", weight=second),
            ]
        }
        for first, second in itertools.islice(itertools.cycle([(0, 1), (1, 0), (1, 1), (0, 0)]), 40)
    ]
    dataset = make_dataset(tmp_path, model_dir, records, template="chatml")
    labels = [texts for _, texts in decoded(dataset, model_dir)]
    assert labels == [["y<|im_end|>"], ["x<|im_end|>"], ["x<|im_end|>", "y<|im_end|>"]] * 10
    assert dataset.manifest["rejected_by_reason"] == {"no_label_tokens": 10}


@pytest.mark.parametrize(
    "message", [say("user", "a", weight=1), say("assistant", "a", weight=2), say("assistant", "a", train=1)]
)
def test_wrong_weights_are_named(message: Message, model_dir: Path) -> None:
    """A weight that is neither 0 nor 1, or that is of no answer, is an error with its place."""
    template = sft_fast.ChatTemplate.from_name("chatml", model_dir)
    with pytest.raises(InputError, match="expected") as caught:
        template.render([message, say("assistant", "b")])
    assert (caught.value.location or "").startswith("messages[0].")


@pytest.mark.parametrize("name", ["trl/qwen2_5", "trl/qwen3", "trl/llama3_training", "models/deepseek-v3"])
def test_turns_are_cut_where_answers_end(name: str, model_dir: Path, tmp_path: Path) -> None:
    """`truncate_turns`: the sample is that of the first turns alone, as many as fit; or too long."""
    source = tmp_path / "t.jinja"
    source.write_text(TEMPLATES[name])
    template = sft_fast.ChatTemplate.from_file(source, model_dir)
    turns = [(say("user", f"question {number}"), say("assistant", f"answer {number}. " * 3)) for number in range(6)]
    messages = [message for turn in turns for message in turn]
    lengths = [len(template.encode(messages[: 2 * number])[0]) for number in range(1, 7)]
    record = {"messages": messages}
    for limit in sorted({2, lengths[0] - 1, *lengths, *(length + 1 for length in lengths), lengths[2] - 1}):
        options: dict[str, Any] = {"template": str(source), "sequence_length": limit, "too_long": "truncate_turns"}
        fitting = [number for number, length in enumerate(lengths, 1) if length <= limit]
        directory = tmp_path / str(limit)
        if not fitting:
            with pytest.raises(InputError, match="too_long 1"):
                make_dataset(directory, model_dir, [record], **options)
            continue
        dataset = make_dataset(directory, model_dir, [record], **options)
        ids, mask = template.encode(messages[: 2 * fitting[-1]])
        assert (dataset[0].input_ids.tolist(), dataset[0].label_mask.tolist()) == (ids.tolist(), mask.tolist())
        assert dataset.manifest["num_truncated"] == (fitting[-1] < 6)
        assert dataset.manifest["num_cut_answers"] == 0
        sft_fast.verify(directory / "out")


@pytest.mark.parametrize("name", ["trl/qwen3", "trl/llama3_training", "models/deepseek-v3"])
def test_long_chats_by_plan_are_as_one_by_one(name: str, model_dir: Path, tmp_path: Path) -> None:
    """A chat of 150 turns whose shape comes again is rendered by plan, with the tokens and labels of the proof."""
    source = tmp_path / "t.jinja"
    source.write_text(TEMPLATES[name])
    template = sft_fast.ChatTemplate.from_file(source, model_dir)
    chats = [
        [message for turn in range(150) for message in (say("user", f"q{chat}.{turn}"), say("assistant", f"a{turn}"))]
        for chat in range(4)
    ]
    dataset = make_dataset(
        tmp_path, model_dir, [{"messages": chat} for chat in chats], template=str(source), sequence_length=1 << 20
    )

    for chat, sample in zip(chats, dataset, strict=True):
        ids, mask = template.encode(chat)
        assert (ids.tolist(), mask.tolist()) == (sample.input_ids.tolist(), sample.label_mask.tolist())


def test_an_answer_that_lost_its_end_is_counted(model_dir: Path, tmp_path: Path) -> None:
    """`truncate` counts samples that are cut, and those of them whose last answer is cut."""
    messages = [say("user", "q"), say("assistant", "an answer"), say("user", "question " * 9), say("assistant", "b")]
    length = len(sft_fast.ChatTemplate.from_name("chatml", model_dir).encode(messages[:2])[0])
    for limit, num_cut in ((length + 3, 0), (length - 5, 1)):
        dataset = make_dataset(
            tmp_path / str(limit),
            model_dir,
            [{"messages": messages}],
            template="chatml",
            sequence_length=limit,
            too_long="truncate",
        )
        assert (dataset.manifest["num_truncated"], dataset.manifest["num_cut_answers"]) == (1, num_cut)


def test_a_failed_part_takes_the_record_with_it(model_dir: Path, tmp_path: Path) -> None:
    """A record that is split gives all of its samples or none: records = samples - split + rejected."""
    (tmp_path / "t.jinja").write_text(TEMPLATES["trl/qwen3"])
    long = [say("user", "q"), thought("First.", "Hm. " * 100), say("user", "two?"), thought("Second.", "Well.")]
    dataset = make_dataset(
        tmp_path, model_dir, [{"messages": long}, {"messages": TALK}], template=str(tmp_path / "t.jinja"),
        dropped_thinking="split", sequence_length=256,
    )  # fmt: skip
    manifest = dataset.manifest
    assert (manifest["num_records"], manifest["num_samples"], manifest["num_split_samples"]) == (2, 2, 1)
    assert manifest["rejected_by_reason"] == {"too_long": 1}
    assert {sample.source.rsplit(":", 1)[1] for sample in dataset} == {"2"}


def test_validate_prints_the_verdict(run_cli: Any, tmp_path: Path) -> None:
    """`sft-fast validate` says what the template does: prefix, end of turn, markers, date, thinking."""
    make_tokenizer_dir(tmp_path / "model", TEMPLATES["trl/qwen3_5_think"])
    (tmp_path / "train.jsonl").write_bytes(dump_lines([{"messages": TALK}]))
    (tmp_path / "run.yaml").write_text(
        "pretrain: model\nsequence_length: 512\nnum_gpus_per_node: 0\n"
        "sft_train:\n  data_args:\n    file_name: train.jsonl\n"
    )
    result = run_cli("validate", "--config-path", ".", "--config-name", "run")

    assert result.returncode == 0, result.stderr
    rows = {" ".join(line.split()) for line in result.stdout.splitlines()}
    for row in (
        "prefix-preserving no",
        "end of turn trained yes: an answer ends with a token that ends the turn",
        "generation markers no",
        "date-dependent no",
        "thinking shown",
        "earlier thinking left out: dropped_thinking=skip",
        "prompt opens <think>",
        "skipped answers 1 whose thinking the template leaves out",
    ):
        assert row in rows, (row, rows)
