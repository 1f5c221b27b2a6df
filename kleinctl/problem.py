"""Bad news in three lines: what happened, why, and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]

OK, PROBLEMS, MISUSED, BUG, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes, as README documents them


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    `what` names the file or part and stands alone, `why` puts wanted and found side by side, `fix` can be pasted.
    `name` is a lasting kebab-case name (a check's runner fills it in), `path` the file meant, `auto` whether
    `doctor --fix` can do it, `ref` the entry of the failure catalogue it stands for.
    """

    what: str
    why: str
    fix: str
    name: str = ""
    severity: Severity = "error"
    path: str | None = None
    auto: bool = False
    ref: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The problem as it stands in `doctor --json`, without empty keys."""
        optional = {"path", "ref"}
        return {key: value for key, value in asdict(self).items() if key not in optional or value is not None}


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
