"""The worker's side: answers requests with one backend, and measures what a picture took."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import queue
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from kleinctl import __version__
from kleinctl.backends import Budget, InstalledModel, Job
from kleinctl.pngtext import plain_text, utf8_text, with_chunks
from kleinctl.problem import KleinctlError, Problem
from kleinctl.records import numbered
from kleinctl.worker import die_with_parent, protocol
from kleinctl.worker.device import Device, open_device, rss_bytes, settle_processor
from kleinctl.worker.looks import pixels_of, prompt_cut
from kleinctl.worker.protocol import (
    Calibrate,
    Calibrated,
    Close,
    Failed,
    Generate,
    Hello,
    Load,
    Loaded,
    Made,
    Message,
    Prepare,
    Prepared,
    Progress,
    StageUse,
)

#: Packages whose versions go into a picture's record.
RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow")
#: Progress of one stage is sent this often at most, in seconds.
PROGRESS_SECONDS = 0.05


def serve(requests: BinaryIO, replies: BinaryIO, *, die_with_control: bool) -> None:
    """Answer requests until the control process closes the worker, or is gone."""
    if die_with_control:
        die_with_parent()
    line = Line(requests, replies)
    line.send(Hello(protocol.PROTOCOL, __version__, os.getpid()))
    worker = Worker(line)
    while not isinstance(request := line.receive(), Close):
        line.send(worker.answer(request))
    worker.close()


class Line:
    """The pipes to the control process. When it ends, so does this process, whatever it is doing."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests, self._replies = requests, replies
        self._arrived: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self.partial: Path | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: Message) -> None:
        with self._sending:
            self._replies.write(protocol.encode(message))
            self._replies.flush()

    def receive(self) -> Message | None:
        return self._arrived.get()

    def _listen(self) -> None:
        for text in self._requests:
            message = protocol.decode(text)
            self._arrived.put(message)
            if isinstance(message, Close):
                return
        if self.partial is not None:
            with contextlib.suppress(OSError):  # Windows removes no file that is being written
                self.partial.unlink(missing_ok=True)
        if sys.platform != "win32" and os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)  # what the backend has started goes as well
        os._exit(1)


class Stopwatch:
    """The `progress` that a backend calls: passes it on, and adds up the seconds of each stage.

    What is done before the first call counts for the first stage. `synchronize` waits for the GPU, so that a stage is
    charged with the work it queued; `measure` then says what the stage took of the card.
    """

    def __init__(
        self,
        send: Callable[[Progress], None],
        synchronize: Callable[[], None],
        stage: str = "",
        measure: Callable[[], StageUse] = StageUse,
    ) -> None:
        self._send, self._synchronize, self._measure = send, synchronize, measure
        self.stage = stage
        self.seconds: dict[str, float] = {}
        self.uses: dict[str, StageUse] = {}
        self._since = time.perf_counter()
        self._sent = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        changed = stage != self.stage
        if changed:
            if self.stage:
                # A picture that is saved is on the host; what comes back for the next goes on coming.
                self.stop(wait=stage != "save")
            self.stage = stage
        now = time.monotonic()
        if changed or done >= total or now - self._sent >= PROGRESS_SECONDS:
            self._sent = now
            self._send(Progress(str(stage), int(done), int(total)))

    def stop(self, *, wait: bool = True) -> dict[str, float]:
        """Seconds by stage until now; without `wait` the GPU may still be at what was queued."""
        if wait:
            self._synchronize()
        now = time.perf_counter()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self._since
        self.uses[self.stage] = _most(self.uses.get(self.stage), self._measure())
        self._since = now
        return self.seconds


def _most(one: StageUse | None, other: StageUse) -> StageUse:
    """The larger figures of two parts of a stage."""
    if one is None:
        return other
    return StageUse(
        vram_peak_bytes=max(one.vram_peak_bytes, other.vram_peak_bytes),
        vram_rise_bytes=max(one.vram_rise_bytes, other.vram_rise_bytes),
        card_used_bytes=max(one.card_used_bytes, other.card_used_bytes),
        gpu_percent=other.gpu_percent if one.gpu_percent is None else max(one.gpu_percent, other.gpu_percent or 0),
    )


class Worker:
    """One backend with one model."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._watch = Stopwatch(line.send, lambda: None)
        self._device = Device(Budget(0, 0, "cpu"))
        self._session: Any = None
        self._loaded: Loaded | None = None
        self._max_tokens = 0
        #: A picture that could not be written, as on a full disk: asked for again, it need not be drawn again.
        self._unwritten: dict[Job, Any] = {}

    def answer(self, request: Message | None) -> Message:
        """The reply to one request; whatever goes wrong becomes a `Failed`, its traceback goes to the log."""
        try:
            if isinstance(request, Load):
                return self.load(request)
            if isinstance(request, Prepare):
                return self.prepare(request)
            if isinstance(request, Generate):
                return self.generate(request)
            if isinstance(request, Calibrate):
                return self.calibrate(request)
            raise ValueError("the worker was asked something it does not know")
        except KleinctlError as error:
            traceback.print_exc()
            return Failed(type(error).__name__, str(error), self._watch.stage, error.problem)
        except Exception as error:
            traceback.print_exc()
            return Failed(_type_name(error), str(error)[:4000], self._watch.stage)

    def load(self, request: Load) -> Loaded:
        """Import the plugin and load the model."""
        self._watch = Stopwatch(
            self._line.send, lambda: self._device.synchronize(), "load", lambda: self._device.measure()
        )
        backend = _backend(request.plugin, request.backend)
        model = InstalledModel(request.model, request.folder, request.parts, request.cache)
        if request.job is not None and hasattr(backend, "prefetch"):
            backend.prefetch(model, request.budget, request.job)
        self._device = getattr(backend, "open_device", open_device)(request.budget)
        session = backend.load(model, self._device.budget)
        settle_processor()
        self._session = session
        self._loaded = Loaded(
            strategy=session.strategy,
            dtype=getattr(session, "dtype", request.model.dtype),
            device=self._device.name,
            versions=versions(session),
            seconds=self._watch.stop(),
            warnings=self._new_warnings(),
            stages=self._watch.uses,
            card_bytes=self._device.total_bytes,
        )
        self._max_tokens = request.model.defaults.max_prompt_tokens
        return self._loaded

    def prepare(self, request: Prepare) -> Prepared:
        """Let the session do ahead what it can for the jobs that come next."""
        ahead = getattr(self._session, "prepare", None)
        if ahead is None:
            return Prepared()
        self._watch = Stopwatch(self._line.send, self._device.synchronize, "prepare", self._device.measure)
        ahead(request.jobs, self._watch)
        return Prepared(self._watch.stop(), self._watch.uses, self._new_warnings())

    def generate(self, request: Generate) -> Made:
        """Make one picture and write it, whole or not at all."""
        if self._loaded is None:
            raise ValueError("the worker was asked for a picture before a model was loaded")
        self._watch = Stopwatch(self._line.send, self._device.synchronize, measure=self._device.measure)
        for path in request.job.images:
            _decode_reference(path)
        image = self._unwritten.get(request.job)
        if image is None:
            image = self._session.generate(request.job, self._watch).convert("RGB")
        self._unwritten = {request.job: image}
        self._watch("save", 0, 1)
        warnings = (*self._new_warnings(), *_remarks(image, request.job))
        record = {
            **request.record,
            "strategy": self._session.strategy,
            "dtype": getattr(self._session, "dtype", self._loaded.dtype),
            "device": self._loaded.device,
            "versions": {**self._loaded.versions, **getattr(self._session, "versions", {})},
            "warnings": [*self._loaded.warnings, *warnings],
        }
        self._line.partial = request.partial
        with ThreadPoolExecutor(1) as beside:
            pixels = beside.submit(lambda: hashlib.sha256(image.tobytes()).hexdigest())
            digest, output = write_png(image, record, request.partial, request.output, request.first)
        self._line.partial = None
        self._unwritten = {}
        peak, source = self._device.peak_vram()
        return Made(
            sha256=digest,
            pixels_sha256=pixels.result(),
            record=record,
            seconds=self._watch.stop(),
            peak_vram_bytes=peak,
            peak_vram_source=source,
            peak_rss_bytes=self._device.peak_rss(),
            warnings=warnings,
            stages=self._watch.uses,
            rss_bytes=rss_bytes(),
            pixels=pixels_of(image),
            prompt_cut=prompt_cut(getattr(self._session, "tokenizer", None), request.job.prompt, self._max_tokens),
            tiling=getattr(self._session, "tiling", None),
            output=output,
        )

    def calibrate(self, request: Calibrate) -> Calibrated:
        """Time pieces of a model; nothing needs to be loaded."""
        from kleinctl.worker.calibrate import calibrate

        self._watch = Stopwatch(self._line.send, lambda: None, "calibrate")
        return Calibrated(calibrate(request, self._watch))

    def close(self) -> None:
        """Free what the session holds."""
        if self._session is not None:
            self._session.close()

    def _new_warnings(self) -> tuple[str, ...]:
        """What the session has put into its `warnings`, if it has such a list; it is emptied."""
        warnings = getattr(self._session, "warnings", None)
        if not warnings:
            return ()
        taken = tuple(map(str, warnings))
        warnings.clear()
        return taken


def _backend(plugin: str, name: str) -> Any:
    for backend in importlib.import_module(plugin).kleinctl_backends():
        if name in (backend.name, *backend.aliases):
            return backend
    raise LookupError(f"the plugin {plugin} offers no backend named {name}")


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _decode_reference(path: Path) -> None:
    """Read a reference picture once to the end, so that a damaged one is named before any work is done for it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow lets IndexError, struct.error and more out of damaged files
        raise KleinctlError(
            Problem(
                f"{path.name} cannot be used as a reference picture",
                f"It starts like a picture, but cannot be decoded: {error}.",
                "save it again as PNG and give that",
                name="reference-damaged",
                path=str(path),
            )
        ) from None


def _remarks(image: Any, job: Job) -> list[str]:
    """What is odd about a finished picture."""
    remarks = []
    if image.size != (job.width, job.height):
        remarks.append(f"the picture is {image.width}x{image.height}; {job.width}x{job.height} was asked for")
    return remarks


def write_png(
    image: Any, record: Mapping[str, Any], partial: Path, output: Path, first: Path | None = None
) -> tuple[str, Path]:
    """Write `image` with its record to `partial`, then rename to `output`. The sha256 of the file, and its name.

    With `first` nothing is replaced: where `output` is taken by now, it gets the next free name that counts from there.
    The record holds no times, so the same job on the same machine gives the same file, byte for byte.
    """
    buffer = io.BytesIO()
    # Run lengths alone: what the filters of PNG leave of a picture has no longer repeats. On 1024x1024 a processor's
    # 160 ms become 80 with grain, at the same size (1.85 MB), and a smooth gradient has 0.09 MB instead of 0.05.
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    png = with_chunks(
        buffer.getvalue(),
        plain_text("Description", record["prompt"]),
        plain_text("Software", f"kleinctl {__version__}"),
        utf8_text("kleinctl", json.dumps(record, ensure_ascii=False)),
    )
    try:
        with partial.open("wb") as file:
            file.write(png)
            file.flush()
            os.fsync(file.fileno())
        output = partial.replace(output) if first is None else _rename(partial, output, first)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    return hashlib.sha256(png).hexdigest(), output


def _rename(partial: Path, output: Path, first: Path) -> Path:
    """Rename to `output`, or to the first name free that counts from `first`, however many do so at a time."""
    for path in itertools.chain([output], numbered(first)):
        with contextlib.suppress(FileExistsError):
            if sys.platform == "win32":
                return partial.rename(path)  # replaces nothing
            path.touch(exist_ok=False)
            return partial.replace(path)
    raise AssertionError("numbers do not end")


def versions(session: Any) -> dict[str, str]:
    """Versions of kleinctl and of what decides how a picture looks: the session's own, else Python's and packages'."""
    from importlib.metadata import PackageNotFoundError, version

    own = getattr(session, "versions", None)
    if own:
        return {"kleinctl": __version__, **own}
    found = {"kleinctl": __version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if "torch" in sys.modules:
        found["torch"] = str(sys.modules["torch"].__version__)  # with the build it is of, as +cu130
    return found
