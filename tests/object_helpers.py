"""What the tests of object storage share: servers of the test's own, behind a proxy that does harm."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast.errors import FileError
from sft_fast.objects import store
from sft_fast.objects.cache import DIRECTORY_VARIABLE
from tests.data_helpers import contents, dump_lines, plain_samples, random_records

OPTIONS: dict[str, Any] = {"sequence_length": 1024, "system_key": "system", "query_key": "input"}
RECORDS = random_records(300, seed=5)

BUCKET = "bucket"
SECRET = "a-secret-that-is-nowhere-written"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Request:
    """A request that came to the proxy."""

    method: str
    path: str
    range: str


@dataclass
class Fault:
    """Harm that is done to requests that match, so many times.

    `refuse`: 503. `wrong`: 400, as Google says it. `cut`: the connection ends in the middle of the answer. `short`: an
    answer that is whole, but too short. `garble`: one byte is another. `slow`: the answer comes late.
    """

    kind: str
    matches: Callable[[Request], bool]
    num_times: int = 1
    seconds: float = 0.0
    num_done: int = 0


@dataclass
class Proxy:
    """What the proxy has seen, and what it is to do."""

    address: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    before: Callable[[Request], object] | None = None
    """Is called with each request before it goes on."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Forgets all of it."""
        with self.lock:
            self.faults, self.requests, self.before = [], [], None

    def fault_for(self, request: Request) -> Fault | None:
        """The harm for a request, which is counted."""
        with self.lock:
            for fault in self.faults:
                if fault.num_done < fault.num_times and fault.matches(request):
                    fault.num_done += 1
                    return fault
        return None

    def seen(self, method: str, part: str) -> list[Request]:
        """Requests of a method, of objects with `part` in their path."""
        with self.lock:
            return [one for one in self.requests if one.method == method and part in one.path]


def reading(part: str) -> Callable[[Request], bool]:
    """Matches requests for the bytes of objects with `part` in their path."""
    return lambda request: request.method == "GET" and part in request.path and bool(request.range)


def writing(part: str) -> Callable[[Request], bool]:
    """Matches requests that put objects with `part` in their path."""
    return lambda request: request.method == "PUT" and part in request.path


def made(tokenizer: Path, output_dir: Any, source: Any, **options: Any) -> sft_fast.Report:
    """Preprocesses."""
    return sft_fast.preprocess(source, output_dir, tokenizer=tokenizer, **{**OPTIONS, **options})


def check_fault_of_reading(proxy: Proxy, tokenizer: Path, source: str, directory: Path, kind: str) -> None:
    """Harm to answers on the way changes no byte in the end, and every further try is counted: an input, and a dataset.

    `source` is an object of the bucket; a dataset is put beside it. There are no more tries than harm is done.
    """
    bucket = source.rpartition("/")[0]
    expected = made(tokenizer, directory / "expected", source)
    made(tokenizer, f"{bucket}/out", source)
    num_times = 1 if kind in ("garble", "slow") else 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DIRECTORY_VARIABLE, str(directory / "other"))
        if kind == "slow":
            patch.setattr(store, "TIMEOUT_SECONDS", 3.0)  # no other answer is so late, on a busy machine either
        proxy.faults = [Fault(kind, reading(part), num_times, 4.0) for part in ("data.jsonl", "shard-00000")]
        report = made(tokenizer, directory / "out", source)
        dataset = sft_fast.Dataset(f"{bucket}/out")

    assert contents(directory / "out") == contents(directory / "expected")
    assert plain_samples(dataset) == plain_samples(sft_fast.Dataset(expected.path))
    assert [fault.num_done for fault in proxy.faults] == [num_times] * 2
    for transfer in (report.transfer, dataset.transfer):  # below us, a connection that ended may be opened again once
        assert 1 <= transfer.num_retries <= num_times


def check_change_while_read(
    proxy: Proxy, tokenizer: Path, put: Callable[[str, bytes], str], directory: Path, pattern: str
) -> None:
    """An object that is replaced while it is fetched is an error that says so, whatever its bytes are."""
    source = put("data.jsonl", dump_lines(RECORDS))

    def replace(request: Request) -> None:
        if reading("data.jsonl")(request):
            proxy.before = None
            put("data.jsonl", dump_lines(RECORDS[1:] + RECORDS[:1]))

    proxy.before = replace
    with pytest.raises(FileError, match="changed while it was read") as raised:
        made(tokenizer, directory / "out", f"{source.rpartition('/')[0]}/{pattern}")
    assert (raised.value.code, raised.value.path) == ("changed", source)
    assert not (directory / "out").exists()
    assert made(tokenizer, directory / "out", source).num_samples == len(RECORDS)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]
    proxy: Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self._body()
        request = Request(self.command, self.path, self.headers.get("Range", ""))
        with self.proxy.lock:
            self.proxy.requests.append(request)
        if self.proxy.before is not None:
            self.proxy.before(request)
        fault = self.proxy.fault_for(request)
        kind = fault.kind if fault else ""
        if kind == "refuse":
            self._answer(503, [], SLOW_DOWN)
            return
        if kind == "wrong":
            self._answer(400, [], b'{"error": {"code": 400, "message": "invalid argument"}}')
            return
        if kind == "cut" and self.command == "PUT":
            self.close_connection = True  # not a word
            return
        upstream = http.client.HTTPConnection(*self.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        upstream.request(self.command, self.path, body=body, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        if kind == "short":
            content = content[: len(content) // 2]
        if kind == "garble":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._answer(answer.status, answer.getheaders(), content, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815  # the names of http.server

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        with contextlib.suppress(OSError):  # nobody waits for the answer any more
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("connection", "date", "server", "transfer-encoding") and (
                    name.lower() != "content-length" or self.command == "HEAD"
                ):
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            self.wfile.flush()
            if cut:
                self.close_connection = True


@contextlib.contextmanager
def object_server() -> Iterator[Proxy]:
    """An S3 server with an empty bucket, and the proxy before it. Nothing leaves this machine."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        with proxy_before(server.get_host_and_port()) as proxy:
            yield proxy
    finally:
        server.stop()


@contextlib.contextmanager
def google_server() -> Iterator[Proxy]:
    """A server that speaks as Google Cloud Storage does, and the proxy before it. Nothing leaves this machine."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    try:
        with proxy_before(server._api._httpd.server_address[:2]) as proxy:
            yield proxy
    finally:
        server.stop()


@contextlib.contextmanager
def proxy_before(upstream: tuple[str, int]) -> Iterator[Proxy]:
    """The proxy before a server."""
    proxy = Proxy()
    handler = type("Handler", (_Handler,), {"upstream": upstream, "proxy": proxy})
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http_server.daemon_threads = True
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    proxy.address = f"http://127.0.0.1:{http_server.server_address[1]}"
    try:
        yield proxy
    finally:
        http_server.shutdown()
        http_server.server_close()
