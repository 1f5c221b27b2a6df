"""Fetch parts from the hub or from an installed package: resumed, hashed on the way, and kept only if they are right.

huggingface-hub says who we are (token, user agent) and brings the HTTP client (proxies, certificates). The bytes are
fetched here, because that library starts again at zero after a restart and checks no hash over plain HTTP
(huggingface/huggingface_hub#4196). A partial file is `downloads/<sha256>.partial`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from kleinctl import store
from kleinctl.home import downloads_folder, offline
from kleinctl.hub import (
    PATIENT,
    Answer,
    Failed,
    Patience,
    endpoint,
    host_of,
    identity,
    interrupted,
    offline_problem,
    opened,
    public,
    reachable,
    refusal,
    where,
)
from kleinctl.problem import KleinctlError, Problem
from kleinctl.units import MIB, bytes_text, seconds_text

if TYPE_CHECKING:
    from kleinctl.manifest import Part, Source

__all__ = ["Event", "Patience", "Progress", "fetch", "fetch_all", "reachable"]

#: Files fetched at the same time. klein-4b has three large ones, so four leave a line for the small.
WORKERS = 4
#: Bytes. Smaller files go first, so that a missing licence or a wrong name shows before gigabytes have been fetched.
SMALL = 16 * MIB


@dataclass(frozen=True)
class Event:
    """Progress of one part, and of all. Bytes. `note` is a sentence where `stage` is `wait`.

    Stages: `rehash` (reading what an earlier run left), `download`, `verify`, `wait`, `done`.
    """

    part: str
    stage: Literal["rehash", "download", "verify", "wait", "done"]
    done: int
    total: int | None
    note: str = ""
    all_done: int = 0
    all_total: int = 0


Progress = Callable[[Event], None]


class Stopped(Exception):
    """Another part failed, or the user pressed Ctrl-C. What has arrived is on disk."""


def fetch_all(
    parts: Sequence[Part],
    arrived: Callable[[Part, Path, str], None],
    progress: Progress,
    *,
    workers: int = WORKERS,
    patience: Patience = PATIENT,
) -> None:
    """Fetch `parts`, several at a time. `arrived(part, file, sha256)` and `progress(event)` are called in this thread.

    Ctrl-C and the first failure stop all threads; the partial files stay, and the next call goes on with them.

    Raises:
        KleinctlError: a part could not be had from any source.
    """
    waiting: queue.SimpleQueue[Part] = queue.SimpleQueue()
    for part in sorted(parts, key=_turn):
        waiting.put(part)
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()
    threads = [
        threading.Thread(target=_work, args=(waiting, news, stop, patience), daemon=True)
        for _ in range(min(workers, len(parts)))
    ]
    try:
        for thread in threads:
            thread.start()
        _relay(parts, news, arrived, progress)
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=1)  # one that waits for the network ends by itself, and writes no more


def _turn(part: Part) -> tuple[bool, int]:
    size = part.size or 0
    return size >= SMALL, -size if size >= SMALL else size


def _work(waiting: queue.SimpleQueue[Part], news: Any, stop: threading.Event, patience: Patience) -> None:
    """One thread: part after part, until there are none. What it has to say goes into `news`."""
    try:
        while not stop.is_set():
            part = waiting.get_nowait()
            news.put((part, *fetch(part, news.put, stop=stop, patience=patience)))
    except (queue.Empty, Stopped):
        pass
    except BaseException as error:
        news.put(error)


def _relay(
    parts: Sequence[Part], news: queue.SimpleQueue[Any], arrived: Callable[..., None], progress: Progress
) -> None:
    """Pass on what the threads say, with the total of all parts added, until all have arrived."""
    done = {part.ref: 0 for part in parts}
    totals = {part.ref: part.size or 0 for part in parts}
    left = len(parts)
    while left:
        try:
            item = news.get(timeout=0.2)  # so that Windows sees Ctrl-C
        except queue.Empty:
            continue
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, Event):
            done[item.part], totals[item.part] = item.done, item.total or item.done
            progress(replace(item, all_done=sum(done.values()), all_total=sum(totals.values())))
        else:
            arrived(*item)
            left -= 1


def fetch(
    part: Part,
    progress: Progress,
    *,
    stop: threading.Event | None = None,
    patience: Patience = PATIENT,
) -> tuple[Path, str]:
    """Fetch one part: its verified file in `downloads/`, to be moved into place, and its sha256. Sources take turns.

    Where the manifest has no sha256, the one that the hub states is checked, if it states one.

    Raises:
        KleinctlError: no source had it, or the disk did not take it.
        Stopped: `stop` was set.
    """
    job = _Fetch(part, progress, stop or threading.Event(), patience)
    failures: list[Problem] = []
    try:
        job.partial.load(part.size, job.tick("rehash"))
        for source in part.sources:
            try:
                job.take(source)
                job.emit("done")
                return job.partial.path, job.partial.sha256.hexdigest()
            except Failed as failure:
                failures.append(failure.problem)
        raise KleinctlError(_with_the_others(failures))
    except BaseException:
        job.partial.drop_if_empty()
        raise


def _with_the_others(failures: Sequence[Problem]) -> Problem:
    """The first failure, with the other sources' named."""
    first, *others = failures
    if not others:
        return first
    more = "; ".join(f"{other.what} [{other.name}]" for other in others)
    return replace(first, why=f"{first.why} Other sources failed too: {more}.")


# What has arrived


def partial_file(part: Part) -> Path:
    """Where what has arrived of `part` lies."""
    words = part.ref
    for source in part.sources[:1]:
        words = f"{source.repo or source.package}@{source.revision}/{source.path}"
    name = part.sha256 or "unverified-" + hashlib.sha256(words.encode()).hexdigest()[:32]
    return downloads_folder() / f"{name}.partial"


def arrived_bytes(part: Part) -> int:
    """How much of `part` an earlier run left, in bytes."""
    try:
        return partial_file(part).stat().st_size
    except OSError:
        return 0


def discard_partial(part: Part) -> None:
    """Remove what has arrived of `part`, if anything has."""
    partial = _Partial(partial_file(part))
    partial.path.unlink(missing_ok=True)
    partial.sidecar.unlink(missing_ok=True)


class _Partial:
    """The bytes that are here so far, their hash, and a sidecar that says which version of which URL they are of."""

    def __init__(self, path: Path) -> None:
        self.path, self.sidecar = path, path.with_name(path.name + ".json")
        self.size, self.sha256 = 0, hashlib.sha256()

    def load(self, expected: int | None, tick: Callable[[], None]) -> None:
        """Hash what an earlier run left. More than `expected` bytes are of another file, and dropped."""
        store.make_folder(self.path.parent)
        with store.writing(self.path), self.path.open("ab+", buffering=0) as file:
            if expected is not None and file.tell() > expected:
                file.truncate(0)
            file.seek(0)
            while chunk := file.read(MIB):
                self._count(chunk)
                tick()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open for `write` and `rewind`; flushed to the disk at the end."""
        with store.writing(self.path):
            self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
            self._file.seek(self.size)
        try:
            yield
        finally:
            with self._file, store.writing(self.path):
                os.fsync(self._file.fileno())

    def write(self, chunk: bytes) -> None:
        with store.writing(self.path):
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        self._count(chunk)

    def rewind(self) -> None:
        """Start again: what is here belongs to another file."""
        with store.writing(self.path):
            self._file.seek(0)
            self._file.truncate(0)
        self.forget()

    def forget(self) -> None:
        """The file is gone or empty."""
        self.size, self.sha256 = 0, hashlib.sha256()
        self.sidecar.unlink(missing_ok=True)

    def drop_if_empty(self) -> None:
        """Nothing has arrived, so nothing is left behind."""
        with contextlib.suppress(OSError):
            if not self.path.stat().st_size:
                self.path.unlink()
                self.sidecar.unlink(missing_ok=True)

    def etag(self, url: str) -> str | None:
        """What the server called the version that these bytes are of, if they came from `url`."""
        try:
            note = json.loads(self.sidecar.read_bytes())
            return note["etag"] if note["url"] == url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def came_from(self, url: str, etag: str | None, size: int | None) -> None:
        store.write_json(self.sidecar, {"url": url, "etag": etag, "size": size})

    def _count(self, chunk: bytes) -> None:
        self.sha256.update(chunk)
        self.size += len(chunk)


class _Fetch:
    """One part on its way. `sha256` and `total` are the manifest's, else what the server says."""

    def __init__(self, part: Part, progress: Progress, stop: threading.Event, patience: Patience) -> None:
        self.part, self.progress, self.stop, self.patience = part, progress, stop, patience
        self.partial = _Partial(partial_file(part))
        self.total, self.sha256 = part.size, part.sha256
        self.received = False
        self._last = 0.0

    def emit(self, stage: Any, note: str = "") -> None:
        self.progress(Event(self.part.ref, stage, self.partial.size, self.total, note))

    def tick(self, stage: str) -> Callable[[], None]:
        """A function to call after each chunk: stops when told to, and tells of progress ten times a second."""

        def tick() -> None:
            if self.stop.is_set():
                raise Stopped
            now = time.monotonic()
            if now - self._last > 0.1:
                self._last = now
                self.emit(stage)

        return tick

    def take(self, source: Source) -> None:
        """Every byte from `source`, verified. If an earlier run's bytes spoil the hash, once more without them."""
        resumed = self.partial.size > 0
        try:
            self._get(source)
            self._verify(source)
        except _WrongHash:
            if not resumed:
                raise
            self._get(source)
            self._verify(source)

    def _get(self, source: Source) -> None:
        if self.partial.size == self.total:
            return
        with self.partial.opened():
            self._unpack(source) if source.package else self._download(source)

    def _verify(self, source: Source) -> None:
        found, wanted = self.partial.sha256.hexdigest(), self.sha256
        if wanted in (None, found):
            self.partial.sidecar.unlink(missing_ok=True)
            return
        origin = where(source)
        kept, looks = store.quarantine(
            self.partial.path, name=self.part.name, wanted=f"sha256 {wanted}", found=f"sha256 {found}", source=origin
        )
        self.partial.forget()
        raise _WrongHash(_wrong_hash(self.part, wanted or "", f"{found} ({looks})", origin, kept))

    # From a package

    def _unpack(self, source: Source) -> None:
        from importlib.resources import files

        assert source.package
        self.partial.rewind()
        try:
            file = files(source.package).joinpath(*PurePosixPath(source.path).parts)
            with file.open("rb") as stream:
                while chunk := stream.read(MIB):
                    self.partial.write(chunk)
                    self.tick("download")()
        except (ImportError, OSError):
            raise Failed(
                Problem(
                    f"{self.part.name} is not in the package {source.package}",
                    f"{source.path} should be in it; the package is missing or incomplete.",
                    "pip install --force-reinstall kleinctl",
                    name="package-incomplete",
                )
            ) from None

    # From the hub

    def _download(self, source: Source) -> None:
        """Try until all is here, as long as tries bring something or patience lasts."""
        if offline():
            raise Failed(offline_problem([self.part]))
        url = source.url(endpoint())
        fruitless, furthest = 0, self.partial.size
        while True:
            try:
                return self._try(source, url)
            except Failed as failure:
                fruitless = 1 if self.partial.size > furthest else fruitless + 1
                furthest = max(furthest, self.partial.size)
                patience = self.patience
                pause = failure.wait if failure.wait is not None else patience.backoff * 2 ** (fruitless - 1)
                allowed = patience.retries if self.received or failure.problem.name != "hub-unreachable" else 1
                if not failure.temporary or fruitless > allowed or pause > patience.longest_wait:
                    raise
                self.emit("wait", f"{failure.problem.what}; trying again in {seconds_text(pause)}")
                if self.stop.wait(pause):
                    raise Stopped from None

    def _try(self, source: Source, url: str) -> None:
        headers = {**identity(), "Accept-Encoding": "identity"}
        if self.partial.size:
            headers["Range"] = f"bytes={self.partial.size}-"
            etag = self.partial.etag(public(url))
            if etag and not etag.startswith("W/") and etag.isascii() and etag.isprintable():  # else it is no header
                headers["If-Range"] = etag
        with opened(url, headers, self.patience, self.part.name) as answer:
            if not self._begin(answer, source, url):
                return
            tick = self.tick("download")
            for chunk in answer.chunks():
                tick()
                if self.total is not None and self.partial.size + len(chunk) > self.total:
                    raise Failed(_wrong_size(self.part, self.total, f"more than {self.total}", url))
                self.partial.write(chunk)
                self.received = True
        if self.total is not None and self.partial.size < self.total:
            raise Failed(interrupted(self.part.name, url), temporary=True)

    def _begin(self, answer: Answer, source: Source, url: str) -> bool:
        """Judge an answer before its bytes are taken. False: nothing is missing."""
        self._compare(answer, source, url)
        here, etag = self.partial.size, answer.headers.get("etag")
        if answer.status == 416:
            if self.total is None and answer.range_total == here:
                return False
            self.partial.rewind()
            raise Failed(interrupted(self.part.name, url), temporary=True)
        if answer.status == 206:
            known = self.partial.etag(public(url))
            if answer.range_start != here or (known and etag != known):
                self.partial.rewind()
                raise Failed(interrupted(self.part.name, url), temporary=True)
        elif here:
            self.partial.rewind()
        total = answer.range_total if answer.status == 206 else answer.length
        if None not in (total, self.total) and total != self.total:
            raise Failed(_wrong_size(self.part, self.total or 0, str(total), url))
        self.total = self.total if self.total is not None else total
        self._check_room()
        self.partial.came_from(public(url), etag, self.total)
        return True

    def _compare(self, answer: Answer, source: Source, url: str) -> None:
        """Hold status and metadata against what is wanted."""
        if answer.status not in (200, 206, 416):
            raise refusal(answer, source, self.part.name, url)
        if answer.headers.get("content-type", "").startswith("text/html"):
            raise Failed(_web_page(self.part.name, url))
        for wanted, stated in ((self.sha256, answer.linked_sha256), (self.total, answer.linked_size)):
            if None not in (wanted, stated) and wanted != stated:
                raise Failed(_changed(self.part.name, wanted, stated, url))
        self.sha256 = self.sha256 or answer.linked_sha256
        self.total = self.total if self.total is not None else answer.linked_size

    def _check_room(self) -> None:
        missing, free = (self.total or 0) - self.partial.size, store.free_bytes(self.partial.path.parent)
        if missing > free:
            raise KleinctlError(no_room(self.partial.path.parent, missing, free))


class _WrongHash(Failed):
    """All bytes came, and they are not the file."""


# What can go wrong


def no_room(folder: Path, need: int, free: int) -> Problem:
    """`need` bytes are to be written to the disk of `folder`, and `free` are left."""
    return Problem(
        f"not enough room on the disk of {folder}",
        f"{bytes_text(need)} wanted, {bytes_text(free)} free.",
        f"make {bytes_text(need - free)} of room there, or set KLEINCTL_HOME to a folder on another disk",
        name="disk-full",
        path=str(folder),
        ref="B06",
    )


def _web_page(name: str, url: str) -> Problem:
    return Problem(
        f"a web page came instead of {name}",
        f"Weights are wanted; {host_of(url)} sent HTML. Networks that ask to log in first do this.",
        f"open {public(url)} in a browser and see what it says",
        name="web-page-instead",
        ref="B04",
    )


def _changed(name: str, wanted: object, stated: object, url: str) -> Problem:
    return Problem(
        f"{name} on {host_of(url)} is another file than the manifest means",
        f"{_brief(wanted)} is wanted; the hub states {_brief(stated)}. Nothing was fetched.",
        "pip install --upgrade kleinctl   (for manifests of today)",
        name="hub-file-changed",
    )


def _brief(value: object) -> str:
    return f"{value} bytes" if isinstance(value, int) else f"sha256 {str(value)[:12]}…"


def _wrong_size(part: Part, wanted: int, found: str, url: str) -> Problem:
    return Problem(
        f"{part.name} has the wrong size",
        f"{wanted} bytes wanted, {found} offered by {host_of(url)}. It was not used.",
        "run the same command again; if it stays, unset HF_ENDPOINT or check the proxy",
        name="wrong-size",
    )


def _wrong_hash(part: Part, wanted: str, found: str, origin: str, kept: Path) -> Problem:
    return Problem(
        f"{part.name} is not what it should be",
        f"sha256 {wanted} wanted; {origin} gave {found}. It is not used, and lies in {kept.parent} to be looked at.",
        "run the same command again; if it stays, unset HF_ENDPOINT or check the proxy",
        name="wrong-hash",
        path=str(kept),
    )
