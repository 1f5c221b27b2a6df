"""ComfyUI's own page in a browser without a window, spoken to over its debugging port."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READY_SECONDS = 90


@contextlib.contextmanager
def page(url: str, folder: Path) -> Iterator[Callable[[str], Any]]:
    """Open the page; what is yielded evaluates JavaScript in it, and waits for promises."""
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--remote-allow-origins=*")
    command = [str(CHROMIUM), *flags, f"--user-data-dir={folder}", url]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        socket = websocket.create_connection(_debugger(folder), timeout=60, suppress_origin=True)
        yield lambda code: _evaluate(socket, code)
        socket.close()
    finally:
        browser.kill()
        browser.wait()


def _debugger(folder: Path) -> str:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError):
            port = (folder / "DevToolsActivePort").read_text(encoding="ascii").split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                pages = [each for each in json.load(answer) if each["type"] == "page"]
            return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.2)
    raise TimeoutError("the browser does not answer")


def _evaluate(socket: Any, code: str) -> Any:
    parameters = {"expression": code, "awaitPromise": True, "returnByValue": True}
    socket.send(json.dumps({"id": 1, "method": "Runtime.evaluate", "params": parameters}))
    while True:
        message = json.loads(socket.recv())
        if message.get("id") == 1:
            return message["result"]["result"].get("value")


def wait_for(evaluate: Callable[[str], Any], code: str) -> None:
    """Wait until JavaScript says true."""
    end = time.monotonic() + READY_SECONDS
    while evaluate(code) is not True:
        assert time.monotonic() < end, code
        time.sleep(0.5)
