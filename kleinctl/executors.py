"""Where a worker runs. The built-in place is a process on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from kleinctl.exits import exit_text, looks_like_no_memory, oom_kills
from kleinctl.home import home
from kleinctl.problem import KleinctlError, Problem
from kleinctl.worker import protocol
from kleinctl.worker.protocol import Close, Failed, Hello, Progress, Reply, Request, Setup

if TYPE_CHECKING:
    from kleinctl.logs import LogPattern

BOOTSTRAP = Path(__file__).parent / "worker" / "bootstrap.py"

#: Seconds a worker gets to end by itself when it is closed, and at each step when it is stopped.
CLOSE_SECONDS, STOP_SECONDS = 10.0, 1.0
#: Waiting is done in slices of so many seconds: on Windows nothing shorter lets Ctrl-C through.
SLICE_SECONDS = 0.25

OnProgress = Callable[[Progress], None]
Handle = TypeVar("Handle", bound="WorkerHandle")


class WorkerDied(KleinctlError):
    """The worker is gone, and what was loaded in it."""


class WorkerHandle(Protocol):
    """A running worker. Used in a `with` block: it is closed at its end, and stopped when the block fails."""

    def ask(self, request: Request, on_progress: OnProgress) -> Reply:
        """Send a request and wait for its answer: `Loaded`, `Prepared` or `Made`.

        Raises:
            KleinctlError: the request failed; the worker can be asked again.
            WorkerDied: the worker ended, or fell silent and was stopped.
        """

    def close(self) -> None:
        """Let the worker free what it holds, and end it."""

    def stop(self) -> None:
        """End the worker at once."""

    def __enter__(self: Handle) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.stop()


class Executor(Protocol):
    """A place where workers can run."""

    name: str

    def start(self, python: Path, plugin: str, *, gpu: str | None = None) -> WorkerHandle:
        """Start a worker that can import kleinctl and the module `plugin`.

        `python` is the interpreter of an environment that has what the plugin's backends need, `gpu` the UUID of the
        card to use (CUDA's default without it).

        Raises:
            KleinctlError: it does not start.
        """


@dataclass(frozen=True)
class ProcessExecutor:
    """Workers as processes of this machine.

    A worker has `start_seconds` to say hello, and is stopped after `quiet_seconds` without progress. `patterns` explain
    its log, by default kleinctl's own.
    """

    start_seconds: float = 180.0
    quiet_seconds: float = 900.0
    patterns: Sequence[LogPattern] | None = None
    bootstrap: Path = BOOTSTRAP
    name: str = "process"

    def start(self, python: Path, plugin: str, *, gpu: str | None = None) -> ProcessWorker:
        """Start a worker; see `Executor.start`."""
        worker = ProcessWorker(self, python, gpu)
        try:
            worker.greet(Setup(protocol.PROTOCOL, importable(plugin), _in_main_thread()))
        except BaseException:
            worker.stop()
            raise
        return worker


class ProcessWorker(WorkerHandle):
    """A worker process, its pipes and its log."""

    def __init__(self, executor: ProcessExecutor, python: Path, gpu: str | None) -> None:
        from kleinctl.worker.log import WorkerLog  # not when a server has the worker: then nobody needs it

        self._executor = executor
        self._oom_kills = oom_kills()
        try:
            self._process = subprocess.Popen(
                [str(python), "-I", "-u", "-X", "utf8", str(executor.bootstrap)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=worker_environment(os.environ, gpu),
                # Ctrl-C reaches this process alone, which then ends the worker in its own way.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
                | getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise KleinctlError(
                Problem(
                    f"{python} does not start",
                    f"It was to run the model: {error.strerror}.",
                    "kleinctl install",
                    name="worker-start",
                    path=str(python),
                )
            ) from None
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin, self._stage = self._process.stdin, "start"
        try:
            self._log = WorkerLog(self._process.stderr, self._process.pid)
        except BaseException:
            self._process.kill()
            raise
        self.log = self._log.path
        self._replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def greet(self, setup: Setup) -> None:
        """Tell the worker where to import from, and hear its hello."""
        self._send(json.dumps(asdict(setup)).encode() + b"\n")
        hello = self._hear(self._executor.start_seconds)
        if not isinstance(hello, Hello) or hello.protocol != protocol.PROTOCOL:
            said = hello.protocol if isinstance(hello, Hello) else f"a {type(hello).__name__} before its hello"
            raise KleinctlError(
                Problem(
                    "the worker belongs to another kleinctl",
                    f"This one speaks {protocol.PROTOCOL}; the worker said {said}.",
                    "kleinctl install",
                    name="worker-protocol",
                    path=str(self.log),
                )
            )

    def ask(self, request: Request, on_progress: OnProgress) -> Reply:
        """Send a request and wait for its answer; see `WorkerHandle.ask`."""
        self._stage = type(request).__name__.lower()
        self._log.tail.clear()  # what earlier requests said explains nothing of this one
        self._send(protocol.encode(request))
        while isinstance(reply := self._hear(self._executor.quiet_seconds), Progress):
            self._stage = reply.stage
            on_progress(reply)
        if isinstance(reply, Failed):
            raise KleinctlError(self._failure(reply))
        return reply

    def close(self) -> None:
        """Let the worker free what it holds; after ten seconds, or when it fails at that, end it."""
        with contextlib.suppress(WorkerDied):
            self._send(protocol.encode(Close()))
            self._ended(CLOSE_SECONDS)
        self.stop()

    def stop(self) -> None:
        """End the worker, and what it has started, within three seconds."""
        with contextlib.suppress(OSError):
            self._stdin.close()  # the worker ends itself
        if not self._ended(STOP_SECONDS):
            self._process.terminate()
            self._ended(STOP_SECONDS)
        if self._process.returncode is None:
            _kill_group(self._process)
            self._process.wait()
        self._log.join()

    def _send(self, line: bytes) -> None:
        try:
            self._stdin.write(line)
            self._stdin.flush()
        except (OSError, ValueError):  # it is gone, or was stopped
            raise WorkerDied(self._death()) from None

    def _listen(self, replies: IO[bytes]) -> None:
        while line := replies.readline(protocol.MAX_LINE_BYTES):
            message = protocol.decode(line)
            if message is None:
                self._log.write(line)  # printed by something that ran before the worker took its pipes
            else:
                self._replies.put(message)  # type: ignore[arg-type]
        self._replies.put(None)

    def _hear(self, seconds: float) -> Reply:
        """The worker's next message.

        Raises:
            WorkerDied: it ended, or said nothing for that long.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                reply = self._replies.get(timeout=SLICE_SECONDS)
                if reply is None:
                    raise WorkerDied(self._death())
                return reply
        if sys.platform != "win32":
            self._process.send_signal(signal.SIGUSR1)  # the log then tells where it hangs
            time.sleep(0.2)
        self.stop()
        raise WorkerDied(
            Problem(
                "the worker fell silent",
                f"Nothing came of it for {seconds:g} seconds while {_doing(self._stage)}.{self._last_lines()}",
                f"kleinctl doctor --log {_quoted(self.log)}",
                name="worker-silent",
                path=str(self.log),
            )
        )

    def _ended(self, seconds: float) -> bool:
        """Whether the process ends within `seconds`. It stays a zombie, so that its group can still be ended safely."""
        if sys.platform == "win32":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            return self._process.returncode is not None
        end = time.monotonic() + seconds
        while self._process.returncode is None:
            try:
                if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return True
            except ChildProcessError:  # another thread has waited for it just now
                self._process.wait()
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def _failure(self, failed: Failed) -> Problem:
        """The problem behind a request that failed."""
        from kleinctl.logs import explain

        if failed.problem is not None:
            return failed.problem
        said = f"{failed.error}: {failed.message}"
        for match in explain(said, self._executor.patterns):
            return self._at_stage(match.problem, failed.stage or self._stage, said)
        return Problem(
            f"{_doing(failed.stage or self._stage)} failed",
            _short(said),
            f"kleinctl doctor --log {_quoted(self.log)}",
            name="job-failed",
            path=str(self.log),
        )

    def _death(self) -> Problem:
        """Why the worker ended."""
        from kleinctl.logs import explain

        ended = self._ended(5)
        self.stop()
        status = self._process.returncode
        how = f"It ended with {exit_text(status)}" if ended else "It closed its pipes and had to be stopped"
        if ended and looks_like_no_memory(status):
            return self._killed(how)
        for match in explain("\n".join(self._log.tail), self._executor.patterns):
            if match.problem.severity == "error":
                return self._at_stage(match.problem, self._stage, match.line)
        return Problem(
            "the worker crashed",
            f"{how} while {_doing(self._stage)}.{self._last_lines()}",
            f"kleinctl doctor --log {_quoted(self.log)}",
            name="worker-crashed",
            path=str(self.log),
        )

    def _killed(self, how: str) -> Problem:
        counted = oom_kills()
        if counted is not None and self._oom_kills is not None and counted > self._oom_kills:
            why = f"Memory (RAM) ran out while {_doing(self._stage)}, and the kernel ended the worker."
        else:
            why = f"{how} while {_doing(self._stage)}, most likely because memory (RAM) ran out."
        return Problem(
            "the system killed the worker", why, "kleinctl plan", name="worker-killed", path=str(self.log), ref="D03"
        )

    def _at_stage(self, problem: Problem, stage: str, said: str) -> Problem:
        return replace(
            problem, why=f"{problem.why} It was {_doing(stage)}: {_short(said)}", path=problem.path or str(self.log)
        )

    def _last_lines(self) -> str:
        lines = [line[:160] for line in self._log.tail if line.strip()][-5:]
        return "".join(["\nThe last lines of its log:", *(f"\n  {line}" for line in lines)]) if lines else ""


def worker_environment(own: Mapping[str, str], gpu: str | None) -> dict[str, str]:
    """Environment variables of a worker: this process's without secrets and network, and the settings that it needs."""
    kept = {name: value for name, value in own.items() if not _SECRET.search(name.upper()) and name not in _LEFT_OUT}
    kept |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONNOUSERSITE": "1",  # -I says so to the worker; this to what it starts
        "KLEINCTL_HOME": str(home()),  # what finds it without is not in every environment
    }
    if sys.platform == "linux":
        # Segments that grow waste less VRAM on stages of different sizes; torch offers them on Linux alone.
        if "PYTORCH_ALLOC_CONF" not in kept:  # its newer name
            kept.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        if gpu is not None:
            # Weights that come and go leave holes in glibc's arenas, and memory grows from picture to picture (D20).
            kept.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    if gpu is not None:
        # CUDA numbers cards by speed and the driver's tools by slot: a UUID means one card to both (A15).
        kept |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu}
    return kept


#: Old guides set it, and it fails without a package that nothing here needs (B15).
_LEFT_OUT = ("HF_HUB_ENABLE_HF_TRANSFER",)
_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL|_PROXY$")


def importable(plugin: str) -> dict[str, dict[str, Any]]:
    """Where kleinctl and the top-level module of `plugin` lie, as bootstrap.py wants it.

    Raises:
        KleinctlError: they lie nowhere that another Python could import from.
    """
    modules = {}
    for name in ("kleinctl", plugin.partition(".")[0]):
        spec = importlib.util.find_spec(name)
        if spec is None or not (spec.has_location or spec.submodule_search_locations):
            raise KleinctlError(
                Problem(
                    f"the plugin module {name} cannot be handed to a worker",
                    "It has to be a file or a folder that Python can import.",
                    "kleinctl plugins",
                    name="plugin-not-importable",
                )
            )
        folders = spec.submodule_search_locations
        modules[name] = {
            "origin": spec.origin if spec.has_location else None,
            "folders": None if folders is None else [str(Path(folder).absolute()) for folder in folders],
        }
    return modules


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that has not been waited for, and what it has started."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        return
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()


_STAGES = {
    "start": "starting",
    "load": "loading the model",
    "prepare": "preparing the pictures",
    "queue": "waiting in ComfyUI's queue",
    "generate": "making the picture",
    "encode": "reading the prompt",
    "denoise": "drawing the picture",
    "decode": "decoding the picture",
    "save": "writing the picture",
}


def _doing(stage: str) -> str:
    return _STAGES.get(stage, f"in its stage {stage}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else line[:397] + "..."


def _quoted(path: Path) -> str:
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))
