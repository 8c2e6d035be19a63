"""Writes docs/configuration.md: the hand-written introduction below, and one table a section, read from the schema.

python docs/generate_configuration.py            writes the page
python docs/generate_configuration.py --check    exit status 1 if the page is not what it would write
"""

import ast
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import yaml

from sft_fast.config import SFTConfig
from sft_fast.config.roll import NOT_ACTED_ON
from sft_fast.config.values import describe, field_types, section_of

PAGE = Path(__file__).parent / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by docs/generate_configuration.py from python/sft_fast/config/schema.py. Change those. -->

A run is described by one YAML file, read by [Hydra](https://hydra.cc). The keys are those of ROLL's SFT pipeline: its
files load unchanged.

    sft-fast train --config-path DIR --config-name NAME key=value section.key=value

- `DIR` is relative to the current directory, and so is every path in the file. A `NAME` that `DIR` lacks is looked for
  among the configurations that ship with sft-fast (`demo`, `sft_single_gpu`, `lora_single_gpu`, `sft_eight_gpus`).
- `key=value` sets any key, whether the file has it or not. A value with brackets, commas or spaces needs quotes of its
  own: `'sft_train.device_mapping="list(range(0, 4))"'`.
- A value may refer to another key (`${output_dir}/logs`) or to the environment (`${oc.env:HOME}`).
- `sft-fast validate` checks a configuration in seconds, down to the first records, without a GPU.

A key that does not exist is an error that names the nearest one that does. A key that ROLL has and that sft-fast does
not act on is accepted and said once. The configuration as it was resolved is saved with the run; values in
`tracker_kwargs` and `system_envs` whose names look like secrets are masked there.

The DeepSpeed settings come ready as a group:

```yaml
defaults:
  - strategy@sft_train.strategy_args: deepspeed_zero2
  - _self_
```

There are `deepspeed_zero1`, `deepspeed_zero2` and `deepspeed_zero3`, each also with `_offload`. Keys that the file sets
under `sft_train.strategy_args.strategy_config` win over those of the group. On the command line:
`strategy@sft_train.strategy_args=deepspeed_zero3`.
"""

ROLL = """\
## Keys of ROLL without effect

These load, and the run says once that they change nothing.
"""


def main() -> None:
    """Writes or checks the page."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is not up to date: run make docs")


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *section_pages(SFTConfig, ""), ROLL, *roll_rows(), ""])


def section_pages(section: type, prefix: str) -> list[str]:
    """A heading and a table for a section, then the same for each section inside it."""
    texts = field_texts(section)
    fields = {field.name: field for field in dataclasses.fields(section)}
    rows, inner_pages = [], []
    for name, annotation in field_types(section).items():
        inner = section_of(annotation)
        if inner is not None:
            inner_pages += section_pages(inner, f"{prefix}{name}.")
        else:
            rows.append(f"| `{name}` | {describe(annotation)} | {default(fields[name])} | {texts[name]} |")
    heading = f"## `{prefix[:-1]}`" if prefix else "## Top level"
    table = ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    return [heading, "", first_paragraph(section), "", *table, *inner_pages]


def field_texts(section: type) -> dict[str, str]:
    """The documentation of each field: the text that follows it in the source."""
    [definition] = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    name = None
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            texts[name] = " ".join(str(statement.value.value).split())
            name = None
    return texts


def default(field: "dataclasses.Field[Any]") -> str:
    """The default of a key as YAML writes it."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return "" if value in ({}, []) else f"`{value}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{yaml.safe_dump(field.default).splitlines()[0]}`"


def first_paragraph(section: type) -> str:
    """The first line of a section's docstring."""
    return (inspect.getdoc(section) or "").split("\n")[0]


def roll_rows() -> list[str]:
    """A table of the keys that are accepted without effect."""
    rows = ["| section | key | why |", "|---|---|---|"]
    for section, names in NOT_ACTED_ON.items():
        by_reason: dict[str, list[str]] = {}
        for name, reason in names.items():
            by_reason.setdefault(reason, []).append(f"`{name}`")
        label = f"`{section}`" if section else "top level"
        rows += [f"| {label} | {', '.join(keys)} | {reason} |" for reason, keys in by_reason.items()]
    return rows


if __name__ == "__main__":
    main()
