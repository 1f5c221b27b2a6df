"""What a problem asks to be done, with every argument checked, and the plan that comes of it.

Arguments come from checks and plugins, and those have them from files of strangers: a path has to lie in kleinctl's own
folder, or be one that the problem names in words that the user reads before saying yes. Nothing else is ever changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kleinctl import store
from kleinctl.home import home
from kleinctl.journal import Progress, Record
from kleinctl.problem import KleinctlError, Problem, shell

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware
    from kleinctl.plugins import Plugins

#: Bytes a second that estimates go by: a line of 100 Mbit/s, a slow SSD.
LINE_RATE, DISK_RATE = 12.5e6, 200e6
#: Bytes. A fix that fetches more is asked about, whatever its remedy says.
ASK_FROM = 10**9
MAX_TEXT = 100_000
#: What a plan says where git or pip finds out only then.
UNKNOWN: dict[str, Any] = {"fetch_bytes": None, "disk_bytes": None, "seconds": None}

Work = Callable[[Record, Progress], None]


@dataclass(frozen=True)
class Plan:
    """What a fix would do. `sentences` say what changes, `commands` do the same by hand.

    Bytes to fetch and to write and `seconds` are estimates, None where nobody knows. `problems`: all those it is for.
    `outside`: it changes something outside of kleinctl's folder.
    """

    problem: Problem
    sentences: tuple[str, ...]
    commands: tuple[str, ...]
    work: Work = field(repr=False, compare=False)
    fetch_bytes: int | None = 0
    disk_bytes: int | None = 0
    seconds: float | None = 0.0
    why_not_undoable: str = ""
    problems: tuple[Problem, ...] = ()
    outside: bool = False

    @property
    def undoable(self) -> bool:
        """Whether `kleinctl undo` can reverse it."""
        return not self.why_not_undoable

    @property
    def consent(self) -> Literal["auto", "ask"]:
        """Whether the user is asked: where a remedy wants that, for gigabytes, and for what is not kleinctl's own."""
        asks = any(each.remedy and each.remedy.consent == "ask" for each in (self.problem, *self.problems))
        return "ask" if asks or self.outside or (self.fetch_bytes or 0) >= ASK_FROM else "auto"

    def to_json(self) -> dict[str, Any]:
        """The plan as it stands in `doctor --fix --json`."""
        told = {key: getattr(self, key) for key in ("fetch_bytes", "disk_bytes", "seconds", "consent", "undoable")}
        why = {"why_not_undoable": self.why_not_undoable} if self.why_not_undoable else {}
        return {"changes": list(self.sentences), "commands": list(self.commands), **told, **why}


@dataclass(frozen=True)
class Request:
    """A problem with a remedy, and what there is to carry it out with."""

    problem: Problem
    plugins: Plugins
    hardware: Hardware

    def text(self, name: str, *, longest: int = 1000, lines: bool = False) -> str:
        """An argument of the remedy.

        Raises:
            KleinctlError: it is missing, too long, or has characters in it that are not text.
        """
        value = self._arguments.get(name)
        if not isinstance(value, str) or len(value) > longest:
            raise self.refuse(f"{name} is wanted as text of at most {longest} characters")
        if not (value.replace("\n", "").replace("\t", "") if lines else value).isprintable():
            raise self.refuse(f"{name} has characters in it that cannot be printed")
        return value

    @property
    def _arguments(self) -> dict[str, Any]:
        return dict(self.problem.remedy.arguments) if self.problem.remedy else {}

    @property
    def outside(self) -> bool:
        """Whether it changes something that is not in kleinctl's own folder, which is always asked about."""
        paths = (self._arguments[name] for name in ("path", "to", "python") if name in self._arguments)
        return any(not store.inside(Path(path).parent, home()) for path in paths)

    def path(self, name: str, near: Path | None = None) -> Path:
        """An argument that is a path which may be changed: in kleinctl's folder, or one that the problem names.

        With `near`, one in the same folder `models`, or in that of a folder that is named, will do too.

        Raises:
            KleinctlError: it is none of these.
        """
        given = self.text(name)
        path = Path(given).absolute()
        if ".." in path.parts:
            path = path.parent.resolve() / path.name
        if not path.name or path == home():
            raise self.refuse(f"{given!r} is no path of a file")
        named = self.names(given) or self._beside(path) or (near is not None and self._in_models(path, near))
        if not store.inside(path.parent, home()) and not named:
            raise self.refuse(f"{path} is not a path that the problem names")
        return path

    def names(self, path: Path | str) -> bool:
        """Whether the problem's own words, which the user reads before saying yes, name `path`."""
        problem = self.problem
        words = [problem.path or "", problem.what, problem.why, problem.fix]
        words += [text for each in problem.evidence for text in (each.looked_at, each.found, each.wanted)]
        whole = re.compile(rf"(?<![\w.]){re.escape(_slashes(path))}(?!\.?[\w/-])")
        return any(whole.search(_slashes(text)) for text in words)

    def _beside(self, path: Path) -> bool:
        """Whether it lies beside the problem's path and is named without its folder."""
        known = self.problem.path
        return known is not None and Path(known).absolute().parent == path.parent and self.names(path.name)

    def _in_models(self, path: Path, near: Path) -> bool:
        folder = _models(path)
        return folder is not None and (folder == _models(near) or any(map(self.names, folder.parents)))

    def refuse(self, why: str) -> KleinctlError:
        """The error of a remedy that is not carried out as it stands."""
        return KleinctlError(
            Problem(
                what=f"{self.problem.name or 'a problem'} cannot be fixed by kleinctl",
                why=f"What its check asks for is refused: {why}.",
                fix=self.problem.fix,
                name="fix-refused",
            )
        )

    def plan(
        self, *sentences: str, work: Work, commands: tuple[str, ...] = (), outside: bool = False, **more: Any
    ) -> Plan:
        """A plan for this problem."""
        return Plan(self.problem, sentences, commands, work, outside=outside or self.outside, **more)


def _slashes(path: Path | str) -> str:
    return str(path).replace("\\", "/")


def _models(path: Path) -> Path | None:
    """The folder `models` that `path` lies in."""
    return next((folder for folder in path.parents if folder.name == "models"), None)


def for_all(plan: Plan, problems: tuple[Problem, ...]) -> Plan:
    """The plan for several problems with one remedy."""
    return replace(plan, problems=problems)


def move_by_hand(source: Path, target: Path) -> tuple[str, ...]:
    """What to type to move a file, to a folder that may have to be made."""
    make, move = (("mkdir",), "move") if os.name == "nt" else (("mkdir", "-p"), "mv")
    folder = () if target.parent.is_dir() else (shell(*make, target.parent),)
    return (*folder, shell(move, source, target))
