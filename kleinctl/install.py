"""Install a model's files: plan what comes from where, take what is here already, fetch the rest, and undo it all."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kleinctl import fetch, store
from kleinctl.fetch import Event, Progress
from kleinctl.home import downloads_folder, home, models_folder, offline
from kleinctl.hub import PATIENT, Patience, offline_problem
from kleinctl.manifest import Model, Part
from kleinctl.problem import KleinctlError, Problem
from kleinctl.store import Stamps
from kleinctl.units import bytes_text

#: Room wanted over what the files take, for whatever else writes to the disk meanwhile.
MARGIN = 1.05

Action = Literal["present", "adopt", "package", "download", "missing"]


@dataclass(frozen=True)
class Step:
    """How one part gets to `target`. `source` names a repository, package or file; `found` is a copy that is here.

    `accepted` are all parts that are right there. `fetch_bytes` come over the network, `disk_bytes` are written.
    """

    part: Part
    action: Action
    source: str
    target: Path
    accepted: tuple[Part, ...]
    found: Path | None = None
    fetch_bytes: int = 0
    disk_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The step as it stands in the plan's JSON."""
        return {
            "part": self.part.ref,
            "name": self.part.name,
            "role": self.part.role,
            "action": self.action,
            "source": self.source,
            "to": str(self.target),
            "bytes": self.part.size,
            "sha256": self.part.sha256,
        }


@dataclass(frozen=True)
class InstallPlan:
    """What an install would do. Bytes. `folders` are searched for copies, `problems` stand in the way."""

    model: Model
    layout: str
    folder: Path
    steps: tuple[Step, ...]
    problems: tuple[Problem, ...]
    free_bytes: int
    folders: tuple[Path, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every part is there and verified."""
        return all(step.action == "present" for step in self.steps)

    @property
    def in_place(self) -> bool:
        """Whether every part is where it belongs with the right size, verified or not."""
        return all(step.action == "present" or step.found == step.target for step in self.steps)

    @property
    def fetch_bytes(self) -> int:
        """What is still to come over the network."""
        return sum(step.fetch_bytes for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """What is still to be written."""
        return sum(step.disk_bytes for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """The plan as a document."""
        return {
            "schema": "kleinctl.install/1",
            "model": self.model.name,
            "layout": self.layout,
            "folder": str(self.folder),
            "complete": self.complete,
            "parts": [step.to_json() for step in self.steps],
            "fetch_bytes": self.fetch_bytes,
            "disk_bytes": self.disk_bytes,
            "disk_free_bytes": self.free_bytes,
            "problems": [problem.to_json() for problem in self.problems],
        }


# Planning


def plan_files(
    model: Model,
    layout: str,
    precision: str | None = None,
    comfyui: Path | None = None,
    allow_unverified: bool = False,
) -> InstallPlan:
    """What has to be done to have `model` in `layout`. Hashes nothing, fetches nothing, writes nothing.

    Without `precision` it is the one that is here, or else the first that the manifest lists. `comfyui` is a ComfyUI
    whose folders of models may hold copies, those of its `extra_model_paths.yaml` too; parts without a sha256 need
    `allow_unverified`.

    Raises:
        Misuse: the model does not come in that precision.
        KleinctlError: the manifest points out of the model's folder.
    """
    folders = _folders(comfyui) if comfyui else ()
    stamps, precision = Stamps(), precision or here(model, layout)
    steps = tuple(_step(model, layout, part, stamps, folders) for part in model.parts_for(layout, precision))
    problems = tuple(_problems(model, steps, allow_unverified))
    folder = store.model_folder(model.name, layout)
    return InstallPlan(model, layout, folder, steps, problems, store.free_bytes(folder), folders)


def here(model: Model, layout: str) -> str | None:
    """The precision whose parts all lie in their places, or else one of which only shared ones do not; else None."""
    for shared in (True, False):
        for precision in model.precisions(layout):
            parts = [part for part in model.parts_for(layout, precision) if shared or part.precision]
            places = ((store.destination(model.name, layout, part), part.size) for part in parts)
            if all(place.is_file() and size in (None, place.stat().st_size) for place, size in places):
                return precision
    return None


def _folders(comfyui: Path) -> tuple[Path, ...]:
    """The folders that a ComfyUI reads models from; what is no ComfyUI is searched as it is."""
    from kleinctl.facts import comfyui as facts

    found = facts.read(comfyui)
    if found is None:
        return (comfyui / "models" if (comfyui / "models").is_dir() else comfyui,)
    return tuple(dict.fromkeys(folder for _, folder in facts.model_folders(found)))


def _step(model: Model, layout: str, part: Part, stamps: Stamps, folders: Sequence[Path]) -> Step:
    target, accepted, size = store.destination(model.name, layout, part), model.accepted(part, layout), part.size or 0
    state = store.state(target, accepted, stamps)
    if state == "verified":
        return Step(part, "present", str(target), target, accepted, target)
    if state == "unchecked":
        return Step(part, "adopt", str(target), target, accepted, target)
    found = next((copy for other in accepted for copy in store.copies(other, stamps, folders)), None)
    if found:
        disk = 0 if store.can_link(found, target) else size
        return Step(part, "adopt", str(found), target, accepted, found, disk_bytes=disk)
    source = next(iter(part.sources), None)
    if source is None:
        return Step(part, "missing", "nowhere", target, accepted)
    if source.package:
        return Step(part, "package", source.package, target, accepted, disk_bytes=size)
    missing = max(0, size - fetch.arrived_bytes(part))
    return Step(part, "download", source.repo or "", target, accepted, fetch_bytes=missing, disk_bytes=missing)


def _problems(model: Model, steps: Sequence[Step], allow_unverified: bool) -> Iterator[Problem]:
    new = [step for step in steps if step.action in ("package", "download", "missing")]
    if model.accept_licence and new and not licence_accepted(model):
        yield Problem(
            f"the licence of {model.name} has not been accepted",
            f"It is {model.licence}, which wants you to accept it first: {model.licence_url}",
            f"kleinctl install --model {model.name} --accept-licence",
            name="licence-not-accepted",
        )
    for step in new:
        if step.part.sha256 is None and step.action != "missing" and not allow_unverified:
            yield Problem(
                f"{step.part.name} cannot be verified",
                f"A sha256 is wanted; the manifest of {model.name} has none for it, so any file would do.",
                f"kleinctl install --model {model.name} --allow-unverified",
                name="part-unverified",
            )
        if step.action == "missing":
            yield Problem(
                f"{step.part.name} of {model.name} is not on this machine",
                f"Its manifest names no source for it; it belongs at {step.target}.",
                f"put it there, then: kleinctl install --model {model.name}",
                name="part-without-source",
                path=str(step.target),
            )
    downloads = [step.part for step in steps if step.action == "download"]
    if downloads and offline():
        yield offline_problem(downloads)
    yield from _disk_problems(steps)


def _disk_problems(steps: Sequence[Step]) -> Iterator[Problem]:
    """No folder, no room, or files too large for the file system. What is fetched goes to `downloads/`, then moves."""
    written = [step.target.parent for step in steps if step.action != "present"]
    blocked = next((problem for problem in map(store.no_folder, written) if problem), None)
    if blocked:
        yield blocked
        return
    need: Counter[int] = Counter()
    places: dict[int, Path] = {}
    for step in steps:
        written = [downloads_folder()] if step.action in ("package", "download") else []
        for disk, place in {store.disk(place): place for place in (*written, step.target)}.items():
            need[disk] += step.disk_bytes
            places[disk] = place
    for disk, place in places.items():
        wanted, free = math.ceil(need[disk] * MARGIN), store.free_bytes(place)
        if wanted > free:
            yield fetch.no_room(store.existing_parent(place), wanted, free)
    for step in steps:
        if step.disk_bytes and (step.part.size or 0) > store.FAT32_LIMIT and store.is_fat32(step.target):
            yield Problem(
                f"{step.part.name} is too large for the disk of {store.existing_parent(step.target)}",
                f"It has {bytes_text(step.part.size or 0)}; the disk is formatted as FAT32, which ends at 4.29 GB.",
                "set KLEINCTL_HOME to a folder on an NTFS, exFAT or ext4 disk",
                name="file-too-large-for-disk",
                path=str(step.target),
                ref="B07",
            )


def _licences() -> Path:
    return home() / "licences.json"


def licence_accepted(model: Model) -> bool:
    """Whether the user has accepted the licence that `model` has now."""
    return store.read_json(_licences()).get(model.name) == model.licence


def accept_licence(model: Model) -> None:
    """Remember that the user has accepted the licence of `model`.

    Raises:
        KleinctlError: `KLEINCTL_HOME` cannot be written.
    """
    store.write_json(_licences(), {**store.read_json(_licences()), model.name: model.licence})


# Carrying it out


def install_files(
    plan: InstallPlan,
    progress: Progress = lambda event: None,
    *,
    workers: int = fetch.WORKERS,
    patience: Patience = PATIENT,
) -> list[Path]:
    """Carry out `plan` and return where the parts are. What is there is left alone; what broke off goes on.

    Waits while another kleinctl installs. Nothing is trusted from the plan: each file is looked at again.

    Raises:
        KleinctlError: a problem of the plan stands in the way, a part cannot be had, or the disk does not take it.
    """
    for problem in plan.problems:
        if problem.severity == "error":
            raise KleinctlError(problem)
    with store.locked(lambda note: progress(Event(plan.model.name, "wait", 0, None, note))):
        work = _Work(plan, progress)
        missing: Sequence[Step] = plan.steps
        while missing := [step for step in missing if not work.have(step)]:
            work.fetch(missing, workers, patience)
    return [step.target for step in plan.steps]


class _Work:
    """An install under way: the plan, the memory of hashes, and where to tell of progress."""

    def __init__(self, plan: InstallPlan, progress: Progress) -> None:
        self.plan, self.progress, self.stamps = plan, progress, Stamps()

    def have(self, step: Step) -> bool:
        """Whether the part is in place, or a copy on this machine could be put there."""
        state = store.state(step.target, step.accepted, self.stamps)
        if state == "unchecked":
            state = "verified" if self.is_right(step.target, step) else "wrong"
        if state == "wrong":
            self.put_away(step)
        return state == "verified" or self.adopt(step)

    def is_right(self, path: Path, step: Step) -> bool:
        """Hash `path`, unless that was done before, and remember it."""
        from kleinctl.verify import hash_file

        found = self.stamps.sha256(path)
        if found is None:
            try:
                found = hash_file(path, self.hashing(step.part, path))
            except OSError:
                return False
            self.stamps.put(path, found)
        return bool({None, found} & {part.sha256 for part in step.accepted})

    def hashing(self, part: Part, path: Path) -> Callable[[int], None]:
        total = path.stat().st_size
        return lambda done: self.progress(Event(part.ref, "verify", done, total))

    def put_away(self, step: Step) -> None:
        """What is in the place of a part and is not it goes into quarantine."""
        found = self.stamps.sha256(step.target)
        size = step.target.stat().st_size
        store.quarantine(
            step.target,
            name=step.part.name,
            wanted=f"sha256 {step.part.sha256}, {step.part.size} bytes",
            found=f"sha256 {found}, {size} bytes" if found else f"{size} bytes",
            source=str(step.target),
        )

    def adopt(self, step: Step) -> bool:
        """Put a copy from this machine into place, if there is one that has the right hash."""
        for part in step.accepted:
            for copy in store.copies(part, self.stamps, self.plan.folders):
                if self.is_right(copy, step):
                    store.place(copy, step.target)
                    self.stamps.put(step.target, self.stamps.sha256(copy) or "")
                    size = step.target.stat().st_size
                    self.progress(Event(step.part.ref, "done", size, size))
                    return True
        return False

    def fetch(self, steps: Sequence[Step], workers: int, patience: Patience) -> None:
        """Fetch what is missing; a file that two steps want, once (the other step finds it in the store)."""
        wanted = {fetch.partial_file(step.part): step for step in steps}

        def moved(part: Part, file: Path, sha256: str) -> None:
            step = wanted[fetch.partial_file(part)]
            store.move(file, step.target)
            self.stamps.put(step.target, sha256)

        fetch.fetch_all(
            [step.part for step in wanted.values()], moved, self.progress, workers=workers, patience=patience
        )


# Undoing it


@dataclass(frozen=True)
class Removed:
    """What an uninstall did: files removed, bytes freed, and what is `left` because kleinctl did not put it there."""

    files: tuple[Path, ...]
    freed_bytes: int
    left: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """The outcome as a document."""
        return {
            "schema": "kleinctl.uninstall/1",
            "files": [str(path) for path in self.files],
            "freed_bytes": self.freed_bytes,
            "left": [str(path) for path in self.left],
        }


def uninstall(model: Model, progress: Progress = lambda event: None) -> Removed:
    """Remove what kleinctl put into the folder of `model`, and what has arrived of its parts.

    Only names inside `KLEINCTL_HOME` are removed: a file that the hub's cache or ComfyUI also has stays there.

    Raises:
        KleinctlError: a file cannot be removed.
    """
    folder = store.confined(models_folder(), model.name)
    removed: list[Path] = []
    freed = 0
    with store.locked(lambda note: progress(Event(model.name, "wait", 0, None, note))):
        stamps = Stamps()
        for path in sorted(stamps.under(folder)):
            if os.path.lexists(path) and store.inside(path.parent, home()):
                facts = path.lstat()
                with store.writing(path):
                    path.unlink()
                removed.append(path)
                freed += facts.st_size if facts.st_nlink == 1 else 0
        for part in model.parts:
            freed += fetch.arrived_bytes(part)
            fetch.discard_partial(part)
        stamps.prune()  # which writes, and wants the room that was made
        left = tuple(_remove_empty(folder))
    return Removed(tuple(removed), freed, left)


def _remove_empty(folder: Path) -> Iterator[Path]:
    """Remove empty folders from the bottom up; yields the files that are left. Links to folders are not followed."""
    for parent, _, names in os.walk(folder, topdown=False):
        yield from (Path(parent, name) for name in names)
        with contextlib.suppress(OSError):
            Path(parent).rmdir()
