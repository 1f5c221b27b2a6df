"""Many jobs in a file, one JSON object a line: what each line asks for, and which of them have their picture."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kleinctl.backends import Job
from kleinctl.home import home
from kleinctl.pictures import reference
from kleinctl.problem import KleinctlError, Misuse, Problem, did_you_mean
from kleinctl.records import MAX_SIDE, is_picture_of, numbered
from kleinctl.units import asked_size, bytes_text, nearest_size, parse_size

#: A model reads a few hundred words; what is longer is no prompt. Bytes of a line, and of a file.
MAX_LINE_BYTES, MAX_FILE_BYTES = 2**16, 2**26
#: Lines of a file, empty ones too.
MAX_LINES = 10_000
#: What the options of `kleinctl run` take.
MAX_SEED, MAX_STEPS, MAX_GUIDANCE = 2**63 - 1, 200, 30
#: How a line can look.
EXAMPLE = {"prompt": "a red circle", "seed": 7, "size": "1024x768", "steps": 4, "guidance": 1.0, "image": "sketch.png"}


@dataclass(frozen=True)
class Line:
    """A line that asks for a picture: `says` has the fields of `Job` that it names, `asked` its size as it stands."""

    number: int
    says: Mapping[str, Any]
    asked: tuple[int, int] | None = None


@dataclass(frozen=True)
class Fault:
    """A line that gives no picture, and why. Its problem names file and line."""

    line: int
    problem: Problem

    def to_json(self) -> dict[str, Any]:
        """The line as one of a run's `failed`."""
        return {"line": self.line, "problem": self.problem.to_json()}


@dataclass(frozen=True)
class Batch:
    """The lines of a file called `name` (as messages name it), by what could be read of each."""

    name: str
    lines: tuple[Line, ...]
    faults: tuple[Fault, ...]

    def origin(self, line: int) -> str:
        """Where a line stands, as editors and terminals take it: `prompts.jsonl:3`."""
        return f"{self.name}:{line}"


@dataclass(frozen=True)
class Task:
    """A line's job and its picture's file. `done`: that is there, and its record is of exactly this job."""

    line: int
    job: Job
    path: Path
    done: bool

    def to_json(self) -> dict[str, Any]:
        """The line as one of a run's `skipped`."""
        return {"line": self.line, "path": str(self.path)}


# Reading


def read(source: str) -> Batch:
    """The batch in the file `source`, or on stdin where that is `-`.

    Reference pictures are looked for beside the file (from stdin: here), and each must be one.

    Raises:
        Misuse: there is no such file, or it is no batch.
    """
    name, folder = ("stdin", Path()) if source == "-" else (source, Path(source).parent)
    try:
        if source == "-":
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(name, f"{getattr(error, 'strerror', None) or error}.", "give the path of a file") from None
    return parse(data, name, folder)


def parse(data: bytes, name: str, folder: Path) -> Batch:
    """The batch in `data`. Its reference pictures are looked for in `folder`.

    Raises:
        Misuse: it has no lines, or is something else.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")  # the mark that Windows editors put before UTF-8
    if len(data) > MAX_FILE_BYTES:
        raise _unreadable(name, f"It is larger than {bytes_text(MAX_FILE_BYTES)}.", "split it into several files")
    if b"\0" in data:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        why = "It is UTF-16, as older PowerShells write." if utf16 else "It is no text: it has bytes that are zero."
        raise _unreadable(name, why, "save it as UTF-8, one JSON object a line")
    rows = data.split(b"\n")
    if len(rows) - (not rows[-1].strip()) > MAX_LINES:
        raise _unreadable(name, f"It has more than {MAX_LINES} lines.", "split it into several files")
    lines, faults = [], []
    for number, row in enumerate(rows, 1):
        if row.strip():
            try:
                lines.append(_line(number, row, folder))
            except KleinctlError as error:
                faults.append(fault(name, number, error.problem))
    if not lines and not faults:
        raise _unreadable(name, "It is empty; each line is to be a JSON object.", f"as in {json.dumps(EXAMPLE)}")
    return Batch(name, tuple(lines), tuple(faults))


def fault(name: str, line: int, problem: Problem) -> Fault:
    """`problem` as that of a line of the file `name`."""
    return Fault(line, replace(problem, what=f"{name}:{line}: {problem.what}"))


def _unreadable(name: str, why: str, fix: str) -> Misuse:
    return Misuse(Problem(f"{name} is no batch of jobs", why, fix, name="batch-unreadable", path=name))


def _line(number: int, row: bytes, folder: Path) -> Line:
    says = _checked(_object(row))
    asked = None
    if "size" in says:
        size = says.pop("size")
        asked, (says["width"], says["height"]) = asked_size(size), parse_size(nearest_size(size))
    if "images" in says:
        says["images"] = tuple(folder / path for path in says["images"])
        for path in says["images"]:
            reference(path)
    return Line(number, says, asked)


def _object(row: bytes) -> dict[str, Any]:
    """The JSON object in a line."""
    if len(row) > MAX_LINE_BYTES:
        why = f"It has {len(row)} bytes; {MAX_LINE_BYTES} are read, far more than a model does."
        raise _bad("the line is too long", why, "shorten the prompt")
    try:
        found = json.loads(row.decode("utf-8"))
    except UnicodeDecodeError as error:
        why = f"Byte {error.start + 1} belongs to another encoding."
        raise _bad("the line is no UTF-8", why, "save the file as UTF-8") from None
    except RecursionError:
        raise _bad("the line is no JSON object", "It is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise _bad("the line is no JSON", f"{error.msg} at character {error.pos + 1}.") from None
    except ValueError as error:  # a number of thousands of digits
        raise _bad("the line is no JSON", f"{str(error)[:200]}.") from None
    if not isinstance(found, dict):
        raise _bad("the line is no JSON object", f"It is {_shown(found)}; keys and values in braces are wanted.")
    return found


def _checked(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says, by the fields of `Job`; `size` is left as text."""
    for key in found:
        if key not in _KEYS:
            why = f"A line has {', '.join(_KEYS)}.{did_you_mean(key[:40], _KEYS)}"
            raise _bad(f"there is no key {_shown(key)}", why)
    if "prompt" not in found:
        raise _bad("there is no prompt", f"The line has {', '.join(found) or 'nothing'}.")
    says: dict[str, Any] = {}
    for key, value in found.items():
        field, check = _KEYS[key]
        try:
            says[field] = check(value)
        except ValueError as error:
            wanted = str(error)
            example = {"prompt": EXAMPLE["prompt"], key: EXAMPLE[key]}
            raise _bad(
                f"{key} cannot be {_shown(value)}", f"Wanted is {wanted}.", f"as in {json.dumps(example)}"
            ) from None
    return says


def _bad(what: str, why: str, fix: str = "") -> KleinctlError:
    example = {key: EXAMPLE[key] for key in ("prompt", "seed", "size")}
    return KleinctlError(Problem(what, why, fix or f"as in {json.dumps(example)}", name="batch-line"))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Each checks one value, and says what is wanted in a ValueError.


def _prompt(value: Any) -> str:
    if not _is_text(value):
        raise ValueError("text that says what is to be seen")
    return str(value)


def _is_text(value: Any) -> bool:
    """Whether `value` is text with something in it, and without halves of characters (surrogates)."""
    return (
        isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    )


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _guidance(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_GUIDANCE:
        raise ValueError(f"a number from 0 to {MAX_GUIDANCE}")
    return float(value)


def _size(value: Any) -> str:
    """A size that can be drawn, as text: `1024x768`, or 1024 for a square."""
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    try:
        width, height = parse_size(nearest_size(text))
    except Misuse:
        width = height = 0
    if not 0 < max(width, height) <= MAX_SIDE:
        raise ValueError(f"width and height in pixels, up to {MAX_SIDE}")
    return text


def _paths(value: Any) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(_is_text(path) and "\0" not in path for path in paths):
        raise ValueError("the path of a picture, or a list of paths")
    return paths


#: The keys of a line, the field of `Job` that each is, and its check.
_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "prompt": ("prompt", _prompt),
    "seed": ("seed", _whole(0, MAX_SEED)),
    "size": ("size", _size),
    "steps": ("steps", _whole(1, MAX_STEPS)),
    "guidance": ("guidance", _guidance),
    "image": ("images", _paths),
}


# Jobs and files


def default_folder(source: str) -> Path:
    """Where a batch's pictures go when nobody says: `klein-prompts` for `prompts.jsonl`."""
    return Path("klein-batch" if source == "-" else f"klein-{Path(source).stem}")


def changes(line: Line, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the job of `line` has other than the model's defaults; `defaults` go for what the line does not say.

    A line without a seed gets the default's and its own number, so that it is the same in the next run.
    """
    return {**defaults, "seed": (defaults.get("seed", 0) + line.number) % (MAX_SEED + 1), **line.says}


def tasks(jobs: Mapping[int, Job], folder: Path, begin: Callable[[Job], Mapping[str, Any]]) -> list[Task]:
    """The file of each job, by its line: `klein-0003-17.png` for seed 17 in line 3.

    `begin` says what a picture's record has to say (`records.begin`). A picture of another job is left alone: then the
    name gets a number, as everywhere where no file was named.
    """
    return [
        Task(line, job, *_place(folder / f"klein-{line:04}-{job.seed}.png", job, begin)) for line, job in jobs.items()
    ]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Be the only batch that draws into `folder`, so that no line is drawn twice; to be held before `tasks` looks.

    The lock is in KLEINCTL_HOME, and the system frees it when its process ends, however it ends.

    Raises:
        KleinctlError: another process draws there, or KLEINCTL_HOME cannot be written.
    """
    from filelock import FileLock, Timeout

    from kleinctl import store

    path = store.make_folder(home() / "batches") / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    lock, owner = FileLock(path.with_suffix(".lock")), path.with_suffix(".pid")
    with store.writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise _running(folder, owner) from None
    try:
        with store.writing(owner):
            owner.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _running(folder: Path, owner: Path) -> KleinctlError:
    pid = ""
    with contextlib.suppress(OSError, ValueError):  # it has just begun, or ended
        pid = f" (pid {int(owner.read_text(encoding='ascii'))})"
    why = f"Another kleinctl{pid} draws a batch there; what is not there yet would be drawn by both."
    fix = f"-o {folder}-2   # or wait: the same line then makes what is missing"
    return KleinctlError(
        Problem(f"a batch is being drawn into {folder}", why, fix, name="batch-running", path=str(folder))
    )


def _place(first: Path, job: Job, begin: Callable[[Job], Mapping[str, Any]]) -> tuple[Path, bool]:
    for path in numbered(first):
        if not path.exists():
            return path, False
        if is_picture_of(path, begin(job)):
            return path, True
    raise AssertionError("numbers do not end")


def demands(lines: Iterable[Line], defaults: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], list[Line]]]:
    """Lines that ask for as much (sides, steps, guidance, number of references) together, and their changes."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        wanted = changes(line, defaults)
        key = (*(wanted.get(name) for name in ("width", "height", "steps", "guidance")), len(wanted.get("images", ())))
        groups.setdefault(key, []).append(line)
    for own in groups.values():
        yield changes(own[0], defaults), own
