"""Text of a record that spells a control token: it never becomes one, unless that is asked for.

The oracle knows nothing of our renderer: where a word stands instead of the control token, all control tokens that
`transformers` renders are the template's own. Between them everything is encoded with `split_special_tokens`, which
recognises none.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

import sft_fast
from sft_fast.errors import ConfigError, InputError
from tests.data_helpers import make_dataset
from tests.template_helpers import GRID, TEMPLATES, TOKENS, Conversation, compile_template, say

# What stands for a control token in a text that is to have none.
WORD = "wOrD"
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
BARRED = re.compile(r"<\|[^|<>{}']{1,40}\|>|<｜[^｜<>{}']{1,40}｜>")
CONTROL = sorted(
    {token for source in TEMPLATES.values() for token in BARRED.findall(source)}
    | {"<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", *TOKENS.values()}
)
# Every second of those between bars is listed as an ordinary added token, as some models list the marks of their roles.
SPECIAL = [token for index, token in enumerate(CONTROL) if index % 2 or not BARRED.fullmatch(token)]


@pytest.fixture(scope="module")
def control_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with the control tokens of all templates, and markup that is no control token."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    tokenizer.add_tokens([AddedToken(token, special=token in SPECIAL, normalized=False) for token in CONTROL])
    directory = tmp_path_factory.mktemp("control")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        **TOKENS,
        "chat_template": json.loads((tokenizer_dir / "tokenizer_config.json").read_text())["chat_template"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


class Oracle:
    """Ids of texts in which a word stands for a control token."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.blind = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.blind.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
        self.blind.encode_special_tokens = True
        self.border = re.compile(
            "(" + "|".join(re.escape(token) for token in sorted(CONTROL, key=len, reverse=True)) + ")"
        )

    def ids(self, text: str, token: str) -> list[int]:
        """Ids of `text` with `token` for each `WORD`, as ordinary text."""
        ids: list[int] = []
        for number, piece in enumerate(self.border.split(text)):
            ids += [self.tokenizer.token_to_id(piece)] if number % 2 else self.plain(piece.replace(WORD, token))
        return ids

    def plain(self, text: str) -> list[int]:
        """Ids of a text without control tokens."""
        return list(self.blind.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def oracle(control_dir: Path) -> Oracle:
    """The oracle over the same tokenizer."""
    return Oracle(control_dir)


def inject(value: Any, addition: str, key: str = "") -> Any:
    """The messages with `addition` behind each text but names that templates compare, and no other control token."""
    if isinstance(value, dict):
        return {name: inject(item, addition, name) for name, item in value.items()}
    if isinstance(value, list):
        return [inject(item, addition, key) for item in value]
    is_text = isinstance(value, str) and key not in ("role", "type", "id", "name", "tool_call_id")
    return value.replace("[INST]", "INST") + addition if is_text else value


def outcome(template: sft_fast.ChatTemplate, conversation: Conversation, policy: Any) -> tuple[str, list[int]]:
    """Ids, or the code of the error."""
    try:
        ids, _ = template.encode(*conversation, control_tokens=policy)
    except InputError as error:
        return str(error.code), []
    return "encoded", ids.tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_text_stays_text_under_every_template(name: str, control_dir: Path, oracle: Oracle) -> None:
    """Policy `plain`: the control tokens are the template's, those of the record are spelled out, or it is left out."""
    template = compile_template(TEMPLATES[name], control_dir)
    tokens = [token for token in CONTROL if token in template.source] or ["<|im_end|>"]
    outcomes = []
    for number, (messages, tools) in enumerate(GRID):
        token = tokens[number % len(tokens)]
        word = (inject(messages, WORD), tools)
        try:
            text, _ = template.render(*word)
        except InputError:
            continue
        code, ids = outcome(template, (inject(messages, token), tools), "plain")
        outcomes.append(code)
        if code == "encoded":
            assert ids == oracle.ids(text, token), (messages, token)

    # Guard: where a template refuses these, it is by what it does with the text, not by chance.
    assert outcomes.count("encoded") >= 0.7 * len(outcomes), outcomes


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<", "|>", "</s>", "<think>", "\n", " ", "a", "é"]
)
TEXT = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip() != "")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=2, max_size=5))
def test_no_text_adds_or_takes_away_a_control_token(texts: list[str], control_dir: Path, oracle: Oracle) -> None:
    """Whatever the texts are made of, the control tokens of a conversation are those of its template, in order."""
    template = sft_fast.ChatTemplate.from_pretrained(control_dir)
    messages = [say("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(texts)]
    code, ids = outcome(template, (messages, None), "plain")

    assert code == "encoded"
    control = {oracle.tokenizer.token_to_id(token) for token in CONTROL}
    frame = [oracle.tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert [token for token in ids if token in control] == frame * len(texts)
    expected: list[int] = []
    for message in messages:
        expected += [frame[0], *oracle.plain(f"{message['role']}\n{message['content']}"), frame[1], *oracle.plain("\n")]
    assert ids == expected


def test_tokens_put_together_are_not_guessed_at(control_dir: Path) -> None:
    """A control token made of two texts is text; one made of the template and a text is an error, never a guess."""
    start = "{% for m in messages %}{% if m.role == 'user' %}"
    answer = "{% else %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    together = compile_template(
        start + "{% for part in m.content %}{{ part.text }}{% endfor %}" + answer + prompt, control_dir
    )
    half = compile_template(start + "<|im_{{ m.content }}" + answer + prompt, control_dir)
    mixed = compile_template(start + "{{ {'<|im_end|>': m.content} | tojson }}" + answer + prompt, control_dir)
    parts = [{"type": "text", "text": text} for text in ("<|im_", "end|>")]

    code, ids = outcome(together, ([say("user", parts), say("assistant", "x")], None), "plain")
    assert code == "encoded"
    assert ids.count(Tokenizer.from_file(str(control_dir / "tokenizer.json")).token_to_id("<|im_end|>")) == 1
    assert outcome(half, ([say("user", "end|>"), say("assistant", "x")], None), "plain")[0] == "control_text"
    assert outcome(mixed, ([say("user", "a"), say("assistant", "x")], None), "plain")[0] == "control_text"
    assert outcome(mixed, ([say("user", "a"), say("assistant", "x")], None), "allow")[0] == "encoded"


def test_the_same_by_plan_and_without(control_dir: Path, tmp_path: Path) -> None:
    """The first records of a shape are rendered one by one, the others by plan: with the same ids."""
    record = {"instruction": "say <|im_end|>", "output": "<|im_start|>system"}
    dataset = make_dataset(tmp_path, control_dir, [record] * 40, system_key=None, query_key=None)

    assert len({tuple(sample.input_ids.tolist()) for sample in dataset}) == 1
    assert dataset.manifest["num_control_text"] == 40


def test_policies_are_counted(control_dir: Path, tmp_path: Path) -> None:
    """`plain` counts, `reject` leaves out and says where, `allow` does as transformers; the recipe names the policy."""
    records = [
        {"instruction": "Say <|im_end|>.", "output": "No."},
        {"instruction": "Hi", "output": "See <think>: markup."},
        {"messages": [say("user", "Hi"), say("assistant", "a</s>")]},
    ]
    options: dict[str, Any] = {"tokenizer": control_dir, "sequence_length": 99}
    made = {
        policy: make_dataset(tmp_path / policy, records=records, control_tokens=policy, **options)
        for policy in ("plain", "reject", "allow")
    }

    assert {policy: dataset.manifest["num_control_text"] for policy, dataset in made.items()} == {
        "plain": 2,
        "reject": 0,
        "allow": 0,
    }
    assert {policy: len(dataset) for policy, dataset in made.items()} == {"plain": 3, "reject": 1, "allow": 3}
    assert made["reject"].manifest["rejected_by_reason"] == {"control_text": 2}
    assert [dataset.manifest["recipe"]["control_tokens"] for dataset in made.values()] == ["plain", "reject", "allow"]
    rejected = [json.loads(line) for line in (tmp_path / "reject" / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["line"], line["location"]) for line in rejected] == [
        (1, "messages[0].content"),
        (3, "messages[1].content"),
    ]
    tokenizer = Tokenizer.from_file(str(control_dir / "tokenizer.json"))
    text = "<|im_start|>user\nSay <|im_end|>.<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    assert made["allow"][0].input_ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    markup = tokenizer.token_to_id("<think>")
    assert all(markup in dataset[len(dataset) > 1].input_ids.tolist() for dataset in made.values())


def test_an_unknown_policy_is_refused(control_dir: Path) -> None:
    """A policy that is not there is an error that lists those that are."""
    template = sft_fast.ChatTemplate.from_pretrained(control_dir)
    with pytest.raises(ConfigError, match="'plain', 'reject' or 'allow'"):
        template.encode([say("user", "a"), say("assistant", "b")], control_tokens="keep")  # type: ignore[arg-type]
