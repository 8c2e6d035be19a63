"""The options and arguments that several commands share, and what the shell completes for them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

# What `template` may name; `.jinja` files besides, which the shell completes.
TEMPLATES = ("native", "none", "chatml", "gemma", "llama3", "phi3", "qwen2_5", "qwen3", "smollm2")


def complete_config_name(context: typer.Context, incomplete: str) -> list[str]:
    """For completion: the configurations in the directory that the command line names."""
    directory = context.params.get("config_path") or "."
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith((".yaml", ".yml")))
    except OSError:
        return []
    return [stem for name in names if (stem := name.rpartition(".")[0]).startswith(incomplete)]


def complete_template(incomplete: str) -> list[str]:
    """For completion: the names of templates."""
    return [name for name in TEMPLATES if name.startswith(incomplete)]


ConfigPath = Annotated[
    str,
    typer.Option("--config-path", "--config_path", metavar="DIR", help="Directory of the configuration."),
]
ConfigName = Annotated[
    str,
    typer.Option(
        "--config-name",
        "--config_name",
        metavar="NAME",
        help="YAML file in it, without its ending.",
        autocompletion=complete_config_name,
    ),
]
OptionalConfigName = Annotated[
    str | None,
    typer.Option(
        "--config-name",
        "--config_name",
        metavar="NAME",
        help="Take everything from this configuration.",
        autocompletion=complete_config_name,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that replace those of the file.")
]
CacheDirectory = Annotated[
    list[str] | None, typer.Argument(metavar="DIR", help="The cache; with --config-name: KEY=VALUE overrides.")
]
DatasetOrOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="DATASET", help="Data set on disk; with --config-name: KEY=VALUE overrides."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
