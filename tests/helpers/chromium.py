"""Chromium without a window, driven by its DevTools protocol through pipes (--remote-debugging-pipe)."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

PATH = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage --hide-scrollbars
    --remote-debugging-pipe --window-size=1300,900""".split()
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}


class Browser:
    """One page in a browser."""

    def __init__(self, read, write):
        self.read, self.write = read, write
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """The result of a command of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self.number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, path):
        """Load a file and wait until all of it is there."""
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self._until(lambda found: found.get("method") == "Page.loadEventFired", among=self.events)

    def value(self, expression):
        """What a JavaScript expression gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key):
        """A key pressed and let go."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **code)

    def screenshot(self, path):
        """A PNG file of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests(self):
        """Addresses that the page fetched."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def _until(self, wanted, among=(), patience=60.0):
        for message in among:
            if wanted(message):
                return message
        end = time.monotonic() + patience
        while True:
            while b"\0" in self.buffer:
                text, _, self.buffer = self.buffer.partition(b"\0")
                message = json.loads(text)
                self.events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self.read, 1 << 20) if ready else b""
            assert data, "chromium gives no answer"
            self.buffer += data


@contextlib.contextmanager
def browser(profile):
    """A `Browser` whose profile is a new folder; ends with the block."""
    commands, write = os.pipe()
    read, answers = os.pipe()

    def places():  # the descriptors that the browser reads from and writes to
        for number, end in [
            (3, fcntl.fcntl(commands, fcntl.F_DUPFD, 10)),
            (4, fcntl.fcntl(answers, fcntl.F_DUPFD, 10)),
        ]:
            os.dup2(end, number)

    process = subprocess.Popen(
        [PATH, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=places,
        close_fds=False,
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(read, write)
    finally:
        process.terminate()
        process.wait()
        os.close(read)
        os.close(write)
