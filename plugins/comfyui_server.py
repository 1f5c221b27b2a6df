"""A ComfyUI server for a worker: one that is started for it and ends with it, or one that runs already."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kleinctl_plugins.comfyui_client import Client, Refused

from kleinctl import Budget, KleinctlError, Problem, comfyui, exits, logs, logs_folder

WARDEN = Path(__file__).with_name("comfyui_warden.py")
#: Seconds that a server may take to answer (18 measured; custom nodes take longer), to end, and between two looks; and
#: that another one of the same checkout, which may be just ending, is waited for, and the news of its end.
READY_SECONDS, CLOSE_SECONDS, LOOK_SECONDS, LOCK_SECONDS, GRACE_SECONDS = 300.0, 12.0, 0.25, 20.0, 2.0
#: A port that was free may be taken by the time the server binds it: so often another is tried.
PORTS_TRIED = 3
#: Logs that are kept, and how much of a log's end is read to explain a death, in bytes.
LOGS_KEPT, LOG_BYTES = 20, 2**18
#: The oldest ComfyUI that takes klein for what it is.
OLDEST = "0.9.2"
#: Arguments of a user's own start that this one sets otherwise, or that are about the page.
OURS = (
    *("--listen", "--port", "--tls-keyfile", "--tls-certfile", "--enable-cors-header", "--auto-launch"),
    *("--disable-auto-launch", "--windows-standalone-build", "--output-directory", "--temp-directory"),
    *("--user-directory", "--base-directory", "--database-url", "--reserve-vram", "--preview-method", "--multi-user"),
    *("--quick-test-for-ci", "--log-stdout", "--dont-print-server"),
)
#: Settings of the worker that are not for ComfyUI, which chooses its own allocator and has its own packages.
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def open_server(checkout: comfyui.Checkout | None, budget: Budget, paths: Path | None) -> Server:
    """The server to draw with: the budget's own, or one that is started now and ready when this returns.

    The budget's own needs no checkout. `paths` is the `extra_model_paths.yaml` of kleinctl's own files.

    Raises:
        KleinctlError: it does not start, does not answer, or is too old.
    """
    if budget.server:
        return _met(Server(budget.server))
    assert checkout is not None
    return _met(_started(checkout, budget, paths))


def running_server(checkout: comfyui.Checkout) -> Server | None:
    """The server that the user runs from this checkout, where it answers; None where it does not.

    Raises:
        KleinctlError: it is too old.
    """
    folders = _folders(checkout.url) if checkout.url else {}
    own = _real((checkout.base or checkout.path) / "custom_nodes")
    if not checkout.url or own not in map(_real, folders.get("custom_nodes", ())):
        return None
    server = Server(checkout.url, checkout.path)
    server.folders = folders
    return _met(server)


def _met(server: Server) -> Server:
    try:
        server.meet()
    except BaseException:
        server.close()
        raise
    return server


def _real(path: Path | str) -> str:
    return os.path.normcase(os.path.realpath(path))


def _folders(url: str) -> Mapping[str, Sequence[str]]:
    """The folders that a ComfyUI searches, by kind; none where no ComfyUI answers, or one that does not say."""
    try:
        told = Client(url).ask("/internal/folder_paths")
    except (Refused, KleinctlError):
        return {}
    every = told.items() if isinstance(told, dict) else ()
    return {kind: [each for each in paths if isinstance(each, str)] for kind, paths in every if isinstance(paths, list)}


def _started(checkout: comfyui.Checkout, budget: Budget, paths: Path | None) -> Server:
    for attempt in range(PORTS_TRIED):
        started = Started(checkout, budget, paths)
        try:
            started.wait()
            return started
        except KleinctlError as error:
            started.close()
            if error.problem.name != "port-in-use" or attempt == PORTS_TRIED - 1:
                raise
        except BaseException:
            started.close()
            raise
    raise AssertionError("the last attempt returns or raises")


class Server:
    """A server that runs already, and goes on when we are done. Its warden takes back what is under way."""

    #: Whether it was started for this worker, so that it can be started again.
    ours = False
    #: Whether it is a ComfyUI that klein can be drawn with.
    met = False
    #: Versions of it, its torch and its Python, as it says them.
    version = torch = python = "unknown"
    #: The folders that it searches by kind, as far as it was asked.
    folders: Mapping[str, Sequence[str]] = {}

    def __init__(self, url: str, place: Path | None = None) -> None:
        self.url, self._place = url, place
        self.client = Client(url, self.alive)
        self._warden = _Warden({"url": url})

    @property
    def place(self) -> str:
        """Its checkout as a command takes it; `DIR` where that is not known."""
        return quoted(self._place) if self._place else "DIR"

    @property
    def pid(self) -> int | None:
        """The process that was started for it; None for one that runs already."""
        return self._warden.pid

    @property
    def ended(self) -> bool:
        """Whether it no longer answers, or nobody watches over its jobs any more."""
        if self._warden.exit is not None:
            return True
        try:
            self.client.ask("/queue")
        except Refused:
            return False
        except KleinctlError:
            return True
        return False

    def meet(self) -> None:
        """Learn its version, and those of its torch and its Python.

        Raises:
            KleinctlError: it is older than klein, or no ComfyUI.
        """
        try:
            answer = self.client.ask("/system_stats")
        except Refused as error:
            raise self.forbidden(error) from None
        system = _system(answer)
        if not system:
            why = f"{self.url} says nothing of a ComfyUI: {json.dumps(answer)[:200]}"
            what, fix = "what answers is not ComfyUI", f"kleinctl doctor --comfyui {self.place}"
            raise KleinctlError(Problem(what, why, fix, name="comfyui-failed"))
        self.version = str(system.get("comfyui_version") or "unknown")[:40]
        self.torch = str(system.get("pytorch_version") or "unknown")[:40]
        self.python = (str(system.get("python_version") or "").split() or ["unknown"])[0][:40]
        check_version(self.version, self.place)
        self.met = True

    def watch(self, prompt: str | None) -> None:
        """Say which prompt is under way: it is taken back when this worker ends before it does."""
        self._warden.tell({"prompt": prompt})

    def alive(self) -> None:
        """Raise where it is known that the server has ended."""

    def forbidden(self, error: Refused) -> KleinctlError:
        """The problem of a request that was refused by its status alone."""
        if error.status == 403:
            why = f"{self.url} answered 403: it compares Host and Origin, and something between changes them."
            fix = "ask ComfyUI directly at http://127.0.0.1:8188, without a proxy"
            problem = Problem("ComfyUI refuses requests from here", why, fix, name="origin-mismatch", ref="E08")
            return KleinctlError(problem)
        why = f"{self.url} answered HTTP {error.status}: {' '.join(error.text.split())[:300] or 'nothing more'}"
        what, fix = "what answers is not the ComfyUI that was expected", f"kleinctl doctor --comfyui {self.place}"
        return KleinctlError(Problem(what, why, fix, name="comfyui-failed"))

    def empty(self) -> None:
        """Let it drop what it holds, but not while it works for somebody else."""
        with contextlib.suppress(KleinctlError, Refused):
            if self.met and self.client.idle():
                self.client.free()

    def close(self) -> None:
        """Leave it, and nothing of ours in it."""
        self.empty()
        self._warden.close()


class Started(Server):
    """A server that was started for this worker, and that ends with it, however it ends."""

    ours = True

    def __init__(self, checkout: comfyui.Checkout, budget: Budget, paths: Path | None) -> None:
        port, folder = _free_port(), comfyui.folder() / "run"
        self.url = f"http://127.0.0.1:{port}"
        self.client = Client(self.url, self._silent)
        self._place, self._ready = checkout.path, False
        #: Where in the log begins what was said since the last job was sent.
        self._since = 0
        lock = hashlib.sha256(str(checkout.path.resolve()).encode()).hexdigest()[:12]
        temp = folder / f"temp-{lock}"  # a start empties it, so no two checkouts may share one
        self._words = arguments(checkout, port, budget, paths, temp)
        for each in (folder / "output", folder / "user", temp, logs_folder()):
            each.mkdir(parents=True, exist_ok=True)
        self.log = _new_log(port)
        self._warden = _Warden(
            {
                "url": self.url,
                "command": [str(checkout.python), "-s", "-u", str(checkout.path / "main.py"), *self._words],
                "folder": str(folder),  # ComfyUI writes a log of its own to where it is started
                "environment": environment(os.environ, owned=checkout.owned),
                "log": str(self.log),
                "lock": str(folder / f"{lock}.lock"),
                "patience": LOCK_SECONDS,
                "temp": str(temp),
            }
        )

    def watch(self, prompt: str | None) -> None:
        """Remember where the log has come to: what was said before explains nothing of this job."""
        if prompt:
            with contextlib.suppress(OSError):
                self._since = self.log.stat().st_size

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            KleinctlError: it does not, or ends.
        """
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            self.alive()
            try:
                answer = self.client.ask("/system_stats")
            except Refused as error:
                if error.status == 403:  # it compares Host and Origin
                    raise self.forbidden(error) from None
                raise KleinctlError(self._taken(f"answers HTTP {error.status}")) from None
            except KleinctlError as error:
                if error.problem.name != "comfyui-silent":
                    raise
                time.sleep(LOOK_SECONDS)
            else:
                if not _started_with(answer, self._words):
                    raise KleinctlError(self._taken("is another server, started with other arguments"))
                self._ready = True
                return
        why = f"It was started from {self._place}, and has not answered within {READY_SECONDS / 60:.0f} minutes."
        raise KleinctlError(self._start_failed("ComfyUI does not become ready", why))

    @property
    def ended(self) -> bool:
        """Whether it has ended since it was started."""
        return self._warden.exit is not None

    def alive(self) -> None:
        """Raise where the server has ended.

        Raises:
            KleinctlError: with the cause, as its log and its exit status tell.
        """
        if self._warden.busy:
            raise KleinctlError(
                Problem(
                    f"the ComfyUI in {self._place} is in use by another kleinctl",
                    "One checkout runs once at a time: two of them would fill the card.",
                    "kleinctl serve --free   # where a server has it; else wait until the other command is done",
                    name="comfyui-in-use",
                )
            )
        if self._warden.exit is not None:
            raise KleinctlError(self._death(self._warden.exit))

    def _silent(self) -> None:
        """Raise where the server does not answer because it has ended, which may become known a moment later."""
        end = time.monotonic() + (GRACE_SECONDS if self._ready else 0.0)
        self.alive()
        while time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            self.alive()

    def close(self) -> None:
        """End it."""
        self._warden.close()

    def _death(self, status: int) -> Problem:
        how = f"It ended with {exits.exit_text(status)}"
        text = tail(self.log, self._since)
        for match in logs.explain(text):
            if match.problem.severity == "error":
                return replace(
                    match.problem,
                    why=f"{match.problem.why} ComfyUI said: {match.line}",
                    path=match.problem.path or str(self.log),
                )
        if re.search(r"^Port \d+ is already in use|already in use on address", _plain(text), re.MULTILINE):
            return self._taken("has it")
        if exits.looks_like_no_memory(status):
            why = f"{how}, most likely because memory (RAM) ran out."
            what = "the system ended ComfyUI"
            return Problem(what, why, "kleinctl plan", name="memory-full", path=str(self.log), ref="D03")
        if self._ready:
            fix = f"kleinctl doctor --log {quoted(self.log)}"
            why = f"{how}.{last_lines(text)}"
            return Problem("ComfyUI has ended", why, fix, name="comfyui-ended", path=str(self.log))
        return self._start_failed("ComfyUI does not start", f"{how}.{last_lines(text)}")

    def _taken(self, how: str) -> Problem:
        why = f"Another program took it between the choice and the start: what listens at {self.url} {how}."
        fix = "kleinctl doctor   # then the same command again"
        return Problem("ComfyUI's port was taken", why, fix, name="port-in-use", path=str(self.log), ref="E06")

    def _start_failed(self, what: str, why: str) -> Problem:
        fix = f"kleinctl doctor --log {quoted(self.log)}"
        return Problem(what, why, fix, name="comfyui-start", path=str(self.log))


class _Warden:
    """The process that cleans up. It sees the end of its stdin, and so the end of this process."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self.exit: int | None = None
        self.pid: int | None = None
        self.busy = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-u", "-X", "utf8", str(WARDEN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.tell(task)

    def tell(self, line: Mapping[str, Any]) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Let it clean up, and wait until it has."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(1.0)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as said:
            for line in said:
                with contextlib.suppress(ValueError):
                    told = json.loads(line)
                    self.pid = told.get("pid", self.pid)
                    self.busy = self.busy or bool(told.get("busy"))
                    self.exit = told.get("exit", self.exit)
        if self.exit is None and not self.busy:
            self.exit = self._process.wait()


def arguments(checkout: comfyui.Checkout, port: int, budget: Budget, paths: Path | None, temp: Path) -> list[str]:
    """How `main.py` is started: the user's own arguments without those that are ours, and ours."""
    folder = comfyui.folder() / "run"
    given = [
        *("--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch", "--disable-api-nodes"),
        *("--output-directory", str(folder / "output"), "--temp-directory", str(temp)),
        *("--user-directory", str(folder / "user"), "--database-url", "sqlite:///:memory:"),
        *("--preview-method", "none"),
    ]
    if checkout.base is not None:
        given += ["--base-directory", str(checkout.base)]
    if paths is not None:
        given += ["--extra-model-paths-config", str(paths)]
    return [*_others(checkout.arguments), *given, *_memory(checkout, budget)]


def _memory(checkout: comfyui.Checkout, budget: Budget) -> list[str]:
    """What of the card is left alone: what is free now beyond the budget. Dynamic VRAM keeps to it by itself."""
    if budget.device == "cpu":
        return [] if "--cpu" in checkout.arguments else ["--cpu"]
    gpu = budget.hardware.gpu if budget.hardware else None
    return [] if gpu is None else ["--reserve-vram", f"{max(0, gpu.vram_free_bytes - budget.vram_bytes) / 2**30:.2f}"]


def _others(given: Sequence[str]) -> list[str]:
    """The arguments without those in OURS, and what follows them."""
    kept: list[str] = []
    ours = False
    for word in given:
        if word.startswith("--"):
            ours = word.partition("=")[0] in OURS
        kept += [] if ours else [word]
    return kept


def environment(own: Mapping[str, str], *, owned: bool) -> dict[str, str]:
    """Environment variables of the server; in a checkout that is not `owned` its Python leaves no compiled files."""
    kept = {name: value for name, value in own.items() if name not in NOT_INHERITED}
    leaving = {} if owned else {"PYTHONDONTWRITEBYTECODE": "1"}
    return {**kept, "PYTHONUTF8": "1", "PYTHONNOUSERSITE": "1", **leaving}


def _system(answer: Any) -> Mapping[str, Any]:
    """What `/system_stats` says of a ComfyUI; empty where another program answered."""
    system = answer.get("system") if isinstance(answer, dict) else None
    return system if isinstance(system, dict) and "comfyui_version" in system else {}


def _started_with(answer: Any, words: Sequence[str]) -> bool:
    """Whether what answered is a ComfyUI that was started with these arguments, its port among them."""
    system = _system(answer)
    told = system.get("argv", words)
    return bool(system) and isinstance(told, list) and set(words) <= {str(each) for each in told}


def check_version(version: str, place: str) -> None:
    """Whether the server in `place` knows klein. That it has the nodes of FLUX.2 proves nothing: they came before.

    Raises:
        KleinctlError: it does not.
    """
    found, wanted = ([int(each) for each in re.findall(r"\d+", text)[:3]] for text in (version, OLDEST))
    if found and found < wanted:
        raise KleinctlError(
            Problem(
                "this ComfyUI is too old for klein",
                f"Wanted is ComfyUI {OLDEST} or newer; this is {version}, which takes klein for another model.",
                f"kleinctl doctor --fix --comfyui {place}",
                name="comfyui-too-old",
                ref="C07",
            )
        )


def tail(log: Path, since: int = 0) -> str:
    """The end of a log, from the byte `since` on at the earliest."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - LOG_BYTES))
        return file.read(LOG_BYTES).decode("utf-8", "replace")
    return ""


def last_lines(text: str) -> str:
    """The last lines of a log, as they end an explanation."""
    lines = [line[:160] for line in _plain(text).splitlines() if line.strip()][-5:]
    return "".join(["\nThe last lines of its log:", *(f"\n  {line}" for line in lines)]) if lines else ""


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]{0,20}m", "", text).replace("[INFO] ", "").replace("[ERROR] ", "")


def _new_log(port: int) -> Path:
    for old in sorted(logs_folder().glob("comfyui-*.log"), key=lambda path: path.name)[: 1 - LOGS_KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return logs_folder() / f"comfyui-{time.strftime('%Y%m%d-%H%M%S')}-{port}.log"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
