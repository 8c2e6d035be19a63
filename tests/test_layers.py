"""The layers of the project: who may import whom, read from the sources, and what a light command must not load."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "sft_fast"
CORE = ROOT / "rust" / "core" / "src"

# From the bottom up. A unit (a module or a package below `sft_fast`; "" is `sft_fast` itself) imports only from lower
# ones, and from itself.
PYTHON_LAYERS = [
    {"redact"},
    {"errors", "lease"},
    {"_core", "configs", "options"},
    {"mixing"},
    {"config", "console", "ray_session"},
    {"arrow", "cache", "distributed", "reference", "spool", "tables"},
    {"objects"},
    {"inputs"},
    {"data", "prefetch"},
    {"chat_template", "records", "stream"},
    {"views"},
    {""},
    {"inspect"},
    {"train"},
    {"check", "doctor"},
    {"cli"},
]
# What takes seconds to load, and is only for training or for object storage.
HEAVY = {
    *("accelerate", "deepspeed", "mlflow", "peft", "ray", "swanlab", "tensorboard", "torch", "transformers", "wandb"),
    *("aiohttp", "botocore", "fsspec", "gcsfs", "s3fs"),
}

# The same for the modules of the core crate.
RUST_LAYERS = [
    {"error", "json", "random"},
    {"hash"},
    {"source", "conversation", "tokenize", "staging", "shard", "listing", "pack"},
    {"plan", "mix", "template", "sample", "manifest"},
    {"dataset"},
    {"model", "batch"},
    {"sampler", "assemble", "survey"},
    {"preprocess"},
]


def rank_of(layers: list[set[str]], unit: str) -> int:
    """The layer of a unit; a new one must be given its place above."""
    for rank, units in enumerate(layers):
        if unit in units:
            return rank
    raise AssertionError(f"{unit!r} has no layer: add it to this test and say in docs/design.md what it may import")


def imports(tree: ast.AST, is_lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is inside a function) of each import; those for type checkers only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from sft_fast import console` imports the module, `from sft_fast.console import count` a name of it.
            yield from ((f"{node.module}.{alias.name}", is_lazy) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        else:
            yield from imports(node, is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def unit_of(name: str) -> str:
    """The unit that a dotted name below `sft_fast` belongs to; "" for a name of `sft_fast` itself."""
    first = name.split(".")[1] if "." in name else ""
    return first if any(first in units for units in PYTHON_LAYERS) else ""


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_python_imports_run_one_way(module: Path) -> None:
    """A module imports only from lower layers, and only training and the views import what is heavy when loaded."""
    relative = module.relative_to(PACKAGE).with_suffix("")
    unit = "" if relative.name == "__init__" and len(relative.parts) == 1 else relative.parts[0]
    found = list(imports(ast.parse(module.read_text(encoding="utf-8"))))

    for name, is_lazy in found:
        root = name.split(".")[0]
        if root == "sft_fast" and unit_of(name) != unit:
            assert rank_of(PYTHON_LAYERS, unit_of(name)) < rank_of(PYTHON_LAYERS, unit), f"{relative} imports {name}"
        if unit not in ("train", "views") and not is_lazy:
            assert root not in HEAVY, f"{relative} imports {name} when it is loaded"


def test_the_layers_are_those_of_the_package() -> None:
    """Guard: the test above reads the whole package and sees its imports."""
    names = {str(module.relative_to(PACKAGE)) for module in MODULES}
    cli = {
        name.split(".")[1] for name, _ in imports(ast.parse((PACKAGE / "cli.py").read_text())) if "sft_fast." in name
    }

    assert {"cli.py", "errors.py", "__init__.py"} <= names
    assert {"config", "check", "train", "errors"} <= cli


@pytest.mark.parametrize("module", sorted(CORE.rglob("*.rs")), ids=lambda module: str(module.relative_to(CORE)))
def test_rust_modules_run_one_way(module: Path) -> None:
    """A module of the core crate uses only lower ones; packs and plans know integers only; no module knows Python."""
    unit = module.relative_to(CORE).with_suffix("").parts[0]
    code = re.sub(r"//.*", "", module.read_text(encoding="utf-8"))
    used = set(re.findall(r"\bcrate::(\w+)", code)) - {unit}

    assert "pyo3" not in code
    if unit == "lib":
        return
    for name in used:
        assert rank_of(RUST_LAYERS, name) < rank_of(RUST_LAYERS, unit), f"{unit} uses {name}"
    if unit in ("pack", "plan"):
        assert used <= {"random", "pack"}


@pytest.mark.parametrize(
    "statement",
    [
        "import sft_fast",
        "import sft_fast.config, sft_fast.inspect.terminal, sft_fast.check",
        *(
            f"import sft_fast.cli; sys.argv = ['sft-fast', {command!r}, '--help']; sft_fast.cli.main()"
            for command in ("preprocess", "train", "validate", "inspect", "verify", "export", "cache", "doctor")
        ),
    ],
)
def test_light_commands_stay_light(statement: str) -> None:
    """Importing the package, and the help of every command, load nothing that is for training only."""
    program = (
        f"import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', sorted({HEAVY} & set(sys.modules)), file=sys.stderr))\n"
        f"{statement}\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stderr.strip().endswith("LOADED []")
