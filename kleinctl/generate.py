"""Jobs in; pictures, and the record of how each was made, out."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kleinctl.backends import Budget, Job
from kleinctl.executors import Executor, ProcessExecutor, WorkerHandle
from kleinctl.manifest import Model
from kleinctl.pictures import reference
from kleinctl.problem import KleinctlError, Misuse, Problem
from kleinctl.records import RECORD_SCHEMA
from kleinctl.verify import hash_file
from kleinctl.worker.protocol import NO_PIXELS, Generate, Load, Loaded, Made, Pixels, Progress, PromptCut, StageUse

SCHEMA = "kleinctl.run/1"
#: The stages whose seconds are told; what a backend calls otherwise counts in the total alone.
STAGES = ("load", "encode", "denoise", "decode")


@dataclass(frozen=True)
class Request:
    """Pictures to make with one backend and one model.

    `python` is the interpreter of the backend's environment, `plugin` the module that offers the backend, `folder`
    where the model's parts lie in its layout, `parts` their sha256 by id, `gpu` the UUID of the card to use.
    `outputs` has the file of each job; see `choose_outputs`.
    """

    model: Model
    folder: Path
    backend: str
    plugin: str
    python: Path
    budget: Budget
    jobs: tuple[Job, ...]
    outputs: tuple[Path, ...]
    parts: Mapping[str, str] = field(default_factory=dict, hash=False)
    gpu: str | None = None


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
class Result:
    """What a run made. `load_seconds` by stage, before the first picture; `total_seconds` with the worker's start.

    `problems` are what was odd about the jobs and about how the run went.
    """

    backend: str
    model: str
    images: tuple[Image, ...]
    load_seconds: dict[str, float] = field(hash=False)
    total_seconds: float
    load_stages: Mapping[str, StageUse] = field(default_factory=dict, hash=False)
    card_bytes: int = 0
    problems: tuple[Problem, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """What the backend said, each once."""
        return list(dict.fromkeys(text for image in self.images for text in image.record["warnings"]))

    @property
    def warnings(self) -> list[str]:
        """What the backend said and what checks found, in sentences."""
        return [*self.remarks, *(f"{each.what}: {each.why}" for each in self.problems)]

    def to_json(self) -> dict[str, Any]:
        """`kleinctl.run/1`. `record` is the first picture's; each file carries its own."""
        last, stages = self.images[-1], [self.load_seconds, *(image.seconds for image in self.images)]
        return {
            "schema": SCHEMA,
            "images": [image.to_json() for image in self.images],
            "backend": self.backend,
            "model": self.model,
            "strategy": last.record["strategy"],
            "seconds": {**_seconds(stages), "total": round(self.total_seconds, 3)},
            "peak_vram_bytes": last.peak_vram_bytes,
            "peak_vram_source": last.peak_vram_source,
            "peak_rss_bytes": last.peak_rss_bytes,
            "warnings": self.warnings,
            "record": self.images[0].record,
        }


def _seconds(stages: Iterable[Mapping[str, float]]) -> dict[str, float]:
    every = list(stages)
    return {stage: round(sum(seconds.get(stage, 0.0) for seconds in every), 3) for stage in STAGES}


@dataclass(frozen=True)
class Step:
    """Progress: `done` of `total` in `stage`, for picture `number` (from 1; 0 while loading) of `count`."""

    stage: str
    done: int
    total: int
    number: int
    count: int


@dataclass(frozen=True)
class Finished:
    """A picture is there: `number` (from 1) of `count`."""

    image: Image
    number: int
    count: int


Event = Step | Finished
OnEvent = Callable[[Event], None]


def run(request: Request, on_event: OnEvent, executor: Executor | None = None) -> Result:
    """Make every picture of `request` in one worker.

    Nothing is loaded before inputs and outputs are checked. A file that was there is replaced once the new picture is
    whole, and not before; whatever ends a run early leaves finished pictures, and no half ones.

    Raises:
        KleinctlError: something cannot work, or failed; no worker is left behind.
    """
    start = time.monotonic()
    count = len(request.jobs)
    check_jobs(request.jobs)
    prepare_outputs(request.jobs, request.outputs)
    images: list[Image] = []

    def at(number: int) -> Callable[[Progress], None]:
        return lambda said: on_event(Step(said.stage, said.done, said.total, number, count))

    with Painter(request, at(0), executor) as painter:
        for number, (job, output) in enumerate(zip(request.jobs, request.outputs, strict=True), 1):
            try:
                images.append(painter.paint(job, output, at(number)))
            except KleinctlError as error:
                raise _with_finished(error, number - 1, count) from None
            on_event(Finished(images[-1], number, count))
        seconds = time.monotonic() - start
    loaded = painter.loaded
    return Result(
        backend=request.backend,
        model=request.model.name,
        images=tuple(images),
        load_seconds=loaded.seconds,
        total_seconds=seconds,
        load_stages=loaded.stages,
        card_bytes=loaded.card_bytes,
    )


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
        self, request: Request, on_progress: Callable[[Progress], None], executor: Executor | None = None
    ) -> None:
        self._request = request
        self._partial: Path | None = None
        place = executor or ProcessExecutor()
        self._worker: WorkerHandle = place.start(request.python, request.plugin, gpu=request.gpu)
        try:
            load = Load(request.plugin, request.backend, request.model, request.folder.absolute(), request.budget)
            reply = self._worker.ask(load, on_progress)
        except BaseException:
            self._worker.stop()
            raise
        assert isinstance(reply, Loaded)
        self.loaded = reply

    def paint(self, job: Job, output: Path, on_progress: Callable[[Progress], None]) -> Image:
        """Make the picture of `job` and put it at `output`, replacing what is there.

        Raises:
            KleinctlError: it failed; the next job may succeed.
            WorkerDied: it failed for good; see `kleinctl.executors`.
        """
        output = output.absolute()
        self._partial = output.with_name(f".{output.name[:100]}.{os.getpid()}.partial")
        reply = self._worker.ask(Generate(_absolute(job), output, self._partial, self._record(job)), on_progress)
        assert isinstance(reply, Made)
        self._partial = None
        return Image(
            path=output,
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

    def _record(self, job: Job) -> dict[str, Any]:
        """What is known beforehand of how a picture is made; the worker adds the rest."""
        return {
            "schema": RECORD_SCHEMA,
            "prompt": job.prompt,
            "seed": job.seed,
            "width": job.width,
            "height": job.height,
            "steps": job.steps,
            "guidance": job.guidance,
            "images": [{"name": path.name, "sha256": hash_file(path)} for path in job.images],
            "model": self._request.model.name,
            "variant": self._request.model.variant,
            "parts": dict(self._request.parts),
            "backend": self._request.backend,
        }

    def __enter__(self) -> Painter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._worker.__exit__(kind, *rest)
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)


def _absolute(job: Job) -> Job:
    return replace(job, images=tuple(path.absolute() for path in job.images))


# Where pictures go.


def choose_outputs(
    jobs: Sequence[Job], output: Path | str | None, *, many: bool = False, folder: Path | None = None
) -> tuple[Path, ...]:
    """The file of each job.

    `output` names the PNG of a single job, or a folder for several (`many`: also where it happens to be one). Without
    it, and in a folder, a picture is called `klein-<seed>.png`, with a number where that name is taken: only a file
    that was named is ever replaced.

    Raises:
        Misuse: `output` cannot be meant so.
    """
    if output is None:
        return _default_names(jobs, folder or Path.cwd())
    path = Path(output)
    if many or len(jobs) > 1:
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            raise Misuse(
                Problem(
                    f"{output} names one file",
                    f"{len(jobs)} pictures are to be made, so -o has to name a folder.",
                    f"-o {path.with_suffix('')}",
                    name="output-not-a-folder",
                )
            )
        return _default_names(jobs, path)
    if _is_folder(path) or str(output).endswith(("/", os.sep)):
        return _default_names(jobs, path)
    if path.suffix.lower() != ".png":
        raise Misuse(
            Problem(
                f"{output} is no PNG",
                "Pictures are written as PNG, which keeps every pixel and the record of how they were made.",
                f"-o {path.with_suffix('.png')}",
                name="output-not-png",
            )
        )
    return (path,)


def _default_names(jobs: Sequence[Job], folder: Path) -> tuple[Path, ...]:
    chosen: list[Path] = []
    for job in jobs:
        path, number = folder / f"klein-{job.seed}.png", 1
        while path in chosen or path.exists():
            number += 1
            path = folder / f"klein-{job.seed}-{number}.png"
        chosen.append(path)
    return tuple(chosen)


def prepare_outputs(jobs: Sequence[Job], outputs: Sequence[Path]) -> None:
    """Make the folders of `outputs`, and try whether pictures can be written there.

    Raises:
        KleinctlError: they cannot, or would fill the disk.
    """
    for output in outputs:
        if _is_folder(output):
            raise Misuse(_unwritable(output, "It is a folder.", f"-o {output / 'picture.png'}"))
        if output.exists() and not os.access(output, os.W_OK):
            raise KleinctlError(_unwritable(output, "It is read-only.", "-o another.png"))
    for folder in dict.fromkeys(output.absolute().parent for output in outputs):
        probe = folder / f".kleinctl-{os.getpid()}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise KleinctlError(_unwritable(folder, f"{error.strerror}.", "-o another/folder/picture.png")) from None
        needed = sum(job.width * job.height * 3 for job in jobs)  # a PNG is rarely larger than its pixels
        if free < needed:
            why = f"The pictures take up to {needed} bytes, and {free} are free."
            raise KleinctlError(Problem(f"the disk of {folder} is full", why, "free some space", name="disk-full"))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # its name is too long
        raise Misuse(_unwritable(path, f"{error.strerror}.", "-o picture.png")) from None


def _unwritable(path: Path, why: str, fix: str) -> Problem:
    return Problem(f"{path} cannot be written to", why, fix, name="output-unwritable", path=str(path))


def check_jobs(jobs: Sequence[Job]) -> None:
    """Look at every reference picture.

    Raises:
        KleinctlError: one cannot be used.
    """
    for path in dict.fromkeys(path for job in jobs for path in job.images):
        reference(path)
