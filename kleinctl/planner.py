"""Compares backends by their fit, and says which would run and why each other would not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kleinctl import environment as environments
from kleinctl.backends import Fit, Job
from kleinctl.problem import KleinctlError, Problem
from kleinctl.units import gib, seconds_text

if TYPE_CHECKING:
    from kleinctl.backends import Backend
    from kleinctl.environment import Environment
    from kleinctl.hardware import Hardware
    from kleinctl.manifest import Model
    from kleinctl.plugins import Offer

#: Of the seconds of a picture, those that more RAM or another precision has to come down to before it is told.
FASTER = 0.9
#: More RAM than any plan takes, in bytes.
AMPLE_BYTES = 2**50


@dataclass(frozen=True)
class Candidate:
    """A backend and a model on one machine: the fit, and what is in the way.

    `unchecked`: it fits, and whether what it needs beside that is there could not be looked at; `problem` says so.
    `faster`: where little RAM makes it slower, the sentence that says so, and what would help.
    """

    backend: str
    model: str
    fit: Fit
    problem: Problem | None = None
    device: str = "cuda:0"
    unchecked: bool = False
    faster: str = ""

    @property
    def runs(self) -> bool:
        """Whether it would work here."""
        return self.fit.fits and self.problem is None

    @property
    def why_not(self) -> str | None:
        """What is in the way, in one sentence: what the machine lacks rather than what could be installed."""
        if self.problem is not None and self.fit.why_not is None:
            return f"{self.problem.what}: {self.problem.why}"
        return self.fit.why_not


@dataclass(frozen=True)
class Choice:
    """What would run, and why it and not another."""

    candidate: Candidate
    why: str

    def to_json(self) -> dict[str, Any]:
        """The choice as it stands in `doctor --json`."""
        return {
            "backend": self.candidate.backend,
            "model": self.candidate.model,
            "fit": self.candidate.fit.to_json(),
            "why": self.why,
        }


def default_job(model: Model, **changes: Any) -> Job:
    """The job a bare `kleinctl run` would be, for predictions."""
    defaults = model.defaults
    job = Job("", defaults.width, defaults.height, 0, defaults.steps, defaults.guidance)
    return replace(job, **changes)


def precisions(backend: Backend) -> tuple[str, ...]:
    """The precisions that `backend` can be asked for by name; a job that names none has the manifest's."""
    return tuple(getattr(backend, "precisions", ()))


def compare(
    offers: Iterable[Offer],
    model: Model,
    hardware: Hardware,
    job: Job,
    among: Sequence[Environment] | None = None,
    *,
    here: bool = True,
) -> list[Candidate]:
    """A candidate for every backend that has the model's files in its layout, the fastest that runs first.

    A backend that cannot hold weights in the job's precision is none of them. Loads nothing and starts nothing.
    `among` are the environments there are, by default those of this machine. `here` is whether this is the machine in
    question, which can then be asked for more than is known of its hardware.
    """
    among = environments.known() if among is None else among
    found = []
    for offer in offers:
        if model.parts_for(offer.thing.layout) and (not job.precision or job.precision in precisions(offer.thing)):
            try:
                candidate = _candidate(offer.thing, model, hardware, job, among)
                candidate = _looked_for(offer.thing, candidate, here=here)
            except Exception as error:  # a stranger's arithmetic must not take doctor down
                problem = Problem(
                    f"{offer.thing.name} cannot say what it needs",
                    f"{type(error).__name__}: {error}",
                    f"kleinctl plugins --disable {offer.plugin}",
                    name="plugin-failed",
                    severity="warning",
                )
                candidate = Candidate(offer.thing.name, model.name, Fit(0, 0, 0, 0, 0, False, "unknown"), problem)
            found.append(candidate)
    return sorted(found, key=lambda each: (not each.runs, each.fit.seconds_next, each.fit.seconds_first))


def absent(backend: Backend) -> Problem | None:
    """What a backend needs of this machine beside hardware and packages, and is not there; most need nothing."""
    return _answer(backend.absent(), Problem, "absent()") if hasattr(backend, "absent") else None


def _answer(value: Any, wanted: type, method: str) -> Any:
    """What a backend's method returned, which a stranger may have written: one that is wanted, or None.

    Raises:
        TypeError: it is something else.
    """
    if value is not None and not isinstance(value, wanted):
        raise TypeError(f"its {method} returned {type(value).__name__}, and not {wanted.__name__}")
    return value


def _looked_for(backend: Backend, candidate: Candidate, *, here: bool) -> Candidate:
    """The candidate, with what it needs beside hardware and packages looked for where that can be done."""
    if here or not hasattr(backend, "absent"):
        return replace(candidate, problem=absent(backend) or candidate.problem)
    unknown = Problem(
        f"{backend.name} could not be checked",
        "Whether the program that it needs is installed shows on that machine alone.",
        "kleinctl doctor   # on that machine",
    )
    if candidate.problem is not None:
        return candidate
    return replace(candidate, problem=unknown, unchecked=candidate.fit.fits)


def _candidate(backend: Backend, model: Model, hardware: Hardware, job: Job, among: Sequence[Environment]) -> Candidate:
    """The backend on the card, where model, card and driver can; else on the CPU, where the model can.

    A model that also runs on the CPU does not have gigabytes of CUDA packages fetched for it.
    """
    cpu = "cpu" in model.devices
    if hardware.gpu is not None and "cuda" in model.devices:
        environment = environments.find(backend.requires, hardware, cuda=True, among=among)
        if environment is not None or not cpu:
            on_card = _on(backend, model, hardware, job, environment, "cuda:0")
            if on_card.runs or not cpu:
                return on_card
    elsewhere = replace(hardware, gpus=()) if cpu else hardware
    found = environments.find(backend.requires, hardware, cuda=False, among=among) if cpu else None
    return _on(backend, model, elsewhere, job, found, "cpu" if cpu else "cuda:0")


def _on(
    backend: Backend, model: Model, hardware: Hardware, job: Job, environment: Environment | None, device: str
) -> Candidate:
    fit = backend.fit(model, hardware, job)
    problem = _answer(backend.health(hardware, environment), Problem, "health()")
    if problem is None and environment is None and (device == "cpu" or hardware.gpu is not None):
        try:
            environments.torch_build(hardware, cuda=device != "cpu")
        except KleinctlError as error:
            problem = error.problem
    return Candidate(backend.name, model.name, fit, problem, device, faster=_faster(backend, model, hardware, job, fit))


def _faster(backend: Backend, model: Model, hardware: Hardware, job: Job, fit: Fit) -> str:
    """What would make pictures faster where RAM holds them up, each with the seconds it is predicted; else nothing."""
    if not fit.fits:
        return ""
    enough = fit.seconds_next * FASTER
    ample = backend.fit(model, replace(hardware, ram_available_bytes=AMPLE_BYTES), job)
    if ample.seconds_next > enough:
        return ""
    told = (
        "Weights that RAM has no room for are read again for each picture: "
        f"with {gib(ample.ram_bytes)} of RAM available (close programs, or more RAM) it would take "
        f"{seconds_text(ample.seconds_next)}"
    )
    names = () if job.precision else precisions(backend)
    fits = {name: backend.fit(model, hardware, replace(job, precision=name)) for name in names}
    ways = [(each.seconds_next, name) for name, each in fits.items() if each.fits and each.seconds_next <= enough]
    if ways:
        seconds, name = min(ways)
        told += f"; `kleinctl run --precision {name}` takes {seconds_text(seconds)}, for nearly the same picture"
    return f"{told}."


def choose(candidates: Sequence[Candidate]) -> Choice | None:
    """The fastest candidate that runs, among those of one model."""
    running = [each for each in candidates if each.runs]
    if not running:
        return None
    best, rest = running[0], running[1:]
    takes = f"{memory_text(best.fit)}, about {seconds_text(best.fit.seconds_next)} a picture"
    why = f"{best.backend} ({best.fit.strategy}) takes {takes}"
    if rest and rest[0].fit.seconds_next > best.fit.seconds_next * 1.05:
        why += f"; {rest[0].backend} would take {seconds_text(rest[0].fit.seconds_next)}"
    elif rest:
        why += f"; {rest[0].backend} would be as fast"
    elif any(each.unchecked for each in candidates):
        why += "; nothing else that could be checked fits"
    elif len(candidates) > 1:
        why += "; nothing else fits here"
    return Choice(best, f"{why}. {best.faster}".rstrip())


def memory_text(fit: Fit) -> str:
    """Peaks for people: `13.9 GiB of VRAM and 1.4 GiB of RAM`."""
    ram = f"{gib(fit.ram_bytes)} of RAM"
    return f"{gib(fit.vram_bytes)} of VRAM and {ram}" if fit.vram_bytes else ram
