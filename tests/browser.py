"""A real, headless Chromium that a test drives through its debugging protocol.

Not a fixture and not a check: it opens a page at a size, says what the console said, and takes pictures.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_START_TIMEOUT_S = 120.0
_COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")


@dataclass
class Shown:
    """A page as a browser shows it.

    Attributes:
        complaints: what the console, the page's policy and the network said.
        load_ms: from the start of the navigation to the end of its `load` event.
    """

    call: Callable[..., Awaitable[dict[str, Any]]]
    complaints: list[str] = field(default_factory=list)
    load_ms: float = 0.0

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        done = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    async def picture(self, *, whole: bool = False) -> bytes:
        """PNG of what is in sight, or of the whole page."""
        done = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(done["data"])


@contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """The address of a running browser's debugger; it is ended by its process id."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        until = time.monotonic() + _START_TIMEOUT_S
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None, f"Chromium ended with {process.returncode}"
            assert time.monotonic() < until, "Chromium does not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def show(
    debugger: str,
    url: str,
    look: Callable[[Shown], Awaitable[Any]],
    *,
    width_px: int,
    height_px: int = 900,
    media: dict[str, str] | None = None,
) -> tuple[Shown, Any]:
    """Opens a page in a tab of its own and returns it with what `look` made of it.

    Args:
        media: features of the reader's system, such as {"prefers-color-scheme": "dark"}.
    """
    return asyncio.run(_show(debugger, url, look, width_px, height_px, media or {}))


async def _show(
    debugger: str,
    url: str,
    look: Callable[[Shown], Awaitable[Any]],
    width_px: int,
    height_px: int,
    media: dict[str, str],
) -> tuple[Shown, Any]:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{debugger}/json/new?about:blank") as answer:
            tab = await answer.json(content_type=None)
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
            loaded = asyncio.Event()
            sent = 0

            async def call(method: str, **params: Any) -> dict[str, Any]:
                nonlocal sent
                sent += 1
                answers[sent] = asyncio.get_running_loop().create_future()
                await socket.send_json({"id": sent, "method": method, "params": params})
                return await answers[sent]

            shown = Shown(call)

            async def listen() -> None:
                async for message in socket:
                    told = json.loads(message.data)
                    if "id" in told:
                        answers.pop(told["id"]).set_result(told.get("result", {"error": told.get("error")}))
                    elif told["method"] == "Page.loadEventFired":
                        loaded.set()
                    elif told["method"] in _COMPLAINTS:
                        shown.complaints.append(json.dumps(told["params"])[:500])

            listener = asyncio.create_task(listen())
            try:
                for domain in ("Page", "Log", "Runtime", "Network"):
                    await call(f"{domain}.enable")
                size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": width_px < 600}
                await call("Emulation.setDeviceMetricsOverride", **size)
                features = [{"name": name, "value": value} for name, value in media.items()]
                await call("Emulation.setEmulatedMedia", features=features)
                await call("Page.navigate", url=url)
                await asyncio.wait_for(loaded.wait(), 120)
                timing = (
                    "(() => { const t = performance.getEntriesByType('navigation')[0]; return t.loadEventStart })()"
                )
                shown.load_ms = await shown.evaluate(timing)
                found = await look(shown)
            finally:
                listener.cancel()
        async with session.get(f"{debugger}/json/close/{tab['id']}"):
            pass
    return shown, found
