"""Time and memory of pictures within several budgets of VRAM, beside what was predicted and beside another program.

For each budget other memory of the card is really taken by another process; then a fresh session makes pictures of each
size by the road that `kleinctl run` takes. One line that fails is told, and the others go on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kleinctl import generate, memory, road, store
from kleinctl.backends import Fit, Job
from kleinctl.executors import ProcessExecutor, worker_environment
from kleinctl.hardware.rates import Rates
from kleinctl.planner import default_job
from kleinctl.problem import KleinctlError, Problem
from kleinctl.units import MIB, gib
from kleinctl.worker.protocol import Calibrate, Calibrated, Progress

if TYPE_CHECKING:
    from kleinctl.environment import Environment
    from kleinctl.hardware import Gpu, Hardware
    from kleinctl.manifest import Model
    from kleinctl.plugins import Plugins
    from kleinctl.road import Way

SCHEMA = "kleinctl.bench/1"
HOLDER = Path(__file__).parent / "worker" / "holder.py"
CHART = Path(__file__).parent / "worker" / "chart.py"
#: Pictures of new prompts before those that count: the first pays for loading, the second for what came first.
WARM_UP = 2
#: Seconds between two looks at the card's memory, and at the worker's own.
CARD_SECONDS, HOST_SECONDS = 0.003, 0.05
#: How near the holder comes to what is to be free, in bytes, and how long it may take to start, in seconds.
NEAR_BYTES, HOLDER_SECONDS = 64 * MIB, 180.0
#: More than any card has: the model card's own path knows no limit.
NO_LIMIT = 2**60
#: After so many seconds a line draws no more new prompts, if it has one: the model card's offload is slow.
LINE_SECONDS = 60.0


@dataclass(frozen=True)
class Asked:
    """What is to be measured. `free` are bytes of VRAM to leave free, None for as it is; `changes` are of the job.

    `detect` asks the machine as it is now, `environment` finds or builds what a way needs. `url` is a ComfyUI server's.
    """

    plugins: Plugins
    model: Model
    backends: tuple[str | None, ...]
    sizes: tuple[tuple[int, int], ...]
    free: tuple[int | None, ...]
    runs: int
    changes: Mapping[str, Any]
    detect: Callable[[], Hardware]
    environment: Callable[[Way, Hardware], Environment]
    against: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Figures:
    """What was measured: seconds of the first picture from process start, of each new prompt, of the last one again.

    `seconds_first` is None where the session had drawn in another size before. `vram_bytes` is the most of the card
    that was taken, with the context, `host_bytes` of the process's own memory; that of a server that ran before is not
    counted.
    """

    strategy: str
    seconds_first: float | None
    seconds_new: tuple[float, ...]
    seconds_again: float
    vram_bytes: int
    host_bytes: int
    pixels: tuple[str, ...]
    stages: Mapping[str, float] = field(default_factory=dict, hash=False)
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def seconds(self) -> float:
        """A picture of a new prompt: the median."""
        return statistics.median(self.seconds_new)


@dataclass(frozen=True)
class Line:
    """One line of the table: who drew, in what, and what it took; or the problem.

    `share` is its time over that of `--against diffusers` with no limit, and `same` whether its pixels are that one's.
    """

    who: str
    width: int
    height: int
    free_bytes: int | None = None
    figures: Figures | None = None
    fit: Fit | None = None
    share: float | None = None
    same: bool | None = None
    problem: Problem | None = None

    def to_json(self) -> dict[str, Any]:
        """The line as it stands in `kleinctl.bench/1`."""
        named = {key: getattr(self, key) for key in ("who", "width", "height", "free_bytes", "share", "same")}
        fit, figures = self.fit, self.figures
        return {
            **named,
            "predicted": fit and {key: fit.to_json()[key] for key in ("vram_bytes", "seconds_first", "seconds_next")},
            "measured": figures and {**_rounded(vars(figures)), "seconds_next": round(figures.seconds, 4)},
            "problem": self.problem and self.problem.to_json(),
        }


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


class Draw(Protocol):
    """Makes one picture: the sha256 of its pixels, and seconds by stage."""

    def __call__(self, job: Job, output: Path) -> tuple[str, Mapping[str, float]]: ...


@dataclass
class Opened:
    """A program that is ready to draw."""

    draw: Draw
    strategy: Callable[[], str]
    versions: Mapping[str, str] = field(default_factory=dict)


#: A line with its prediction, a key that is another where another session is needed, and what starts that session.
Ready = tuple[Line, str, Callable[[], contextlib.AbstractContextManager[Opened]]]
Open = Callable[[Line, "Hardware"], Ready]
OnProgress = Callable[[str, int, int], None]


def measure(asked: Asked, on_progress: OnProgress) -> Iterator[Line]:
    """Each line as soon as it is there; `on_progress(text, done, total)` hears of pictures.

    A budget has one session, which draws in every size. Plain diffusers is measured once without a limit, and once
    where it has to offload: with less it takes as long.
    """
    references: dict[tuple[int, int], Figures] = {}
    if asked.against == "diffusers":
        for line in _lines(asked, None, partial(_model_card, asked), "diffusers", asked.sizes, on_progress):
            if line.figures is not None:
                references[line.width, line.height] = line.figures
            yield _compared(line, references)
    offloaded = False
    for free in asked.free:
        for line in _within(asked, free, on_progress, card=not offloaded):
            offloaded = offloaded or (line.who == "diffusers" and line.figures is not None)
            yield _compared(line, references)


def _compared(line: Line, references: Mapping[tuple[int, int], Figures]) -> Line:
    """The line beside plain diffusers without a limit."""
    reference = references.get((line.width, line.height))
    if line.figures is None or reference is None:
        return line
    same = all(own == theirs for own, theirs in zip(line.figures.pixels, reference.pixels, strict=False))
    return replace(line, share=line.figures.seconds / reference.seconds, same=same)


def _within(asked: Asked, free: int | None, on_progress: OnProgress, *, card: bool) -> Iterator[Line]:
    """The lines of one budget, with the rest of the VRAM taken meanwhile; `card`: with the model card's path."""
    ways: list[tuple[str, Open, Sequence[tuple[int, int]]]] = [
        (name or "kleinctl", partial(_kleinctl, asked, name), asked.sizes) for name in asked.backends
    ]
    if asked.against == "diffusers" and card and free is not None:
        ways.append(("diffusers", partial(_model_card, asked), asked.sizes[:1]))
    if asked.against == "comfyui":
        ways.append(("comfyui", partial(_comfyui, asked), asked.sizes))
    done = 0
    try:
        with contextlib.ExitStack() as stack:
            if free is not None:
                on_progress(f"taking memory until {gib(free)} are free", 0, 1)
                stack.enter_context(_held(asked, free))
            for who, opening, sizes in ways:
                yield from _lines(asked, free, opening, who, sizes, on_progress)
                done += 1
    except KleinctlError as error:
        for who, _, sizes in ways[done:]:
            yield from (Line(who, *size, free, problem=error.problem) for size in sizes)


def _lines(
    asked: Asked,
    free: int | None,
    opening: Open,
    who: str,
    sizes: Sequence[tuple[int, int]],
    on_progress: OnProgress,
) -> Iterator[Line]:
    """A line for each size, drawn by one session; a fresh one where it has to be another, or the last one failed."""
    try:
        hardware = asked.detect()
    except Exception as error:
        yield from (Line(who, *size, free, problem=_failed(who, error)) for size in sizes)
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(watch := Watch(hardware.gpu))
        session, key = contextlib.ExitStack(), ""
        stack.callback(lambda: session.close())
        opened: Opened | None = None
        for width, height in sizes:
            line = Line(who, width, height, free)
            try:
                line, wanted, start = opening(line, hardware)
                since = time.perf_counter()
                if opened is None or wanted != key:
                    session.close()
                    session, key = contextlib.ExitStack(), wanted
                    opened = session.enter_context(start())
                    first: float | None = since
                else:
                    first = None
                yield _drawn(asked, line, opened, watch, first, on_progress)
            except KleinctlError as error:
                opened = None
                yield replace(line, problem=error.problem)
            except Exception as error:  # one line must not cost the others
                opened = None
                yield replace(line, problem=_failed(who, error))


def _failed(who: str, error: Exception) -> Problem:
    why = f"{type(error).__name__}: {error}"
    return Problem(f"{who} could not be measured", why, "kleinctl doctor", name="bench-line-failed")


# Those who draw


def _way(asked: Asked, line: Line, backend: str | None, hardware: Hardware, *, must_fit: bool = True) -> Way:
    """The way kleinctl would take on the machine as it is now; without `must_fit` one whose files are at hand.

    Raises:
        KleinctlError: it does not fit, or is not installed.
    """
    changes = {**asked.changes, "width": line.width, "height": line.height}
    found = road.ways(asked.plugins, [asked.model], backend, hardware, changes, must_fit=must_fit)
    if not found:
        raise road.no_way(asked.plugins, asked.model, backend, hardware, changes)
    if not road.files(found[0]).in_place:
        raise road.not_installed(found[0])
    return found[0]


def _kleinctl(asked: Asked, backend: str | None, line: Line, hardware: Hardware) -> Ready:
    way = _way(asked, line, backend, hardware)
    request = _request(asked, way, hardware, _jobs(asked, line)[0])
    named = replace(line, who=way.backend.name, fit=way.candidate.fit)
    return named, f"{way.backend.name} on {way.candidate.device}", lambda: _worker(request)


def _model_card(asked: Asked, line: Line, hardware: Hardware) -> Ready:
    """Plain diffusers: everything on the card where that fits, else the model card's offload."""
    way = _way(asked, line, asked.backends[0], hardware, must_fit=False)
    job = _jobs(asked, line)[0]
    resident = memory.weight_bytes(asked.model) + memory.decode_bytes(asked.model, job) + memory.CONTEXT_BYTES
    name = "resident" if hardware.gpu is None or resident <= hardware.gpu.vram_free_bytes else "offload"
    request = _request(asked, way, hardware, job)
    budget = replace(request.budget, vram_bytes=NO_LIMIT)
    request = replace(request, plugin="kleinctl.worker.model_card", backend=name, budget=budget)
    return line, name, lambda: _worker(request)


def _comfyui(asked: Asked, line: Line, hardware: Hardware) -> Ready:
    """The backend of that name with a server that runs, drawing in the precision that kleinctl draws in."""
    precision = asked.changes.get("precision") or _own_precision(asked.model)
    changes = {**asked.changes, "precision": precision, "width": line.width, "height": line.height}
    found = road.ways(asked.plugins, [asked.model], "comfyui", hardware, changes, must_fit=False)
    if not found:
        raise road.no_way(asked.plugins, asked.model, "comfyui", hardware, changes)
    request = _request(asked, found[0], hardware, default_job(asked.model, **changes))
    request = replace(request, budget=replace(request.budget, server=asked.url))

    @contextlib.contextmanager
    def start() -> Iterator[Opened]:
        with _worker(request) as opened:
            yield replace(opened, draw=lambda job, output: opened.draw(replace(job, precision=precision), output))

    return line, "comfyui", start


def _own_precision(model: Model) -> str:
    """The precision in which ComfyUI's files of a model hold what its manifest says; empty where they do not differ."""
    parts = (part for part in model.parts if "comfyui" in part.to and part.dtype == model.dtype)
    return next((part.precision for part in parts if part.precision), "")


def _request(asked: Asked, way: Way, hardware: Hardware, first: Job) -> generate.Request:
    """What a worker needs to know; the jobs come one by one.

    Without the sha256 of the model's parts nothing of a prompt is kept on disk: each line meets new prompts.
    """
    where = road.place(way, hardware)
    return replace(road.request(way, asked.environment(way, hardware), where, hardware), jobs=(first,), parts={})


@contextlib.contextmanager
def _worker(request: generate.Request) -> Iterator[Opened]:
    """A fresh session in a worker."""
    strategy = ""

    def quiet(progress: Progress) -> None:
        """Nobody looks at single steps."""

    with generate.Painter(request, quiet) as painter:

        def draw(job: Job, output: Path) -> tuple[str, Mapping[str, float]]:
            nonlocal strategy
            image = painter.paint(job, generate.Output(output), quiet)
            strategy = str(image.record["strategy"])
            return image.pixels_sha256, image.seconds

        yield Opened(draw, lambda: strategy, painter.loaded.versions)


def _jobs(asked: Asked, line: Line) -> list[Job]:
    """New prompts, each with its seed."""
    base = default_job(asked.model, **{**asked.changes, "width": line.width, "height": line.height})
    count = WARM_UP + asked.runs
    what = f"a picture of a cat, {line.width} wide and {line.height} high, number"  # new to a session in every size
    return [replace(base, prompt=f"{what} {number}", seed=number) for number in range(count)]


def _drawn(
    asked: Asked, line: Line, opened: Opened, watch: Watch, first: float | None, on_progress: OnProgress
) -> Line:
    """The line with the figures of new prompts, and of the last one again; `first` is when the session was begun."""
    jobs = _jobs(asked, line)
    seconds: list[float] = []
    hashes, stages = [], []
    about = line.who if line.free_bytes is None else f"{line.who}, {gib(line.free_bytes)} free"
    start = time.perf_counter()
    watch.begin()
    with tempfile.TemporaryDirectory(prefix="kleinctl-bench-") as folder:

        def draw(job: Job, number: int) -> None:
            on_progress(f"{line.width}x{line.height} {about}", number, len(jobs) + 1)
            since = time.perf_counter()
            digest, spent = opened.draw(job, Path(folder, f"{number}.png"))
            seconds.append(time.perf_counter() - since)
            hashes.append(digest)
            stages.append(spent)

        for number, job in enumerate(jobs):
            if number > WARM_UP and time.perf_counter() - start > LINE_SECONDS:
                break
            draw(job, number)
        draw(jobs[len(seconds) - 1], len(jobs))
    figures = Figures(
        strategy=opened.strategy(),
        seconds_first=None if first is None else start - first + seconds[0],
        seconds_new=tuple(seconds[WARM_UP:-1]),
        seconds_again=seconds[-1],
        vram_bytes=watch.vram_bytes,
        host_bytes=watch.host_bytes,
        pixels=tuple(hashes[:-1]),
        stages=_medians(stages[WARM_UP:-1]),
        versions=opened.versions,
    )
    return replace(line, figures=figures)


def _medians(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in stages for name in each)
    return {name: statistics.median(each.get(name, 0.0) for each in stages) for name in names}


# The card, and what is taken of it


class Watch:
    """Most of the card's memory, and of this process's new children's own memory, that was taken since `begin`.

    It begins before the children do, and knows what others had taken until then; of a server that then lets go of its
    models, what is left.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self.vram_bytes = self.host_bytes = 0
        self._gpu, self._ended = gpu, threading.Event()
        self._others = set(_children())
        self._before = used_bytes(gpu)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._card, self._host)]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def begin(self) -> None:
        """Forget the peaks until now."""
        self.vram_bytes = self.host_bytes = 0

    def __exit__(self, *rest: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(5)

    def _card(self) -> None:
        while self._gpu is not None and not self._ended.wait(CARD_SECONDS):
            used = used_bytes(self._gpu)
            self._before = min(self._before, used or self._before)
            self.vram_bytes = max(self.vram_bytes, used - self._before)

    def _host(self) -> None:
        while not self._ended.wait(HOST_SECONDS):
            own = sum(own_bytes(pid) for pid in _children() if pid not in self._others)
            self.host_bytes = max(self.host_bytes, own)


def _children() -> list[int]:
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        return [child.pid for child in psutil.Process().children(recursive=True)]
    return []


def own_bytes(pid: int) -> int:
    """Memory of a process that is no file's: anonymous and shared, pinned or not."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
        return 0
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        found = psutil.Process(pid).memory_info()
        return int(getattr(found, "private", found.rss))
    return 0


def used_bytes(gpu: Gpu | None) -> int:
    """Bytes of the card that are in use by every process; 0 without a card, or where the driver does not say."""
    return _memory(gpu)[0]


def _memory(gpu: Gpu | None) -> tuple[int, int]:
    """Bytes of the card in use, and free, by NVML."""
    if gpu is None:
        return 0, 0
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) if gpu.uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        found = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(found.used), int(found.free)
    return 0, 0


@contextlib.contextmanager
def _held(asked: Asked, free: int) -> Iterator[None]:
    """Other memory of the card taken, until only `free` bytes are free.

    Raises:
        KleinctlError: there is no card, or it has not so much free.
    """
    hardware = asked.detect()
    if hardware.gpu is None:
        raise no_card()
    way = _way(asked, Line("holder", *asked.sizes[0]), asked.backends[0], hardware, must_fit=False)
    holder = Holder(asked.environment(way, hardware).python, hardware.gpu)
    try:
        holder.leave(free)
        yield
    finally:
        holder.close()


def no_card() -> KleinctlError:
    """The problem of a budget of VRAM where there is none."""
    return KleinctlError(
        Problem(
            "--free needs an NVIDIA card",
            "It takes memory of the card until so much is left, and no card was found.",
            "kleinctl bench   # without --free",
            name="bench-no-card",
        )
    )


class Holder:
    """A process that holds VRAM; see kleinctl/worker/holder.py."""

    def __init__(self, python: Path, gpu: Gpu) -> None:
        self._gpu = gpu
        self._process = subprocess.Popen(
            [str(python), "-I", "-u", str(HOLDER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=worker_environment(os.environ, gpu.cuda_id),
            start_new_session=True,
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def leave(self, free: int) -> None:
        """Take memory until only `free` bytes are free.

        Raises:
            KleinctlError: less is free already, or it cannot be taken.
        """
        self._hear()
        for _ in range(8):
            more = _memory(self._gpu)[1] - free
            if more < -NEAR_BYTES:
                raise self._failed(f"{gib(free + more)} are free as it is, with the holder's own CUDA context.")
            if more <= NEAR_BYTES // 4:
                return
            self._take(more)

    def _take(self, count: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        self._hear()

    def _hear(self) -> None:
        try:
            said = self._answers.get(timeout=HOLDER_SECONDS)
        except queue.Empty:
            raise self._failed(f"Its holder said nothing for {HOLDER_SECONDS:.0f} seconds.") from None
        if not said.startswith("held"):
            raise self._failed(f"Its holder said: {said.strip() or 'nothing, and ended'}.")

    def _failed(self, why: str) -> KleinctlError:
        what = f"memory of {self._gpu.name} cannot be taken as --free wants it"
        return KleinctlError(Problem(what, why, "kleinctl bench   # without --free", name="bench-holder"))

    def close(self) -> None:
        """End the process, and wait until its memory is free again."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# Calibration


def calibrate(way: Way, environment: Environment, hardware: Hardware, on_progress: OnProgress) -> Rates:
    """Measure this machine's rates with the files of `way`; they are not kept here.

    Raises:
        KleinctlError: the worker does not start, or fails.
    """
    where = road.place(way, hardware)
    gpu = hardware.gpu if where.cuda else None
    folder = store.model_folder(way.model.name, way.backend.layout)
    start = time.perf_counter()
    with ProcessExecutor().start(environment.python, way.offer.module, gpu=gpu.cuda_id if gpu else None) as worker:
        started = time.perf_counter() - start
        reply = worker.ask(
            Calibrate(way.model, folder.absolute(), where.device),
            lambda said: on_progress(said.stage, said.done, said.total),
        )
    assert isinstance(reply, Calibrated)
    return replace(
        replace(reply.rates, encode=None, forward=(), decode=()) if gpu and too_small(way.model) else reply.rates,
        card=gpu.name if gpu else "",
        driver=(gpu.driver or "") if gpu else "",
        cpu=hardware.cpu,
        model=way.model.name,
        date=datetime.now(timezone.utc).date().isoformat(),
        start_seconds=started + (reply.rates.start_seconds or 0.0),
    )


def too_small(model: Model) -> bool:
    """Whether a model, one that needs no card, keeps a card too little busy to show how fast larger ones would be."""
    return "cpu" in model.devices


# The document and its chart


def document(asked: Asked, lines: Sequence[Line], hardware: Hardware, command: str, date: str) -> dict[str, Any]:
    """`kleinctl.bench/1`: the machine without what tells whose it is, what was asked, and every line."""
    from kleinctl import __version__

    job = default_job(asked.model, **asked.changes)
    versions = next((each.figures.versions for each in lines if each.figures and each.figures.versions), {})
    card = hardware.gpu
    return {
        "schema": SCHEMA,
        "kleinctl": __version__,
        "date": date,
        "command": command,
        "machine": {
            "card": card.name if card else None,
            "vram_bytes": card.vram_bytes if card else 0,
            "driver": card.driver if card else None,
            "cpu": hardware.cpu,
            "cores": hardware.cpu_count,
            "ram_bytes": hardware.ram_bytes,
            "os": hardware.os,
        },
        "versions": dict(versions),
        "model": asked.model.name,
        "steps": job.steps,
        "guidance": job.guidance,
        "images": len(job.images),
        "runs": asked.runs,
        "lines": [line.to_json() for line in lines],
    }


def chart(written: Path, target: Path, python: Path) -> None:
    """Draw the document that was written, with the Pillow of the worker's environment.

    Raises:
        KleinctlError: it cannot be drawn.
    """
    done = subprocess.run(
        [str(python), "-I", str(CHART), str(written), str(target)],
        capture_output=True,
        text=True,
        env=worker_environment(os.environ, None),
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        what = f"{target} could not be drawn"
        raise KleinctlError(Problem(what, f"{said[0][:300]}.", "kleinctl bench -o bench.json", name="bench-chart"))
