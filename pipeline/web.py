"""Files behind http:// and https://, for jobs that were told to read them: fetched whole, from public addresses only.

A table of addresses comes from anyone, and whoever fetches what it says reaches what this machine reaches: its cloud's
metadata, its neighbours. So a name is resolved first, every address of it must be public, the connection goes to the
very address that was checked; each redirect starts over. Proxies of the environment are not used. Not where it is
decided whether the web may be read at all (`storage.allow_web_inputs`). Called by `storage`.

A server that fails, stalls or sends too much is the fault of its file, not of this run: StorageNotFoundError, so that
one dead host among a million does not keep its neighbours from being decided. What this machine lacks is not: a full
disk, or no network. A name server that fails for one name and a route that is missing to one host look like the
latter, so a host that answered before is asked again before either is blamed.
"""

from __future__ import annotations

import errno
import http.client
import io
import ipaddress
import os
import random
import socket
import ssl
import tempfile
import time
from typing import Any, Self, cast
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from pipeline.errors import StorageError, StorageNotFoundError, StorageUnavailableError, UsageError
from pipeline.store import Backoff, Steps, shown_uri

_MOST_REDIRECTS = 5
_ATTEMPTS = 3
_PAUSE_S = 0.5
# Without a network; the driver tries the shard again after that.
_OUTAGE_S = 120.0
_CONNECT_S = 10.0
_STALL_S = 20.0
# Of a whole file: a server that sends a byte now and then must not hold a shard for ever.
_SLOWEST_BYTES_PER_S = 20_000
_BLOCK_BYTES = 1 << 20
# As browsers send them; "%" stays, because most addresses are quoted already.
_UNQUOTED = "%/:?&=#+,;@!$'()*~[]"
_NO_ROUTE = (errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.EADDRNOTAVAIL)
_NOTHING_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)

# Name and port of the host that answered last in this process. No bare address, which needs no name server.
_last_answered: tuple[str, int] | None = None


class _TryAgainError(Exception):
    """The server may yet answer."""


class _UnreachedError(Exception):
    """There is no way to the host, or none to any host."""

    def __init__(self, host: str, message: str) -> None:
        super().__init__(message)
        self.host = host


def fetch(uri: str, largest_bytes: int) -> int:
    """The file as a descriptor of an unnamed temporary file, at its beginning. The caller closes it.

    Raises:
        UsageError: the address, or one that it redirects to, is not http(s), holds credentials, or is not public.
        StorageNotFoundError: there is no such file, it has more than `largest_bytes`, or the server keeps failing.
        StorageUnavailableError: no host can be reached, this one or the one that answered last.
        StorageError: this machine has no room or no descriptor for the file.
    """
    backoff = Backoff()
    num_attempts = 0
    while True:
        num_attempts += 1
        try:
            return _fetch_once(uri, largest_bytes)
        except _UnreachedError as error:
            if num_attempts >= _ATTEMPTS and _another_host_answers(error.host, uri):
                raise StorageNotFoundError(
                    f"{shown_uri(uri)} cannot be reached, and other hosts can: {error}"
                ) from error
            if not backoff.pause(_OUTAGE_S):
                raise StorageUnavailableError(
                    f"{shown_uri(uri)} cannot be reached: {error}; no other host is known to be reached either, so "
                    "look at the network and the name server of this machine, and run the job again"
                ) from error
        except (_TryAgainError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in _NOTHING_LEFT:
                raise StorageError(
                    f"{shown_uri(uri)} cannot be fetched, because this machine is short of something: "
                    f"{error.strerror}; look at its memory and at `ulimit -n`"
                ) from error
            if num_attempts >= _ATTEMPTS:
                said = str(error) if isinstance(error, _TryAgainError) else type(error).__name__
                raise StorageNotFoundError(
                    f"{shown_uri(uri)} cannot be fetched, {num_attempts} times: {said}"
                ) from error
            time.sleep(_PAUSE_S * 2**num_attempts * random.uniform(0.5, 1.0))


def _another_host_answers(host: str, uri: str) -> bool:
    if _last_answered is None or _last_answered[0] == host:
        return False
    try:
        _connected(*_last_answered, uri, time.monotonic() + _STALL_S).close()
    except (OSError, UsageError, StorageNotFoundError, _UnreachedError, _TryAgainError):
        return False
    return True


def _fetch_once(uri: str, largest_bytes: int) -> int:
    global _last_answered
    started = time.monotonic()
    address = uri
    for _ in range(_MOST_REDIRECTS + 1):
        host, port, target, is_tls = _parts(address, uri)
        with _Line(host, port, is_tls, uri, started + 2 * _STALL_S) as line:
            connection = http.client.HTTPConnection(host, port)
            # Connected already, so that the name is not resolved a second time, to another address.
            connection.sock = cast(socket.socket, line)
            connection.default_port = 443 if is_tls else 80
            connection.request("GET", target, headers={"User-Agent": "latentmill", "Accept-Encoding": "identity"})
            with connection.getresponse() as response:
                if not _is_bare_address(host):
                    _last_answered = host, port
                if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                    address = urljoin(address, _location(response.headers["Location"]))
                    continue
                if response.status == 429 or response.status >= 500:
                    raise _TryAgainError(f"the server answered {response.status}")
                if response.status != 200:
                    raise StorageNotFoundError(f"{shown_uri(uri)}: the server answered {response.status}")
                return _spool(response, line, uri, largest_bytes, started)
    raise StorageNotFoundError(f"{shown_uri(uri)} redirects more than {_MOST_REDIRECTS} times")


def _location(header: str) -> str:
    """What a server redirects to: http.client reads headers as Latin-1, and servers send UTF-8."""
    data = header.encode("latin-1")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return quote(data, safe=_UNQUOTED)


def _parts(address: str, uri: str) -> tuple[str, int, str, bool]:
    """Host, port, path with query, and whether it is https; `uri` is what a person knows the file by."""
    try:
        parts = urlsplit(address)
        host, port = _host_of(parts), parts.port
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_UNQUOTED)
    except ValueError as error:  # UnicodeError is one
        raise UsageError(f"{shown_uri(uri)} is not a web address") from error
    if parts.scheme not in ("http", "https") or not host or " " in host or not address.isprintable():
        raise UsageError(f"{shown_uri(uri)} leads to something that is no http(s) address")
    if "@" in parts.netloc:
        raise UsageError(f"{shown_uri(uri)} holds a user or a password, which would stand in records; it is not read")
    if parts.scheme == "http" and uri.startswith("https:"):
        raise UsageError(f"{shown_uri(uri)} redirects from https to http, which is not followed")
    is_tls = parts.scheme == "https"
    return host, port or (443 if is_tls else 80), target, is_tls


def _host_of(parts: SplitResult) -> str:
    """The name as name servers know it, in ASCII (RFC 3490)."""
    host = parts.hostname or ""
    return host if host.isascii() else host.encode("idna").decode("ascii")


def _is_bare_address(host: str) -> bool:
    return ":" in host or not any(letter.isalpha() for letter in host)


def _connected(host: str, port: int, uri: str, deadline_s: float) -> socket.socket:
    """A connection to one of the addresses of a host, all of which are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise StorageNotFoundError(f"{shown_uri(uri)}: the host has no address") from error
    except socket.gaierror as error:
        if error.errno in (socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_MEMORY):
            raise _UnreachedError(host, "the name server does not answer") from error
        raise StorageNotFoundError(f"{shown_uri(uri)}: the host has no address") from error
    addresses = list(dict.fromkeys(str(place[0]) for *_, place in found))
    for one in addresses:
        if not is_public(one):
            raise UsageError(f"{shown_uri(uri)} leads to an address that is not public, which is not read")
    failed: OSError = TimeoutError()
    for one in addresses:
        left_s = min(_CONNECT_S, deadline_s - time.monotonic())
        if left_s <= 0:
            break
        try:
            return socket.create_connection((one, port), left_s)
        except OSError as error:
            # Of a host that refuses at one address and has no route to another, it is the refusal that counts.
            if failed.errno is None or failed.errno in _NO_ROUTE:
                failed = error
    if failed.errno in _NO_ROUTE:
        raise _UnreachedError(host, failed.strerror or "no route") from failed
    raise failed


class _Line:
    """A connected socket as http.client wants one, that gives up at a deadline, however slowly bytes drip in.

    A time limit of a socket is one of each read, and http.client reads until it has what it wants.

    Attributes:
        deadline_s: by the clock of `time.monotonic`; whoever reads a file moves it on.
    """

    def __init__(self, host: str, port: int, is_tls: bool, uri: str, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._socket = _connected(host, port, uri, deadline_s)
        if is_tls:
            try:
                # The limit of a handshake is one of the whole of it.
                self._socket.settimeout(self._left_s())
                self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
            except BaseException:
                self._socket.close()
                raise

    def _left_s(self) -> float:
        left_s = min(_STALL_S, self.deadline_s - time.monotonic())
        if left_s <= 0:
            raise TimeoutError("the deadline passed")
        return left_s

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(self._left_s())
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb", mode
        return io.BufferedReader(_LineReader(self))

    def receive_into(self, buffer: Any) -> int:
        self._socket.settimeout(self._left_s())
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        """Nothing yet: http.client calls this as soon as it has the headers, and reads on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class _LineReader(io.RawIOBase):
    def __init__(self, line: _Line) -> None:
        self._line = line

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._line.receive_into(buffer)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also when it carries an IPv4 address inside."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        # NAT64, and the old form "::a.b.c.d".
        if ip in ipaddress.ip_network("64:ff9b::/96") or ip in ipaddress.ip_network("::/96"):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(one is not None and not is_public(str(one)) for one in inner):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _spool(response: http.client.HTTPResponse, line: _Line, uri: str, largest_bytes: int, started: float) -> int:
    stated = response.headers.get("Content-Length", "")
    num_bytes = 0
    try:
        with tempfile.TemporaryFile() as spool:
            while block := _block(response, line, uri):
                num_bytes += len(block)
                if num_bytes > largest_bytes:
                    raise StorageNotFoundError(
                        f"{shown_uri(uri)} has more than the {largest_bytes} bytes that are allowed"
                    )
                line.deadline_s = started + 2 * _STALL_S + num_bytes / _SLOWEST_BYTES_PER_S
                spool.write(block)
            if stated.isdecimal() and int(stated) != num_bytes:
                raise _TryAgainError(f"it ended after {num_bytes} of {stated} bytes")
            spool.flush()
            os.lseek(spool.fileno(), 0, os.SEEK_SET)
            return os.dup(spool.fileno())
    except OSError as error:
        raise StorageError(
            f"{shown_uri(uri)} cannot be kept on the disk for its decoder: {error.strerror or error}; make room in "
            "the temporary folder, or set TMPDIR to a larger disk"
        ) from error


def _block(response: http.client.HTTPResponse, line: _Line, uri: str) -> bytes:
    """What has come of a file; the errors of its server are none of the disk."""
    Steps.note()
    try:
        return response.read1(_BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= line.deadline_s:
            raise StorageNotFoundError(f"{shown_uri(uri)} comes at less than {_SLOWEST_BYTES_PER_S} bytes/s") from error
        raise _TryAgainError(type(error).__name__) from error
