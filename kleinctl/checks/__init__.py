"""Questions that doctor asks: a check names the facts it wants as arguments, and returns what is wrong, or nothing.

Checks open no file and print nothing. `hardware` and the like are gathered once; facts that come several times (each
weights file, each set of parts that would be loaded together) come as scenes, and a check runs once for each.
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kleinctl.problem import Problem

#: What a check returns: nothing, a problem, or several.
Verdict = Problem | Iterable[Problem] | None
Function = Callable[..., Verdict]
#: How a check ended: all is well, something is not, or a fact is lacking.
Status = Literal["ok", "problem", "skipped"]

#: How long a check may take, in seconds, all its scenes together: it is arithmetic on facts.
CHECK_SECONDS = 2.0


class CouldNotCheck(Exception):
    """Raised by a check that lacks a fact, or that has nothing to look at: the message says why, in a sentence."""


@dataclass(frozen=True)
class Check:
    """A question with a lasting name. `sentence` says what holds when all is well, `wants` which facts it reads."""

    name: str
    sentence: str
    function: Function
    wants: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """How one check ended: `ok`, `problem`, or `skipped` for lack of a fact (`why` says which)."""

    name: str
    status: Status
    why: str
    seconds: float = 0.0
    problems: tuple[Problem, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as it stands in `doctor --json`."""
        return {"name": self.name, "status": self.status, "why": self.why, "seconds": round(self.seconds, 4)}


def check(name: str) -> Callable[[Function], Check]:
    """Make a function a check. Its docstring's first line is the sentence."""

    def decorate(function: Function) -> Check:
        sentence = (function.__doc__ or name).strip().splitlines()[0]
        return Check(name, sentence, function, tuple(inspect.signature(function).parameters))

    return decorate


def run_checks(
    checks: Sequence[Check], facts: Mapping[str, Any], scenes: Iterable[Mapping[str, Any]] = ()
) -> list[Result]:
    """Ask every check about the facts, and about each scene that has what it wants."""
    rounds = [{**facts, **scene} for scene in ({}, *scenes)]
    found: list[Result] = []
    while len(found) < len(checks):
        found += _until_stuck(checks[len(found) :], facts, rounds)
    return found


def _until_stuck(
    checks: Sequence[Check], facts: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> list[Result]:
    """Results in order, up to a check that takes too long: that one is left behind on its thread."""
    answers: queue.SimpleQueue[Result] = queue.SimpleQueue()

    def ask() -> None:
        for each in checks:
            answers.put(_run(each, facts, rounds))

    threading.Thread(target=ask, daemon=True).start()
    found = []
    for each in checks:
        try:
            found.append(answers.get(timeout=CHECK_SECONDS))
        except queue.Empty:
            return [*found, Result(each.name, "skipped", f"It took longer than {CHECK_SECONDS:.0f} s.", CHECK_SECONDS)]
    return found


def _run(each: Check, facts: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> Result:
    own = [names for names in rounds if all(names.get(want) is not None for want in each.wants)]
    if all(facts.get(want) is not None for want in each.wants):
        own = own[:1]  # it reads nothing that a scene adds
    if not own:
        lacking = [want for want in each.wants if facts.get(want) is None]
        return Result(each.name, "skipped", f"Nothing is known of {' and '.join(lacking).replace('_', ' ')}.")
    start, problems, lacks, crash = time.perf_counter(), [], [], ""
    for names in own:
        try:
            problems += _listed(each.function(**{want: names[want] for want in each.wants}))
        except CouldNotCheck as lack:
            lacks.append(str(lack))
        except Exception as error:  # a check that crashes is one line; the others still run
            crash = f"The check crashed: {type(error).__name__}: {error}".splitlines()[0]
    named = tuple(replace(problem, name=problem.name or each.name) for problem in problems)
    unknown = crash or (lacks[0] if len(lacks) == len(own) else "")
    status: Status = "skipped" if unknown else "problem" if named else "ok"
    why = unknown or (named[0].what if named else each.sentence)
    return Result(each.name, status, why, time.perf_counter() - start, named)


def _listed(verdict: Verdict) -> list[Problem]:
    if verdict is None:
        return []
    problems = [verdict] if isinstance(verdict, Problem) else list(verdict)
    odd = next((each for each in problems if not isinstance(each, Problem)), None)
    if odd is not None:
        raise TypeError(f"it returned {type(odd).__name__}, and not Problem")
    return problems


def own_checks() -> list[Check]:
    """The checks that come with kleinctl, in the order in which people want to read them."""
    from kleinctl.checks import comfyui, downloads, environment, files, job, machine, pairing, run, workflow

    return [
        value
        for module in (machine, environment, downloads, files, pairing, comfyui, workflow, job, run)
        for value in vars(module).values()
        if isinstance(value, Check)
    ]
