"""Plain values into dataclasses, with an error that names the full key. Knows types and bounds, no key by name.

A section is a dataclass; the type of a field is read from its annotation, bounds from `Annotated[...]`. Values are
taken as YAML gives them and are not bent into shape: a whole number may stand where a number is expected, nothing else.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

from sft_fast.errors import ConfigError

Section = TypeVar("Section")

# A device list longer than any cluster is a slip of the keyboard; without a bound it would also fill the memory.
MAX_DEVICES = 65_536


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a number must keep to."""

    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None

    def __str__(self) -> str:
        words = ((name.replace("_", " "), limit) for name, limit in dataclasses.asdict(self).items())
        return " and ".join(f"{word} {limit:g}" for word, limit in words if limit is not None)

    def holds(self, value: float) -> bool:
        """Whether `value` keeps to it."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.more_than is None or value > self.more_than)
            and (self.at_most is None or value <= self.at_most)
            and (self.less_than is None or value < self.less_than)
        )


def field_types(section: type) -> dict[str, Any]:
    """Name and annotation of each key of a section, bounds included; fields that are no keys are left out."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section) if field.init}


def section_of(annotation: Any) -> type | None:
    """The dataclass that an annotation names, alone or beside None; None where it names none."""
    for member in _members(annotation):
        if dataclasses.is_dataclass(member):
            return typing.cast(type, member)
    return None


def all_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Full names of all keys below a section, sections included."""
    for name, annotation in field_types(section).items():
        yield prefix + name
        inner = section_of(annotation)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{name}.")


def build(section: type[Section], values: Mapping[str, Any], root: type | None = None, prefix: str = "") -> Section:
    """Makes a section from a mapping of plain values, and the sections inside it.

    Raises:
        ConfigError: a key is not known (the nearest known one is named), a required key is missing, or a section is not
            a mapping. `location` is the full key.
    """
    root = root or section
    known = field_types(section)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise ConfigError(
                f'unknown key "{name}"',
                code="unknown_key",
                location=key,
                hint=f"the nearest known key is {nearest_key(key, root)}",
            )
        inner = section_of(known[name])
        if inner is not None and value is not None:
            if not isinstance(value, Mapping):
                raise _wrong_type("a group of keys", value, key)
            value = build(inner, value, root, f"{key}.")
        if value is None and not _allows_none(known[name]):
            continue  # `key:` with nothing behind it asks for the default
        arguments[name] = value
    for field in dataclasses.fields(typing.cast(Any, section)):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in arguments:
            raise ConfigError(
                f'the key "{field.name}" is required',
                code="missing_key",
                location=f"{prefix}{field.name}",
                hint=f"add it to the configuration, or give {prefix}{field.name}=... on the command line",
            )
    return section(**arguments)


def nearest_key(key: str, root: type) -> str:
    """The full known key that is most like `key`: by its last part first, then by the section it is in."""
    parent, _, name = key.rpartition(".")

    def likeness(candidate: str) -> tuple[float, float]:
        candidate_parent, _, candidate_name = candidate.rpartition(".")
        by_name = difflib.SequenceMatcher(None, name, candidate_name).ratio()
        by_parent = difflib.SequenceMatcher(None, parent, candidate_parent).ratio()
        return by_name + 0.1 * by_parent, by_parent

    return max(all_keys(root), key=likeness)


def check_values(section: Any, prefix: str = "") -> None:
    """Checks type and bounds of every value of a section and of those inside it; whole numbers become floats in place.

    Raises:
        ConfigError: with the full key as `location`.
    """
    for name, annotation in field_types(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{prefix}{name}.")
        else:
            setattr(section, name, _checked(value, annotation, f"{prefix}{name}"))


def _checked(value: Any, annotation: Any, key: str) -> Any:
    """The value as its field holds it, or the error that it does not fit."""
    members = _members(annotation)
    for member in members:
        fits, result = _match(value, member)
        if fits:
            bounds = typing.get_args(member)[1:] if typing.get_origin(member) is Annotated else ()
            for bound in bounds:
                if not bound.holds(result):
                    raise ConfigError(f"expected a number {bound}, found {value}", code="out_of_range", location=key)
            return result
    expected = describe(annotation, with_bounds=False)
    if all(typing.get_origin(member) is Literal or member is type(None) for member in members):
        choices = [str(choice) for member in members for choice in typing.get_args(member)]
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {close[0]}?" if close else None
        raise ConfigError(f"expected {expected}, found {_found(value)}", code="unknown_value", location=key, hint=hint)
    raise _wrong_type(expected, value, key)


def _match(value: Any, member: Any) -> tuple[bool, Any]:
    """Whether a value is of one plain type, and how a field of that type holds it."""
    origin, arguments = typing.get_origin(member), typing.get_args(member)
    if origin in (Union, types.UnionType):  # of the items of a list
        return next((match for match in (_match(value, one) for one in arguments) if match[0]), (False, value))
    if origin is Annotated:
        return _match(value, arguments[0])
    if origin is Literal:
        return value in arguments, value
    if origin is list:
        if not isinstance(value, list | tuple):
            return False, value
        items = [_match(item, arguments[0]) for item in value]
        return all(fits for fits, _ in items), [item for _, item in items]
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value), value
    if member is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return is_number, float(value) if is_number else value
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, member), value


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _allows_none(annotation: Any) -> bool:
    return type(None) in _members(annotation)


def describe(annotation: Any, with_bounds: bool = True) -> str:
    """A type in words, such as `a whole number at least 1 or null`."""
    return " or ".join(_describe(member, with_bounds) for member in _members(annotation))


def _describe(member: Any, with_bounds: bool) -> str:
    """One plain type in words."""
    origin, arguments = typing.get_origin(member), typing.get_args(member)
    if origin is Annotated:
        words = _describe(arguments[0], with_bounds)
        return " ".join([words, *map(str, arguments[1:])]) if with_bounds else words
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in arguments)
    if origin is list:
        return {str: "a list of texts", int: "a list of whole numbers"}.get(arguments[0], "a list of them")
    words_of_type = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    words_of_type[type(None)] = "null"
    return words_of_type.get(member, "a group of keys")


def _found(value: Any) -> str:
    """A value in words, cut short where it is long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, str):
        return f"the text {text}"
    return (
        f"{'the group' if isinstance(value, Mapping) else 'the list' if isinstance(value, list) else ''} {text}".strip()
    )


def _wrong_type(expected: str, value: Any, key: str) -> ConfigError:
    return ConfigError(f"expected {expected}, found {_found(value)}", code="wrong_type", location=key)


def parse_device_mapping(value: list[int] | str | None, key: str) -> list[int]:
    """Device numbers from a list, or from the text of one: `[0, 1]`, `range(8)`, `list(range(0, 8))`, joined by `+`.

    The text is parsed and read as numbers, it is never evaluated. None is the one device 0.

    Raises:
        ConfigError: another text, no device, a device below zero, or one that is named twice.
    """
    if value is None:
        return [0]
    devices = value
    if isinstance(value, str):
        try:
            devices = _device_list(ast.parse(value.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"expected a list of device numbers, found the text {value!r}",
                code="device_mapping",
                location=key,
                hint='write [0, 1, 2, 3] or "list(range(0, 4))"',
            ) from error
    assert isinstance(devices, list)
    if not devices or min(devices) < 0 or len(set(devices)) != len(devices):
        raise ConfigError(
            f"expected device numbers from 0, each once, found {_found(devices)}", code="device_mapping", location=key
        )
    return devices


def _device_list(node: ast.expr) -> list[int]:
    """Reads the few shapes that a device list is written in; ValueError for anything else."""
    match node:
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_integer(item) for item in items]
        case ast.Call(func=ast.Name(id="list"), args=[inner], keywords=[]):
            return _device_list(inner)
        case ast.Call(func=ast.Name(id="range"), args=[*bounds], keywords=[]) if 1 <= len(bounds) <= 3:
            devices = range(*(_integer(bound) for bound in bounds))
            if len(devices) > MAX_DEVICES:
                raise ValueError("too many devices")
            return list(devices)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _device_list(left) + _device_list(right)
    raise ValueError("not a list of numbers")


def _integer(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
            return -number
    raise ValueError("not a whole number")
