"""Credentials inside an address: used to fetch, and nowhere to be found in what is written."""

import base64
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast.errors import ConfigError, FileError, SftFastError
from sft_fast.objects import store
from sft_fast.objects.cache import DIRECTORY_VARIABLE
from sft_fast.redact import has_secrets, without_query, without_secrets
from tests.data_helpers import dump_lines, random_records

SECRETS = ("a-user", "a-password", "a-token", "a/signature")
CONTENT = dump_lines([*random_records(30), "{"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://key:secret@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("two: http://k@h/a, https://u:p@h/b.", "two: http://***@h/a, https://***@h/b."),
        ("https://h/a?token=x&versionId=y", "https://h/a?token=***&versionId=***"),
        ("could not read 'https://h/a?sig=x%2F+y==': 403", "could not read 'https://h/a?sig=***': 403"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("s3://bucket/who@home.jsonl", "s3://bucket/who@home.jsonl"),
        ("mail me@host, or /data/a?b=c", "mail me@host, or /data/a?b=c"),
    ],
)
def test_only_secrets_are_left_out(text: str, expected: str) -> None:
    """Users, passwords and values of queries are replaced in any text, and nothing else is."""
    assert without_secrets(text) == expected
    assert without_secrets(expected) == expected
    assert has_secrets(text) == (text != expected)
    assert without_query("https://h/a.jsonl?token=x") == "https://h/a.jsonl"


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Records that a web server gives to those who know a password and a token."""
    authorization = "Basic " + base64.b64encode(b"a-user:a-password").decode()

    class Handler(BaseHTTPRequestHandler):
        """Answers with a range of the records."""

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            is_known = self.headers["Authorization"] == authorization and "token=a-token&" in self.path
            found = is_known and self.path.startswith("/data.jsonl?")
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            content = CONTENT[int(first) : int(last or len(CONTENT)) + 1] if found else b""
            self.send_response(206 if found and "Range" in self.headers else 200 if found else 404 if is_known else 403)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815  # the names of http.server

    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "objects"))
    monkeypatch.setattr(store, "FIRST_WAIT_SECONDS", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield (
        f"http://a-user:a-password@127.0.0.1:{server.server_address[1]}/data.jsonl?token=a-token&X-Signature=a/signature"
    )
    server.shutdown()
    server.server_close()


def test_nothing_secret_is_written(
    address: str,
    tokenizer_dir: Path,
    tmp_path: Path,
    run_cli: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run with a password and a token in its input's address works; no file, output, log or error has them."""
    caplog.set_level(logging.DEBUG, "sft_fast")
    options: dict[str, Any] = {"tokenizer": tokenizer_dir, "sequence_length": 1024, "system_key": "system"}
    report = sft_fast.preprocess(address, tmp_path / "out", on_error="skip", **options)
    assert (report.num_records, report.num_rejected) == (31, 1)
    assert report.sources[0].name == "data"
    expected = without_secrets(address)
    assert sft_fast.Dataset(report.path)[0].source == f"{expected}:1"
    said = [str(report), caplog.text]

    for wrong in (address.replace("data.jsonl", "none.jsonl"), address.replace("token=", "no="), address):
        with pytest.raises(SftFastError) as raised:
            sft_fast.preprocess(wrong, tmp_path / "new", **options)
        error: BaseException | None = raised.value
        said += [str(error), repr(raised.value.__dict__)]
        while error is not None and not error.__suppress_context__:
            error = error.__cause__ or error.__context__
            said.append(str(error))
    assert raised.value.line == 31, "guard: the last is the wrong record"

    command = ("preprocess", address, "--output-dir", "cli", "--tokenizer", tokenizer_dir, "--sequence-length", 1024)
    for more in ((), ("--on-error", "skip", "--system-key", "system")):
        result = run_cli(*command, *more)
        said += [result.stdout, result.stderr]
    assert result.returncode == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    said += [path.read_bytes().decode(errors="replace") for path in files]
    assert len(files) > 8
    for secret in SECRETS:
        assert not [text for text in said if secret in text]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_buckets_take_no_credentials(scheme: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Credentials before a bucket, which no library would use, are refused with what to do, and not repeated."""
    address = f"{scheme}://a-user:a-password@bucket/data.jsonl"
    with pytest.raises(ConfigError, match="found credentials in the address") as raised:
        sft_fast.preprocess(address, tmp_path / "out", tokenizer=tokenizer_dir, sequence_length=128)
    assert raised.value.path == f"{scheme}://***@bucket/data.jsonl"
    assert "a-password" not in str(raised.value)
    with pytest.raises(ConfigError):
        sft_fast.Dataset(address)
    assert FileError("x", path=address).path == raised.value.path
