"""The documentation against the program: the records that it shows are read, and its tables are those of the code."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import sft_fast
from sft_fast.train.metrics import StepMetrics

ROOT = Path(__file__).parent.parent
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
REJECTS = re.findall(r"^\| `(\w+)` \| [^|]* \| (?:`(.*)` )?\|$", DATA, flags=re.MULTILINE)
KEYS = {"query_key": "input", "system_key": "system"}


@pytest.mark.parametrize("record", re.findall(r"^```json\n(.*?)\n```$", DATA, flags=re.MULTILINE | re.DOTALL))
def test_record_becomes_a_sample(record: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Every record that is shown as a good one is one line, and becomes a sample with something to learn."""
    file = tmp_path / "data.jsonl"
    file.write_text(record + "\n", encoding="utf-8")

    report = sft_fast.preprocess(
        file, tmp_path / "out", tokenizer=tokenizer_dir, template="chatml", sequence_length=512, **KEYS
    )

    assert (report.num_records, report.num_samples) == (1, 1)
    assert report.num_label_tokens > 0


def test_bad_records_have_the_codes_of_the_table(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A record that is shown beside a code is rejected with that code."""
    shown = [(code, record) for code, record in REJECTS if record]
    file = tmp_path / "data.jsonl"
    good = json.dumps({"instruction": "Say hello.", "output": "Hello."})
    file.write_text("".join(record + "\n" for _, record in shown) + good, encoding="utf-8")

    report = sft_fast.preprocess(
        file, tmp_path / "out", tokenizer=tokenizer_dir, sequence_length=512, on_error="skip", **KEYS
    )

    rejected = [json.loads(line) for line in Path(report.path, "rejected.jsonl").read_text("utf-8").splitlines()]
    assert len(shown) >= 8
    assert [line["reason"] for line in rejected] == [code for code, _ in shown]
    assert set(rejected[0]) == {"path", "line", "column", "reason", "message", "location"}


def test_every_reason_is_in_the_table() -> None:
    """The table has the codes of all errors that a record can have, and no others."""
    source = (ROOT / "rust" / "core" / "src" / "error.rs").read_text(encoding="utf-8")
    codes = dict(re.findall(r'Self::(\w+) => "(\w+)"', source))
    codes.pop("NoRecords")  # of the whole input, not of a record
    of_other_classes = set(re.findall(r"Self::(\w+)(?: \| Self::\w+)* => ErrorClass::", source))

    assert {code for kind, code in codes.items() if kind not in of_other_classes} == {code for code, _ in REJECTS}


def test_every_metric_is_on_its_page() -> None:
    """The table of docs/metrics.md has what is known of a step, in that order, and nothing else."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## What to look at")[0]
    names = [field.name.replace("val_loss_by_source", "val_loss/<source>") for field in dataclasses.fields(StepMetrics)]

    assert re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE) == names


def test_every_module_has_its_line() -> None:
    """The tables of docs/design.md name every module of the core crate and of the package."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    cells = " ".join(re.findall(r"^\| (`.+?) \|", page, flags=re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", cells))
    package, core = ROOT / "python" / "sft_fast", ROOT / "rust" / "core" / "src"
    modules = {path.stem for path in [*package.iterdir(), *core.iterdir()] if path.suffix in ("", ".py", ".rs")}

    assert modules - {"__init__", "__pycache__", "lib", "configs", "py", "_core"} - named == set()
    assert len(named) > 25
