"""The exceptions: their text, their kinds, and their way between processes."""

import copy
import pickle

import pytest

from sft_fast import errors

LEAVES = [
    (errors.InputError, ValueError, 2),
    (errors.ConfigError, ValueError, 2),
    (errors.TemplateError, ValueError, 2),
    (errors.TokenizerError, ValueError, 2),
    (errors.DatasetError, ValueError, 2),
    (errors.FileError, OSError, 2),
    (errors.TrainError, RuntimeError, 1),
    (errors.ClusterError, RuntimeError, 1),
]
DETAILS = {
    "code": "unknown_role",
    "path": "data.jsonl",
    "line": 7,
    "column": 12,
    "location": "messages[3].role",
    "hint": "roles are system, user, assistant and tool",
}


def test_every_leaf_is_listed() -> None:
    """No exception of the project escapes the tests below."""
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}

    assert defined - {errors.SftFastError} == {leaf for leaf, _, _ in LEAVES}


@pytest.mark.parametrize(("leaf", "standard", "exit_status"), LEAVES)
def test_leaf_is_root_and_standard_exception(leaf: type, standard: type, exit_status: int) -> None:
    """A leaf is caught by the root and by the standard exception, and knows its exit status."""
    assert issubclass(leaf, errors.SftFastError)
    assert issubclass(leaf, standard)
    assert leaf.exit_status == exit_status


@pytest.mark.parametrize("leaf", [errors.SftFastError, *(leaf for leaf, _, _ in LEAVES)])
@pytest.mark.parametrize("details", [{}, DETAILS])
@pytest.mark.parametrize("send", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_error_survives_copy_and_pickle(leaf: type, details: dict, send: object) -> None:
    """An exception that was copied or sent to another process has the same class, text and attributes."""
    error = leaf("expected a role", **details)

    received = send(error)

    assert type(received) is leaf
    assert vars(received) == vars(error)
    assert str(received) == str(error)


@pytest.mark.parametrize("leaf", [errors.SftFastError, *(leaf for leaf, _, _ in LEAVES)])
def test_attributes_are_what_was_given(leaf: type) -> None:
    """Each keyword of the constructor is an attribute; what is not given is None, and the code is never None."""
    full, bare = leaf("expected a role", **DETAILS), leaf("expected a role")

    assert {name: getattr(full, name) for name in DETAILS} == DETAILS
    assert all(getattr(bare, name) is None for name in DETAILS if name != "code")
    assert bare.code == leaf.default_code


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({}, "expected a role"),
        ({"path": "a.jsonl"}, "a.jsonl: expected a role"),
        ({"path": "a.jsonl", "line": 3}, "a.jsonl:3: expected a role"),
        ({"path": "a.jsonl", "line": 3, "column": 9}, "a.jsonl:3:9: expected a role"),
        ({"location": "messages[0]"}, "expected a role (at messages[0])"),
        ({"hint": "use one\nof these"}, "expected a role\n  use one\n  of these"),
        (
            DETAILS,
            "data.jsonl:7:12: expected a role (at messages[3].role)\n  roles are system, user, assistant and tool",
        ),
    ],
)
def test_text_names_place_and_remedy(details: dict, expected: str) -> None:
    """The text is `path:line:column: message (at location)`, then the hint on its own lines, less what is absent."""
    assert str(errors.InputError("expected a role", **details)) == expected
