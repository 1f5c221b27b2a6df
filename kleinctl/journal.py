"""What `doctor --fix` changed, so that it can be changed back: an entry is a JSON file in `KLEINCTL_HOME/journal/`.

A step is written down before it is taken and again when it is done, so that an entry that was cut short can be undone
too. A step is undone only where nothing was changed since, and undoing it again does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kleinctl import __version__, atomic, documents, store
from kleinctl.home import home, quarantine_folder
from kleinctl.problem import KleinctlError, Misuse, Problem

#: Bytes an entry may have, and how many of the newest are read.
MAX_BYTES, MAX_ENTRIES = 2**20, 100

Progress = Callable[[Any], None]


def silent(event: Any) -> None:
    """Progress that nobody watches."""


def journal_folder() -> Path:
    """One file an entry, `0001.json`, and what small files were before they were changed."""
    return home() / "journal"


# Steps: what was done, what tells that it is as it was left, and how it is undone


@dataclass(frozen=True)
class Seen:
    """How a file (or link) looked: bytes, nanoseconds."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | Path) -> Seen | None:
        """How `path` looks now; None where nothing is there."""
        try:
            facts = os.lstat(path)
        except OSError:
            return None
        if stat.S_ISDIR(facts.st_mode):  # a folder's own change with everything that is made in it
            return cls(0, 0)
        return cls(facts.st_size, facts.st_mtime_ns)


@dataclass(frozen=True)
class Moved:
    """A file or folder that went from `source` to `target`; for it the folders `made` were made. `seen`: afterwards."""

    kind: Literal["moved"]
    source: str
    target: str
    made: tuple[str, ...] = ()
    seen: Seen | None = None

    @property
    def back(self) -> str:
        """What undoing it does."""
        return f"move {self.target} back to {self.source}"

    def do(self, reason: Mapping[str, Any] | None = None) -> Moved:
        """Move it, and write `reason` beside it."""
        store.move(Path(self.source), Path(self.target))
        _explain(self.target, reason)
        return replace(self, seen=Seen.of(self.target))

    def is_back(self) -> bool:
        """Whether it has not happened, or was undone."""
        here = Seen.of(self.source)
        return here is not None and (self.seen is None or (here == self.seen and Seen.of(self.target) is None))

    def check(self) -> None:
        """Raise where it cannot be undone without losing something."""
        if self.is_back():
            return
        if Seen.of(self.source) is not None:
            raise changed(self.source, "Nothing was left there; now something is, which would be overwritten.")
        there = Seen.of(self.target)
        if there is None:
            raise changed(self.target, "It is gone, and has to go back.")
        if self.seen is not None and there != self.seen:
            raise changed(self.target, _differs(self.seen, there))

    def undo(self, progress: Progress = silent) -> None:
        """Move it back."""
        if not self.is_back():
            store.move(Path(self.target), Path(self.source))
        _tidy(self.target, self.made)


@dataclass(frozen=True)
class Put:
    """A file with `sha256` that was put at `path`. What was there is kept at `former`, or was a link to `link`.

    `before` and `after` say how `path` looked, `made` which folders had to be made for it.
    """

    kind: Literal["put"]
    path: str
    sha256: str
    former: str | None = None
    link: str | None = None
    made: tuple[str, ...] = ()
    before: Seen | None = None
    after: Seen | None = None

    @property
    def back(self) -> str:
        """What undoing it does."""
        if self.former:
            return f"put {self.former} back at {self.path}"
        return f"make {self.path} a link to {self.link} again" if self.link else f"take {self.path} away"

    def do(self, new: Path, reason: Mapping[str, Any] | None = None) -> Put:
        """Keep what is at `path`, then put `new` over it: at every moment the old file is there or the new one."""
        if self.former:
            keep(Path(self.path), Path(self.former))
            _explain(self.former, reason)
        store.move(new, Path(self.path))
        return replace(self, after=Seen.of(self.path))

    def is_back(self) -> bool:
        """Whether it has not happened, or was undone."""
        now = Seen.of(self.path)
        return now == self.before and now != self.after

    def check(self) -> None:
        """Raise where it cannot be undone without losing something."""
        if self.is_back():
            return
        now = Seen.of(self.path)
        if now is None or (now != self.after and not _has_hash(self.path, self.sha256)):
            raise changed(self.path, _differs(self.after, now))
        if self.former and Seen.of(self.former) is None:
            raise changed(self.former, "It is gone, and has to go back.")

    def undo(self, progress: Progress = silent) -> None:
        """Put what was there back; what takes long to fetch again goes to quarantine, where an install finds it."""
        path = Path(self.path)
        if not self.is_back():
            self._set_aside()
            if self.former:
                keep(Path(self.former), path)
            elif self.link:
                beside = atomic.beside(path)
                with store.writing(path):
                    beside.symlink_to(self.link)
                    beside.replace(path)
            else:
                with store.writing(path):
                    path.unlink()
        if self.former:
            with store.writing(Path(self.former)):
                Path(self.former).unlink(missing_ok=True)
            _tidy(self.former, ())
        _tidy(self.path, self.made)

    def _set_aside(self) -> None:
        path = Path(self.path)
        facts = path.lstat()
        if path.is_symlink() or facts.st_nlink > 1 or facts.st_size < store.LINK_FROM:
            return
        kept = quarantine_folder() / f"{path.stem}-{self.sha256[:8]}{path.suffix}"
        keep(path, kept)
        store.Stamps().put(kept, self.sha256)


@dataclass(frozen=True)
class Packages:
    """Packages that pip changed in `python`: all versions `before` and `after`."""

    kind: Literal["packages"]
    python: str
    before: Mapping[str, str] = field(hash=False)
    after: Mapping[str, str] | None = field(default=None, hash=False)

    @property
    def back(self) -> str:
        """What undoing it does."""
        former = ", ".join(f"{name} {self.before.get(name) or 'away'}" for name in self._touched())
        return f"in {self.python} set back: {former or 'nothing'}"

    def do(self, arguments: tuple[str, ...], log: Path, progress: Progress) -> Packages:
        """Let pip do it: `arguments` begin with `install` or `uninstall`."""
        from kleinctl.fixes.pip import pip, versions

        pip(Path(self.python), arguments, log, progress)
        return replace(self, after=versions(Path(self.python)))

    def _touched(self) -> list[str]:
        """The packages that were changed; of a step that was cut short, those that differ now."""
        from kleinctl.fixes.pip import versions

        after = versions(Path(self.python)) if self.after is None else self.after
        return sorted(name for name in {*self.before, *after} if self.before.get(name) != after.get(name))

    def is_back(self) -> bool:
        """Whether it has not happened, or was undone."""
        from kleinctl.fixes.pip import versions

        return versions(Path(self.python)) == self.before

    def check(self) -> None:
        """Raise where another program changed the packages since."""
        from kleinctl.fixes.pip import versions

        if not Path(self.python).exists():
            raise changed(self.python, "It is gone.")
        now = versions(Path(self.python))
        for name in self._touched() if self.after is not None else ():
            if now.get(name) not in (self.before.get(name), (self.after or {}).get(name)):
                wanted = (self.after or {}).get(name) or "none"
                raise changed(f"{name} in {self.python}", f"Left there was {wanted}; now it is {now.get(name)}.")

    def undo(self, progress: Progress = silent) -> None:
        """Install the former versions, and take away what was new."""
        from kleinctl.fixes.pip import set_back

        touched = {name: self.before.get(name) for name in self._touched()}
        set_back(Path(self.python), touched, log_file("undo"), progress)


@dataclass(frozen=True)
class Shared:
    """A file that became another name of `other`, which has the same bytes; `before` and `after` say how it looked."""

    kind: Literal["shared"]
    path: str
    other: str
    sha256: str
    before: Seen | None = None
    after: Seen | None = None

    @property
    def back(self) -> str:
        """What undoing it does."""
        return f"make {self.path} a file of its own again"

    def do(self) -> Shared:
        """Put the link over the file: at every moment one of them is there."""
        path = Path(self.path)
        beside = atomic.beside(path)
        with store.writing(path):
            try:
                beside.hardlink_to(self.other)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)  # renaming one hard link onto another leaves both
        return replace(self, after=Seen.of(path))

    def is_back(self) -> bool:
        """Whether it has not happened, or was undone."""
        return Seen.of(self.path) == self.before and not _one_file(self.path, self.other)

    def check(self) -> None:
        """Raise where something else is at the path now."""
        now = Seen.of(self.path)
        if now is None or (now not in (self.before, self.after) and not _has_hash(self.path, self.sha256)):
            raise changed(self.path, _differs(self.after, now))

    def undo(self, progress: Progress = silent) -> None:
        """Copy the bytes, with the time that the file had."""
        path = Path(self.path)
        if self.is_back():
            return
        beside = atomic.beside(path)
        with store.writing(path):
            try:
                shutil.copy2(path, beside)
                if self.before is not None:
                    os.utime(beside, ns=(self.before.mtime_ns, self.before.mtime_ns))
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Made:
    """A folder of kleinctl's own that was made, with all that is in it: an environment, a Python."""

    kind: Literal["made"]
    folder: str

    @property
    def back(self) -> str:
        """What undoing it does."""
        return f"take {self.folder} away"

    def do(self, make: Callable[[], object]) -> Made:
        """Make it."""
        make()
        return self

    def is_back(self) -> bool:
        """Whether it has not happened, or was undone."""
        return not Path(self.folder).exists()

    def check(self) -> None:
        """It is kleinctl's own: whatever was done to it since goes with it."""

    def undo(self, progress: Progress = silent) -> None:
        """Take it away."""
        from kleinctl.environment import discard

        with store.writing(Path(self.folder)):
            discard(Path(self.folder))


@dataclass(frozen=True)
class Variable:
    """A variable of the Windows user. None: it is not set."""

    kind: Literal["variable"]
    name: str
    before: str | None
    after: str | None

    @property
    def back(self) -> str:
        """What undoing it does."""
        return f"{f'set {self.name} to {self.before}' if self.before is not None else f'unset {self.name}'} again"

    def do(self) -> Variable:
        """Set it."""
        from kleinctl.fixes import windows

        windows.set_variable(self.name, self.after)
        return self

    def is_back(self) -> bool:
        """Whether it has not happened, or was undone."""
        from kleinctl.fixes import windows

        return windows.variable(self.name) == self.before

    def check(self) -> None:
        """Raise where it was changed since."""
        from kleinctl.fixes import windows

        now = windows.variable(self.name)
        if now not in (self.before, self.after):
            raise changed(self.name, f"Left there was {self.after}; now it is {now}.")

    def undo(self, progress: Progress = silent) -> None:
        """Set it back."""
        from kleinctl.fixes import windows

        windows.set_variable(self.name, self.before)


@dataclass(frozen=True)
class Commit:
    """A git checkout that went forward on its `branch`, from the commit `former` to `commit`."""

    kind: Literal["commit"]
    checkout: str
    branch: str
    former: str
    commit: str

    @property
    def back(self) -> str:
        """What undoing it does."""
        return f"set {self.checkout} back to commit {self.former[:10]}"

    def do(self, remote: str, ref: str) -> Commit:
        """Fetch `ref` of `remote` and go forward to `commit`."""
        from kleinctl.fixes import git

        git.forward(Path(self.checkout), remote, ref, self.commit)
        return self

    def is_back(self) -> bool:
        """Whether it has not happened, or was undone."""
        from kleinctl.fixes import git

        return git.head(Path(self.checkout)) == self.former

    def check(self) -> None:
        """Raise where somebody moved it on since, or changed its files."""
        from kleinctl.fixes import git

        if self.is_back():
            return
        folder = Path(self.checkout)
        now, branch = git.head(folder), git.on(folder)
        if (now, branch) != (self.commit, self.branch):
            there = f"{now[:10] or 'no commit'} on {branch or 'no branch'}"
            raise changed(self.checkout, f"Left there was {self.commit[:10]} on {self.branch}; now it is {there}.")
        if settings := git.risky(folder):
            raise changed(self.checkout, f"With {settings[0]} in its .git/config git may run a program.")
        if edited := git.changes(folder):
            raise changed(self.checkout, f"Files of it were edited: {', '.join(edited[:3])}.")

    def undo(self, progress: Progress = silent) -> None:
        """Set it back."""
        from kleinctl.fixes import git

        if not self.is_back():
            git.back(Path(self.checkout), self.former)


@dataclass(frozen=True)
class Cloned:
    """A git repository that was cloned into `clone`; undoing it moves that to `kept`, with what is in it by then."""

    kind: Literal["cloned"]
    clone: str
    kept: str

    @property
    def back(self) -> str:
        """What undoing it does."""
        return f"move {self.clone} out of the way, to {self.kept}"

    def do(self, address: str) -> Cloned:
        """Clone it."""
        from kleinctl.fixes import git

        git.clone(address, Path(self.clone))
        return self

    def is_back(self) -> bool:
        """Whether it has not happened, or was undone."""
        return not os.path.lexists(self.clone)

    def check(self) -> None:
        """Raise where it cannot be undone without losing something."""
        if not self.is_back() and os.path.lexists(self.kept):
            raise changed(self.kept, "Nothing was left there; now something is.")

    def undo(self, progress: Progress = silent) -> None:
        """Move it to quarantine."""
        clone, kept = Path(self.clone), Path(self.kept)
        if self.is_back():
            return
        store.make_folder(kept.parent)
        with store.writing(kept):
            for path in clone.rglob("*") if os.name == "nt" else ():
                path.chmod(stat.S_IWRITE)  # git marks what it keeps as read-only, which Windows does not move
            shutil.move(clone, kept)


#: `Shared` before `Put`, whose entries have all that a `Put` has.
Step = Moved | Shared | Put | Packages | Made | Variable | Commit | Cloned


def changed(name: str, why: str) -> KleinctlError:
    """The error of a file or package that is not as it was left."""
    return KleinctlError(
        Problem(
            what=f"{name} was changed since",
            why=f"{why} Nothing was undone.",
            fix="kleinctl undo --list   # shows what was changed, to put it back by hand",
            name="undo-file-changed",
            path=name if Path(name).is_absolute() else None,
        )
    )


def _differs(left: Seen | None, now: Seen | None) -> str:
    if now is None:
        return "It is gone."
    wanted = f"{left.size} bytes" if left else "the file of this entry"
    return f"Left there were {wanted}; now it has {now.size} bytes or another time."


def _one_file(path: str, other: str) -> bool:
    try:
        return Path(path).samefile(other)
    except OSError:
        return False


def _has_hash(path: str, sha256: str) -> bool:
    from kleinctl.verify import hash_file

    try:
        return hash_file(Path(path)) == sha256
    except OSError:
        return False


def keep(path: Path, kept: Path) -> None:
    """Make `kept` another name of `path`, or where the disk cannot do that, a copy with its times. Replaces `kept`."""
    store.make_folder(kept.parent)
    beside = atomic.beside(kept)
    with store.writing(kept):
        beside.unlink(missing_ok=True)
        try:
            try:
                beside.hardlink_to(path)
            except (OSError, NotImplementedError):
                shutil.copy2(path, beside)
            beside.replace(kept)
        finally:
            beside.unlink(missing_ok=True)


def _explain(kept: str, reason: Mapping[str, Any] | None) -> None:
    if reason:
        store.write_json(Path(f"{kept}.json"), dict(reason))


def _tidy(path: str, made: tuple[str, ...]) -> None:
    """Take away the reason beside a file that left quarantine, and folders that were made and are empty now."""
    if Path(path).parent == quarantine_folder() and not os.path.lexists(path):
        Path(f"{path}.json").unlink(missing_ok=True)
    for folder in made:
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def missing_folders(path: Path) -> tuple[str, ...]:
    """The folders above `path` that are not there, the innermost first."""
    return tuple(str(folder) for folder in path.parents if not folder.exists())


# Entries


@dataclass(frozen=True)
class Entry:
    """What one fix changed. `why_not` says why it cannot be undone; empty where it can."""

    number: int
    time: str
    kleinctl: str
    problem: str
    sentences: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    finished: bool = False
    undone: bool = False
    why_not: str = ""

    @property
    def can_be_undone(self) -> bool:
        """Whether there is something to undo."""
        return bool(self.steps) and not self.undone and not self.why_not

    @property
    def state(self) -> str:
        """`done`, `undone`, `cut short` or `lasting` (cannot be undone)."""
        if self.undone:
            return "undone"
        return "lasting" if self.why_not else "done" if self.finished else "cut short"

    def to_json(self) -> dict[str, Any]:
        """The entry as `undo --json` shows it."""
        told = {key: getattr(self, key) for key in ("number", "time", "kleinctl", "problem", "state")}
        back = [step.back for step in reversed(self.steps)]
        return {**told, "sentences": list(self.sentences), "back": back, "can_be_undone": self.can_be_undone}


@dataclass(frozen=True)
class Damaged:
    """An entry that cannot be read."""

    number: int
    why: str

    def to_json(self) -> dict[str, Any]:
        """The entry as `undo --json` shows it."""
        return {"number": self.number, "state": "damaged", "why": self.why, "can_be_undone": False}


class Record:
    """An entry being written. Nothing is written before its first step, so a fix that failed at once leaves none."""

    def __init__(self, problem: str, sentences: tuple[str, ...], why_not: str = "") -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.entry = Entry(0, when, __version__, problem, sentences, why_not=why_not)

    def perform(self, step: Any, *things: Any) -> None:
        """Write the step down, take it (`step.do(*things)`), and write down how it left things.

        Raises:
            KleinctlError: it failed; the entry tells how far it came.
        """
        steps = self.entry.steps
        self._write(steps=(*steps, step))
        self._write(steps=(*steps, step.do(*things)))

    def finish(self) -> int:
        """The entry is complete. Returns its number."""
        self._write(finished=True)
        return self.entry.number

    def abandon(self) -> None:
        """The fix failed: an entry of which nothing happened is taken away; another stays, and can be undone."""
        if self.entry.number and all(step.is_back() for step in self.entry.steps):
            for step in self.entry.steps:
                step.undo()
            _file(self.entry.number).unlink(missing_ok=True)

    def _write(self, **changes: Any) -> None:
        self.entry = replace(self.entry, number=self.entry.number or _take_number(), **changes)
        save(self.entry)


def save(entry: Entry) -> None:
    """Write an entry whole or not at all.

    Raises:
        KleinctlError: the disk does not take it.
    """
    store.write_json(_file(entry.number), {"schema": "kleinctl.journal/1", **documents.plain(entry)})


def _file(number: int) -> Path:
    return journal_folder() / f"{number:04}.json"


def _numbers() -> list[int]:
    return sorted(
        int(path.stem) for path in journal_folder().glob("*.json") if path.stem.isascii() and path.stem.isdigit()
    )


def _take_number() -> int:
    store.make_folder(journal_folder())
    number = max(_numbers(), default=0) + 1
    with store.writing(_file(number)):
        while True:
            try:
                _file(number).open("x").close()
                return number
            except FileExistsError:
                number += 1


def spare_file(name: str) -> Path:
    """A name in the journal's folder that is free: for what a small file was, or will be."""
    store.make_folder(journal_folder())
    return journal_folder() / f"{time.time_ns()}-{os.getpid()}-{name}"


def log_file(name: str) -> Path:
    """Where pip's words go."""
    from kleinctl.home import logs_folder

    return store.make_folder(logs_folder()) / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.log"


def entries() -> list[Entry | Damaged]:
    """The newest entries first; one that is damaged says so."""
    return [_read(number) for number in _numbers()[: -MAX_ENTRIES - 1 : -1]]


def _read(number: int) -> Entry | Damaged:
    try:
        with _file(number).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            return Damaged(number, f"It has more than {MAX_BYTES} bytes.")
        entry = documents.read(Entry, json.loads(raw), "entry")
        return replace(entry, number=number)
    except KleinctlError as error:
        return Damaged(number, error.problem.why)
    except (OSError, ValueError, RecursionError) as error:
        return Damaged(number, f"{type(error).__name__}: {error}".splitlines()[0][:200])


def find(number: int | None) -> Entry:
    """The entry of that number, or the newest that can be undone.

    Raises:
        Misuse: there is none.
        KleinctlError: it is damaged, was undone before, or cannot be undone.
    """
    known = entries()
    if number is None:
        newest = next((each for each in known if isinstance(each, Entry) and each.can_be_undone), None)
        if newest is None:
            raise _impossible("there is nothing to undo", "No entry of the journal can be undone.", "kleinctl doctor")
        return newest
    found = next((each for each in known if each.number == number), None)
    if found is None:
        numbers = ", ".join(str(each.number) for each in known[:10])
        why = f"The newest are {numbers}." if numbers else "The journal has no entry."
        raise Misuse(Problem(f"there is no entry {number}", why, "kleinctl undo --list", name="undo-impossible"))
    if isinstance(found, Damaged):
        raise _impossible(f"entry {number} cannot be read", found.why, f"see {_file(number)}")
    if found.undone:
        raise _impossible(
            f"entry {number} was undone already", "Nothing is left to undo of it.", "kleinctl undo --list"
        )
    if not found.can_be_undone:
        raise _impossible(
            f"entry {number} cannot be undone", found.why_not or "It changed nothing.", "kleinctl undo --list"
        )
    return found


def _impossible(what: str, why: str, fix: str) -> KleinctlError:
    return KleinctlError(Problem(what, why, fix, name="undo-impossible"))


def check(entry: Entry) -> None:
    """Whether every step of `entry` can be undone.

    Raises:
        KleinctlError: something was changed since; the problem names it.
    """
    for step in reversed(entry.steps):
        step.check()


def undo(entry: Entry, progress: Progress = silent) -> Entry:
    """Reverse the steps of `entry`, the last one first, after checking them all. Returns it as it is then.

    Raises:
        KleinctlError: something was changed since and nothing was undone, or the disk does not take it.
    """
    check(entry)
    for step in reversed(entry.steps):
        step.undo(progress)
    done = replace(entry, undone=True)
    save(done)
    return done


@contextlib.contextmanager
def locked(waiting: Callable[[str], None]) -> Iterator[None]:
    """One fix or undo at a time; the system frees the lock when its process ends.

    Raises:
        KleinctlError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(store.make_folder(journal_folder()) / ".lock")
    with store.writing(journal_folder() / ".lock"):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting("waiting for another kleinctl to finish its fix")
            lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()
