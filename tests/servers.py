"""Servers that tests start on this machine, and a proxy that spoils what passes between a test and one of them.

Not fixtures (those are in conftest.py).
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.session

BIN = Path(sys.executable).parent


def s3_variables(endpoint: str, key: str, secret: str) -> dict[str, str]:
    """The environment of a process that uses an S3 store here, and nothing else that this machine may offer."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextmanager
def ray_folders() -> Iterator[dict[str, str]]:
    """Environment of a process that starts Ray: its own HOME and temporary folder, and workers that are served at once.

    The folder's name is short because the paths of Ray's sockets below it may have 107 characters at most. Ray gives
    its workers niceness 15 otherwise, and beside other tests they would hardly get a processor.
    """
    folder = Path(tempfile.mkdtemp(prefix="lm", dir="/tmp"))
    (folder / "home").mkdir()
    try:
        yield {"HOME": str(folder / "home"), "RAY_TMPDIR": str(folder), "RAY_worker_niceness": "0"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports whose neighbours 10,000 above are free too.

    weed listens on both. Ray's workers take 10002-19999, and the system gives out 32768 and above.
    """
    start = 20_000 + os.getpid() * 16 % 2_500
    for first in [*range(start, 22_600, 16), *range(20_000, start, 16)]:
        if all(_is_free(port + above) for port in range(first, first + count) for above in (0, 10_000)):
            return first
    raise RuntimeError("no free ports between 20000 and 22600")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_for_http(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 60) -> None:
    """Returns once a server answers anything."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as answer:
            answer.close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer: {log.read_text(errors='replace')[-2000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def seaweed(buckets: Sequence[str], address: str = "127.0.0.1") -> Iterator[tuple[str, dict[str, str]]]:
    """A SeaweedFS with these buckets: its endpoint, and the environment of a process that uses it."""
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    log = folder / "log"
    port = free_ports(5)
    env = s3_variables(f"http://{address}:{port}", "test", "testtest")
    names = ("s3", "master", "volume", "filer", "admin")
    command = [
        str(BIN / "weed"),
        "mini",
        f"-dir={folder}",
        f"-ip={address}",
        f"-ip.bind={address}",
        *(f"-{name}.port={port + number}" for number, name in enumerate(names)),
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        f"-bucket={','.join(buckets)}",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **env, "GOMEMLIMIT": "200MiB"}
        )
    try:
        wait_for_http(env["AWS_ENDPOINT_URL"], process, log)
        _wait_for_buckets(env, buckets)
        yield env["AWS_ENDPOINT_URL"], env
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def s3_client(env: Mapping[str, str]) -> Any:
    """A plain botocore client, for looking at a store from outside."""
    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )


def _wait_for_buckets(env: Mapping[str, str], buckets: Sequence[str]) -> None:
    client = s3_client(env)
    for _ in range(200):
        if set(buckets) <= {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            return
        time.sleep(0.1)
    raise RuntimeError(f"the buckets {buckets} were not made")


Fault = Callable[[str, str], str | None]


class FaultProxy:
    """Passes requests to a real store; `fault(method, path)` names what goes wrong with one, or None.

    lose: the request is carried out, then the connection closes without an answer.
    drop: the connection closes and the store never hears of it.
    <number>: the store is not asked; that status is answered with the S3 code of `codes`.
    stall: half of the body comes, and then nothing, until the proxy is closed.
    short: the body ends early.    truncate: body and lengths agree, but the end is missing.    flip: one byte differs.
    """

    def __init__(self, endpoint: str) -> None:
        self.codes = {
            "503": "SlowDown",
            "500": "InternalError",
            "409": "ConditionalRequestConflict",
            "400": "ExpiredToken",
            "403": "AccessDenied",
            "200": "InternalError",  # what S3 answers where completing an upload fails late
            "404": "NoSuchUpload",
        }
        self.requests: list[tuple[str, str]] = []
        self.closed = threading.Event()
        self.fault: Fault = lambda method, path: None
        proxy = self
        host, port = endpoint.removeprefix("http://").split(":")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.requests.append((self.command, self.path))
                fault = proxy.fault(self.command, self.path)
                if fault == "drop":
                    self.close_connection = True
                    return
                if fault is not None and fault.isdigit():
                    error = f"<Error><Code>{proxy.codes[fault]}</Code><Message>m</Message></Error>".encode()
                    return self.answer(int(fault), [("Content-Type", "application/xml")], error)
                upstream = http.client.HTTPConnection(host, int(port), timeout=60)
                try:
                    headers = {name: value for name, value in self.headers.items() if name != "Expect"}
                    upstream.request(self.command, self.path, body, headers)
                    response = upstream.getresponse()
                    content, status, fields = response.read(), response.status, response.getheaders()
                finally:
                    upstream.close()
                if fault == "lose":
                    self.close_connection = True
                    return
                self.spoil_and_answer(fault, status, fields, content)

            def spoil_and_answer(
                self, fault: str | None, status: int, fields: list[tuple[str, str]], content: bytes
            ) -> None:
                length = None
                if fault == "stall":
                    self.answer(status, fields, content[: len(content) // 2], len(content))
                    proxy.closed.wait()
                    self.close_connection = True
                    return
                if fault == "short":
                    length, content = len(content), content[: len(content) // 2]
                    self.close_connection = True
                elif fault == "truncate":
                    content = content[: len(content) // 2]
                elif fault == "flip":
                    content = content[:-1] + bytes([content[-1] ^ 1])
                self.answer(status, fields, content, length)

            def answer(
                self, status: int, fields: list[tuple[str, str]], content: bytes, length: int | None = None
            ) -> None:
                self.send_response(status)
                for name, value in fields:
                    if name.lower() == "content-length" and self.command == "HEAD":
                        length = int(value)
                    elif name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def first(self, count: int, what: str, method: str, ending: str = "") -> None:
        """Spoils the next `count` requests of a method whose path ends so."""
        left = [what] * count
        self.fault = lambda m, path: left.pop() if left and m == method and path.endswith(ending) else None

    def count(self, method: str) -> int:
        return sum(m == method for m, _ in self.requests)

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
