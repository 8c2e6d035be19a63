"""Bad input: every kind of wrong record and file is one clear error or one counted reject, and leaves nothing."""

import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sft_fast
from sft_fast.errors import ConfigError, FileError, InputError, SftFastError, TemplateError, TokenizerError
from tests.conftest import make_tokenizer_dir
from tests.data_helpers import contents, dump_lines, knobs, random_records

GOOD = '{"instruction": "a", "output": "b"}'
KEYS = '"instruction": "a", "output": "b"'

# name: (record, with ¦ in front of what is wrong; reason; place in the record; a part of the message). Bytes that are
# not UTF-8 are written as Python's "surrogateescape" has them.
RECORDS: dict[str, tuple[str, str, str | None, str]] = {
    "truncated": ('{"instruction": "a", "out¦', "invalid_json", None, "a string is not closed"),
    "truncated after a value": ('{"instruction": "a"¦', "invalid_json", None, "expected ',' or '}', found the end"),
    "no comma": ('{"instruction": "a" ¦"output": "b"}', "invalid_json", None, "expected ',' or '}', found '\"'"),
    "comma at the end": (f"{{{KEYS},¦}}", "invalid_json", None, "expected a key in double quotes, found '}'"),
    "single quotes": ("{¦'instruction': 'a'}", "invalid_json", None, "expected a key in double quotes"),
    "comment": (f"{GOOD} ¦// good", "invalid_json", None, "expected the end of the record, found '/'"),
    "two records": (f"{GOOD}¦{GOOD}", "invalid_json", None, "expected the end of the record, found '{'"),
    "NaN": (f'{{{KEYS}, "x": ¦NaN}}', "invalid_json", None, "expected a value, found 'N'"),
    "Infinity": (f'{{{KEYS}, "x": -¦Infinity}}', "invalid_json", None, "expected a digit, found 'I'"),
    "leading zero": (f'{{{KEYS}, "x": 0¦1}}', "invalid_json", None, "expected ',' or '}', found '1'"),
    "bare plus": (f'{{{KEYS}, "x": ¦+1}}', "invalid_json", None, "expected a value, found '+'"),
    "no fraction": (f'{{{KEYS}, "x": 1.¦}}', "invalid_json", None, "expected a digit, found '}'"),
    "unknown escape": (r'{"instruction": "¦\x41"}', "invalid_json", None, "unknown escape"),
    "short escape": (r'{"instruction": "¦\u12"}', "invalid_json", None, "four hexadecimal digits"),
    "lone surrogate": (r'{"instruction": "a¦\ud800"}', "invalid_json", None, "half of a surrogate pair"),
    "low surrogate first": (r'{"instruction": "¦\udc00\ud800"}', "invalid_json", None, "half of a surrogate pair"),
    "tab in a string": ('{"instruction": "a¦\tb"}', "invalid_json", None, "U+0009 must be escaped"),
    "NUL in a string": ('{"instruction": "a¦\x00b"}', "invalid_json", None, "U+0000 must be escaped"),
    "NUL alone": ("¦\x00", "invalid_json", None, "found the control character U+0000"),
    "byte order mark inside": ("¦\ufeff" + GOOD, "invalid_json", None, "expected a value"),
    "nested deep": (f"{'[' * 128}¦{'[' * 100_000}", "invalid_json", None, "nested deeper than 128"),
    "nested deep in a good record": (f'{{{KEYS}, "x": {"[" * 127}¦[[]', "invalid_json", None, "nested deeper"),
    "text": ("¦hello", "invalid_json", None, "expected a value, found 'h'"),
    "CSV": ("¦instruction,output", "invalid_json", None, "expected a value, found 'i'"),
    "column counts characters": ('{"ünïcödé 漢字 🙂": ¦x}', "invalid_json", None, "found 'x'"),
    "Latin-1": ('{"instruction": "¦\udce9"}', "invalid_utf8", None, "found the byte 0xE9"),
    "cut UTF-8": ('{"instruction": "¦\udce6\udcbc', "invalid_utf8", None, "found the byte 0xE6"),
    "overlong UTF-8": ('{"instruction": "¦\udcc0\udc80"}', "invalid_utf8", None, "found the byte 0xC0"),
    "surrogate as UTF-8": ('{"instruction": "¦\udced\udca0\udc80"}', "invalid_utf8", None, "found the byte 0xED"),
    "an array": ("¦[1]", "wrong_type", None, "expected a record (an object), found an array"),
    "null": ("¦null", "wrong_type", None, "found null"),
    "a string": ('¦"a"', "wrong_type", None, "found a string"),
    "no keys": ("¦{}", "missing_key", None, "expected the key 'instruction', found no keys"),
    "no answer key": ('¦{"instruction": "a", "answer": "b"}', "missing_key", None, "found 'instruction', 'answer'"),
    "key twice": (f'{{{KEYS}, ¦"output": "c"}}', "duplicate_key", "output", "found 'output' twice"),
    "key twice by escape": (f'{{{KEYS}, ¦"outpu\\u0074": "c"}}', "duplicate_key", "output", "found 'output' twice"),
    "null prompt": ('{"instruction": ¦null, "output": "b"}', "wrong_type", "instruction", "found null"),
    "huge number": ('{"instruction": ¦1e999999, "output": "b"}', "wrong_type", "instruction", "found a number"),
    "answer is a list": ('{"instruction": "a", "output": ¦["b"]}', "wrong_type", "output", "found an array"),
    "query is a number": (f'{{{KEYS}, "input": ¦3}}', "wrong_type", "input", "expected a string, found a number"),
    "empty prompt": ('{"instruction": ¦"", "output": "b"}', "empty_prompt", "instruction", "an empty text"),
    "empty answer": ('{"instruction": "a", "output": ¦""}', "empty_answer", "output", "an empty text"),
    "blank answer": ('{"instruction": "a", "output": ¦" \\n"}', "empty_answer", "output", "an empty text"),
    "messages null": ('{"messages": ¦null}', "wrong_type", "messages", "expected an array of messages"),
    "messages an object": ('{"messages": ¦{}}', "wrong_type", "messages", "found an object"),
    "no messages": ('{"messages": ¦[]}', "no_answer", "messages", "at least one assistant message"),
    "no assistant": ('{"messages": ¦[{"role": "user", "content": "a"}]}', "no_answer", "messages", "found none"),
    "message a text": ('{"messages": [¦"a"]}', "wrong_type", "messages[0]", "found a string"),
    "unknown role": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": ¦"bot", "content": "b"}]}',
        "unknown_role", "messages[1].role", "found 'bot'",
    ),
    "role that a terminal would obey": (
        r'{"messages": [{"role": ¦"\u001b[2J", "content": "a"}]}',
        "unknown_role", "messages[0].role", r"found '\u{1b}[2J'",
    ),
    "long role": (
        f'{{"messages": [{{"role": ¦"{"x" * 100_000}"}}]}}', "unknown_role", "messages[0].role", "found 'xxx",
    ),
    "role of another type": ('{"messages": [{"role": ¦1}]}', "wrong_type", "messages[0].role", "found a number"),
    "no role": ('{"messages": [¦{"content": "a"}]}', "missing_key", "messages[0]", "expected the key 'role'"),
    "no content": ('{"messages": [¦{"role": "user"}]}', "missing_key", "messages[0]", "expected the key 'content'"),
    "content a number": (
        '{"messages": [{"role": "user", "content": ¦1}]}', "wrong_type", "messages[0].content", "found a number",
    ),
    "empty answer in messages": (
        '{"messages": [{"role": "assistant", "content": ¦""}]}',
        "empty_answer", "messages[0].content", "an empty text",
    ),
    "role twice": (
        '{"messages": [{"role": "user", ¦"role": "user"}]}', "duplicate_key", "messages[0].role", "'role' twice",
    ),
    "unknown speaker": (
        '{"conversations": [{"from": ¦"bot", "value": "b"}]}',
        "unknown_role", "conversations[0].from", "found 'bot'",
    ),
    "tools a number": (
        '{"messages": [{"role": "assistant", "content": "a"}], "tools": ¦5}',
        "wrong_type", "tools", "expected an array of tools",
    ),
}  # fmt: skip


def unmark(record: str) -> tuple[bytes, int]:
    """The bytes of a record, and the column of the mark in it."""
    before, after = record.split("¦")
    return (before + after).encode("utf-8", "surrogateescape"), len(before) + 1


def run(file: Any, tmp_path: Path, tokenizer_dir: Path, **options: Any) -> sft_fast.Report:
    """Preprocesses a file into `out` beside it."""
    options = {"sequence_length": 64, "query_key": "input", "tokenizer": tokenizer_dir, **options}
    return sft_fast.preprocess(file, tmp_path / "out", **options)


def rejects(report: sft_fast.Report) -> list[dict[str, Any]]:
    """The lines of rejected.jsonl."""
    with Path(report.path, "rejected.jsonl").open("rb") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(("marked", "reason", "location", "message"), RECORDS.values(), ids=RECORDS)
def test_a_wrong_record_is_one_error(
    marked: str, reason: str, location: str | None, message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The error has the file, the line, the column of what is wrong, its place in the record, and what was expected."""
    record, column = unmark(marked)
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines([GOOD, "", record, GOOD]))
    before = contents(tmp_path)

    with pytest.raises(InputError) as caught:
        run(path, tmp_path, tokenizer_dir)

    error = caught.value
    assert (error.code, error.path, error.line, error.column) == (reason, str(path), 3, column)
    assert error.location == location
    assert message in error.message
    assert str(error).startswith(f"{path}:3:{column}: ")
    assert len(str(error)) < 1000
    assert contents(tmp_path) == before


@pytest.mark.parametrize("chunk_bytes", [16, 100, 1 << 20])
@pytest.mark.parametrize("as_array", [False, True])
def test_wrong_records_are_skipped_and_listed(
    tokenizer_dir: Path, tmp_path: Path, as_array: bool, chunk_bytes: int
) -> None:
    """With on_error="skip" each wrong record is a line of rejected.jsonl with all that the error would have said."""
    table = {
        name: entry
        for name, entry in RECORDS.items()
        # What does not close its strings and brackets takes the rest of an array with it; commas part elements there.
        if not as_array or not (name.startswith(("truncated", "nested", "cut")) or name in ("CSV", "single quotes"))
    }
    records, columns = zip(*(unmark(marked) for marked, *_ in table.values()), strict=True)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"[" + b"\n,".join([GOOD.encode(), *records]) + b"]" if as_array else dump_lines([GOOD, *records]))

    with knobs(chunk_bytes=chunk_bytes):
        report = run(path, tmp_path, tokenizer_dir, on_error="skip")

    rejected = rejects(report)
    indent = 1 if as_array else 0
    assert [(line["reason"], line["line"], line["column"], line["location"]) for line in rejected] == [
        (reason, number, column + indent, location)
        for number, column, (_, reason, location, _) in zip(itertools.count(2), columns, table.values())
    ]
    assert all(line["path"] == str(path) for line in rejected)
    if not as_array:
        assert all(message in line["message"] for line, (*_, message) in zip(rejected, table.values(), strict=True))
    assert (report.num_records, report.num_samples, report.num_rejected) == (len(table) + 1, 1, len(table))
    assert sum(report.rejected_by_reason.values()) == report.num_rejected
    sft_fast.verify(report.path)


def test_the_first_error_in_the_file_is_raised(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Of many wrong records, the error is always that of the first, for any number of threads and size of chunks."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines([GOOD] * 300 + ["{1"] + ["{}"] * 300))
    for num_threads, chunk_bytes in [(1, 1 << 20), (2, 64), (8, 16), (8, 999)]:
        with knobs(chunk_bytes=chunk_bytes), pytest.raises(InputError) as caught:
            run(path, tmp_path, tokenizer_dir, num_threads=num_threads)
        assert (caught.value.line, caught.value.code) == (301, "invalid_json")


def test_good_records_may_be_odd(tokenizer_dir: Path, tmp_path: Path) -> None:
    """What JSON allows is accepted: escapes, spaces, and huge numbers, deep values and odd keys in other fields."""
    deep = "[" * 100 + "]" * 100
    odd = [
        f'{{{KEYS}, "x": 1e999999, "y": -{"9" * 100_000}.0E-5, "": {{"": null}}, "\\u0000": {deep}}}',
        r'{"instruction": "\u0061\/\b\f\ud83d\ude42", "output": "\u0000b"}',
        f" \t{GOOD} \r",
        '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b", "x": [1]}], "id": 7}',
    ]
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines(odd))

    assert run(path, tmp_path, tokenizer_dir).num_samples == len(odd)


# Where Python's json says something else on purpose.
ELSEWHERE = (
    "Unterminated string",  # Python gives the place of the opening quote, we that of the end.
    "Invalid \\uXXXX escape",  # Python gives the place of the digits or of the backslash.
    "Illegal trailing comma",  # Since 3.13 Python gives the place of the comma.
)


def python_verdict(text: str) -> tuple[bool, int | None]:
    """Whether text is JSON by Python's reader without its extensions, and the column where it is not, if comparable."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return False, None if error.msg.startswith(ELSEWHERE) else error.colno
    except ValueError:  # NaN and its kind, and lone surrogates, which are not Unicode text
        return False, None
    return True, None


@st.composite
def almost_json(draw: st.DrawFn) -> str:
    """JSON on one line with a few characters changed."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)
    text = json.dumps(draw(values), ensure_ascii=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from([*'{}[]",:\\0-+.eEtu aé漢\x00\x1f', "\\u", "\\ud83d", "null", "true", ""]))
        text = text[:at] + piece + text[at + draw(st.integers(0, 2)) :]
    return text.replace("\n", " ").replace("\r", " ")


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(almost_json(), min_size=10, max_size=40))
def test_json_is_judged_as_python_judges_it(
    texts: list[str], tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A line is JSON exactly if Python's json says so, and its error is in the same column."""
    texts = [text for text in texts if text.strip(" \t\n\r\x0b\x0c") and not text.startswith("\ufeff")]
    directory = tmp_path_factory.mktemp("json")
    path = directory / "data.jsonl"
    path.write_bytes(dump_lines([GOOD, *texts]))

    report = run(path, directory, tokenizer_dir, on_error="skip")

    rejected = rejects(report)
    found = {line["line"] - 2: line for line in rejected if line["reason"] == "invalid_json"}
    for number, text in enumerate(texts):
        is_json, column = python_verdict(text)
        assert is_json == (number not in found), text
        if is_json:
            continue
        # Of a number that breaks off, Python takes what it can and goes on; half a surrogate pair it accepts.
        is_strict = any(part in found[number]["message"] for part in ("expected a digit", "surrogate"))
        if column is not None and not is_strict:
            assert found[number]["column"] == column, text


def python_error(text: str) -> json.JSONDecodeError | None:
    """What Python's json says of a text that is not JSON."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error
    return None


def test_broken_arrays_have_the_lines_of_python(tokenizer_dir: Path, tmp_path: Path) -> None:
    """In a JSON array over many lines, line and column of what is broken are those that Python's json gives."""
    text = json.dumps(
        [json.loads(GOOD)] * 50 + [{"instruction": "ü", "output": "b"}] * 50, indent=2, ensure_ascii=False
    )
    generator = random.Random(4)
    path = tmp_path / "data.json"
    num_compared = 0
    for _ in range(60):
        at = generator.randrange(1, len(text))
        broken = text[:at] + generator.choice("?}]:x,") + text[at + 1 :]
        expected = python_error(broken)
        if expected is None or expected.msg.startswith((*ELSEWHERE, "Invalid control", "Extra data")):
            continue
        path.write_text(broken, encoding="utf-8")
        with knobs(chunk_bytes=generator.choice([16, 333, 1 << 20])), pytest.raises(InputError) as caught:
            run(path, tmp_path, tokenizer_dir)
        # A bracket too many ends the array where Python still reads the element: that is told in other words.
        if caught.value.message.startswith(("invalid JSON: expected ',' or '}'", "invalid JSON: expected a")):
            assert (caught.value.line, caught.value.column) == (expected.lineno, expected.colno), broken
            num_compared += 1
    assert num_compared > 10


@pytest.mark.parametrize(
    ("content", "num_samples", "line", "message"),
    [
        (f"[{GOOD}", 1, 1, "found the end of the file"),
        (f"[{GOOD},", 1, 1, "found the end of the file"),
        (f"[{GOOD},\n]", 1, 2, "expected a value"),
        (f"[{GOOD}\n{GOOD}]", 0, 2, "expected the end of the record"),
        (f"[{GOOD}]\n{GOOD}", 1, 2, "expected the end of the file after ']'"),
        (f"[{GOOD}]]", 1, 1, "expected the end of the file after ']'"),
        (f'[{GOOD},\n{{"a": "', 1, 2, "a string is not closed"),
        (f"[{GOOD}, [{GOOD}]]", 1, 1, "found an array"),
    ],
)
def test_a_broken_array_is_never_taken_for_whole(
    content: str, num_samples: int, line: int, message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """An array that is cut off, or goes on behind its end, is an error, or a reject beside the elements before it."""
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        run(path, tmp_path, tokenizer_dir)
    assert caught.value.line == line
    assert message in caught.value.message

    if num_samples:
        report = run(path, tmp_path, tokenizer_dir, on_error="skip")
        assert report.num_samples == num_samples
        assert report.num_rejected >= 1


def write(content: bytes) -> Any:
    """A function that writes a file of this content."""
    return lambda path: path.write_bytes(content)


ZIPPED = gzip.compress(dump_lines(random_records(50)))

# name: (what makes the file, class of the error, a part of its text)
FILES: dict[str, tuple[Any, type[SftFastError], str]] = {
    "missing": (str, FileError, "expected a file, a directory or a glob that matches one"),
    "empty directory": (Path.mkdir, FileError, "in this directory, found nothing"),
    "pipe": (os.mkfifo, FileError, "found a pipe"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), FileError, "could not read|expected a file"),
    "empty": (write(b""), InputError, "expected records, found none"),
    "blank": (write(b"\n \r\n\t\n"), InputError, "expected records, found none"),
    "byte order mark alone": (write(b"\xef\xbb\xbf"), InputError, "expected records, found none"),
    "empty array": (write(b" [ ]\n"), InputError, "expected records, found none"),
    "cut Parquet": (write(b"PAR1\x15\x04"), FileError, "could not read the Parquet file"),
    "no gzip": (write(b"\x1f\x8b\x08garbage that is no gzip"), FileError, "could not read"),
    "cut gzip": (write(ZIPPED[:-9]), FileError, "could not read"),
    "changed gzip": (write(ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:]), FileError, "could not read"),
    "no Zstandard": (write(b"\x28\xb5\x2f\xfdgarbage"), FileError, "could not read"),
    "UTF-16": (write(GOOD.encode("utf-16")), InputError, "expected UTF-8 text"),
    "all too long": (write(dump_lines([{"instruction": "a", "output": "b" * 999}])), InputError, "all 1 records were"),
}


@pytest.mark.parametrize(("make", "error", "message"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("name", ["bad.jsonl", "bäd [1]*.json"])
def test_a_wrong_file_is_one_error(
    make: Any, error: type[SftFastError], message: str, name: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """What is missing, no file, badly compressed or without records is one error with its path; nothing is left."""
    path = tmp_path / name
    make(path)
    before = sorted(tmp_path.iterdir())

    with pytest.raises(error, match=message) as caught:
        run(path, tmp_path, tokenizer_dir)

    assert caught.value.path == str(path)
    assert caught.value.exit_status == 2
    assert sorted(tmp_path.iterdir()) == before


def test_no_files_are_an_error(tokenizer_dir: Path, tmp_path: Path) -> None:
    """An empty list of files, and a glob that matches nothing, are errors."""
    with pytest.raises(ConfigError, match="at least one input file"):
        run([], tmp_path, tokenizer_dir)
    with pytest.raises(FileError, match="glob"):
        run(tmp_path / "*.jsonl", tmp_path, tokenizer_dir)


# name: (change of the model directory, class of the error, a part of its text)
MODELS: dict[str, tuple[Any, type[SftFastError], str]] = {
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), TokenizerError, "expected a tokenizer.json"),
    "broken tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        TokenizerError,
        "expected a tokenizer",
    ),
    "another tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("[1]"),
        TokenizerError,
        "expected a tokeni",
    ),
    "no template": (lambda path: (path / "tokenizer_config.json").write_text("{}"), TemplateError, "template"),
    "broken configuration": (
        lambda path: (path / "tokenizer_config.json").write_text("{"),
        SftFastError,
        "tokenizer_config",
    ),
    "broken template": (
        lambda path: (path / "chat_template.jinja").write_text("{% for %}"),
        TemplateError,
        "chat template",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), MODELS.values(), ids=MODELS)
def test_a_wrong_model_directory_is_one_error(
    change: Any, error: type[SftFastError], message: str, tmp_path: Path
) -> None:
    """A model directory without a tokenizer or template, or with broken ones, is one error; nothing is left."""
    model = make_tokenizer_dir(tmp_path / "model")
    change(model)
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD)
    before = contents(tmp_path)

    with pytest.raises(error, match=message) as caught:
        run(path, tmp_path, model)

    assert caught.value.exit_status == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sequence_length": 1}, ConfigError), ({"sequence_length": 0}, ConfigError),
        ({"sequence_length": -5}, ConfigError), ({"sequence_length": 2**32}, ConfigError),
        ({"num_threads": 0}, ConfigError), ({"num_threads": 1025}, ConfigError), ({"num_threads": 2**31}, ConfigError),
        ({"on_error": "ignore"}, ConfigError), ({"too_long": "cut"}, ConfigError),
        ({"control_tokens": "keep"}, ConfigError), ({"train_on": "none"}, ConfigError),
        ({"dropped_thinking": "x"}, ConfigError),
        ({"train_on_thinking": "no"}, ConfigError),
        ({"template": "no_such_template"}, TemplateError), ({"template": "missing.jinja"}, SftFastError),
        ({"tokenizer": "no/such/model"}, TokenizerError), ({"prompt_key": "missing"}, InputError),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_error(
    options: dict[str, Any], error: type[SftFastError], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """An option that can't be is refused with a sentence about it; nothing is left."""
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD)

    with pytest.raises(error) as caught:
        run(path, tmp_path, tokenizer_dir, **options)

    assert caught.value.exit_status == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("output", ["/", ".", "file", "file/out"])
def test_an_output_that_can_not_be_is_one_error(output: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    """An output directory without a name, or where a file is, is an error of ours, and the file stays."""
    path = tmp_path / "file"
    path.write_text(GOOD)

    with pytest.raises((ConfigError, FileError, sft_fast.DatasetError)):
        sft_fast.preprocess(
            path, output if output in "/." else tmp_path / output, tokenizer=tokenizer_dir, sequence_length=9
        )

    assert contents(tmp_path) == {"file": GOOD.encode()}


# Peak memory of a process that preprocesses a file: (error code or number of samples, MiB above those of a small file).
MEASURE = """
import resource, sys, sft_fast
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def run(path, out):
    try:
        return sft_fast.preprocess(path, out, tokenizer=sys.argv[1], sequence_length=64, num_threads=2).num_samples
    except sft_fast.SftFastError as error:
        return error.code
run(sys.argv[2], sys.argv[2] + ".out")
before = peak()
print(run(sys.argv[3], sys.argv[3] + ".out"), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "expected", "most_mib"),
    [
        ([b'{"instruction": "a", "output": "', b"word " * 20_000_000, b'"}'], "no_records", 1500),
        ([b"[" * 100_000_000], "invalid_json", 600),
        ([b"\0" * 100_000_000], "invalid_json", 600),
        ([b"{", *(b'"%d": 0, ' % number for number in range(1_000_000)), b'"0": 0}'], "duplicate_key", 600),
        ([b'{"instruction": "a', b" " * 300_000_000, b'"}'], "record_too_large", 900),
        ([b"[", b" " * 300_000_000, b"]"], "file", 900),
        ([b"x\n" * 1_000_000], "invalid_json", 300),
    ],
    ids=["long answer", "brackets", "zeros", "million keys", "too long a line", "array of spaces", "million lines"],
)
def test_huge_records_end_within_bounds(
    parts: list[bytes], expected: str, most_mib: int, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A record of hundreds of megabytes is one named error, soon, within bounded memory."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_text(GOOD)
    large.write_bytes(b"".join(parts))

    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tokenizer_dir, small, large],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip

    code, mib = result.stdout.split()
    assert code == expected
    assert int(mib) < most_mib


def test_a_million_rejects_take_a_moment(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Finding the place of an error takes time in the length of its record, not in that of what stands before it."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines([GOOD]) + b"x\n" * 200_000)

    report = run(path, tmp_path, tokenizer_dir, on_error="skip")

    assert (report.num_samples, report.rejected_by_reason) == (1, {"invalid_json": 200_000})
    assert report.seconds < 20
