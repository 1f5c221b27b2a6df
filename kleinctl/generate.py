"""Jobs in; pictures, and the record of how each was made, out."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kleinctl.backends import Budget, Job
from kleinctl.executors import Executor, ProcessExecutor, WorkerDied, WorkerHandle
from kleinctl.home import home
from kleinctl.manifest import Model
from kleinctl.pictures import reference
from kleinctl.problem import KleinctlError, Misuse, Problem
from kleinctl.records import begin, numbered
from kleinctl.units import bytes_text
from kleinctl.worker import protocol
from kleinctl.worker.protocol import (
    NO_PIXELS,
    Generate,
    Load,
    Loaded,
    Made,
    Pixels,
    Prepare,
    Prepared,
    Progress,
    PromptCut,
    StageUse,
)

SCHEMA = "kleinctl.run/1"
#: The stages whose seconds are told; what a backend calls otherwise counts in the total alone.
STAGES = ("load", "encode", "denoise", "decode", "save")
#: Jobs that a backend is told of ahead, to load its encoder, and a transformer that cannot stay, once for all of them.
#: So many embeddings fit into its cache on the disk (512 MiB, and klein-9b's have 12.6 MB each), latents wait in RAM
#: (1 MB each at 1024x1024), and an interrupted run loses minutes. By the memory model both loads take 2.4 s from the
#: page cache on an RTX 4090 with 8 GB of RAM: to 1.9 s of a picture they add 0.15 s with 16 jobs, 0.06 s with 40.
CHUNK = 40


@dataclass(frozen=True)
class Output:
    """The file of a picture. One that is there by then is left alone, and the picture goes beside, but for `replaces`.

    `replaces` is for the file that was named and was there already, and no other, however many runs write at once.
    """

    path: Path
    replaces: bool = False


@dataclass(frozen=True)
class Request:
    """Pictures to make with one backend and one model.

    `python` is the interpreter of the backend's environment, `plugin` the module that offers the backend, `folder`
    where the model's parts lie in its layout, `parts` their sha256 by id, `gpu` the UUID of the card to use.
    `outputs` has that of each job, in their order. `origins` is where each job of a batch stands (`prompts.jsonl:3`):
    one that fails is named by it, and the rest runs; without it the first that fails ends the run.
    """

    model: Model
    folder: Path
    backend: str
    plugin: str
    python: Path
    budget: Budget
    jobs: tuple[Job, ...]
    outputs: tuple[Output, ...]
    parts: Mapping[str, str] = field(default_factory=dict, hash=False)
    gpu: str | None = None
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Image:
    """A finished picture. `seconds` and `stages` by stage, `record` as it stands in the file; the rest as in `Made`."""

    path: Path
    job: Job
    sha256: str
    pixels_sha256: str
    seconds: dict[str, float] = field(hash=False)
    record: dict[str, Any] = field(hash=False)
    peak_vram_bytes: int
    peak_vram_source: str
    peak_rss_bytes: int
    stages: Mapping[str, StageUse] = field(default_factory=dict, hash=False)
    rss_bytes: int = 0
    pixels: Pixels = NO_PIXELS
    prompt_cut: PromptCut | None = None
    tiling: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """The picture as one of a run's `images`."""
        return {
            "path": str(self.path),
            "seed": self.job.seed,
            "sha256": self.sha256,
            "pixels_sha256": self.pixels_sha256,
            "seconds": _seconds([self.seconds]),
        }


@dataclass(frozen=True)
class Failure:
    """A job of a batch that gave no picture: its place in the request from 0, and how many of `count` are over now."""

    index: int
    problem: Problem
    number: int
    count: int


@dataclass(frozen=True)
class Result:
    """What a run made. `load_seconds` by stage, before the first picture; `total_seconds` with the worker's start.

    `images` keep the order of the jobs, without those that failed. `prepared` is what was done ahead for several of
    them. `problems` are what was odd about the jobs and about how the run went.
    """

    backend: str
    model: str
    images: tuple[Image, ...]
    load_seconds: dict[str, float] = field(hash=False)
    total_seconds: float
    load_stages: Mapping[str, StageUse] = field(default_factory=dict, hash=False)
    card_bytes: int = 0
    problems: tuple[Problem, ...] = ()
    failures: tuple[Failure, ...] = ()
    prepared: tuple[Prepared, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """What the backend said, each once."""
        ahead = (text for each in self.prepared for text in each.warnings)
        return list(dict.fromkeys([*ahead, *(text for image in self.images for text in image.record["warnings"])]))

    @property
    def warnings(self) -> list[str]:
        """What the backend said and what checks found, in sentences."""
        return [*self.remarks, *(f"{each.what}: {each.why}" for each in self.problems)]

    def to_json(self) -> dict[str, Any]:
        """`kleinctl.run/1`. `record` is the first picture's; each file carries its own."""
        return {
            "schema": SCHEMA,
            "images": [image.to_json() for image in self.images],
            "backend": self.backend,
            "model": self.model,
            "seconds": {**_seconds(self._stages()), "total": round(self.total_seconds, 3)},
            "warnings": self.warnings,
            **(self._of_pictures() if self.images else {}),
        }

    def _stages(self) -> list[Mapping[str, float]]:
        return [self.load_seconds, *(each.seconds for each in self.prepared), *(each.seconds for each in self.images)]

    def _of_pictures(self) -> dict[str, Any]:
        last = max(self.images, key=lambda image: image.peak_rss_bytes)
        return {
            "strategy": last.record["strategy"],
            "peak_vram_bytes": max(image.peak_vram_bytes for image in self.images),
            "peak_vram_source": last.peak_vram_source,
            "peak_rss_bytes": last.peak_rss_bytes,
            "record": self.images[0].record,
        }


def _seconds(stages: Iterable[Mapping[str, float]]) -> dict[str, float]:
    every = list(stages)
    return {stage: round(sum(seconds.get(stage, 0.0) for seconds in every), 3) for stage in STAGES}


@dataclass(frozen=True)
class Step:
    """Progress: `done` of `total` in `stage`, for picture `number` (from 1) of `count`.

    `number` is 0 while the model loads, and while a stage of several pictures is done ahead.
    """

    stage: str
    done: int
    total: int
    number: int
    count: int


@dataclass(frozen=True)
class Finished:
    """A picture is there, and `number` of `count` are over now."""

    image: Image
    number: int
    count: int


Event = Step | Finished | Failure
OnEvent = Callable[[Event], None]


def run(request: Request, on_event: OnEvent, executor: Executor | None = None) -> Result:
    """Make every picture of `request` in one worker, and in another where that dies in a batch.

    Nothing is loaded before inputs and outputs are checked (inputs of a batch: each job's when its turn comes). A file
    is replaced once the new picture is whole, and not before; whatever ends a run early leaves finished pictures, and
    no half ones.

    Raises:
        KleinctlError: something cannot work, or failed; no worker is left behind.
    """
    start = time.monotonic()
    check_jobs(() if request.origins else request.jobs)
    prepare_outputs(request.jobs, request.outputs)
    with Painter(request, _steps(request, 0, on_event), executor) as painter:
        images, failures = _paint_all(painter, request, on_event)
        seconds = time.monotonic() - start
    loaded = painter.loaded
    return Result(
        backend=request.backend,
        model=request.model.name,
        images=tuple(images[index] for index in sorted(images)),
        load_seconds=loaded.seconds,
        total_seconds=seconds,
        load_stages=loaded.stages,
        card_bytes=loaded.card_bytes,
        failures=tuple(sorted(failures, key=lambda failure: failure.index)),
        prepared=tuple(painter.prepared),
    )


def _steps(request: Request, number: int, on_event: OnEvent) -> Callable[[Progress], None]:
    count = len(request.jobs)
    return lambda said: on_event(Step(said.stage, said.done, said.total, number, count))


def _paint_all(painter: Painter, request: Request, on_event: OnEvent) -> tuple[dict[int, Image], list[Failure]]:
    """The pictures by their job's place in the request, and what failed."""
    images: dict[int, Image] = {}
    failures: list[Failure] = []
    ahead = _steps(request, 0, on_event)
    for chunk in _chunks(request.jobs):
        told = 0  # which worker knows what comes next: what one did ahead is lost with it
        for place, index in enumerate(chunk):
            number, count = len(images) + len(failures) + 1, len(request.jobs)
            try:
                painter.ready(ahead)
                if painter.workers != told:
                    painter.prepare([request.jobs[each] for each in chunk[place:]], ahead)
                    painter.ready(ahead)
                    told = painter.workers
                image = _paint(painter, request, index, _steps(request, number, on_event))
            except JobFailed as failed:
                failures.append(Failure(index, failed.problem, number, count))
                on_event(failures[-1])
            except KleinctlError as error:
                raise _with_finished(error, len(images), count) from None
            else:
                images[index] = image
                on_event(Finished(image, number, count))
    return images, failures


def _chunks(jobs: Sequence[Job]) -> list[list[int]]:
    """Places in `jobs`, `CHUNK` at a time; in a chunk jobs of one size follow each other, the largest first."""
    every = range(len(jobs))
    cut = [every[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    return [sorted(chunk, key=lambda index: (-jobs[index].width * jobs[index].height, index)) for chunk in cut]


class JobFailed(KleinctlError):
    """A job of a batch failed, and the next may succeed."""


def _paint(painter: Painter, request: Request, index: int, on_progress: Callable[[Progress], None]) -> Image:
    """The picture of a job. One of a batch gets a second worker where the first dies, which may not be its doing."""
    job, output = request.jobs[index], request.outputs[index]
    if not request.origins:
        return painter.paint(job, output, on_progress)
    try:
        with contextlib.suppress(WorkerDied):
            return painter.paint(job, output, on_progress)
        return painter.paint(job, output, on_progress)
    except KleinctlError as error:
        what = f"{request.origins[index]}: {error.problem.what}"
        raise JobFailed(replace(error.problem, what=what)) from None


def _with_finished(error: KleinctlError, finished: int, count: int) -> KleinctlError:
    if count > 1:
        error.problem = replace(error.problem, why=f"{error.problem.why} {finished} of {count} pictures were finished.")
    return error


class Painter:
    """A model loaded in a worker, that makes one picture after another. Used in a `with` block.

    Raises:
        KleinctlError: the worker does not start, or the model does not load.
    """

    def __init__(
        self,
        request: Request,
        on_progress: Callable[[Progress], None],
        executor: Executor | None = None,
    ) -> None:
        self._request = request
        self._place = executor or ProcessExecutor()
        self._partial: Path | None = None
        self._worker: WorkerHandle | None = None
        #: How many there were.
        self.workers = 0
        #: What was done ahead, in its order.
        self.prepared: list[Prepared] = []
        self.ready(on_progress)

    def ready(self, on_progress: Callable[[Progress], None]) -> WorkerHandle:
        """The worker; where it has died, another in which the model is loaded again.

        Raises:
            KleinctlError: it does not start, or the model does not load.
        """
        if self._worker is not None:
            return self._worker
        wanted = self._request
        worker = self._place.start(wanted.python, wanted.plugin, gpu=wanted.gpu)
        try:
            load = Load(
                wanted.plugin,
                wanted.backend,
                wanted.model,
                wanted.folder.absolute(),
                wanted.budget,
                dict(wanted.parts),
                home() / "cache",
                absolute(wanted.jobs[0]) if wanted.jobs else None,
            )
            reply = worker.ask(load, on_progress)
        except BaseException:
            worker.stop()
            raise
        assert isinstance(reply, Loaded)
        self._worker, self.loaded, self.workers = worker, reply, self.workers + 1
        return worker

    def prepare(self, jobs: Sequence[Job], on_progress: Callable[[Progress], None]) -> None:
        """Let the backend do ahead what it can for `jobs`, which come next.

        What goes wrong is in the worker's log; each job meets it again, or does not, when it is painted.
        """
        if len(jobs) > 1:
            with contextlib.suppress(KleinctlError):
                reply = self._ask(Prepare(tuple(map(absolute, jobs))), on_progress)
                assert isinstance(reply, Prepared)
                self.prepared.append(reply)

    def paint(self, job: Job, output: Output, on_progress: Callable[[Progress], None]) -> Image:
        """Make the picture of `job` and put it at `output`.

        Raises:
            KleinctlError: it failed; the next job may succeed.
            WorkerDied: it failed and took the worker along; the next job gets another.
        """
        check_jobs([job])  # a reference may have gone since the run began,
        prepare_outputs([job], [output])  # or the disk is full now: that shows before it is painted
        wanted, path = self._request, output.path.absolute()
        first = None if output.replaces else _first_name(job, path)
        self._partial = path.with_name(f".{path.name[:100]}.{os.getpid()}.partial")
        record = begin(job, wanted.model, wanted.backend, wanted.parts)
        reply = self._ask(Generate(absolute(job), path, self._partial, record, first), on_progress)
        assert isinstance(reply, Made)
        self._partial = None
        return Image(
            path=reply.output or path,
            job=job,
            sha256=reply.sha256,
            pixels_sha256=reply.pixels_sha256,
            seconds=reply.seconds,
            record=reply.record,
            peak_vram_bytes=reply.peak_vram_bytes,
            peak_vram_source=reply.peak_vram_source,
            peak_rss_bytes=reply.peak_rss_bytes,
            stages=reply.stages,
            rss_bytes=reply.rss_bytes,
            pixels=reply.pixels,
            prompt_cut=reply.prompt_cut,
            tiling=reply.tiling,
        )

    def _ask(self, request: protocol.Request, on_progress: Callable[[Progress], None]) -> protocol.Reply:
        worker = self.ready(on_progress)
        try:
            return worker.ask(request, on_progress)
        except WorkerDied:
            worker.stop()
            self._worker = None
            self._clear()
            raise

    def _clear(self) -> None:
        """Remove what was written of a picture that did not come."""
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
            self._partial = None

    def __enter__(self) -> Painter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._worker is not None:
            self._worker.__exit__(kind, *rest)
        self._clear()


def absolute(job: Job) -> Job:
    """The job with its files named so that a process in another folder finds them."""
    workflow = job.workflow and job.workflow.absolute()
    return replace(job, images=tuple(path.absolute() for path in job.images), workflow=workflow)


# Where pictures go.


def choose_outputs(jobs: Sequence[Job], named: Path | str | None) -> tuple[Output, ...]:
    """The file of each job.

    `named` is the PNG of a single job, or a folder. In a folder, which without it is this one, a picture is called
    `klein-<seed>.png`, with a number where that name is taken.

    Raises:
        Misuse: `named` cannot be meant so.
    """
    if named is None:
        return _default_names(jobs, Path.cwd())
    path = Path(named)
    if len(jobs) > 1:
        return _default_names(jobs, output_folder(path))
    if _is_folder(path) or str(named).endswith(("/", os.sep)):
        return _default_names(jobs, path)
    if path.suffix.lower() != ".png":
        raise Misuse(
            Problem(
                f"{named} is no PNG",
                "Pictures are written as PNG, which keeps every pixel and the record of how they were made.",
                f"-o {path.with_suffix('.png')}",
                name="output-not-png",
            )
        )
    return (Output(path, replaces=path.exists()),)


def output_folder(named: Path) -> Path:
    """`named` as the folder that several pictures go into.

    Raises:
        Misuse: it is, or is called like, a file.
    """
    if named.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") or (not _is_folder(named) and named.exists()):
        raise Misuse(
            Problem(
                f"{named} names one file",
                "Several pictures may be made, so -o has to name a folder.",
                f"-o {named.with_suffix('') if named.suffix else named.with_name(named.name + '-pictures')}",
                name="output-not-a-folder",
            )
        )
    return named


def _default_names(jobs: Sequence[Job], folder: Path) -> tuple[Output, ...]:
    chosen: list[Path] = []
    for job in jobs:
        names = numbered(folder / f"klein-{job.seed}.png")
        chosen.append(next(path for path in names if path not in chosen and not path.exists()))
    return tuple(map(Output, chosen))


def _first_name(job: Job, path: Path) -> Path:
    """The name from which another counts where `path` is taken (see `numbered`): without a number that we gave."""
    given = re.fullmatch(rf"(klein-(?:\d{{4,}}-)?{job.seed})(?:-\d+)?\.png", path.name)
    return path.with_name(f"{given[1]}.png") if given else path


def _folders(outputs: Sequence[Output]) -> list[Path]:
    return list(dict.fromkeys(output.path.absolute().parent for output in outputs))


def check_outputs(outputs: Sequence[Output]) -> None:
    """Whether pictures could be put at `outputs`, as far as that shows without making anything.

    Raises:
        KleinctlError: one cannot be written.
    """
    for path in (output.path for output in outputs):
        if _is_folder(path):
            raise Misuse(_unwritable(path, "It is a folder.", f"-o {path / 'picture.png'}"))
        if path.exists() and not os.access(path, os.W_OK):
            raise KleinctlError(_unwritable(path, "It is read-only.", "-o another.png"))
    for folder in _folders(outputs):
        try:
            there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
            if not os.access(there, os.W_OK):
                raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)}: {there}")
        except OSError as error:
            raise _no_folder(folder, error) from None


def prepare_outputs(jobs: Sequence[Job], outputs: Sequence[Output]) -> None:
    """Make the folders of `outputs`, and try whether pictures can be written there.

    Raises:
        KleinctlError: they cannot, or would fill the disk.
    """
    check_outputs(outputs)
    for folder in _folders(outputs):
        probe = folder / f".kleinctl-{os.getpid()}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise _no_folder(folder, error) from None
        needed = sum(job.width * job.height * 3 for job in jobs)  # a PNG is rarely larger than its pixels
        if free < needed:
            why = f"The pictures take up to {bytes_text(needed)}, and {bytes_text(free)} are free."
            raise KleinctlError(Problem(f"the disk of {folder} is full", why, "free some space", name="disk-full"))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # its name is too long
        raise Misuse(_unwritable(path, f"{error.strerror}.", "-o picture.png")) from None


def _no_folder(folder: Path, error: OSError) -> KleinctlError:
    return KleinctlError(_unwritable(folder, f"{error.strerror}.", "-o another/folder/picture.png"))


def _unwritable(path: Path, why: str, fix: str) -> Problem:
    return Problem(f"{path} cannot be written to", why, fix, name="output-unwritable", path=str(path))


def check_prompt(prompt: str) -> None:
    """Whether a prompt is text, and some; a terminal can hand over what is not.

    Raises:
        Misuse: it is not.
    """
    fix = 'kleinctl run "a red circle"'
    if not prompt.strip():
        why = "It has to say what is to be seen."
        raise Misuse(Problem("the prompt is empty", why, fix, name="prompt-empty"))
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        at = error.start
        why = f"Wanted is text in UTF-8; after {at} characters comes {prompt[at]!a}, which stands for no character."
        fix += "   # typed in a terminal whose encoding is UTF-8"
        raise Misuse(Problem("the prompt is not all text", why, fix, name="prompt-not-text")) from None


def check_jobs(jobs: Sequence[Job]) -> None:
    """Look at every reference picture.

    Raises:
        KleinctlError: one cannot be used.
    """
    for path in dict.fromkeys(path for job in jobs for path in job.images):
        reference(path)
