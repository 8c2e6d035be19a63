"""YAML files and command-line overrides to an `SFTConfig`, and back to YAML without its secrets.

Hydra composes (files, groups, overrides, interpolation); `values.py` checks. Every failure becomes a `ConfigError` that
names the key and, where a file holds it, the place in that file.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sft_fast.config.roll import NOT_ACTED_ON, take_out
from sft_fast.config.schema import SFTConfig
from sft_fast.config.values import build, field_types, nearest_key
from sft_fast.errors import ConfigError, FileError
from sft_fast.redact import MASK, without_secrets

PACKAGED_CONFIGS = "sft_fast.configs"

# Stands where an error names its file, when the value came from an override.
COMMAND_LINE = "command line"

_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth|cookie", re.IGNORECASE)


class _PackagedGroups(SearchPathPlugin):
    """Lets every configuration use the groups that ship with the package."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("sft-fast", f"pkg://{PACKAGED_CONFIGS}")


def load_config(config_path: str | os.PathLike[str], config_name: str, overrides: Sequence[str] = ()) -> SFTConfig:
    """Reads `<config_path>/<config_name>.yaml` with Hydra, applies `key=value` overrides and checks every value.

    Args:
        config_path: directory of the file, relative to the current directory. A name that it lacks is looked for among
            the configurations that ship with the package.
        config_name: name of the file, with or without `.yaml`.
        overrides: Hydra overrides. A key of the schema may be set whether or not the file has it.

    Returns:
        The configuration; its `notes` say what was accepted without effect.

    Raises:
        FileError: there is no such directory or file.
        ConfigError: the YAML is broken, a key is unknown or missing, or a value is wrong.
    """
    directory = os.fspath(config_path)
    name = config_name.removesuffix(".yaml")
    file = _find_file(directory, name)
    values = _compose(directory, name, file, overrides)
    try:
        notes = take_out(values)
        config = build(SFTConfig, values)
    except ConfigError as error:
        _add_position(error, file, overrides)
        raise
    config.notes = notes
    validation = config.validation
    if validation is not None and validation.data_args.template not in ("native", config.template):
        config.notes.append("validation.data_args.template has no effect: validation renders as training does")
    return config


def resolved_yaml(config: SFTConfig) -> str:
    """The configuration as YAML that `load_config` reads back, without what is secret in it."""
    values = config.to_dict()
    for group in (values, values["sft_train"]):
        group["system_envs"] = _masked(group["system_envs"])
    values["tracker_kwargs"] = _masked(values["tracker_kwargs"])
    values = _masked(values, by_name=False)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _find_file(directory: str, name: str) -> Path:
    """The YAML file of the configuration, for its error messages."""
    if not os.path.isdir(directory):
        raise FileError(
            "no such directory",
            code="missing_config",
            path=directory,
            hint="--config-path names the directory of the YAML file, relative to the current directory",
        )
    packaged = Path(__file__).parent.parent / "configs"
    for candidate in (Path(directory, f"{name}.yaml"), packaged / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(path.stem for path in Path(directory).glob("*.yaml"))
    raise FileError(
        "no such configuration file",
        code="missing_config",
        path=os.path.join(directory, f"{name}.yaml"),
        hint=f"that directory has: {', '.join(names)}" if names else "that directory has no YAML file",
    )


def _compose(directory: str, name: str, file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Hydra's answer as plain dictionaries, or its error in our words."""
    Plugins.instance().register(_PackagedGroups)
    try:
        with warnings.catch_warnings(), initialize_config_dir(os.path.abspath(directory), version_base="1.3"):
            # Without `_self_` the file wins over its groups, which is what everyone expects.
            warnings.filterwarnings("ignore", message=".*Defaults list is missing `_self_`")
            composed = compose(config_name=name, overrides=[_as_hydra_override(text) for text in overrides])
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ConfigError(
            f"broken YAML: {error.problem or error.context}",
            code="broken_yaml",
            path=mark.name if mark and os.path.exists(mark.name) else str(file),
            line=mark.line + 1 if mark else None,
            column=mark.column + 1 if mark else None,
        ) from error
    except OmegaConfBaseException as error:
        key = error.full_key or None
        code = "missing_key" if isinstance(error, MissingMandatoryValue) else "interpolation"
        raise ConfigError(str(error).splitlines()[0], code=code, path=str(file), location=key) from error
    except OverrideParseException as error:
        raise ConfigError(
            f"cannot read {error.override.removeprefix('++')}",
            code="override",
            path=COMMAND_LINE,
            hint="an override is key=value; a value with brackets, commas or spaces needs quotes of its own: "
            "'key=\"list(range(0, 8))\"'",
        ) from error
    except HydraException as error:
        _raise_unknown_override(overrides, error)
        cause = error.__cause__ or error
        raise ConfigError(str(cause).splitlines()[0], code="composition", path=str(file)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _top_level_keys() -> set[str]:
    return set(field_types(SFTConfig)) | set(NOT_ACTED_ON[""])


def _as_hydra_override(text: str) -> str:
    """Lets `key=value` set a key of the schema that the file does not name; groups and other forms stay as they are."""
    is_known = re.split(r"[.=]", text, maxsplit=1)[0] in _top_level_keys()
    return f"++{text}" if is_known and "=" in text else text


def _raise_unknown_override(overrides: Sequence[str], error: HydraException) -> None:
    """Hydra rejects an unknown key with advice on its own syntax; the user is better served by the nearest key."""
    for text in overrides:
        key, equals, _ = text.partition("=")
        is_plain = bool(equals) and re.fullmatch(r"[\w.]+", key) is not None
        if is_plain and key.split(".")[0] not in _top_level_keys() and key in str(error):
            raise ConfigError(
                f'unknown key "{key}"',
                code="unknown_key",
                path=COMMAND_LINE,
                location=key,
                hint=f"the nearest known key is {nearest_key(key, SFTConfig)}",
            ) from error


def _add_position(error: ConfigError, file: Path, overrides: Sequence[str]) -> None:
    """Names the file, and the line and column in it if the key is written there and nowhere else."""
    error.path = str(file)
    if error.location is None:
        return
    if any(text.lstrip("+").partition("=")[0] == error.location for text in overrides):
        error.path = COMMAND_LINE
        return
    try:
        node: yaml.Node | None = yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return
    mark = None
    for name in error.location.split("."):
        if not isinstance(node, yaml.MappingNode):
            return
        pair = next(((key, value) for key, value in node.value if key.value == name), None)
        if pair is None:
            return
        mark, node = pair[0].start_mark, pair[1]
    if mark is not None:
        error.line, error.column = mark.line + 1, mark.column + 1


def _masked(value: Any, *, by_name: bool = True) -> Any:
    """The value with what looks like a secret, inside an address or by its name, replaced."""
    if isinstance(value, Mapping):
        return {
            name: MASK
            if by_name and _SECRET_NAME.search(str(name)) and inner not in (None, "")
            else _masked(inner, by_name=by_name)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_masked(inner, by_name=by_name) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value
