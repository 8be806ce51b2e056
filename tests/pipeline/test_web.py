"""Web addresses, fetched from real servers on this machine's own addresses, which a rule of a test calls public.

127.0.0.2 stands in for a public host, because no other can be reached from everywhere a test may run; every other
address is judged by the real rule. The canary on 127.0.0.1 is what a hostile address would like to reach.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline import storage, web
from pipeline.config import DecodeLimits, EncodingConfig, SourceConfig
from pipeline.errors import StorageError, StorageNotFoundError, StorageUnavailableError, UsageError
from pipeline.plan import plan_shards
from pipeline.records import ClipFailure, SourceVideo
from pipeline.source import iterate_videos
from pipeline.storage import open_input, open_input_fd, open_store

CONTENT = bytes(range(256)) * 40


class Server:
    """Answers as `answers` says, by path; remembers what was asked."""

    def __init__(self, host: str) -> None:
        self.asked: list[str] = []
        self.is_closing = threading.Event()
        self.answers: dict[str, Any] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                server.asked.append(self.path)
                if self.path.startswith("/drip"):
                    return server.drip(self)
                answer = server.answers.get(self.path, 404)
                status = answer if isinstance(answer, int) else 302 if isinstance(answer, str) else 200
                body = answer if isinstance(answer, bytes) else b""
                self.send_response(status)
                if isinstance(answer, str):
                    self.send_header("Location", answer)
                self.send_header("Content-Length", str(len(body) + 10 * self.path.startswith("/short")))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def drip(self, handler: BaseHTTPRequestHandler) -> None:
        """One byte now and then, without end: of the headers, of the size of a chunk, or of the file."""
        headers = {"/drip-header.mp4": b"", "/drip-chunk.mp4": b"Transfer-Encoding: chunked\r\n\r\n"}
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + headers.get(handler.path, b"\r\n"))
        with suppress(OSError):
            while not self.is_closing.wait(0.01):
                handler.wfile.write(b"0")

    def close(self) -> None:
        self.is_closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server("127.0.0.2")
    real = web.is_public
    monkeypatch.setattr("pipeline.web.is_public", lambda address: address == "127.0.0.2" or real(address))
    monkeypatch.setattr("pipeline.web._PAUSE_S", 0.01)
    monkeypatch.setattr("pipeline.web._last_answered", None)
    storage.allow_web_inputs(100_000)
    server.answers["/a.mp4"] = CONTENT
    yield server
    storage.allow_web_inputs(None)
    server.close()


@pytest.fixture
def canary() -> Iterator[Server]:
    """What must never be asked for anything."""
    server = Server("127.0.0.1")
    server.answers["/a.mp4"] = b"secret"
    yield server
    assert server.asked == []
    server.close()


def content_of(uri: str) -> bytes:
    descriptor = open_input_fd(uri)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_a_file_of_a_public_host_is_fetched_also_through_a_redirect(public: Server) -> None:
    public.answers["/moved.mp4"] = "/a.mp4"
    assert content_of(f"{public.url}/a.mp4") == CONTENT
    assert content_of(f"{public.url}/moved.mp4") == CONTENT
    with open_input(f"{public.url}/a.mp4") as file:
        file.seek(256)
        assert file.read(10) == CONTENT[256:266]


def test_without_permission_no_web_address_is_read(public: Server, canary: Server) -> None:
    storage.allow_web_inputs(None)
    for uri in (f"{public.url}/a.mp4", f"{canary.url}/a.mp4", "HTTP://127.0.0.1/a.mp4"):
        with pytest.raises(UsageError, match="--allow-http only"):
            open_input_fd(uri)
        with pytest.raises(UsageError):
            storage.list_inputs(uri)
    assert public.asked == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "0"]
)
def test_no_spelling_of_a_private_address_is_connected_to(host: str, public: Server, canary: Server) -> None:
    with pytest.raises((UsageError, StorageNotFoundError)):
        open_input_fd(f"http://{host}:{canary.port}/a.mp4")


def test_a_redirect_is_checked_like_an_address(public: Server, canary: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for number, target in enumerate((f"{canary.url}/a.mp4", f"//127.0.0.1:{canary.port}/a.mp4", f"file://{secret}")):
        public.answers[f"/{number}.mp4"] = target
        with pytest.raises(UsageError):
            open_input_fd(f"{public.url}/{number}.mp4")
    public.answers["/circle.mp4"] = "/circle.mp4"
    with pytest.raises(StorageNotFoundError, match="redirects more than 5 times"):
        open_input_fd(f"{public.url}/circle.mp4")


def test_a_name_is_refused_if_one_of_its_addresses_is_private_and_is_resolved_once(
    public: Server, canary: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server is not to be had here: the resolver of the library stands in for one that turns hostile."""
    answers = [["127.0.0.2", "127.0.0.1"], ["127.0.0.2"], ["127.0.0.1"]]

    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers.pop(0)]

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.web.socket.getaddrinfo", resolve)
        patch.setattr("pipeline.web.socket.create_connection", _connect)
        with pytest.raises(UsageError, match="not public"):
            open_input_fd(f"http://two.example:{public.port}/a.mp4")
        assert content_of(f"http://turns.example:{public.port}/a.mp4") == CONTENT
    assert answers == [["127.0.0.1"]]


def _connect(place: tuple[str, int], timeout_s: float) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(timeout_s)
    connection.connect(place)
    return connection


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("::7f00:1", False),
        ("nonsense", False),
    ],
)
def test_addresses_are_public_only_if_nothing_private_is_in_them(address: str, is_public: bool) -> None:
    assert web.is_public(address) is is_public


def test_what_a_server_does_wrong_is_the_fault_of_its_file(public: Server) -> None:
    public.answers |= {"/large.mp4": bytes(100_001), "/short.mp4": CONTENT, "/busy.mp4": 503, "/teapot.mp4": 418}
    for name, said in (
        ("large", "more than the 100000 bytes"),
        ("short", "cannot be fetched, 3 times"),
        ("busy", "3 times: the server answered 503"),
        ("teapot", "answered 418"),
        ("missing", "answered 404"),
    ):
        with pytest.raises(StorageNotFoundError, match=said):
            open_input_fd(f"{public.url}/{name}.mp4")
    assert public.asked.count("/busy.mp4") == 3
    with pytest.raises(StorageNotFoundError) as caught:
        open_input_fd(f"{public.url}/gone.mp4?token=canary")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("part", ["header", "chunk", "file"])
def test_a_server_that_drips_is_given_up_at_the_deadline(
    part: str, public: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.web._STALL_S", 0.1)
    said = "3 times: TimeoutError" if part == "header" else "comes at less than 20000 bytes/s"
    with pytest.raises(StorageNotFoundError, match=said):
        open_input_fd(f"{public.url}/drip-{part}.mp4")


def test_a_server_that_never_finishes_its_handshake_is_given_up(
    public: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.web._STALL_S", 0.1)
    with (
        socket.create_server(("127.0.0.2", 0)) as silent,
        pytest.raises(StorageNotFoundError, match="3 times: TimeoutError"),
    ):
        open_input_fd(f"https://127.0.0.2:{silent.getsockname()[1]}/a.mp4")


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _no_folder(*_: object) -> None:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")


@pytest.mark.parametrize("fail", [_no_space, _no_folder])
def test_what_the_disk_lacks_is_not_the_fault_of_a_file(
    fail: Any, public: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is not to be had without one: making a temporary file fails as it does there."""
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.web.tempfile.TemporaryFile", fail)
        with pytest.raises(StorageError, match="cannot be kept on the disk") as caught:
            open_input_fd(f"{public.url}/a.mp4")
        assert not isinstance(caught.value, StorageNotFoundError)
    assert public.asked == ["/a.mp4"], "trying again does not help"


def test_a_temporary_folder_that_is_missing_is_no_missing_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other object stores, whose files are copied to this disk too; a local one of their library stands in."""
    (tmp_path / "a.mp4").write_bytes(CONTENT)
    files = LocalFileSystem()
    monkeypatch.setattr("pipeline.storage._filesystem", lambda _: (files, str(tmp_path / "a.mp4")))
    assert content_of("gs://bucket/a.mp4") == CONTENT
    monkeypatch.setattr("pipeline.storage.tempfile.TemporaryFile", _no_folder)
    with pytest.raises(StorageError, match="cannot be kept on the disk") as caught:
        open_input_fd("gs://bucket/a.mp4")
    assert not isinstance(caught.value, StorageNotFoundError)


def test_a_disk_that_fills_up_while_a_file_comes_is_not_the_fault_of_the_file(
    public: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full stands in for the disk: it takes nothing, also when it is closed with bytes that are not written."""
    monkeypatch.setattr("pipeline.web.tempfile.TemporaryFile", lambda: os.fdopen(os.open("/dev/full", os.O_RDWR), "wb"))
    with pytest.raises(StorageError, match="No space left on device") as caught:
        open_input_fd(f"{public.url}/a.mp4")
    assert not isinstance(caught.value, StorageNotFoundError)


def _resolve_as(names: Mapping[str, str | int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver of the library stands in for a name server; a number is its failure. Networks cannot be cut here."""

    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        found = names[host]
        if isinstance(found, int):
            raise socket.gaierror(found, "failed")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found.split()]

    monkeypatch.setattr("pipeline.web.socket.getaddrinfo", resolve)
    monkeypatch.setattr("pipeline.web.socket.create_connection", _connect_or_fail)


def _connect_or_fail(place: tuple[str, int], timeout_s: float) -> socket.socket:
    if place[0] == "9.9.9.9":
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
    return _connect(place, timeout_s)


def test_without_a_network_no_file_is_called_missing(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, str | int] = {
        "good.example": "127.0.0.2",
        "dead.example": socket.EAI_AGAIN,
        "far.example": "9.9.9.9",
    }
    _resolve_as(names, monkeypatch)
    monkeypatch.setattr("pipeline.web._OUTAGE_S", 0.5)
    for host in ("dead.example", "far.example"):
        with pytest.raises(StorageUnavailableError, match="look at the network"):
            open_input_fd(f"http://{host}:{public.port}/a.mp4")
    assert content_of(f"http://good.example:{public.port}/a.mp4") == CONTENT
    # The rest of the network is well, so these two are not.
    for host in ("dead.example", "far.example"):
        with pytest.raises(StorageNotFoundError, match="other hosts can"):
            open_input_fd(f"http://{host}:{public.port}/a.mp4")
    # Nor does what was well an hour ago say anything now.
    names["good.example"] = socket.EAI_AGAIN
    for host in ("dead.example", "far.example", "good.example"):
        with pytest.raises(StorageUnavailableError):
            open_input_fd(f"http://{host}:{public.port}/a.mp4")


def test_no_descriptor_left_is_not_the_fault_of_a_file(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.web.socket.create_connection", none_left)
        with pytest.raises(StorageError, match="Too many open files") as caught:
            open_input_fd(f"{public.url}/a.mp4")
    assert not isinstance(caught.value, StorageNotFoundError)


def test_every_address_of_a_host_is_tried(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve_as({"two.example": "9.9.9.9 127.0.0.2"}, monkeypatch)
    assert content_of(f"http://two.example:{public.port}/a.mp4") == CONTENT


def test_addresses_are_read_as_browsers_read_them(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve_as({"xn--bcher-kva.example": "127.0.0.2"}, monkeypatch)
    public.answers["/my%20caf%C3%A9.mp4?q=%C3%A9%20x"] = CONTENT
    public.answers["/raw.mp4"] = "/my caf\u00c3\u00a9.mp4?q=%C3%A9 x"  # UTF-8, as Latin-1 carries it
    for name in ("my caf\u00e9.mp4?q=\u00e9 x", "my%20caf%C3%A9.mp4?q=%C3%A9%20x", "raw.mp4"):
        assert content_of(f"http://b\u00fccher.example:{public.port}/{name}") == CONTENT
    for wrong in ("http://a b.example/a.mp4", "http://x.example/a\n.mp4", "http://\u00fc..example/a.mp4"):
        with pytest.raises(UsageError):
            open_input_fd(wrong)


def test_rows_of_a_table_are_fetched_or_rejected_one_by_one_and_show_no_secret(
    public: Server, canary: Server, tmp_path: Path
) -> None:
    public.answers["/signed.mp4?X-Amz-Signature=canary"] = CONTENT
    public.answers["/to-private.mp4"] = f"{canary.url}/a.mp4"
    rows = {
        "good": (f"{public.url}/a.mp4", None),
        "signed": (f"{public.url}/signed.mp4?X-Amz-Signature=canary", None),
        "gone": (f"{public.url}/gone.mp4?X-Amz-Signature=canary", "not_found"),
        "private": (f"{canary.url}/a.mp4", "not_allowed"),
        "redirected": (f"{public.url}/to-private.mp4", "not_allowed"),
        "password": (f"http://user:canary@127.0.0.2:{public.port}/a.mp4", "not_allowed"),
        "ftp": (f"ftp://127.0.0.1:{canary.port}/a.mp4", "not_allowed"),
        "hls": (f"hls+http://127.0.0.1:{canary.port}/a.mp4", "not_allowed"),
        "webhdfs": (f"webhdfs://127.0.0.1:{canary.port}/a.mp4", "not_allowed"),
        "chain": (f"simplecache::http://127.0.0.1:{canary.port}/a.mp4", "not_allowed"),
    }
    lines = [json.dumps({"key": key, "url": address}) for key, (address, _) in rows.items()]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    store = open_store(str(tmp_path / "out"))
    specs = plan_shards(SourceConfig(input=str(tmp_path / "table.jsonl")), store)
    reasons: dict[str, str | None] = {}
    for spec in specs:
        for entry in iterate_videos(spec, store, EncodingConfig(model="small"), DecodeLimits()):
            if isinstance(entry, SourceVideo):
                assert os.pread(entry.media_fd, 1 << 20, 0) == CONTENT
                assert "canary" not in str(entry.fields)
                os.close(entry.media_fd)
                reasons[entry.key] = None
            else:
                assert isinstance(entry, ClipFailure)
                reasons[entry.key] = entry.reason
                assert "canary" not in entry.message
            assert "canary" not in entry.source_uri
    assert reasons == {key: reason for key, (_, reason) in rows.items()}


def test_a_slice_that_was_planned_with_the_flag_is_not_read_without(public: Server, tmp_path: Path) -> None:
    """Its web addresses would all be rejected, and a rejection is for good."""
    (tmp_path / "b.mp4").write_bytes(CONTENT)
    rows = [{"key": "a", "url": f"{public.url}/a.mp4"}, {"key": "b", "url": "b.mp4"}]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(input=str(tmp_path / "table.jsonl"))
    store = open_store(str(tmp_path / "out"))
    (spec,) = plan_shards(source, store)
    storage.allow_web_inputs(None)
    with pytest.raises(UsageError, match="planned with --allow-http"):
        list(iterate_videos(spec, store, EncodingConfig(model="small"), DecodeLimits()))
    # Who never gave the flag has the rejection in the plan.
    without = open_store(str(tmp_path / "without"))
    (spec,) = plan_shards(source, without)
    rejected, video = iterate_videos(spec, without, EncodingConfig(model="small"), DecodeLimits())
    assert isinstance(video, SourceVideo)
    os.close(video.media_fd)
    assert isinstance(rejected, ClipFailure)
    assert rejected.reason == "not_allowed"
    assert public.asked == []


def test_an_input_with_a_query_is_refused_because_records_would_hold_it(public: Server) -> None:
    with pytest.raises(UsageError, match="name it in a table"):
        storage.list_inputs(f"{public.url}/shard.tar?X-Amz-Signature=canary")
