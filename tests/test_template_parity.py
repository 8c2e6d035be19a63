"""Chat templates against `transformers`: every template of the packages at hand, over a grid of conversations."""

import datetime
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import sft_fast
from tests.template_helpers import (
    DATE,
    GRID,
    TEMPLATES,
    TOKENS,
    TOOLS,
    Conversation,
    call,
    compile_template,
    make_model_dir,
    say,
)


@pytest.fixture(scope="module")
def reference(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    """Transformers, with special tokens that templates print."""
    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"), **TOKENS)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    """The tokenizer alone: `transformers` adds its special tokens to it."""
    return Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))


@pytest.fixture(autouse=True)
def pinned_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates that ask `transformers` for the date get ours."""

    class Pinned(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Pinned":
            return cls.fromisoformat(DATE).replace(tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Pinned)


@pytest.fixture(scope="module")
def model_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer, with the special tokens of the reference."""
    return make_model_dir(tmp_path_factory.mktemp("model"), tokenizer_dir)


def render(template: sft_fast.ChatTemplate, conversation: Conversation) -> tuple[str, list[tuple[int, int]]] | None:
    """Text and spans; `None` where the spans can't be proved, which is the only reason not to render here."""
    try:
        return template.render(*conversation, dropped_thinking="keep")
    except sft_fast.errors.InputError as error:
        if error.code != "mask_unproved":
            raise
        return None


def expected_text(
    reference: PreTrainedTokenizerFast, source: str, conversation: Conversation, prompt: bool = False, **switches: bool
) -> str:
    """What `apply_chat_template` makes of the conversation."""
    messages, tools = conversation
    text = reference.apply_chat_template(
        messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt, **switches
    )
    assert isinstance(text, str)
    return text


def seen_before(reference: PreTrainedTokenizerFast, source: str, conversation: Conversation) -> set[str]:
    """What a model may see before it answers: as asked to think, or not to; or without the thought that is opened."""
    seen = expected_text(reference, source, conversation, prompt=True)
    unasked = expected_text(reference, source, conversation, prompt=True, enable_thinking=False, thinking=False)
    unopened = re.sub(
        r"[<\[][^\s<\[]*think[^\s<\[]*[>\]]\s*(</[^\s<]*think[^\s<]*>\s*)?\Z", "", seen, flags=re.IGNORECASE
    )
    return {seen, unasked, unopened}


def expected_spans(source: str, conversation: Conversation) -> list[tuple[int, int]]:
    """Bytes inside of `{% generation %}`, as `transformers` finds them."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in conversation[0]]
    variables: dict[str, Any] = {"tools": conversation[1], "return_assistant_tokens_mask": True, **TOKENS}
    rendered: Any = chat_template_utils.render_jinja_template([messages], chat_template=source, **variables)
    [text], [spans] = rendered
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans if end > start]


def check(
    template: sft_fast.ChatTemplate,
    reference: PreTrainedTokenizerFast,
    tokenizer: Tokenizer,
    conversation: Conversation,
) -> str:
    """Compares text, spans, ids and mask with the reference; returns what came of it."""
    source = template.source
    try:
        expected = expected_text(reference, source, conversation)
    except Exception:  # whatever the template does to Python
        with pytest.raises(sft_fast.errors.InputError):
            template.render(*conversation, dropped_thinking="keep")
        return "refused"
    rendered = render(template, conversation)
    if rendered is None:
        return "unproved"
    text, spans = rendered
    assert expected == text
    check_tokens(template, tokenizer, conversation, text, spans)
    if template.verdict["has_generation_markers"]:
        assert expected_spans(source, conversation) == spans
        return "marked"
    # Every answer begins where the model would begin it.
    assert spans
    answers = [index for index, message in enumerate(conversation[0]) if message["role"] == "assistant"]
    content = text.encode()
    for index, (start, end) in zip(answers, spans, strict=True):
        if index > 0:
            seen = seen_before(reference, source, (conversation[0][:index], conversation[1]))
            assert content[:start].decode() in seen
        assert start < end
    return "proved"


def check_tokens(
    template: sft_fast.ChatTemplate,
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    spans: list[tuple[int, int]],
) -> None:
    """Compares ids with those of `tokenizers`, and the mask with the tokens that touch a span."""
    ids, mask = template.encode(*conversation, control_tokens="allow", dropped_thinking="keep")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert encoding.ids == ids.tolist()
    content = text.encode()
    bounds = [(len(content[:start].decode()), len(content[:end].decode())) for start, end in spans]
    touches = [any(first < end and last > start for start, end in bounds) for first, last in encoding.offsets]
    assert touches == mask.tolist()


def test_the_packages_hold_what_this_file_is_about() -> None:
    """Guard: an empty list of templates would pass every other test."""
    assert len([name for name in TEMPLATES if name.startswith("trl/")]) >= 54
    assert len([source for source in TEMPLATES.values() if "generation %}" in source]) >= 25
    assert len(TEMPLATES) >= 90


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_spans_are_those_of_transformers(
    name: str, reference: PreTrainedTokenizerFast, tokenizer: Tokenizer, model_dir: Path
) -> None:
    """The same bytes, or an error where Python has one; spans by the markers, or where the model would answer."""
    template = compile_template(TEMPLATES[name], model_dir)

    outcomes = [check(template, reference, tokenizer, conversation) for conversation in GRID]

    # Guard: templates render conversations; this one alone is that of a model that grades and does not answer.
    if "math-prm" not in name:
        assert outcomes.count("proved") + outcomes.count("marked") >= 2, outcomes


NAMED = {
    "gemma": "trl/gemma",
    "llama3": "trl/llama3",
    "phi3": "trl/phi3",
    "qwen2_5": "trl/qwen2_5",
    "qwen3": "trl/qwen3",
}


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_equal_the_models_own(name: str, reference: PreTrainedTokenizerFast, model_dir: Path) -> None:
    """A named template is a text of our own with the effect of the models' template."""
    own = sft_fast.ChatTemplate.from_name(name, model_dir)
    models = TEMPLATES[NAMED[name]]

    num_rendered = 0
    for conversation in GRID:
        try:
            expected = expected_text(reference, models, conversation)
        except Exception:  # whatever the template does to Python
            with pytest.raises(sft_fast.errors.InputError):
                own.render(*conversation)
            continue
        rendered = render(own, conversation)
        if rendered is not None:
            assert expected == rendered[0]
            num_rendered += 1
    assert num_rendered >= 4


def test_plain_chatml_equals_the_models_own(reference: PreTrainedTokenizerFast, model_dir: Path) -> None:
    """`chatml` and `smollm2` write what a ChatML model without tools does; `smollm2` has a default system prompt."""
    models = TEMPLATES["trl/qwen3_instruct_2507"]
    default = say("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    for messages, tools in GRID:
        is_plain = all(isinstance(message["content"], str) and len(message) == 2 for message in messages)
        if tools or not is_plain or messages[0]["role"] == "assistant" or messages[0]["role"] == "developer":
            continue
        if any("</think>" in message["content"] or "<tool_response>" in message["content"] for message in messages):
            continue
        with_default = messages if messages[0]["role"] == "system" else [default, *messages]
        for name, read in (("chatml", messages), ("smollm2", with_default)):
            text, _ = sft_fast.ChatTemplate.from_name(name, model_dir).render(messages)
            assert expected_text(reference, models, (read, None)) == text


# `make parity` asks for many more.
NUM_EXAMPLES = int(os.environ.get("SFT_FAST_NUM_EXAMPLES", "150"))
# How a list prints a character that the reference's Python does not know ("Cn") depends on its version of Unicode.
KNOWN = st.characters(codec="utf-8", exclude_categories=["Cn"])
CHARACTERS = st.sampled_from("ab <>|/\n\t\"'\\{}%é中😀\u200b\x1c[]:") | KNOWN
TEXT = st.text(CHARACTERS, min_size=1, max_size=20).filter(lambda text: text.strip() != "")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Turns of all kinds, contents of all characters."""
    messages = [say("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(say("user", draw(TEXT)))
        fields = {"reasoning_content": draw(TEXT)} if draw(st.integers(0, 3)) == 0 else {}
        if draw(st.integers(0, 3)) == 0:
            arguments = draw(st.dictionaries(TEXT, VALUES, max_size=3))
            messages.append(say("assistant", draw(TEXT | st.none()), tool_calls=[call("f", arguments)], **fields))
            messages.append(say("tool", draw(TEXT)))
            fields = {}
        messages.append(say("assistant", draw(TEXT), **fields))
    return messages, TOOLS if draw(st.integers(0, 4)) == 0 else None


@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(TEMPLATES)), conversation=conversations())
def test_random_conversations_agree(
    name: str,
    conversation: Conversation,
    reference: PreTrainedTokenizerFast,
    tokenizer: Tokenizer,
    model_dir: Path,
) -> None:
    """Laws 1 and 2, on conversations nobody wrote."""
    check(compile_template(TEMPLATES[name], model_dir), reference, tokenizer, conversation)


REFUSED = [
    ("{% include 'x' %}", "include"),
    ("a\n{{ x | frobnicate }}", "line 2: unknown or unsupported filter 'frobnicate'"),
    ("{{ x is frobnicated }}", "unknown or unsupported test 'frobnicated'"),
    ("{{ frobnicate() }}", "unknown or unsupported function 'frobnicate'"),
    ("{{ x.frobnicate() }}", "unknown or unsupported method 'frobnicate'"),
    ("{% for x in y recursive %}{% endfor %}", "recursive"),
    ("\n\n{% if %}", "line 3"),
    ("{% macro f() %}{% generation %}x{% endgeneration %}{% endmacro %}", "generation"),
]


@pytest.mark.parametrize(("source", "reason"), REFUSED)
def test_what_is_not_known_is_refused_when_it_is_loaded(source: str, reason: str, model_dir: Path) -> None:
    """A template that can't be rendered faithfully never renders: the error names template, line and reason."""
    with pytest.raises(sft_fast.errors.TemplateError, match=re.escape(reason)) as caught:
        compile_template(source, model_dir)

    assert re.search(r"chat template '.*t\.jinja', line \d+: ", str(caught.value))
