"""Watches over a ComfyUI for a worker, and outlives it: `python -I comfyui_warden.py`, of the standard library alone.

The first line on stdin says what to start (`command`, `folder`, `environment`, `log`, and `lock` with the seconds of
`patience` to wait for it; nothing where a server runs already) and its `url`. Each later line names the prompt that is
under way (`{"prompt": "…"}`, null for none). Lines on stdout tell `{"pid": …}`, `{"busy": true}` where another has the
lock, and `{"exit": …}`. When stdin ends, however that came about, the prompt is taken back, and what was started ends.
"""

import contextlib
import ctypes
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request

#: Seconds for an answer at the end, and for a server to end by itself.
ANSWER_SECONDS, END_SECONDS = 2.0, 5.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main():
    """Start what is to be started, listen, and clean up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the control process
    task = json.loads(sys.stdin.readline())
    with contextlib.ExitStack() as held:
        process = _start(task, held) if "command" in task else None
        prompt = None
        for line in sys.stdin:
            prompt = json.loads(line).get("prompt")
        if prompt and (process is None or process.poll() is None):
            _take_back(task["url"], prompt)
        if process is not None:
            _end(process)


def _start(task, held):
    """The server, its log open for as long as it lives."""
    import filelock

    try:
        held.enter_context(filelock.FileLock(task["lock"], timeout=task["patience"]))
    except filelock.Timeout:
        _say(busy=True)
        sys.exit(0)
    log = held.enter_context(open(task["log"], "ab"))  # noqa: PTH123, SIM115
    try:
        process = subprocess.Popen(
            task["command"],
            cwd=task["folder"],
            env=task["environment"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        log.write(f"{task['command'][0]}: {error.strerror}\n".encode())
        _say(exit=127)
        sys.exit(0)
    _say(pid=process.pid)
    threading.Thread(target=lambda: _say(exit=process.wait()), daemon=True).start()
    return process


def _die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(**what):
    with contextlib.suppress(OSError):
        print(json.dumps(what), flush=True)


class _Stay(urllib.request.HTTPRedirectHandler):
    """A server of this machine does not send us to another."""

    def redirect_request(self, *asked):
        return None


def _take_back(url, prompt):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay)
    for path, body in (("/queue", {"delete": [prompt]}), ("/interrupt", {"prompt_id": prompt})):
        request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with contextlib.suppress(OSError, http.client.HTTPException):
            opener.open(request, timeout=ANSWER_SECONDS).close()


def _end(process):
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started as well
    elif process.poll() is None:
        process.kill()


if __name__ == "__main__":
    main()
