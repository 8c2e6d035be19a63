"""Golden files: what `transformers` makes of conversations, recorded by `generate_golden.py` without sft-fast."""

import json
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast import _core
from sft_fast.errors import InputError
from tests.generate_golden import GOLDEN, generate, read_conversations, read_templates, to_runs

HINT = "run `python tests/generate_golden.py`, and judge what it changes"
VERSIONS = json.loads((GOLDEN / "versions.json").read_bytes())
CONVERSATIONS = read_conversations()
TEMPLATES = list(read_templates())


def read_cases(name: str) -> dict[str, dict[str, Any]]:
    """Conversation → what the reference made of it with the template of that name."""
    cases: dict[str, dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_bytes())
    return cases


def files_in(directory: Path) -> dict[str, bytes]:
    """The generated files by name, with their bytes."""
    paths = [path for path in directory.rglob("*") if path.is_file() and "inputs" not in path.parts]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_ids_and_masks_are_the_golden_ones(name: str) -> None:
    """Every case has the text, ids and labels of the reference; it is refused where that refuses, or proves no mask."""
    source = str(GOLDEN / "inputs" / name) if name.endswith(".jinja") else name
    template = sft_fast.ChatTemplate(_core.ChatTemplate(GOLDEN / "tokenizer", source, VERSIONS["date"]))
    cases = read_cases(name)
    assert cases.keys() == CONVERSATIONS.keys(), HINT

    for key, case in cases.items():
        conversation = CONVERSATIONS[key]
        messages, tools = conversation["messages"], conversation.get("tools")
        if "refused" in case or case["labels"] is None:
            with pytest.raises(InputError) as caught:
                template.encode(messages, tools, dropped_thinking="keep", control_tokens="allow")
            assert (caught.value.code == "mask_unproved") == ("refused" not in case), key
            continue
        text, _ = template.render(messages, tools, dropped_thinking="keep")
        ids, mask = template.encode(messages, tools, dropped_thinking="keep", control_tokens="allow")
        assert text == case["text"], key
        assert ids.tolist() == case["ids"], key
        assert to_runs(mask.tolist()) == case["labels"], key


def test_the_golden_files_are_about_something() -> None:
    """Guard: most cases have labels, and no more than a few are refused or without a proof."""
    cases = [case for name in TEMPLATES for case in read_cases(name).values()]
    num_refused = sum("refused" in case for case in cases)
    num_unproved = sum(case.get("labels", ()) is None for case in cases)

    assert len(cases) == len(TEMPLATES) * len(CONVERSATIONS) > 350
    assert all(case["labels"] for case in cases if case.get("labels") is not None)
    assert 20 <= num_refused <= 30
    assert 3 <= num_unproved <= 10


def test_generating_again_gives_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files are those that the script writes, to the byte; with other versions of the libraries, in content."""
    generate(tmp_path)

    found, expected = files_in(tmp_path), files_in(GOLDEN)
    assert found.keys() == expected.keys(), HINT
    versions = json.loads(found.pop("versions.json"))
    expected.pop("versions.json")
    if versions == VERSIONS:
        assert [name for name, content in found.items() if content != expected[name]] == [], HINT
        return
    with capsys.disabled():
        print(f"\ngolden files of {VERSIONS} are compared by content with those of {versions}")
    differing = [name for name, content in found.items() if json.loads(content) != json.loads(expected[name])]
    assert differing == [], f"the golden files are of {VERSIONS}, here are {versions}; {HINT}"
