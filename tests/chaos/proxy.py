"""A way to an S3 store on which things go wrong, by seed: a process of its own, so that killing a job does not kill it.

    python -m chaos.proxy --upstream http://127.0.0.1:8333 --port 9000 --seed 7 --rate 0.3 --inputs-bucket shards
    python -m chaos.proxy --upstream http://127.0.0.1:8333 --port 9000 --policy POLICY.json --role NAME --bucket latents

S3 signatures cover the header Host, so every header, Host among them, goes on as it came. Whether the n-th request of
a key class is spoiled depends on the seed alone; of the kinds of fault that fit a request, the one that its class has
seen least is taken, and none that it has seen `--most` times. `/-/report` is the proxy's own and says what was done.

Kinds that never reach the store: error_500, slow_down_503, conflict_409, expired_token, reset_before, and outage (the
class answers 503 for half a second). Of uploads: half_upload (the store sees a part, then a reset), lost_response,
error_after and precondition_412 (landed, and the answer is a reset, a 500 or a 412), late_write (a 500 now, landed
later). Of downloads: cut_body, short_body (header and body agree and are too short), flipped_byte. And delay.

With `--policy` it lets pass what a bucket policy of AWS allows a role, refuses the rest with 403, and reports it.

Not spoiled: the bytes of lists and of ranges. Nothing in S3's protocol lets a client notice a flipped bit there; TLS
does, and a digest in the input.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from chaos.policy import BucketPolicy
from yarl import URL

CLASSES = ("plans", "data", "records", "snapshots", "inputs", "dataset")
_PARTS = {"plans": "plans", "data": "data", "commits": "records", "snapshots": "snapshots", "manifests": "snapshots"}

BEFORE = ("error_500", "slow_down_503", "expired_token", "reset_before", "outage", "delay")
UPLOADS = ("conflict_409", "half_upload", "lost_response", "error_after", "late_write")
CREATES = ("precondition_412",)
DOWNLOADS = ("cut_body", "short_body")
WHOLE_DOWNLOADS = ("flipped_byte",)

_ANSWERS = {
    "error_500": (500, "InternalError"),
    "slow_down_503": (503, "SlowDown"),
    "outage": (503, "SlowDown"),
    "conflict_409": (409, "ConditionalRequestConflict"),
    "expired_token": (400, "ExpiredToken"),
    "error_after": (500, "InternalError"),
    "late_write": (500, "InternalError"),
    "precondition_412": (412, "PreconditionFailed"),
    "denied": (403, "AccessDenied"),
}
_OUTAGE_S = 0.5
_DELAY_S = 0.3
_LATE_S = 0.2
_HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive", "expect"}


def possible_pairs() -> set[tuple[str, str]]:
    """Every (kind, class) that a run of the pipeline can meet: inputs are only read, in ranges."""
    pairs = {(kind, name) for kind in (*BEFORE, *DOWNLOADS) for name in CLASSES}
    pairs |= {(kind, name) for kind in (*UPLOADS, *WHOLE_DOWNLOADS) for name in CLASSES if name != "inputs"}
    # Data files are the only objects that are not created once.
    return pairs | {(kind, name) for kind in CREATES for name in CLASSES if name not in ("inputs", "data")}


def class_of(path: str, prefix: str, inputs_bucket: str) -> str:
    """The key class of a request, by the parts of its path, or of the prefix that it lists."""
    bucket, _, key = path.lstrip("/").partition("/")
    if bucket == inputs_bucket:
        return "inputs"
    parts = (key or prefix).split("/")
    return next((_PARTS[part] for part in parts if part in _PARTS), "dataset")


def fitting_kinds(method: str, is_conditional: bool, is_list: bool, is_range: bool) -> tuple[str, ...]:
    """The kinds of fault that can strike a request."""
    if method in ("PUT", "POST"):
        return (*BEFORE, *UPLOADS, *(CREATES if is_conditional else ()))
    if method == "GET":
        return (*BEFORE, *DOWNLOADS, *(() if is_list or is_range else WHOLE_DOWNLOADS))
    return BEFORE


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Proxy:
    """The handler of all requests, and the account of what it did."""

    def __init__(
        self,
        upstream: str,
        seed: int = 0,
        rate: float = 0.0,
        most: int = 1_000_000,
        inputs_bucket: str = "shards",
        policy: BucketPolicy | None = None,
        role: str = "",
    ) -> None:
        self._upstream = upstream.rstrip("/")
        self._seed = seed
        self._rate = rate
        self._most = most
        self._inputs_bucket = inputs_bucket
        self._policy = policy
        self._role = role
        self._denied: list[str] = []
        self._num_requests: Counter[str] = Counter()
        self._done: Counter[tuple[str, str]] = Counter()
        self._outage_until_s: dict[str, float] = {}
        self._late: set[asyncio.Task[None]] = set()
        self._session: ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request."""
        if request.path == "/-/report":
            return web.json_response(
                {
                    "requests": self._num_requests.total(),
                    "faults": [[kind, name, number] for (kind, name), number in sorted(self._done.items())],
                    "denied": self._denied,
                }
            )
        body = await request.read()
        if self._policy is not None and not self._policy.is_allowed(
            self._role, request.method, request.path, request.query, request.headers
        ):
            self._denied.append(f"{request.method} {request.path_qs}")
            return _error("denied")
        name = class_of(request.path, request.query.get("prefix", ""), self._inputs_bucket)
        kind = self._kind_for(request, name)
        if kind is not None:
            self._done[kind, name] += 1
        return await self._strike(kind, name, request, body)

    def _kind_for(self, request: web.Request, name: str) -> str | None:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._outage_until_s.get(name, 0.0):
            return "outage"
        number = self._num_requests[name]
        self._num_requests[name] += 1
        chance = random.Random(f"{self._seed} {name} {number}")
        if chance.random() >= self._rate:
            return None
        kinds = fitting_kinds(
            request.method, "If-None-Match" in request.headers, "list-type" in request.query, "Range" in request.headers
        )
        least = min(self._done[kind, name] for kind in kinds)
        if least >= self._most:
            return None
        kind = chance.choice([kind for kind in kinds if self._done[kind, name] == least])
        if kind == "outage":
            self._outage_until_s[name] = now_s + _OUTAGE_S
        return kind

    async def _strike(self, kind: str | None, name: str, request: web.Request, body: bytes) -> web.StreamResponse:
        if kind == "reset_before":
            return self._reset(request)
        if kind == "half_upload":
            await self._forward_half(request, body)
            return self._reset(request)
        if kind == "late_write":
            task = asyncio.create_task(self._forward_late(request, body))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            return _error(kind)
        if kind == "delay":
            await asyncio.sleep(_DELAY_S)
        elif kind in _ANSWERS and kind not in ("error_after", "precondition_412"):
            return _error(kind)
        answer = await self._forward(request, body)
        if kind == "lost_response":
            return self._reset(request)
        if kind in ("error_after", "precondition_412"):
            return _error(kind)
        if kind == "flipped_byte" and answer.body and answer.status == 200:
            middle = len(answer.body) // 2
            flipped = bytes([answer.body[middle] ^ 1])
            answer = _Answer(answer.status, answer.headers, answer.body[:middle] + flipped + answer.body[middle + 1 :])
        elif kind == "short_body":
            answer = _Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2])
        return await self._send(request, answer, is_cut=kind == "cut_body")

    async def _forward(self, request: web.Request, body: bytes | AsyncIterator[bytes]) -> _Answer:
        if self._session is None:
            self._session = ClientSession(
                connector=TCPConnector(limit=64),
                cookie_jar=DummyCookieJar(),
                timeout=ClientTimeout(total=120),
                auto_decompress=False,
            )
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP_BY_HOP}
        # As it came: quoting it anew could change what was signed.
        url = URL(self._upstream + request.raw_path, encoded=True)
        async with self._session.request(
            request.method, url, data=body or None, headers=headers, allow_redirects=False, skip_auto_headers=_NO_EXTRAS
        ) as response:
            fields = [(key, value) for key, value in response.headers.items() if key.lower() not in _HOP_BY_HOP]
            if request.method == "HEAD" and "Content-Length" in response.headers:
                fields.append(("Content-Length", response.headers["Content-Length"]))
            return _Answer(response.status, fields, await response.read())

    async def _forward_half(self, request: web.Request, body: bytes) -> None:
        """An upload whose length header promises more than comes."""
        reader, writer = await asyncio.open_connection(*_host_and_port(self._upstream))
        lines = [f"{request.method} {request.raw_path} HTTP/1.1"]
        lines += [f"{k}: {v}" for k, v in request.headers.items() if k.lower() not in ("expect", "connection")]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body[: len(body) // 2])
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()
        del reader

    async def _forward_late(self, request: web.Request, body: bytes) -> None:
        await asyncio.sleep(_LATE_S)
        try:
            await self._forward(request, body)
        except ClientError:
            return

    def _reset(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _send(self, request: web.Request, answer: _Answer, is_cut: bool) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status)
        for key, value in answer.headers:
            response.headers.add(key, value)
        if request.method != "HEAD":
            response.content_length = len(answer.body)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        await response.write(answer.body[: len(answer.body) // 2] if is_cut else answer.body)
        if is_cut:
            self._reset(request)
        else:
            await response.write_eof()
        return response

    async def close(self, _app: web.Application) -> None:
        """Lets late writes land, then closes the connections to the store."""
        await asyncio.gather(*self._late, return_exceptions=True)
        if self._session is not None:
            await self._session.close()


_NO_EXTRAS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


def _host_and_port(upstream: str) -> tuple[str, int]:
    url = URL(upstream)
    assert url.host is not None
    assert url.port is not None
    return url.host, url.port


def _error(kind: str) -> web.Response:
    status, code = _ANSWERS[kind]
    text = f"<Error><Code>{code}</Code><Message>{kind} on the way</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--inputs-bucket", default="shards")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--role", default="")
    parser.add_argument("--bucket", default="latents")
    flags = parser.parse_args()
    policy = None if flags.policy is None else BucketPolicy(flags.policy, flags.bucket)
    proxy = Proxy(flags.upstream, flags.seed, flags.rate, flags.most, flags.inputs_bucket, policy, flags.role)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    app.on_cleanup.append(proxy.close)
    web.run_app(app, host="127.0.0.1", port=flags.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
