"""Files behind http:// and https://, for jobs that were told to read them: fetched whole, from public addresses only.

A table of addresses comes from anyone, and whoever fetches what it says reaches what this machine reaches: its cloud's
metadata, its neighbours. So a name is resolved first, every address of it must be public, the connection goes to the
very address that was checked; each redirect starts over. Proxies of the environment are not used. Not where it is
decided whether the web may be read at all (`storage.allow_web_inputs`). Called by `storage`.

A server that fails, stalls or sends too much is the fault of its file, not of this run: StorageNotFoundError, so that
one dead host among a million does not keep its neighbours from being decided.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import random
import socket
import ssl
import tempfile
import time
from contextlib import closing
from urllib.parse import urljoin, urlsplit

from pipeline.errors import StorageNotFoundError, UsageError
from pipeline.store import shown_uri

_MOST_REDIRECTS = 5
_ATTEMPTS = 3
_PAUSE_S = 0.5
_STALL_S = 20.0
# Of a whole file: a server that sends a byte now and then must not hold a shard for ever.
_SLOWEST_BYTES_PER_S = 20_000
_BLOCK_BYTES = 1 << 20


class _TryAgainError(Exception):
    """The server may yet answer."""


def fetch(uri: str, largest_bytes: int) -> int:
    """The file as a descriptor of an unnamed temporary file, at its beginning. The caller closes it.

    Raises:
        UsageError: the address, or one that it redirects to, is not http(s), holds credentials, or is not public.
        StorageNotFoundError: there is no such file, it has more than `largest_bytes`, or the server keeps failing.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))
        try:
            return _fetch_once(uri, largest_bytes)
        except (_TryAgainError, http.client.HTTPException, OSError) as error:
            last: Exception = error
    said = str(last) if isinstance(last, _TryAgainError) else type(last).__name__
    raise StorageNotFoundError(f"{shown_uri(uri)} cannot be fetched, {_ATTEMPTS} times: {said}") from last


def _fetch_once(uri: str, largest_bytes: int) -> int:
    started = time.monotonic()
    address = uri
    for _ in range(_MOST_REDIRECTS + 1):
        with closing(_connection(address, uri)) as connection:
            parts = urlsplit(address)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "latentmill", "Accept-Encoding": "identity"})
            with connection.getresponse() as response:
                if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                    address = urljoin(address, response.headers["Location"])
                    continue
                if response.status == 429 or response.status >= 500:
                    raise _TryAgainError(f"the server answered {response.status}")
                if response.status != 200:
                    raise StorageNotFoundError(f"{shown_uri(uri)}: the server answered {response.status}")
                return _spool(response, uri, largest_bytes, started)
    raise StorageNotFoundError(f"{shown_uri(uri)} redirects more than {_MOST_REDIRECTS} times")


def _connection(address: str, uri: str) -> http.client.HTTPConnection:
    """A connection to a public address; `uri` is what a person knows the file by."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{shown_uri(uri)} is not a web address") from error
    if parts.scheme not in ("http", "https") or not host or not address.isascii() or not address.isprintable():
        raise UsageError(f"{shown_uri(uri)} leads to something that is no http(s) address")
    if "@" in parts.netloc:
        raise UsageError(f"{shown_uri(uri)} holds a user or a password, which would stand in records; it is not read")
    if parts.scheme == "http" and uri.startswith("https:"):
        raise UsageError(f"{shown_uri(uri)} redirects from https to http, which is not followed")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
            raise _TryAgainError("the name server does not answer") from error
        raise StorageNotFoundError(f"{shown_uri(uri)}: the host has no address") from error
    addresses = [str(place[0]) for *_, place in found]
    for one in addresses:
        if not is_public(one):
            raise UsageError(f"{shown_uri(uri)} leads to an address that is not public, which is not read")
    connection = http.client.HTTPConnection(host, port, timeout=_STALL_S)
    # Connected here, so that the name is not resolved a second time, to another address.
    plain = socket.create_connection((addresses[0], port), _STALL_S)
    if parts.scheme == "https":
        try:
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        connection.default_port = 443
    else:
        connection.sock = plain
    return connection


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


def _spool(response: http.client.HTTPResponse, uri: str, largest_bytes: int, started: float) -> int:
    stated = response.headers.get("Content-Length", "")
    num_bytes = 0
    with tempfile.TemporaryFile() as spool:
        while block := response.read(_BLOCK_BYTES):
            num_bytes += len(block)
            if num_bytes > largest_bytes:
                raise StorageNotFoundError(f"{shown_uri(uri)} has more than the {largest_bytes} bytes that are allowed")
            if time.monotonic() - started > 2 * _STALL_S + num_bytes / _SLOWEST_BYTES_PER_S:
                raise StorageNotFoundError(f"{shown_uri(uri)} comes at less than {_SLOWEST_BYTES_PER_S} bytes/s")
            spool.write(block)
        if stated.isdecimal() and int(stated) != num_bytes:
            raise _TryAgainError(f"it ended after {num_bytes} of {stated} bytes")
        spool.flush()
        os.lseek(spool.fileno(), 0, os.SEEK_SET)
        return os.dup(spool.fileno())
