"""A real Chromium without a window, and pages in it that are looked at and used as a person would.

It is told what to do by the DevTools protocol over two pipes, so that it opens no port which somebody else could use.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from contextlib import suppress

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
WAIT_S = 300.0  # ends a wait for what will not come, however slow the machine is
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # tests may run as root, and open pages of this repository alone
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--window-size=1024,768",
    "--remote-debugging-pipe",
)


class Chromium:
    """The browser, with a profile of its own, until the block ends: `with Chromium() as browser: ...`."""

    def __enter__(self):
        self._home = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        given = [(_above(theirs_in), 3), (_above(theirs_out), 4)]  # where Chromium looks for them
        silent = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={self._home.name}", "about:blank"]
        self._process = os.posix_spawn(
            CHROMIUM,
            command,
            {**os.environ, "HOME": self._home.name},
            file_actions=[*silent, *((os.POSIX_SPAWN_DUP2, ours, theirs) for ours, theirs in given)],
            setsid=True,
        )
        for ours in (theirs_in, theirs_out, *(ours for ours, _ in given)):
            os.close(ours)
        self._rest, self._number, self._pages = b"", 0, {}
        return self

    def __exit__(self, *_):
        with suppress(AssertionError, OSError):
            self.send("Browser.close")
            while True:  # until its last process has let go of the pipe
                self._message(time.monotonic() + WAIT_S)
        os.close(self._out)
        os.close(self._in)
        with suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        self._home.cleanup()

    def open(self, url):
        """A page at this address, when it has loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        page.go(url)
        return page

    def send(self, method, session=None, **given):
        """What the browser answers to a command. What it tells of its own accord meanwhile goes to its page."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given, **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + WAIT_S
        while (found := self._message(until)).get("id") != self._number:
            if page := self._pages.get(found.get("sessionId")):
                page.told(found["method"], found["params"])
        assert "error" not in found, f"{method}: {found['error']}"
        return found["result"]

    def _message(self, until):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
            assert ready, "Chromium gives no answer"
            read = os.read(self._in, 2**16)
            assert read, "Chromium has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


class Page:
    """A page in its tab.

    Attributes:
        requests: addresses that it has asked for, in their order.
        troubles: errors of its scripts, and what the browser has kept it from.
    """

    def __init__(self, browser, session):
        self._browser, self._session = browser, session
        self.requests, self.troubles = [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def go(self, url):
        """Loads another address here."""
        failed = self._send("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script):
        """The value of a line of JavaScript in the page; a promise is waited for."""
        found = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, script):
        """Waits until a line of JavaScript is true, and gives its value."""
        until = time.monotonic() + WAIT_S
        while not (found := self.run(script)):
            assert time.monotonic() < until, f"never true: {script}; the page says {self.text()!r}, {self.troubles}"
            time.sleep(0.02)
        return found

    def wait_for(self, text, where="body"):
        """Waits until this text can be read in an element, and gives all that can be read there."""
        return self.wait(f"(said => said.includes({json.dumps(text)}) && said)({_at(where)}?.innerText ?? '')")

    def text(self, where="body"):
        """What a person can read in an element, which a selector of CSS names."""
        return self.run(f"{_at(where)}?.innerText ?? ''")

    def click(self, where):
        """Presses the mouse's button in the middle of an element, as soon as that is there and can be pressed."""
        self.wait(f"{_at(where)} && !{_at(where)}.disabled")
        box = f"{_at(where)}.scrollIntoView({{block: 'center'}}), {_at(where)}.getBoundingClientRect().toJSON()"
        box = self.run(f"({box})")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def write(self, where, text):
        """Clicks into a field and writes at its end."""
        self.click(where)
        self._send("Input.insertText", text=text)

    def choose(self, where, value):
        """Takes one of the options of a select."""
        chosen = f"{_at(where)}.value = {json.dumps(value)}"
        self.run(f"{chosen}, {_at(where)}.dispatchEvent(new Event('change', {{bubbles: true}}))")

    def screenshot(self, path):
        """Writes what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def told(self, event, given):
        """Keeps what the browser tells of this page."""
        if event == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.troubles.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.troubles.append(given["entry"]["text"])

    def _send(self, method, **given):
        return self._browser.send(method, self._session, **given)


def _at(where):
    return f"document.querySelector({json.dumps(where)})"


def _above(number):
    """A copy beyond the numbers that the browser is given its pipes at."""
    return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10)
