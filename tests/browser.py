"""A headless Chromium driven over its DevTools protocol by a pipe (descriptors 3 and 4), without any package for it.

https://chromedevtools.github.io/devtools-protocol/ ; each message is one JSON document that ends with a NUL.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEADLINE_S = 20.0
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}


class Browser:
    """One Chromium process with a profile of its own; leaving the `with` block ends it."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        options = [
            "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu",
            "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--force-color-profile=srgb",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # its sandbox refuses to start for root
        ]  # fmt: skip
        read_in, self._write = os.pipe()
        self._read, write_out = os.pipe()
        script = f'exec 3<&{read_in} 4>&{write_out}; exec "$@"'
        self._log = (profile.parent / "chromium.log").open("w")
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, *options, "about:blank"],
            pass_fds=(read_in, write_out),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        os.close(read_in)
        os.close(write_out)
        self._news = threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._number = 0
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(timeout=DEADLINE_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._reader.join(DEADLINE_S)
            os.close(self._write)
            os.close(self._read)
            self._log.close()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of one command."""
        with self._news:
            self._number += 1
            number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        with self._news:
            assert self._news.wait_for(lambda: number in self._answers, DEADLINE_S), f"no answer to {method}"
            answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def events(self, session: str, method: str) -> list[dict[str, Any]]:
        """Parameters of all events of this name so far."""
        with self._news:
            return [e["params"] for e in self._events if e.get("sessionId") == session and e["method"] == method]

    def open(self, url: str, *, width_px: int = 1100, height_px: int = 900, dark: bool = False) -> Tab:
        """A new tab in a context of its own (no cookies, no cache), loaded."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log", "DOM", "Audits", "Network"):
            tab.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        tab.resize(width_px, height_px)
        tab.call("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return tab

    def _listen(self) -> None:
        buffer = b""
        while chunk := os.read(self._read, 1 << 16):
            *messages, buffer = (buffer + chunk).split(b"\0")
            with self._news:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._answers[message["id"]] = message
                    else:
                        self._events.append(message)
                self._news.notify_all()


class Tab:
    """One page, as a person with a keyboard meets it."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target

    def close(self) -> None:
        """The tab is gone; what it said can still be read."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command to this tab."""
        return self._browser.call(method, self._session, **parameters)

    def resize(self, width_px: int, height_px: int) -> None:
        """The window has this size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=height_px, deviceScaleFactor=1, mobile=False
        )

    def value(self, expression: str) -> Any:
        """What the JavaScript expression gives, a promise awaited."""
        got = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait(self, expression: str, deadline_s: float = DEADLINE_S) -> Any:
        """The value of the expression, once it is true."""
        end = time.monotonic() + deadline_s
        while not (got := self.value(expression)):
            assert time.monotonic() < end, f"not so within {deadline_s} s: {expression}\n{self.text('body')}"
            time.sleep(0.02)
        return got

    def text(self, selector: str) -> str:
        """What can be read in the element."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def choose_file(self, selector: str, path: Path) -> None:
        """The file input has this file, as if a person had chosen it."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key: str, *, modifiers: int = 0) -> None:
        """The key goes down and up where the focus is; modifiers as in Input.dispatchKeyEvent (2 Ctrl, 8 Shift)."""
        code = KEYS.get(key, ord(key.upper()[0]))
        text = {"Enter": "\r", " ": " "}.get(key, "" if key in KEYS or modifiers & 2 else key)
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """The text is typed where the focus is."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> Path:
        """The path, where a PNG of the whole page is now."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def complaints(self) -> list[str]:
        """What the browser says against the page: policy violations, uncaught errors, console errors."""
        log = [e["entry"] for e in self._browser.events(self._session, "Log.entryAdded")]
        said = [f"{e['source']}: {e['text']}" for e in log if e["source"] != "network"]
        said += [str(e["exceptionDetails"]) for e in self._browser.events(self._session, "Runtime.exceptionThrown")]
        said += [str(e) for e in self._browser.events(self._session, "Runtime.consoleAPICalled")]
        return said + [str(e["issue"]) for e in self._browser.events(self._session, "Audits.issueAdded")]

    def requested(self) -> list[str]:
        """URLs of everything that the page asked for."""
        return [e["request"]["url"] for e in self._browser.events(self._session, "Network.requestWillBeSent")]
