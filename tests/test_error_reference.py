"""docs/errors.md against the program: it has every code that an error can have, and no others."""

import ast
import re
from pathlib import Path

from sft_fast import errors

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def rust_codes() -> set[str]:
    """The codes of all kinds of the core crate."""
    source = (ROOT / "rust" / "core" / "src" / "error.rs").read_text(encoding="utf-8")
    return set(re.findall(r'Self::\w+ => "(\w+)"', source))


def python_codes() -> set[str]:
    """The codes that Python gives to errors; those of classes where an error is given none."""
    found = set()
    for path in (ROOT / "python").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            codes = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            kind = getattr(errors, node.func.id, None) if isinstance(node.func, ast.Name) else None
            if isinstance(kind, type) and issubclass(kind, errors.SftFastError) and not codes:
                found.add(kind.default_code)
            found.update(text for code in codes for text in constants(code, tree))
    return found


def constants(value: ast.expr, tree: ast.Module) -> set[str]:
    """The texts that an expression can be: itself, or what its name was given; none for the code of another error."""
    if isinstance(value, ast.Name):
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        names = [(ast.unparse(target), node.value) for node in assigned for target in node.targets]
        return {text for name, one in names if name == value.id for text in constants(one, tree)}
    if isinstance(value, ast.IfExp):
        return constants(value.body, tree) | constants(value.orelse, tree)
    return {value.value} if isinstance(value, ast.Constant) and isinstance(value.value, str) else set()


def test_every_code_is_on_the_page() -> None:
    """The tables have a row for each code of Rust and Python, and none for a code that nothing gives."""
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", PAGE, flags=re.MULTILINE)
    expected = rust_codes() | python_codes()

    assert set(rows) | {"interrupted"} == expected
    assert "`interrupted` is the code" in PAGE
    assert {"too_long", "unknown_key", "interpolation", "rank_died", "file"} <= expected


def test_no_row_is_twice_in_a_section() -> None:
    """A section has one row for each code; cause and cure are sentences."""
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", section, flags=re.MULTILINE)
        assert len({code for code, _, _ in rows}) == len(rows)
        for code, cause, cure in rows:
            assert cause.endswith("."), code
            assert cure.endswith("."), code
