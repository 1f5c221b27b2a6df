"""Bad news in three lines: what happened, why, and what to type next."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]

#: What is shown in the place of a character that would do something.
UNSHOWN = "\N{REPLACEMENT CHARACTER}"
_QUOTED = re.compile(r'"[^"\n]*"')
#: What a path of Windows begins with, and words that need no quotes there.
_WINDOWS, _PLAIN = re.compile(r"[A-Za-z]:[\\/]|\\\\|~\\"), re.compile(r"[\w.:\\/=+@,-]+")

OK, PROBLEMS, MISUSED, BUG, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes, as README documents them


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on: what was looked at (a file, a package, a variable), what it showed, what was wanted."""

    looked_at: str
    found: str
    wanted: str = ""


@dataclass(frozen=True)
class Remedy:
    """What `doctor --fix` can do about a problem: the name of one of its actions, and what that is to act on.

    `consent` is `auto` for what is safe and kept to kleinctl's own folder, `ask` for what changes the user's files,
    settings or environments, or fetches gigabytes.
    """

    action: str
    arguments: Mapping[str, str] = field(default_factory=dict, hash=False)
    consent: Literal["auto", "ask"] = "auto"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    `what` names the file or part and stands alone, `why` puts wanted and found side by side, `fix` can be pasted.
    `name` is a lasting kebab-case name (a check's runner fills it in) that `kleinctl explain` knows, `path` the file
    meant, `ref` the entry of the failure catalogue it stands for. Without a `remedy` the fix is for people to do.
    """

    what: str
    why: str
    fix: str
    name: str = ""
    severity: Severity = "error"
    path: str | None = None
    ref: str | None = None
    evidence: tuple[Evidence, ...] = ()
    remedy: Remedy | None = None

    def __post_init__(self) -> None:
        """What a shell would run inside quotes, where the fix is pasted, can only come from the name of a file."""
        fix = _QUOTED.sub(lambda quoted: quoted[0].replace("`", UNSHOWN), self.fix).replace("$(", f"{UNSHOWN}(")
        object.__setattr__(self, "fix", fix)

    @property
    def auto(self) -> bool:
        """Whether `doctor --fix` can do it, perhaps after asking."""
        return self.remedy is not None

    def to_json(self) -> dict[str, Any]:
        """The problem as it stands in `doctor --json`, without empty keys."""
        said = {key: getattr(self, key) for key in ("what", "why", "fix", "name", "severity")}
        known = {key: value for key in ("path", "ref") if (value := getattr(self, key)) is not None}
        if self.evidence:
            known["evidence"] = [
                {key: value for key, value in vars(each).items() if value or key != "wanted"} for each in self.evidence
            ]
        if self.remedy is not None:
            known["remedy"] = {**vars(self.remedy), "arguments": dict(self.remedy.arguments)}
        return {**said, "auto": self.auto, **known}


class KleinctlError(Exception):
    """Ends a command with a problem. Caught once, in `kleinctl.cli`."""

    exit_code = PROBLEMS

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.what}: {problem.why}")
        self.problem = problem


class Misuse(KleinctlError):
    """The command was typed in a way that cannot be carried out. Nothing has run."""

    exit_code = MISUSED


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean klein-4b?"` for the nearest known name, or an empty string."""
    names = sorted(known)
    near = difflib.get_close_matches(word.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    match = next((name for name in names if near and name.lower() == near[0]), None)
    return f" Did you mean {match}?" if match else ""


def shell(*words: object, windows: bool = False) -> str:
    """A command line that can be pasted: here, or on Windows, where `windows` or a path in it says so."""
    windows = windows or os.name == "nt" or any(_WINDOWS.match(str(word)) for word in words)
    return " ".join(map(_windows_word if windows else shlex.quote, map(str, words)))


def _windows_word(word: str) -> str:
    """No file there has a quote in its name; one in the report of a stranger would end the quotes around it."""
    return word if _PLAIN.fullmatch(word) else '"' + word.replace('"', UNSHOWN) + '"'
