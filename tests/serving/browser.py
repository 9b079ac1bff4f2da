"""Chromium, held by its debugging pipe: a page that is clicked and typed into, as people do."""

import contextlib
import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
# the browser reads orders from descriptor 3 and answers on 4
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 60.0  # seconds


class Page:
    """One page of a browser."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders, self._answers = orders, answers
        self._numbers, self._rest = itertools.count(1), b""
        self._session = ""

    def ask(self, method: str, **params: Any) -> Any:
        """Return the result of a command of the DevTools protocol."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._orders, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0"
        )
        while True:
            message = self._message()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _message(self) -> Any:
        while b"\0" not in self._rest:
            more = os.read(self._answers, 1 << 16)
            assert more, "the browser is gone"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def open(self, address: str, *, width: int, height: int) -> None:
        """Show an address in a window of a size, in pixels."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true, of a page that may not be there yet."""
        end = time.monotonic() + PATIENCE
        careful = f"(() => {{ try {{ return !!({expression}); }} catch {{ return false; }} }})()"
        while not self.value(careful):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Click an element, which must be there and be allowed."""
        self.until(f"!(document.querySelector({json.dumps(selector)})?.disabled ?? true)")
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{field}.value = {json.dumps(text)}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def _moved(descriptor: int) -> int:
    """Return a copy of a descriptor that is neither 3 nor 4, and close it."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(descriptor)
    return copy


@contextmanager
def browsing(chromium: str, address: str, profile: Path, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Open an address in a browser of its own, until the block ends."""
    read_orders, orders, answers, write_answers = (_moved(end) for pair in (os.pipe(), os.pipe()) for end in pair)
    command = [chromium, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    start = [sys.executable, "-c", START, str(read_orders), str(write_answers), *command]
    browser = subprocess.Popen(start, pass_fds=(read_orders, write_answers), stderr=subprocess.DEVNULL)
    os.close(read_orders)
    os.close(write_answers)
    page = Page(orders, answers)
    try:
        page.open(address, width=width, height=height)
        yield page
    finally:
        with contextlib.suppress(OSError, AssertionError):
            page.ask("Browser.close")
        os.close(orders)
        try:
            browser.wait(20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
        os.close(answers)
