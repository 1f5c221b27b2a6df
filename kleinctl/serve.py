"""The running server as `run` sees it: where it listens, what is said to it, and the worker behind it.

`kleinctl serve` listens on a port of this machine alone. `serve.json` in KLEINCTL_HOME, which nobody but the user can
read, has the port and two secrets. A client's first line is the token, the server's the proof, so neither tells
anything to a stranger: a browser page, another user, or a program that got the port of a server that died. Then come
JSON lines as between control process and worker: `"is"` names the dataclass. The server says its `State`; a client may
send `Ask`, `Ended`, `Free` and `Stop` at any time, and what it would send a worker. `Load` is then a wish for the
model, granted in the order of asking, and `Close` gives it back.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleinctl import atomic
from kleinctl.backends import Fit, Job
from kleinctl.executors import OnProgress, WorkerDied, WorkerHandle
from kleinctl.generate import Request, absolute
from kleinctl.home import home, server_file
from kleinctl.problem import KleinctlError, Misuse, Problem
from kleinctl.worker import protocol
from kleinctl.worker.protocol import MAX_LINE_BYTES, Close, Failed, Progress, Reply

#: Whoever changes a message here changes the number.
SPEAKS = f"kleinctl.serve/2 with {protocol.PROTOCOL}"
ADDRESS = "127.0.0.1"
#: Seconds in which either side has to say its secret, and the most bytes that secret may have.
SECRET_SECONDS, SECRET_BYTES = 2.0, 128
#: Waiting is done in slices of so many seconds: on Windows nothing shorter lets Ctrl-C through.
SLICE_SECONDS = 0.25


@dataclass(frozen=True)
class State:
    """What the server has, and what it is doing.

    `request` is how pictures are made with it, still without jobs. `names` are the backend's name and aliases,
    `precisions` those that a job can ask it for, `device` is what people call the device. `vram_bytes` and `ram_bytes`
    were free when it planned. `working` is whether a client has the model now, `waiting` how many want it after that.
    """

    pid: int
    request: Request
    names: tuple[str, ...]
    precisions: tuple[str, ...]
    device: str
    vram_bytes: int
    ram_bytes: int
    loaded: bool
    working: bool
    waiting: int


@dataclass(frozen=True)
class Ask:
    """What is to be thought of `job`, whose size was typed as `asked`? The answer is `Told`."""

    job: Job
    asked: tuple[int, int] | None = None


@dataclass(frozen=True)
class Ended:
    """What is to be thought of what this client's run took, beside its first job's `fit`? The answer is `Told`."""

    fit: Fit


@dataclass(frozen=True)
class Told:
    """What is odd, and what was predicted. A job that is `refused` does not fit."""

    problems: tuple[Problem, ...] = ()
    fit: Fit | None = None
    refused: Problem | None = None


@dataclass(frozen=True)
class Waiting:
    """So many clients have the model before this one."""

    before: int


@dataclass(frozen=True)
class Free:
    """Let go of the model when nobody has it. The answer is `State`."""


@dataclass(frozen=True)
class Stop:
    """End. The answer is that the line ends."""


_MESSAGES = {kind.__name__: kind for kind in (State, Ask, Ended, Told, Waiting, Free, Stop)}


class Line:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._heard = bytearray()
        self._sending = threading.Lock()
        self.closed = False

    def write(self, text: bytes) -> None:
        """Send one line.

        Raises:
            OSError: the other side is gone.
        """
        with self._sending:
            self._socket.sendall(text + b"\n")

    def send(self, message: Any) -> None:
        """Send a message; see `write`."""
        self.write(json.dumps({"is": type(message).__name__, **protocol.pack(message)}).encode())

    def read(self, limit: int = MAX_LINE_BYTES, seconds: float = float("inf")) -> bytes | None:
        """The next line; None when the other side is gone, too slow, or says more than `limit` bytes."""
        end = time.monotonic() + seconds
        while (length := self._heard.find(b"\n")) < 0:
            if len(self._heard) > limit or not self._hear(end):
                return None
        text = bytes(self._heard[:length])
        del self._heard[: length + 1]
        return text if length <= limit else None

    def _hear(self, end: float) -> bool:
        try:
            while not select.select([self._socket], [], [], SLICE_SECONDS)[0]:
                if time.monotonic() > end:
                    return False
            heard = self._socket.recv(2**16)
        except (OSError, ValueError):  # it is gone, or was closed here
            return False
        self._heard += heard
        return bool(heard) and time.monotonic() <= end

    def receive(self, seconds: float = float("inf")) -> Any:
        """The next message; None when there is none to come."""
        text = self.read(seconds=seconds)
        return None if text is None else _message(text)

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _message(text: bytes) -> Any:
    """The message in a line; None where it is none."""
    try:
        data = json.loads(text)
        kind = _MESSAGES.get(data["is"])
        return protocol.unpack(kind, data) if kind else protocol.decode(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def server_lock() -> Path:
    """The file that a running server holds locked; the system lets go of it when the server ends, however it ends.

    It is the user's alone: whoever can read a file can lock it, and so keep the server from being started.
    """
    return home() / "serve.lock"


class Server(WorkerHandle):
    """A connection to the running server: a place where one worker runs (see `kleinctl.executors`), and that worker.

    `on_wait` hears how many others have the model first.
    """

    name = "server"

    def __init__(self, line: Line, state: State, on_wait: Callable[[int], None]) -> None:
        self.state = state
        self._line, self._on_wait = line, on_wait

    def judged(self, job: Job, asked: tuple[int, int] | None) -> Told:
        """What is to be thought of `job`; see `Ask`, and `told`."""
        return self.told(Ask(absolute(job), asked))

    def told(self, question: Ask | Ended) -> Told:
        """The answer to a question.

        Raises:
            KleinctlError: there is none.
        """
        answer = self.ask(question, lambda progress: None)
        assert isinstance(answer, Told)
        return answer

    def free(self) -> State:
        """Have it let go of the model, as soon as nobody has it.

        Raises:
            KleinctlError: it ended instead.
        """
        state = self.ask(Free(), lambda progress: None)
        assert isinstance(state, State)
        return state

    def end(self) -> None:
        """End the server, and wait until it has."""
        self._send(Stop())
        while self._line.receive() is not None:
            pass

    def start(self, python: Path, plugin: str, *, gpu: str | None = None) -> Server:
        """The worker that the server has, which is chosen already; after `stop`, on a line of its own again.

        Raises:
            KleinctlError: the server has ended meanwhile.
        """
        if self._line.closed:
            again = connect(self._on_wait)
            if again is None:
                raise WorkerDied(gone())
            self._line = again._line
        return self

    def ask(self, request: Any, on_progress: OnProgress) -> Any:
        """Send a request and wait for its answer; see `WorkerHandle.ask`."""
        self._send(request)
        while True:
            reply: Reply | State | Told | Waiting | None = self._line.receive()
            if isinstance(reply, Progress):
                on_progress(reply)
            elif isinstance(reply, Waiting):
                self._on_wait(reply.before)
            elif isinstance(reply, Failed):
                raise _error(reply)
            elif reply is None:
                raise WorkerDied(gone())
            else:
                return reply

    def close(self) -> None:
        """Give the model back; questions can still be asked."""
        with contextlib.suppress(WorkerDied):
            self._send(Close())

    def stop(self) -> None:
        """Hang up. What the server does for this client ends."""
        self._line.close()

    def _send(self, message: Any) -> None:
        try:
            self._line.send(message)
        except OSError:
            raise WorkerDied(gone()) from None


def _error(failed: Failed) -> KleinctlError:
    assert failed.problem is not None
    kinds = {kind.__name__: kind for kind in (WorkerDied, Misuse)}
    return kinds.get(failed.error, KleinctlError)(failed.problem)


def gone() -> Problem:
    """The problem of a client whose server has ended."""
    return Problem(
        "the server has ended",
        "It was stopped, or its process was ended, before it had answered. No half picture is left.",
        "type the same line again: it then runs without the server",
        name="server-ended",
    )


def connect(on_wait: Callable[[int], None] = lambda before: None) -> Server | None:
    """A connection to the server that runs for this KLEINCTL_HOME; None where none runs.

    Raises:
        KleinctlError: one runs, and does not answer as it should.
    """
    try:
        said = json.loads(server_file().read_bytes())
        speaks, port = said["speaks"], int(said["port"])
        token, proof = (str(said[key]).encode("ascii") for key in ("token", "proof"))
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
    server = _greet(port, token, proof, on_wait) if speaks == SPEAKS else None
    if server is None and not forgotten():
        other = f"It speaks {str(speaks)[:80]}; this kleinctl speaks {SPEAKS}."
        raise _unreachable("It runs, and does not answer on its port." if speaks == SPEAKS else other, said.get("pid"))
    return server


def greeted(line: Line, token: bytes) -> bool:
    """Whether the other side knows the token."""
    heard = line.read(SECRET_BYTES, SECRET_SECONDS)
    return heard is not None and hmac.compare_digest(heard, token)


def _greet(port: int, token: bytes, proof: bytes, on_wait: Callable[[int], None]) -> Server | None:
    with contextlib.suppress(OSError, OverflowError):  # the latter: there is no such port
        line = Line(socket.create_connection((ADDRESS, port), SECRET_SECONDS))
        line.write(token)
        if greeted(line, proof) and isinstance(state := line.receive(SECRET_SECONDS), State):
            return Server(line, state, on_wait)
        line.close()
    return None


def _unreachable(why: str, pid: Any) -> KleinctlError:
    end = "taskkill /F /PID" if sys.platform == "win32" else "kill"
    fix = f"{end} {pid}" if isinstance(pid, int) else "end its process, then: kleinctl serve"
    return KleinctlError(Problem("the server cannot be reached", why, fix, name="server-unreachable"))


def forgotten() -> bool:
    """Whether no server runs; what one that died has left of itself is then taken away."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(server_lock(), timeout=0, mode=0o600):
            server_file().unlink(missing_ok=True)
    except (Timeout, OSError):
        return False
    return True


def private_file(path: Path, text: str) -> None:
    """Write a file that nobody but the user can read at any moment (on Windows: and administrators).

    Raises:
        OSError: it cannot be written.
    """
    beside = atomic.beside(path)
    beside.unlink(missing_ok=True)
    try:
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        if sys.platform == "win32":
            _own(beside)
        beside.write_text(text, encoding="ascii")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _own(path: Path) -> None:
    """Let nobody but the user have a file: a folder outside of the user's profile would let everybody read it.

    Modes say nothing of that on Windows; a disk that knows no rights (FAT) cannot be helped.
    """
    import subprocess

    user = "\\".join(os.environ[name] for name in ("USERDOMAIN", "USERNAME") if name in os.environ)
    with contextlib.suppress(OSError):
        command = ["icacls", str(path), "/inheritance:r", "/grant:r", f"{user}:F"]
        subprocess.run(command, capture_output=True, check=False)
