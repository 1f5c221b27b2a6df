"""What doctor makes of the facts of a machine: judged once, then only shown."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kleinctl import __version__
from kleinctl.checks import Result, own_checks, run_checks
from kleinctl.environment import Environment, broken
from kleinctl.planner import Candidate, Choice, choose, compare, default_job
from kleinctl.plugins import Plugins
from kleinctl.problem import Problem

if TYPE_CHECKING:
    from kleinctl.facts import Facts
    from kleinctl.hardware import Hardware
    from kleinctl.manifest import Model


#: Facts that only `run` and `up` have; checks that want them are theirs.
OF_A_JOB = {"job_facts", "job", "fit", "finished_run"}


@dataclass(frozen=True)
class Survey:
    """A machine, what is wrong with it, and what would run on it."""

    facts: Facts
    results: tuple[Result, ...]
    problems: tuple[Problem, ...]
    choice: Choice | None
    candidates: tuple[Candidate, ...]
    seconds: float

    @property
    def hardware(self) -> Hardware:
        """The machine."""
        return self.facts.hardware

    @property
    def errors(self) -> list[Problem]:
        """The problems that are no mere warnings."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def to_json(self) -> dict[str, Any]:
        """`kleinctl.doctor/1`."""
        chosen = self.choice.candidate if self.choice else None
        return {
            "schema": "kleinctl.doctor/1",
            "kleinctl": __version__,
            "hardware": self.hardware.to_json(),
            "checks": [result.to_json() for result in self.results],
            "problems": [problem.to_json() for problem in self.problems],
            "choice": self.choice.to_json() if self.choice else None,
            "alternatives": [alternative(each, chosen) for each in self.candidates if each != chosen],
        }


def alternative(candidate: Candidate, chosen: Candidate | None) -> dict[str, Any]:
    """A backend that was not chosen, and why."""
    why = candidate.why_not
    if why is None and chosen is not None:
        why = f"It runs; {chosen.backend} with {chosen.model} comes first."
    found = {"backend": candidate.backend, "model": candidate.model, "fit": candidate.fit.to_json()}
    return {**found, "why_not": why} if why else found


def survey(plugins: Plugins, facts: Facts, **question: Any) -> Survey:
    """Judge this machine, whose facts have just been gathered: as `judge`, and what is wrong with kleinctl itself."""
    found = judge(plugins, facts, here=True, **question)
    return replace(found, problems=(*plugins.problems, *broken(), *found.problems))


def judge(
    plugins: Plugins,
    facts: Facts,
    *,
    model: str | None = None,
    backend: str | None = None,
    changes: Mapping[str, Any] | None = None,
    plan_for: Hardware | None = None,
    here: bool = False,
) -> Survey:
    """Judge facts, of this machine or from a report: run every check, and compare every backend.

    `plan_for` is the machine to compare backends on, where that is not all of the facts' (`--vram-limit`). `here` is
    whether the facts are this machine's: of another nothing is known beside them.
    Without `model` the automatic ones are considered in their order, and the first that runs there is chosen.

    Raises:
        Misuse: there is no such model or backend.
    """
    start = time.perf_counter()
    models = plugins.models_for(model)
    offers = plugins.backends_for(backend)
    own = [each for each in own_checks() if not OF_A_JOB & set(each.wants)]
    checks = [*own, *(offer.thing for offer in plugins.offers("kleinctl_checks"))]
    looked_at = [{"model": each} for each in models]
    results = run_checks(checks, facts.once(), [*looked_at, *facts.scenes()])
    candidates, choice = best(offers, models, plan_for or facts.hardware, changes or {}, facts.environments, here=here)
    return Survey(
        facts=facts,
        results=tuple(results),
        problems=tuple(_once(problem for result in results for problem in result.problems)),
        choice=choice,
        candidates=tuple(candidates),
        seconds=time.perf_counter() - start,
    )


def _once(problems: Iterable[Problem]) -> Iterable[Problem]:
    """Each problem once, errors first: what a folder shows, a workflow in it may show again."""
    found = {(each.name, each.path, each.what): each for each in problems}.values()
    return sorted(found, key=lambda each: each.severity != "error")


def best(
    offers: Sequence[Any],
    models: Sequence[Model],
    hardware: Hardware,
    changes: Mapping[str, Any],
    among: Sequence[Environment] | None = None,
    *,
    here: bool = True,
) -> tuple[list[Candidate], Choice | None]:
    """Every candidate in the order of the models, and the choice: the fastest of the first model that runs."""
    candidates, choice = [], None
    for model in models:
        own = compare(offers, model, hardware, default_job(model, **changes), among, here=here)
        choice = choice or choose(own)
        candidates += own
    return candidates, choice
