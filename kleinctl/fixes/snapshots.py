"""The fix of a repository that is not whole in Hugging Face's cache."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kleinctl import fetch, store
from kleinctl.facts import hub_cache
from kleinctl.facts.hub_cache import CachedRepo
from kleinctl.fixes.files import kept_name, replace_file
from kleinctl.fixes.request import Plan, Request
from kleinctl.journal import Moved, Progress, Record
from kleinctl.manifest import Part
from kleinctl.problem import Remedy, shell
from kleinctl.units import bytes_text

#: Seconds. A download that wrote later than this ago may still run.
RUNNING = 120


def complete_snapshot(request: Request) -> Plan:
    """`complete-snapshot`: the files that a snapshot lacks, each verified; what is in their place goes to quarantine.

    Unfinished blobs go there too; what has arrived of a part is gone on with.
    """
    repo = _cached(request)
    parts = list(_lacking(request, repo))
    left = [Path(repo.path, "../../blobs", name).resolve() for name in repo.unfinished if repo.revision]
    if not parts and not left:
        raise request.refuse(f"{repo.path} lacks nothing that kleinctl has a sha256 of")
    if any(time.time() - path.stat().st_mtime < RUNNING for path in left):
        raise request.refuse("another program seems to be fetching it right now")
    moves = [(path, *kept_name(path, f"a whole file of {repo.repo}")) for path in left]
    puts = [_put(request, repo, part) for part in parts]
    kept = {path.name.partition(".")[0]: path for path in left}
    arrived = {part: kept[part.sha256] for part in parts if part.sha256 in kept and not fetch.arrived_bytes(part)}

    def work(record: Record, progress: Progress) -> None:
        for part, path in arrived.items():
            _go_on_from(path, part)
        for path, target, reason in moves:
            record.perform(Moved("moved", str(path), str(target)), reason)
        for each in puts:
            each.work(record, progress)

    saved = sum(path.stat().st_size for path in arrived.values())
    return request.plan(
        *(sentence for each in puts for sentence in each.sentences),
        *(f"move the unfinished {path} out of the way, to {target}" for path, target, _ in moves),
        *([f"go on from the {bytes_text(saved)} that are there"] if saved else []),
        work=work,
        commands=(shell("hf", "download", repo.repo),),
        fetch_bytes=max(0, sum(each.fetch_bytes or 0 for each in puts) - saved),
        disk_bytes=sum(each.disk_bytes or 0 for each in puts),
        seconds=sum(each.seconds or 0 for each in puts),
        outside=True,
    )


def _cached(request: Request) -> CachedRepo:
    """The snapshot that the problem names, as it is now."""
    path = request.path("path")
    cache = hub_cache.gather(request.plugins)
    found = next((each for each in cache.repos if Path(each.path) == path), None) if cache else None
    if found is None:
        raise request.refuse(f"{path} is no snapshot of a model that kleinctl knows")
    return found


def _lacking(request: Request, repo: CachedRepo) -> Iterator[Part]:
    """The parts that belong to names which are missing, lead nowhere, or hold a server's answer."""
    wanted = {*repo.missing, *repo.broken_links, *repo.text_files}
    model = request.plugins.model(repo.model)
    for part in model.parts:
        source = next((each for each in part.sources if each.repo == repo.repo), None)
        if source is not None and source.path in wanted:
            if source.revision != repo.revision:
                raise request.refuse(f"this snapshot is of another revision than the one that {model.name} is made of")
            wanted.discard(source.path)
            yield part


def _put(request: Request, repo: CachedRepo, part: Part) -> Plan:
    """The plan of one file, as `replace-file` makes it."""
    path = str(Path(repo.path, next(each.path for each in part.sources if each.repo == repo.repo)))
    remedy = Remedy("replace-file", {"path": path, "model": repo.model, "part": part.id}, "ask")
    return replace_file(replace(request, problem=replace(request.problem, path=path, remedy=remedy)))


def _go_on_from(path: Path, part: Part) -> None:
    """Let the download of `part` begin with what another has left; it is hashed like all that arrives."""
    partial = fetch.partial_file(part)
    store.make_folder(partial.parent)
    with store.writing(partial):
        shutil.copyfile(path, partial)
