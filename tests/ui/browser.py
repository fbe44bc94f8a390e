"""Headless Chromium, driven over its own protocol: open a page, run code in it, look at it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from elis_gateway.tasks import spawn

__all__ = ["CHROMIUM", "Page", "browser"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--no-first-run", "--disable-dev-shm-usage", "--disable-extensions", "--disable-component-update",
    "--no-default-browser-check", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
_PATIENCE = 60.0


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.said: list[str] = []
        """What the page complained of: console errors, exceptions, what its security policy forbade."""

    async def listen(self) -> None:
        """Read what the browser says, until it says no more."""
        async for message in self._socket:
            told = orjson.loads(message.data)
            if (waiting := self._answers.pop(told.get("id", 0), None)) is not None and not waiting.done():
                waiting.set_result(told)
            elif told.get("method") == "Runtime.exceptionThrown":
                self.said.append(orjson.dumps(told["params"]["exceptionDetails"]).decode())
            elif told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.said.append(told["params"]["entry"]["text"])

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(orjson.dumps({"id": number, "method": method, "params": params}).decode())
        async with asyncio.timeout(_PATIENCE):
            told = await answer
        assert "error" not in told, told
        result: dict[str, Any] = told["result"]
        return result

    async def open(self, url: str) -> None:
        """Go there."""
        await self.do("Page.navigate", url=url)

    async def run(self, code: str) -> Any:
        """The value of an expression; a promise is awaited."""
        told = await self.do("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, code: str, *, within: float = 60.0) -> Any:
        """Wait until an expression is true."""
        async with asyncio.timeout(within):
            while not (value := await self.run(code)):
                await asyncio.sleep(0.02)
        return value

    async def look(
        self, file: Path | None = None, *, width: int, height: int, dark: bool, phone: bool = False
    ) -> bytes:
        """A picture (PNG) of the whole page at this width, in this scheme."""
        scale = 2 if phone else 1
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        await self.do("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.do("Emulation.setEmulatedMedia", features=[scheme])
        await asyncio.sleep(0.3)
        shot = await self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        picture = base64.b64decode(shot["data"])
        if file is not None:
            file.write_bytes(picture)
        return picture


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A browser with a profile of its own and one empty tab; it is gone afterwards."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            port = await _port(Path(folder))
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    tabs = orjson.loads(await response.read())
                address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    page = Page(socket)
                    listening = spawn(page.listen(), name="browser")
                    for domain in ("Page", "Runtime", "Log"):
                        await page.do(f"{domain}.enable")
                    yield page
                    listening.cancel()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _port(folder: Path) -> int:
    """Where it listens: it writes that down when it does."""
    file = folder / "DevToolsActivePort"
    async with asyncio.timeout(_PATIENCE):
        while not (file.exists() and file.read_text().count("\n")):
            await asyncio.sleep(0.02)
    return int(file.read_text().splitlines()[0])
