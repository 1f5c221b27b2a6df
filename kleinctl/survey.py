"""Everything doctor knows of a machine: gathered once, judged once, then only shown."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import __version__
from kleinctl.checks import Result, own_checks, run_checks
from kleinctl.checks.files import ROLES, FoundFile
from kleinctl.environment import broken
from kleinctl.home import home
from kleinctl.planner import Candidate, Choice, choose, compare, default_job
from kleinctl.plugins import Plugins
from kleinctl.problem import Problem

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware
    from kleinctl.identify import Identity
    from kleinctl.manifest import Model


@dataclass(frozen=True)
class Survey:
    """A machine, what is wrong with it, and what would run on it."""

    hardware: Hardware
    results: tuple[Result, ...]
    problems: tuple[Problem, ...]
    choice: Choice | None
    candidates: tuple[Candidate, ...]
    seconds: float

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


def survey(
    plugins: Plugins,
    hardware: Hardware,
    *,
    model: str | None = None,
    backend: str | None = None,
    comfyui: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    plan_for: Hardware | None = None,
) -> Survey:
    """Judge this machine: run every check, and compare every backend.

    `plan_for` is the machine to compare backends on, where that is not all of `hardware` (`--vram-limit`).
    Without `model` the automatic ones are considered in their order, and the first that runs here is chosen.

    Raises:
        Misuse: there is no such model or backend.
    """
    start = time.perf_counter()
    models = plugins.models_for(model)
    offers = plugins.backends_for(backend)
    facts = {"hardware": hardware, "home": str(home()), "home_error": home_error()}
    checks = [*own_checks(), *(offer.thing for offer in plugins.offers("kleinctl_checks"))]
    looked_at = [{"model": each} for each in models]
    results = run_checks(checks, facts, [*looked_at, *scenes(plugins, comfyui)])
    candidates, choice = best(offers, models, plan_for or hardware, changes or {})
    return Survey(
        hardware=hardware,
        results=tuple(results),
        problems=(*plugins.problems, *broken(), *(problem for result in results for problem in result.problems)),
        choice=choice,
        candidates=tuple(candidates),
        seconds=time.perf_counter() - start,
    )


def best(
    offers: Sequence[Any], models: Sequence[Model], hardware: Hardware, changes: Mapping[str, Any]
) -> tuple[list[Candidate], Choice | None]:
    """Every candidate in the order of the models, and the choice: the fastest of the first model that runs."""
    candidates, choice = [], None
    for model in models:
        own = compare(offers, model, hardware, default_job(model, **changes))
        choice = choice or choose(own)
        candidates += own
    return candidates, choice


def home_error() -> str:
    """Why kleinctl's folder cannot be written to, or an empty string."""
    folder = home()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is a file"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} does not let this user write"


def scenes(plugins: Plugins, comfyui: Path | None) -> Iterator[Mapping[str, Any]]:
    """What checks of files look at: each weights file that is in place, and each set that is loaded together."""
    for model in plugins.models.values():
        for layout, root in _roots(model, comfyui):
            files = list(_files(model, layout, root, plugins))
            yield from ({"found_file": found} for found in files)
            together: dict[str, Any] = {}
            for found in files:  # of shards the first, which has the tensors that tell
                together.setdefault(found.role.replace("-", "_"), found.identity.facts)
            if len(together) > 1:
                yield together


def _roots(model: Model, comfyui: Path | None) -> Iterator[tuple[str, Path]]:
    from kleinctl import store

    for layout in model.layouts:
        yield layout, store.model_folder(model.name, layout)
    if comfyui is not None:
        yield "comfyui", comfyui / "models"


def _files(model: Model, layout: str, root: Path, plugins: Plugins) -> Iterator[FoundFile]:
    for part in model.parts_for(layout):
        path = root / part.to[layout]  # confined by the manifest; people link the folders of their ComfyUI elsewhere
        if part.role in ROLES and path.suffix in (".safetensors", ".gguf") and path.exists():
            identity = _identify(path, plugins)
            yield FoundFile(path, identity, model.name, part.id, part.role, part.family, part.size, _fix(model))


def _identify(path: Path, plugins: Plugins) -> Identity:
    from kleinctl.identify import identify

    return identify(path, signatures=[offer.thing for offer in plugins.offers("kleinctl_signatures")])


def _fix(model: Model) -> str:
    return f"kleinctl install --model {model.name}"
