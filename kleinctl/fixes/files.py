"""Fixes that move, quarantine and fetch weights files."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kleinctl import store
from kleinctl.fixes.request import DISK_RATE, LINE_RATE, Plan, Request, move_by_hand
from kleinctl.fixes.texts import WRITABLE_NAMES
from kleinctl.home import downloads_folder, home, quarantine_folder
from kleinctl.journal import Made, Moved, Progress, Put, Record, Seen, Shared, missing_folders
from kleinctl.problem import KleinctlError, shell
from kleinctl.units import bytes_text
from kleinctl.verify import hash_file

if TYPE_CHECKING:
    from kleinctl.install import InstallPlan, Step
    from kleinctl.manifest import Model, Part

#: Ends of the names of weights files, which are kept under what they really are.
WEIGHTS = (".safetensors", ".sft", ".gguf")


# The right part at its place


def replace_file(request: Request) -> Plan:
    """`replace-file` and `fetch-part`: the right part at `path`; what is there goes to quarantine."""
    from kleinctl import install

    model = request.plugins.model(request.text("model"))
    part = model.part(request.text("part"))
    path = request.path("path")
    if path.suffix != PurePosixPath(part.name).suffix or path.is_dir():
        raise request.refuse(f"{path} is no place for {part.name}")
    source = alone(model, part, path)
    for problem in source.problems:
        if problem.severity == "error":
            raise KleinctlError(problem)
    [step] = source.steps
    _check_room(path, part.size or 0)
    link = str(path.readlink()) if path.is_symlink() else None
    kept, reason = kept_name(path, f"{part.name} of {model.name}") if path.exists() and not link else (None, None)
    blank = Put("put", str(path), part.sha256 or "", str(kept) if kept else None, link, missing_folders(path))

    before = Seen.of(path)

    def work(record: Record, progress: Progress) -> None:
        install.install_files(source, progress)
        if Seen.of(path) != before:
            raise request.refuse(f"{path} was changed meanwhile")
        found = store.Stamps().sha256(step.target) or ""
        record.perform(replace(blank, sha256=found, before=before), step.target, reason)
        store.Stamps().put(path, found)

    size = f" ({bytes_text(part.size)})" if part.size is not None else ""
    verb = "fetch" if step.fetch_bytes else "take"
    sentences = [f"{verb} {part.name} of {model.name}{size} from {step.source} and check its sha256"]
    sentences += [f"keep what is at {path} as {kept}"] if kept else []
    sentences += [f"put the right file at {path}" + (f", now a link to {link}" if link else "")]
    return request.plan(
        *sentences,
        work=work,
        commands=_by_hand(model, part, path, kept),
        fetch_bytes=step.fetch_bytes,
        disk_bytes=step.disk_bytes,
        seconds=step.fetch_bytes / LINE_RATE + 2 * (part.size or 0) / DISK_RATE,
    )


def alone(model: Model, part: Part, path: Path) -> InstallPlan:
    """The install of one part, verified, to a file in `downloads/` that a restart finds."""
    from kleinctl import install

    layout = next((each for each, to in part.to.items() if path.as_posix().endswith(to)), next(iter(part.to)))
    others = tuple(other for other in model.accepted(part, layout) if other != part)
    checkout = next((folder.parent for folder in path.parents if folder.name == "models"), None)
    plan = install.plan_files(replace(model, parts=(part, *others)), layout, part.precision, checkout)
    [step] = plan.steps
    if step.action == "adopt" and step.found in (step.target, path):  # not known to be right: count on fetching it
        step = _from_source(step)
    ready = downloads_folder() / f"{part.sha256 or part.id}.ready"
    step = replace(step, target=ready)
    if ready.exists():
        step = replace(step, fetch_bytes=0, disk_bytes=0)
    return replace(plan, steps=(step,), problems=tuple(install._problems(model, (step,), False)))


def _from_source(step: Step) -> Step:
    """The step as it is where no copy is on this machine."""
    from kleinctl import fetch

    size, source = step.part.size or 0, next(iter(step.part.sources), None)
    missing = max(0, size - fetch.arrived_bytes(step.part))
    if source is None:
        return replace(step, action="missing", source="nowhere", found=None)
    if source.package:
        return replace(step, action="package", source=source.package, found=None, disk_bytes=size)
    where = source.repo or ""
    return replace(step, action="download", source=where, found=None, fetch_bytes=missing, disk_bytes=missing)


def _check_room(path: Path, size: int) -> None:
    """Raise where `path` is on another disk than what is fetched, and that has no room for it."""
    from kleinctl import fetch

    free = store.free_bytes(path.parent)
    if size > free and store.disk(path.parent) != store.disk(downloads_folder()):
        raise KleinctlError(fetch.no_room(store.existing_parent(path.parent), size, free))


def _by_hand(model: Model, part: Part, path: Path, kept: Path | None) -> tuple[str, ...]:
    """What to type instead."""
    away = move_by_hand(path, kept) if kept else ()
    url = next((source.url() for source in part.sources if source.repo), None)
    if url is None or store.inside(path.parent, home()):
        return (*away, shell("kleinctl", "install", "--model", model.name))
    return (*away, shell("curl", "-L", "-o", path, url), shell("kleinctl", "identify", path))


# A whole model


def install_model(request: Request) -> Plan:
    """`install-model`: the files of a model, to kleinctl's own folder."""
    from kleinctl import install

    model = request.plugins.model(request.text("model"))
    layout = request.text("layout")
    if layout not in model.layouts:
        raise request.refuse(f"{model.name} has no layout {layout[:80]!r}")
    plan = install.plan_files(model, layout)
    for problem in plan.problems:
        if problem.severity == "error":
            raise KleinctlError(problem)
    new = not plan.folder.exists()

    def work(record: Record, progress: Progress) -> None:
        step, fetch = Made("made", str(plan.folder)), partial(install.install_files, plan, progress)
        record.perform(step, fetch) if new else fetch()

    return request.plan(
        f"install {model.name} for {layout} to {plan.folder}: {len(plan.steps)} files, each with its sha256 checked",
        work=work,
        commands=(shell("kleinctl", "install", "--model", model.name),),
        fetch_bytes=plan.fetch_bytes,
        disk_bytes=plan.disk_bytes,
        seconds=plan.fetch_bytes / LINE_RATE + plan.disk_bytes / DISK_RATE,
        why_not_undoable="" if new else f"A part of it was there before: kleinctl uninstall {model.name}",
    )


# Out of the way


def kept_name(path: Path, wanted: str) -> tuple[Path, dict[str, Any]]:
    """Where `path` goes in quarantine, named after what it really is, and the reason to be written beside it."""
    from kleinctl.identify import identify

    looks = identify(path)
    plain = looks.whole or path.suffix not in WEIGHTS
    label = looks.family if looks.family != "unknown" else path.stem if plain else looks.kind
    label += "" if plain or looks.kind == label else f"-{looks.kind}"
    seen = Seen.of(path)
    sha256 = store.Stamps().sha256(path)
    stamp = (sha256 or hashlib.sha256(f"{path} {seen}".encode()).hexdigest())[:8]
    reason = {
        "schema": "kleinctl.quarantine/1",
        "name": path.name,
        "wanted": wanted,
        "found": f"sha256 {sha256}, {looks.size_bytes} bytes" if sha256 else f"{looks.size_bytes} bytes",
        "source": str(path),
        "looks_like": looks.saw,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return _free(quarantine_folder() / f"{label}-{stamp}{path.suffix}"), reason


def _free(path: Path) -> Path:
    """`path`, or with a number where that name is taken."""
    number, free = 2, path
    while os.path.lexists(free):
        number, free = number + 1, path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def quarantine_file(request: Request) -> Plan:
    """`quarantine-file`: a file out of the way, with the reason beside it."""
    path = _file(request)
    kept, reason = kept_name(path, request.text("why"))
    step = Moved("moved", str(path), str(kept))
    return _moving(request, step, f"move {path} out of the way, to {kept}", reason)


def move_file(request: Request) -> Plan:
    """`move-file`: a file to where it belongs."""
    path = _file(request)
    to = request.path("to", near=path)
    if os.path.lexists(to):
        raise request.refuse(f"{to} exists already")
    if to.suffix != path.suffix and to.name not in WRITABLE_NAMES:
        raise request.refuse(f"{to} has another suffix")
    _check_link(request, path, to)
    step = Moved("moved", str(path), str(to), missing_folders(to))
    return _moving(request, step, f"move {path} to {to}", None)


def _check_link(request: Request, path: Path, to: Path) -> None:
    """Raise where `path` is a link that would lead nowhere, or elsewhere, from `to`."""
    if path.is_symlink() and os.path.realpath(to.parent / path.readlink()) != os.path.realpath(path):
        refused = request.refuse(f"{path} is a link, to {path.readlink()}, which leads elsewhere from {to.parent}")
        *make, _ = move_by_hand(path, to)
        real = os.path.realpath(path)
        link = f'mklink "{to}" "{real}"' if os.name == "nt" else shell("ln", "-s", real, to)
        fix = " && ".join((*make, link, shell("del" if os.name == "nt" else "rm", path)))
        raise KleinctlError(replace(refused.problem, fix=fix))


def _file(request: Request) -> Path:
    path = request.path("path")
    if not os.path.lexists(path) or path.is_dir():
        raise request.refuse(f"{path} is a folder" if path.is_dir() else f"{path} is not there")
    return path


def _moving(request: Request, step: Moved, sentence: str, reason: dict[str, Any] | None) -> Plan:
    source, target = Path(step.source), Path(step.target)
    here = store.disk(source.parent) == store.disk(target.parent)
    size = 0 if here else source.lstat().st_size
    return request.plan(
        sentence,
        work=lambda record, progress: record.perform(step, reason),
        commands=move_by_hand(source, target),
        disk_bytes=size,
        seconds=2 * size / DISK_RATE,
    )


# One file under two names


def share_file(request: Request) -> Plan:
    """`share-file`: a file becomes another name (a hard link) of one with the same bytes."""
    path, other = (_file_behind(request, name) for name in ("path", "with"))
    if store.disk(path.parent) != store.disk(other.parent):
        raise request.refuse(f"{path} and {other} are on two disks, and a file has its names on one")
    size = path.stat().st_size
    if path.samefile(other) or size != other.stat().st_size:
        raise request.refuse(f"{path} and {other} are not two files of one length")
    before = Seen.of(path)

    def work(record: Record, progress: Progress) -> None:
        hashes = []
        for each in (path, other):
            progress(f"reading {each}")
            try:
                hashes.append(hash_file(each))
            except OSError as error:
                raise request.refuse(f"{each} cannot be read ({error.strerror})") from None
        if hashes[0] != hashes[1]:
            raise request.refuse(f"{path} and {other} have different contents")
        if Seen.of(path) != before:
            raise request.refuse(f"{path} was changed meanwhile")
        record.perform(Shared("shared", str(path), str(other), hashes[0], before))
        for each in (path, other):
            store.Stamps().put(each, hashes[0])

    return request.plan(
        f"compare the sha256 of {path} and {other}",
        f"make {path} another name of {other} (a hard link), which frees {bytes_text(size)}; "
        "what changes one in place changes both",
        work=work,
        commands=(_link_by_hand(path, other),),
        seconds=2 * size / DISK_RATE,
        outside=True,
    )


def _file_behind(request: Request, name: str) -> Path:
    """The file that an argument names; of a link, the one it leads to."""
    path = request.path(name)
    if not path.is_file():
        raise request.refuse(f"{path} is not there")
    return path.resolve()


def _link_by_hand(path: Path, other: Path) -> str:
    return f'del "{path}" && mklink /H "{path}" "{other}"' if os.name == "nt" else shell("ln", "-f", other, path)


# Unfinished downloads


def partial_files() -> Iterator[Path]:
    """What downloads that were not finished have left."""
    for pattern in ("*.partial", "*.partial.json", "*.ready"):
        yield from downloads_folder().glob(pattern)


def remove_partial_downloads(request: Request) -> Plan:
    """`remove-partial-downloads`: what kleinctl fetched and never finished."""

    def work(record: Record, progress: Progress) -> None:
        with store.locked(progress):
            for path in partial_files():
                with store.writing(path):
                    path.unlink(missing_ok=True)

    found = list(partial_files())
    size = sum(path.stat().st_size for path in found)
    return request.plan(
        f"delete {len(found)} unfinished downloads in {downloads_folder()}, which frees {bytes_text(size)}",
        work=work,
        commands=tuple(shell("del" if os.name == "nt" else "rm", path) for path in found),
        why_not_undoable="What is deleted can only be fetched again.",
    )
