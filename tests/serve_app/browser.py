"""A headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
CALL_TIMEOUT_S = 60.0


def find_chromium() -> str | None:
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser. Events are read while a call waits for its answer.

    Args:
        folder: Scratch folder for the profile and `downloads/`.

    Attributes:
        problems: Uncaught exceptions, console errors and broken security policies, as text.
        failed_loads: Requests the page made that failed or were answered with 400 and above, as text.
    """

    def __init__(self, folder: Path) -> None:
        program = find_chromium()
        assert program is not None, "no Chromium is installed"
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        self.problems: list[str] = []
        self.failed_loads: list[str] = []
        profile = folder / "profile"
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._loop = asyncio.new_event_loop()
        self._number = 0
        try:
            port_file = profile / "DevToolsActivePort"
            wait_until(lambda: port_file.is_file() and len(port_file.read_text().split()) == 2, "Chromium to start")
            self._run(self._connect(int(port_file.read_text().split()[0])))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        if hasattr(self, "_session"):
            self._run(self._session.close())
        self._loop.close()

    def forget(self) -> None:
        """Forget problems, downloads and what pages kept in the tab."""
        self.problems.clear()
        self.failed_loads.clear()
        for file in self.downloads.iterdir():
            file.unlink()
        if self.value("location.protocol") == "http:":
            self.value("sessionStorage.clear()")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self._run(self._call(method, parameters))

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression, or the promise it gives, comes to."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until a JavaScript expression is true."""
        wait_until(lambda: self.value(f"Boolean({expression})"), expression)

    def text(self, selector: str) -> str:
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str, *, key: str | None = None) -> None:
        """Put text where the keyboard would, then press a key."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        if text:
            self.call("Input.insertText", text=text)
        if key:
            self.press(key)

    def press(self, key: str, *, shift: bool = False, ctrl: bool = False, alt: bool = False) -> None:
        text = "" if ctrl else {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Backspace": 8, "Escape": 27, "Tab": 9, " ": 32}.get(key, 0)
        code = code or {"z": 90, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}.get(key, 0)
        shared = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift + 2 * ctrl + alt}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **shared)
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def set_range(self, selector: str, value: float) -> None:
        """Move a slider, as a person would: with an `input` event."""
        self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {value};"
            " e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def select(self, selector: str, value: str) -> None:
        """Pick an option of a list."""
        self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            " e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def rectangle(self, selector: str) -> dict[str, float]:
        """x, y, width and height in the window, scrolled into view first."""
        return self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'}); const {x, y, width, height} = e.getBoundingClientRect();"
            " return {x, y, width, height}; })()"
        )

    def drag(self, start: tuple[float, float], end: tuple[float, float], *, alt: bool = False) -> None:
        """Press the left button, move, let go."""
        held = {"clickCount": 1, "modifiers": int(alt)}
        for kind, (x, y), buttons in (
            ("mouseMoved", start, 0),
            ("mousePressed", start, 1),
            ("mouseMoved", end, 1),
            ("mouseReleased", end, 0),
        ):
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, **held)

    def press_on(self, selector: str) -> None:
        """A click or a tap in the middle of an element, as by hand: whatever lies over it is hit instead."""
        seen: list[dict[str, float]] = []

        def is_still() -> bool:  # the page may be scrolling
            seen.append(self.rectangle(selector))
            return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3] == seen[-4]

        wait_until(is_still, f"{selector} to stand still")
        frame = seen[-1]
        middle = (frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
        self.drag(middle, middle)

    def names(self) -> list[tuple[str, str]]:
        """Role and name of what the accessibility tree offers to act on."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        found = []
        for node in nodes:
            role = node.get("role", {}).get("value", "")
            is_focusable = any(entry["name"] == "focusable" for entry in node.get("properties", []))
            if is_focusable and not node["ignored"] and role != "RootWebArea":
                found.append((role, node.get("name", {}).get("value", "")))
        return found

    def point(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def downloaded(self, name: str) -> Path:
        """A download, when all of it is here."""
        path = self.downloads / name  # at first an empty file that keeps the name
        wait_until(
            lambda: path.is_file() and path.stat().st_size > 0,
            f"the download of {name}; there: {[p.name for p in self.downloads.iterdir()]}",
        )
        return path

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """The window, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _run(self, what: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(what, CALL_TIMEOUT_S))

    async def _connect(self, port: int) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            pages = [target for target in await answer.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            entry = parameters["entry"]
            (self.failed_loads if entry["source"] == "network" else self.problems).append(
                f"{entry['text']} {entry.get('url', '')}"
            )


def wait_until(is_done: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Ask again and again until it is so."""
    end = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.03)
