"""Is every part the very file its manifest names? Sizes first, then sha256, one thread per file."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kleinctl.identify import Identity, identify
from kleinctl.manifest import Model, Part
from kleinctl.problem import Problem
from kleinctl.units import bytes_text

Status = Literal["ok", "missing", "unreadable", "wrong-size", "wrong-hash", "unverified"]

#: Bytes read at a time. 1 MiB was as fast as any: larger buffers leave the cache, smaller ones cost calls.
BUFFER = 2**20


@dataclass(frozen=True)
class Verdict:
    """What became of one part. Sizes in bytes; `identity` says what a wrong file really is.

    `unverified`: the manifest knows no sha256, so that the file has the right size (where one is known) is all that
    can be said.
    """

    path: Path
    part: Part
    status: Status
    found_size: int | None = None
    found_sha256: str | None = None
    identity: Identity | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with it, as far as can be told."""
        return self.status in ("ok", "unverified")

    @property
    def problem(self) -> Problem | None:
        """What to tell the user, or None when all is well."""
        if self.status == "ok":
            return None
        what, why = self._words()
        return Problem(
            what=f"{self.path.name} {what}",
            why=why,
            fix=f"kleinctl install --model {self.part.model}",
            name=f"part-{self.status}",
            severity="warning" if self.status == "unverified" else "error",
            path=str(self.path),
        )

    def _words(self) -> tuple[str, str]:
        part, found = self.part, f"{self.found_size or 0:,} bytes"
        if self.status == "missing":
            return "is missing", f"{part.ref} should be at {self.path}."
        if self.status == "unreadable":
            reason = self.identity.saw if self.identity else "cannot be read"
            return "cannot be read", f"{part.ref} should be at {self.path}; it {reason}."
        if self.status == "wrong-size":
            return f"is not {part.ref}", f"Wanted {part.size or 0:,} bytes, found {found}.{self._inside()}"
        if self.status == "wrong-hash":
            hashes = f"Wanted sha256 {(part.sha256 or '')[:12]}…, found {(self.found_sha256 or '')[:12]}…"
            return f"is not {part.ref}", f"{hashes}, in {found}.{self._inside()}"
        return "could not be verified", f"No sha256 is known for {part.ref}; {found} were found."

    def _inside(self) -> str:
        if self.identity is None:
            return ""
        return f" It is {self.identity.part}." if self.identity.part else f" Inside: {self.identity.saw}."

    def to_json(self) -> dict[str, Any]:
        """The verdict as `verify --json` carries it."""
        entry: dict[str, Any] = {"part": self.part.ref, "path": str(self.path), "status": self.status}
        entry |= {"size_bytes": self.found_size, "wanted_bytes": self.part.size}
        entry |= {"sha256": self.found_sha256, "wanted_sha256": self.part.sha256}
        return entry | ({"saw": self.identity.saw} if self.identity else {})


class Stopped(Exception):
    """Hashing was told to stop."""


def hash_file(path: Path, progress: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> str:
    """The sha256 of a file, in hex. `progress` is told the bytes done so far; a set `stop` ends it.

    Raises:
        OSError: the file cannot be read.
        Stopped: `stop` was set.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER))
    done = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop and stop.is_set():
                raise Stopped
            digest.update(buffer[:count])
            done += count
            if progress:
                progress(done)
    return digest.hexdigest()


Progress = Callable[[Part, int, int], None]


def verify_parts(
    items: Sequence[tuple[Path, Part]], progress: Progress | None = None, models: Sequence[Model] = ()
) -> list[Verdict]:
    """Compare files with the parts they should be, in the order given. All files are read to their end.

    `progress(part, done, total)` in bytes is called from several threads. `models` tell which other files are as right
    in a part's place, and name what a wrong file is.
    """
    stop = threading.Event()
    # The longest first, so that no thread is left with a long file when the others have ended.
    order = sorted(range(len(items)), key=lambda n: -(items[n][1].size or 0))
    with ThreadPoolExecutor(max(1, min(len(items), os.cpu_count() or 1))) as pool:
        tasks = {n: pool.submit(_verify, *items[n], progress, models, stop) for n in order}
        try:
            while wait(tasks.values(), timeout=0.5).not_done:  # without a timeout, Ctrl-C would not be heard on Windows
                pass
            return [tasks[n].result() for n in range(len(items))]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _verify(
    path: Path, part: Part, progress: Progress | None, models: Sequence[Model], stop: threading.Event
) -> Verdict:
    accepted = _accepted(part, models)
    try:
        size = path.stat().st_size
        if size not in {one.size for one in accepted} and None not in {one.size for one in accepted}:
            return Verdict(path, part, "wrong-size", size, identity=identify(path, models))
        told = None if progress is None else lambda done: progress(part, done, size)
        found = hash_file(path, told, stop)
    except FileNotFoundError:
        return Verdict(path, part, "missing")
    except OSError as error:
        reason = Identity(path, "unreadable", f"cannot be read: {error.strerror or error}")
        return Verdict(path, part, "unreadable", identity=reason)
    if found in {one.sha256 for one in accepted}:
        return Verdict(path, part, "ok", size, found)
    if part.sha256 is None:
        return Verdict(path, part, "unverified", size, found)
    return Verdict(path, part, "wrong-hash", size, found, identify(path, models, found))


def _accepted(part: Part, models: Sequence[Model]) -> list[Part]:
    """The part, and those of its model that are as right in its place (two files are called flux2-vae.safetensors)."""
    own = (other for model in models if model.name == part.model for other in model.parts)
    return [part, *(other for other in own if set(part.to.items()) & set(other.to.items()))]


def summary(verdicts: Sequence[Verdict]) -> str:
    """One line: `19 parts, 16.0 GB: all are as they should be`."""
    total = bytes_text(sum(verdict.found_size or 0 for verdict in verdicts))
    wrong = sum(not verdict.ok for verdict in verdicts)
    unsure = sum(verdict.status == "unverified" for verdict in verdicts)
    said = [f"{wrong} wrong or missing"] if wrong else []
    said += [f"{unsure} without a known sha256"] if unsure else []
    return (
        f"{len(verdicts)} part{'s' * (len(verdicts) != 1)}, {total}: {', '.join(said) or 'all are as they should be'}"
    )
