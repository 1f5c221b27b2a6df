"""The road from a machine to a picture, one function a stretch: choose, files, environment, pictures.

What `up`, `install` and `run` share. Nothing is printed here; progress goes to callbacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kleinctl import environment as environments
from kleinctl import generate, install, memory, store
from kleinctl.backends import Budget, Job
from kleinctl.environment import Environment
from kleinctl.fetch import no_room
from kleinctl.planner import Candidate, absent, choose, compare, default_job, precisions
from kleinctl.problem import KleinctlError, Misuse, Problem, did_you_mean

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware
    from kleinctl.manifest import Model
    from kleinctl.plugins import Offer, Plugins

#: Sides of squares that are tried, in pixels, when a picture does not fit and a smaller one is to be named.
SMALLER_SIDES = (3072, 2048, 1536, 1280, 1024, 896, 768, 512, 256)


@dataclass(frozen=True)
class Way:
    """A model and the backend that would run it here."""

    model: Model
    offer: Offer
    candidate: Candidate

    @property
    def backend(self) -> Any:
        """The plugin's backend."""
        return self.offer.thing


def ways(
    plugins: Plugins,
    models: Sequence[Model],
    backend: str | None,
    hardware: Hardware,
    changes: Mapping[str, Any],
    *,
    must_fit: bool = True,
) -> list[Way]:
    """The best way for each model that runs here (or, without `must_fit`, comes nearest), in the order of the models.

    Raises:
        Misuse: there is no such backend, or none has such a precision.
    """
    offers = plugins.backends_for(backend)
    check_precision(plugins, offers, str(changes.get("precision", "")))
    found = []
    for model in models:
        candidates = compare(offers, model, hardware, default_job(model, **changes))
        best = candidates[:1] if not must_fit else [each for each in candidates[:1] if each.runs]
        found += [Way(model, plugins.backends[each.backend], each) for each in best]
    return found


def check_precision(plugins: Plugins, offers: Sequence[Offer], precision: str) -> None:
    """Whether one of `offers` can hold weights in `precision`; none is asked for where it is empty.

    Raises:
        Misuse: none can.
    """
    if not precision or any(precision in precisions(offer.thing) for offer in offers):
        return
    can = {name: precisions(offer.thing) for name, offer in plugins.backends.items()}
    known = list(dict.fromkeys(each for offer in offers for each in precisions(offer.thing)))
    names = offers[0].thing.name if len(offers) == 1 else "no backend here"
    has = f"Known here is {', '.join(known)}." if known else "It holds them as the model's files have them."
    able = [name for name, own in can.items() if precision in own]
    here = (name for name in able if absent(plugins.backends[name].thing) is None)
    other = next(here, able[0] if able else None)  # rather one that has not to be installed first
    fix = f"--backend {other}" if other else "leave --precision out"
    what = f"{names} {'cannot' if len(offers) == 1 else 'can'} hold weights in {precision[:40]!r}"
    raise Misuse(Problem(what, has + did_you_mean(precision[:40], known), fix, name="precision-unknown"))


def no_way(
    plugins: Plugins, model: Model, backend: str | None, hardware: Hardware, changes: Mapping[str, Any]
) -> KleinctlError:
    """Why `model` does not run here, with the figures and what would."""
    offers = plugins.backends_for(backend)
    job = default_job(model, **changes)
    candidates = compare(offers, model, hardware, job)
    otherwise = compare(offers, model, hardware, replace(job, precision="")) if job.precision else []
    if otherwise and not candidates:
        return not_so_precise(model, backend, job, otherwise)
    if not candidates:
        return KleinctlError(
            Problem(
                f"{backend} cannot run {model.name}" if backend else f"no backend can run {model.name}",
                f"Its files come for {', '.join(sorted({layout for part in model.parts for layout in part.to}))}.",
                "kleinctl plugins",
                name="no-backend",
            )
        )
    smaller = next(
        (
            side
            for side in SMALLER_SIDES
            if side * side < job.width * job.height and _fits(offers, model, hardware, job, side)
        ),
        None,
    )
    closest = min(candidates, key=lambda each: (each.problem is not None, each.fit.vram_bytes, each.fit.ram_bytes))
    if closest.problem is not None:  # of every backend: its own words and hint tell more than that nothing fits
        return KleinctlError(closest.problem)
    if not smaller and choose(otherwise) is not None:
        return not_so_precise(model, backend, job, candidates)
    size = f" at {job.width}x{job.height}" if smaller else ""
    return KleinctlError(
        Problem(
            f"{model.name} does not fit this machine{size}",
            closest.why_not or "",
            f"--size {smaller}x{smaller}" if smaller else "kleinctl plan",
            name="does-not-fit",
        )
    )


def nearest(
    plugins: Plugins, models: Sequence[Model], backend: str | None, hardware: Hardware, changes: Mapping[str, Any]
) -> Model:
    """The model that lacks the least where none of `models` runs; of several that lack the same, the first."""
    offers = plugins.backends_for(backend)
    found = [(model, compare(offers, model, hardware, default_job(model, **changes))) for model in models]
    lacking = [(min(_lacks(each, hardware) for each in own), model) for model, own in found if own]
    return min(lacking, key=lambda each: each[0])[1] if lacking else models[0]


def _lacks(candidate: Candidate, hardware: Hardware) -> tuple[bool, bool, int]:
    """Whether more than memory is in the way, whether a card is, and the bytes of VRAM and RAM that are missing."""
    fit, on_card = candidate.fit, candidate.device != "cpu"
    vram = memory.usable_vram(hardware.gpu) if on_card and hardware.gpu else 0
    missing = max(0, fit.vram_bytes - vram) if on_card else 0
    missing += max(0, fit.ram_bytes - hardware.ram_available_bytes)
    return candidate.problem is not None, on_card and hardware.gpu is None, missing


def not_so_precise(model: Model, backend: str | None, job: Job, candidates: Sequence[Candidate]) -> KleinctlError:
    """The problem of a precision that stands in the way of `model`, with the words of each of `candidates`."""
    drawn = f"{model.name} in {job.precision[:40]!r}"
    words = list(dict.fromkeys(f"{each.backend}: {each.why_not}" for each in candidates if each.why_not))
    names = ", ".join(each.backend for each in candidates)
    return Misuse(
        Problem(
            f"{backend} does not draw {drawn}" if backend else f"no backend here draws {drawn}",
            " ".join(words) or f"What runs it holds weights otherwise: {names}.",
            "leave --precision out",
            name="precision-unknown",
        )
    )


def _fits(offers: Sequence[Offer], model: Model, hardware: Hardware, job: Job, side: int) -> bool:
    return choose(compare(offers, model, hardware, replace(job, width=side, height=side))) is not None


def files(way: Way, **choices: Any) -> install.InstallPlan:
    """What has to be fetched for `way`; see `install.plan_files`."""
    return install.plan_files(way.model, way.backend.layout, **choices)


def room(way: Way, plan: install.InstallPlan, hardware: Hardware) -> Problem | None:
    """The problem of a disk that takes the files of `plan`, but not beside them the environment that is to be built.

    Raises:
        KleinctlError: there is no torch for this machine.
    """
    where = place(way, hardware) if plan.disk_bytes else None
    if where is None or where.environment is not None:
        return None
    made = plan_environment(way, where, hardware)
    need = math.ceil(plan.disk_bytes * install.MARGIN) + made.download_bytes + made.disk_bytes
    folder = store.existing_parent(made.folder)
    if store.disk(folder) != store.disk(plan.folder) or need <= store.free_bytes(folder):
        return None
    return no_room(folder, need, store.free_bytes(folder))


@dataclass(frozen=True)
class Place:
    """Where a model will run: the environment (None: to be built, by `plan`) and the device."""

    environment: Environment | None
    device: str

    @property
    def cuda(self) -> bool:
        """Whether it runs on a card."""
        return self.device != "cpu"


def place(way: Way, hardware: Hardware) -> Place:
    """The environment and the device for `way`, as the planner chose it."""
    device = way.candidate.device
    return Place(environments.find(way.backend.requires, hardware, cuda=device != "cpu"), device)


def plan_environment(way: Way, where: Place, hardware: Hardware) -> environments.EnvironmentPlan:
    """The managed environment to build for `way`.

    Raises:
        KleinctlError: there is no torch for this machine.
    """
    return environments.plan(way.backend.requires, hardware, where.cuda)


def budget(where: Place, hardware: Hardware) -> Budget:
    """What the job may use now."""
    vram = memory.usable_vram(hardware.gpu) if where.cuda and hardware.gpu is not None else 0
    known = replace(hardware, packages={}, remarks=())  # what a plan goes by
    return Budget(vram, hardware.ram_available_bytes, where.device, known)


def digests(way: Way) -> dict[str, str]:
    """The sha256 of the model's installed parts by id; `unknown` for what has not been hashed since it came."""
    layout, stamps = way.backend.layout, store.Stamps()
    parts = way.model.parts_for(layout, install.here(way.model, layout))
    targets = {part: store.destination(way.model.name, layout, part) for part in parts}
    return {part.id: stamps.sha256(target) or "unknown" for part, target in targets.items()}


def pictures(
    way: Way,
    environment: Environment,
    where: Place,
    hardware: Hardware,
    jobs: Sequence[Job],
    outputs: tuple[generate.Output, ...],
    on_event: generate.OnEvent,
    executor: Any = None,
    origins: Sequence[str] = (),
) -> generate.Result:
    """Make the pictures of `jobs` in a worker; see `generate.run`, and `generate.Request` for `origins`.

    Raises:
        KleinctlError: something cannot work, or failed.
    """
    wanted = request(way, environment, where, hardware)
    asked = replace(wanted, jobs=tuple(jobs), outputs=outputs, origins=tuple(origins))
    return generate.run(asked, on_event, executor)


def request(way: Way, environment: Environment, where: Place, hardware: Hardware) -> generate.Request:
    """How pictures are made with `way`, without any yet."""
    return generate.Request(
        model=way.model,
        folder=store.model_folder(way.model.name, way.backend.layout),
        backend=way.backend.name,
        plugin=way.offer.module,
        python=environment.python,
        budget=budget(where, hardware),
        jobs=(),
        outputs=(),
        parts=digests(way),
        gpu=hardware.gpu.cuda_id if where.cuda and hardware.gpu is not None else None,
    )


def executor(plugins: Plugins, name: str | None) -> Any:
    """Where the worker runs: a process here, or the executor of a plugin that was named.

    Raises:
        Misuse: there is none of that name.
    """
    from kleinctl.executors import ProcessExecutor
    from kleinctl.log_patterns import PATTERNS

    theirs = [offer.thing for offer in plugins.offers("kleinctl_log_patterns")]
    offered = [ProcessExecutor(patterns=(*theirs, *PATTERNS)), *(o.thing for o in plugins.offers("kleinctl_executors"))]
    found = next((each for each in offered if each.name == (name or "process")), None)
    if found is None:
        names = [each.name for each in offered]
        why = f"This installation has {', '.join(names)}.{did_you_mean(name or '', names)}"
        raise Misuse(Problem(f"there is no executor {name!r}", why, "kleinctl plugins", name="unknown-executor"))
    return found


def not_installed(way: Way) -> KleinctlError:
    """The problem of a model that is asked to run and is not here."""
    size = way.model.size_text(way.backend.layout)
    folder = store.model_folder(way.model.name, way.backend.layout)
    return KleinctlError(
        Problem(
            f"{way.model.name} is not installed",
            f"Its files for {way.backend.name} ({size}) are not all in {folder}.",
            f"kleinctl install --model {way.model.name} --backend {way.backend.name}",
            name="model-not-installed",
        )
    )
