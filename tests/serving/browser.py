"""A headless Chromium, driven through the DevTools protocol."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import websockets

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--mute-audio",
    "--remote-debugging-port=0",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


class Page:
    """One tab. errors: what its console and its network complained of; requests: every URL it asked for."""

    def __init__(self, socket: Any, session: str) -> None:
        self._socket, self._session = socket, session
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.errors: list[str] = []
        self.requests: list[str] = []

    async def listen(self) -> None:
        """Sort what comes in, until the browser is gone."""
        async for text in self._socket:
            message = json.loads(text)
            if (waiting := self._answers.pop(message.get("id"), None)) is not None and not waiting.done():
                waiting.set_result(message)
            else:
                self._note(message.get("method"), message.get("params", {}))

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(argument.get("value")) for argument in params["args"]))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Network.loadingFailed" and not params.get("canceled"):
            self.errors.append(f"loading failed: {params['errorText']} {params.get('blockedReason', '')}")

    async def call(self, method: str, **params: Any) -> Any:
        """What a command of the protocol answers."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params, "sessionId": self._session}
        await self._socket.send(json.dumps(message))
        answer = await asyncio.wait_for(self._answers[number], 30)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    async def wait(self, script: str, seconds: float = 20) -> Any:
        """The expression's value once it is true."""
        end = time.monotonic() + seconds
        while not (value := await self.run(script)):
            if time.monotonic() > end:
                body = await self.run("document.body.innerText")
                raise TimeoutError(f"{script}: not true after {seconds} s; errors {self.errors}; page:\n{body}")
            await asyncio.sleep(0.05)
        return value

    async def open(self, url: str) -> None:
        """Go to an address and wait until all of it is there."""
        answer = await self.call("Page.navigate", url=url)  # comes once the new document has taken the old one's place
        if "errorText" in answer:
            raise RuntimeError(f"{url}: {answer['errorText']}")
        await self.wait("document.readyState === 'complete'")

    async def choose_files(self, selector: str, paths: Sequence[Path]) -> None:
        """Put files into a file input, as its dialog does."""
        document = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node["nodeId"])

    async def press(self, key: str) -> None:
        """Press a key and let go of it."""
        params = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r", " ": " "}.get(key)
        down: dict[str, Any] = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        await self.call("Input.dispatchKeyEvent", **down, **params)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **params)

    async def resize(self, width: int, height: int, scale: float = 1, mobile: bool = False) -> None:
        """Give the page a screen of so many CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )


@asynccontextmanager
async def browse(folder: Path, microphone: Path) -> AsyncIterator[Page]:
    """A tab of a browser of its own, whose microphone plays a WAV file over and over."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    process = subprocess.Popen(
        [
            CHROMIUM,
            *FLAGS,
            f"--use-file-for-fake-audio-capture={microphone}",
            f"--user-data-dir={profile}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = profile / "DevToolsActivePort"
        while not (port.exists() and len(lines := port.read_text().split()) == 2):  # pytest's timeout ends it
            assert process.poll() is None, "chromium: found it gone before it could be driven"
            await asyncio.sleep(0.05)
        async with websockets.connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", max_size=None) as socket:
            await socket.send(json.dumps({"id": -1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
            target = (await answer_to(socket, -1))["targetId"]
            attach = {"targetId": target, "flatten": True}
            await socket.send(json.dumps({"id": -2, "method": "Target.attachToTarget", "params": attach}))
            page = Page(socket, (await answer_to(socket, -2))["sessionId"])
            listening = asyncio.create_task(page.listen())
            for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
                await page.call(f"{domain}.enable")
            yield page
            listening.cancel()
    finally:
        process.kill()
        process.wait()


async def answer_to(socket: Any, number: int) -> Any:
    """The result of a command that was sent before anything listened."""
    while (message := json.loads(await socket.recv())).get("id") != number:
        pass
    return message["result"]
