"""The options and arguments that several commands share, and what the shell completes for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

# What `template` may name; `.jinja` files besides, which the shell completes.
TEMPLATES = ("native", "none", "chatml", "gemma", "llama3", "phi3", "qwen2_5", "qwen3", "smollm2")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def complete_config_name(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """For completion: the configurations in the directory that the command line names."""
    directory = context.params.get("config_path") or "."
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith((".yaml", ".yml")))
    except OSError:
        return []
    return [stem for name in names if (stem := name.rpartition(".")[0]).startswith(incomplete)]


def complete_template(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """For completion: the names of templates."""
    return [name for name in TEMPLATES if name.startswith(incomplete)]


def choice(name: str, *choices: str, help: str) -> Decorator:
    """An option with a value of several, the first by default."""
    return click.option(name, type=click.Choice(choices), default=choices[0], help=help)


def flag(name: str, *names: str, help: str) -> Decorator:
    """An option without a value."""
    return click.option(name, *names, is_flag=True, help=help)


def number(
    name: str, *names: str, help: str, least: int, default: int | None = None, multiple: bool = False
) -> Decorator:
    """An option with a whole number, of at least `least`."""
    return click.option(
        name, *names, type=click.IntRange(min=least), default=default, multiple=multiple, metavar="INTEGER", help=help
    )


def text(name: str, metavar: str = "TEXT", *, help: str, default: str | None = None) -> Decorator:
    """An option with a text."""
    return click.option(name, metavar=metavar, default=default, help=help)


def arguments(metavar: str) -> Decorator:
    """All that follows on the command line; with `--config-name`, overrides of the configuration."""
    return click.argument("arguments", metavar=metavar, nargs=-1)


config_path = click.option(
    "--config-path", "--config_path", metavar="DIR", default=".", help="Directory of the configuration."
)


def config_name(*, is_required: bool) -> Decorator:
    """The configuration that a command needs or may take."""
    return click.option(
        "--config-name",
        "--config_name",
        metavar="NAME",
        required=is_required,
        help="YAML file in it, without its ending." if is_required else "Take everything from this configuration.",
        shell_complete=complete_config_name,
    )


def configuration(*, is_required: bool) -> Decorator:
    """The two options that name a configuration."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        return config_path(config_name(is_required=is_required)(command))

    return decorate


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _print_completion(context: click.Context, _: click.Parameter, shell: str | None) -> None:
    if shell is None or context.resilient_parsing:
        return
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.command, {}, "sft-fast", "_SFT_FAST_COMPLETE").source())
    context.exit()


show_completion = click.option(
    "--show-completion",
    type=click.Choice(["bash", "zsh", "fish"]),
    is_eager=True,
    expose_value=False,
    callback=_print_completion,
    help="Print what makes this shell complete commands, for its start-up file.",
)
