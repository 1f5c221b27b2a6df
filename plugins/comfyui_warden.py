"""Watches over a ComfyUI for a worker, and outlives it: `python -I comfyui_warden.py`, of the standard library alone.

The first line on stdin says what to start (`command`, `folder`, `environment`, `log`, and `lock` with the seconds of
`patience` to wait for it, and its `temp` folder; nothing where a server runs already) and its `url`. Each later line
names the prompt that is under way (`{"prompt": "…"}`, null for none). Lines on stdout tell `{"pid": …}`,
`{"busy": true}` where another has the lock, and `{"exit": …}`. When stdin ends, however that came about, what was
started ends and its temporary files go; from a server that goes on the prompt is taken back.
"""

import contextlib
import ctypes
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

#: Seconds for an answer at the end, for a server to end by itself, and between two looks at the lock.
ANSWER_SECONDS, END_SECONDS, LOOK_SECONDS = 2.0, 5.0, 0.1
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main():
    """Start what is to be started, listen, and clean up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the control process
    try:
        task = json.loads(sys.stdin.readline())
    except ValueError:  # the worker was killed before it had said it
        return
    worker = _Worker()
    worker.start()
    if "command" not in task:
        worker.ended.wait()
        if worker.prompt:
            _take_back(task["url"], worker.prompt)
        return
    with contextlib.ExitStack() as held:
        if _locked(task, held, worker.ended):
            process = _start(task, held)
            worker.ended.wait()
            if process is not None:
                _end(process)
            shutil.rmtree(task["temp"], ignore_errors=True)
        worker.ended.wait()


class _Worker(threading.Thread):
    """What the worker says until it ends: the prompt that is under way."""

    def __init__(self):
        super().__init__(daemon=True)
        self.prompt, self.ended = None, threading.Event()

    def run(self):
        with contextlib.suppress(ValueError):  # a line that was cut off as the worker was killed
            for line in sys.stdin:
                self.prompt = json.loads(line).get("prompt")
        self.ended.set()


def _locked(task, held, ended):
    """Whether no other runs this checkout, or is done with it while the worker waits."""
    import filelock

    end = time.monotonic() + task["patience"]
    while not ended.is_set():
        with contextlib.suppress(filelock.Timeout):
            held.enter_context(filelock.FileLock(task["lock"]).acquire(timeout=0))
            return True
        if time.monotonic() > end:
            _say(busy=True)
            return False
        ended.wait(LOOK_SECONDS)
    return False


def _start(task, held):
    """The server, its log open for as long as it lives; None where it does not start."""
    log = held.enter_context(open(task["log"], "ab", buffering=0))  # noqa: PTH123, SIM115
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
        return None
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
