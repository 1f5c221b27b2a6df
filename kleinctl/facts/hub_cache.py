"""Hugging Face's cache: which of klein's repositories are in it, and how whole they are."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kleinctl.manifest import Model, Part
    from kleinctl.plugins import Plugins

#: Bytes. What a server says instead of a file is shorter; so are most files that are no weights.
MAX_ANSWER = 64 * 1024
#: Snapshots and unfinished blobs looked at in one repository.
MAX_ENTRIES = 200


@dataclass(frozen=True)
class CachedRepo:
    """One snapshot of a repository in the cache. Paths are relative to the snapshot.

    `refs` are the names that point to the snapshot ("main"). `missing` are files of the model's manifest that the
    snapshot lacks (bytes in `missing_bytes`, as far as known), `broken_links` names whose blob is gone, `unfinished`
    blobs that a download left half done (with their bytes in `unfinished_bytes`), `text_files` those in which a web
    page, a server's answer or a Git LFS pointer was saved. A repository without any snapshot has no `revision`.
    """

    repo: str
    revision: str
    path: str
    model: str
    missing: tuple[str, ...] = ()
    broken_links: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    unfinished_bytes: int = 0
    text_files: tuple[str, ...] = ()
    refs: tuple[str, ...] = ()
    missing_bytes: int = 0


@dataclass(frozen=True)
class HubCache:
    """The cache's folder, the disk it is on, and klein's repositories in it."""

    path: str
    free_bytes: int | None = None
    same_disk_as_home: bool | None = None
    repos: tuple[CachedRepo, ...] = ()


def gather(plugins: Plugins) -> HubCache | None:
    """The cache as it is now; None where there is none."""
    from kleinctl import store
    from kleinctl.home import home

    folder = store.hub_cache()
    if not folder.is_dir():
        return None
    free, same = None, None
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        same = store.disk(folder) == store.disk(home())
    models = tuple(plugins.models.values())
    repos = tuple(each for repo in _repos(models) for each in _cached(models, repo, folder))
    return HubCache(str(folder), free, same, repos)


def snapshots(models: Sequence[Model]) -> Iterator[tuple[str, Path]]:
    """The snapshots in the cache of every repository that a manifest names."""
    from kleinctl import store

    for repo in _repos(models):
        for name in _names(_folder(store.hub_cache(), repo) / "snapshots"):
            yield repo, _folder(store.hub_cache(), repo) / "snapshots" / name


def unfinished(folder: Path) -> dict[str, int]:
    """What downloads left half done in `folder`, with its bytes."""
    found = {}
    for name in _names(folder):
        path = folder / name
        if name.endswith(".incomplete"):
            with suppress(OSError):
                found[name] = path.stat().st_size
        elif path.is_dir() and not path.is_symlink():
            found |= {f"{name}/{inner}": size for inner, size in unfinished(path).items()}
    return found


def _repos(models: Sequence[Model]) -> list[str]:
    return list(dict.fromkeys(s.repo for model in models for part in model.parts for s in part.sources if s.repo))


def _folder(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))[:MAX_ENTRIES]  # noqa: PTH208 (a third of the time)
    except OSError:
        return []


def _cached(models: Sequence[Model], repo: str, cache: Path) -> Iterator[CachedRepo]:
    folder = _folder(cache, repo)
    if not folder.is_dir():
        return
    model, parts = _expected(models, repo)
    left = unfinished(folder / "blobs")
    refs = {name: _text(folder / "refs" / name) for name in _names(folder / "refs")}
    revisions = _names(folder / "snapshots")
    for revision in revisions or ([""] if left else []):
        place = folder / "snapshots" / revision if revision else folder
        # A file may be all that somebody wanted of a repository; with its index they wanted the whole.
        missing = [part for part in parts if not (place / part.sources[0].path).exists()]
        missing = missing if (place / "model_index.json").exists() else []
        yield CachedRepo(
            repo=repo,
            revision=revision,
            path=str(place),
            model=model,
            missing=tuple(part.sources[0].path for part in missing),
            missing_bytes=sum(part.size or 0 for part in missing),
            broken_links=tuple(_broken_links(place)) if revision else (),
            unfinished=tuple(left),
            unfinished_bytes=sum(left.values()),
            text_files=tuple(part.sources[0].path for part in parts if _is_answer(place / part.sources[0].path)),
            refs=tuple(name for name, meant in refs.items() if meant == revision),
        )


def _expected(models: Sequence[Model], repo: str) -> tuple[str, list[Part]]:
    """The model that a repository is the first source of, and the files a diffusers folder needs of it."""
    from_here = [
        (model.name, part) for model in models for part in model.parts if part.sources and part.sources[0].repo == repo
    ]
    name = Counter(model for model, _ in from_here).most_common(1)[0][0] if from_here else ""
    return name, [p for model, p in from_here if model == name and "diffusers" in p.to and p.role != "licence"]


def _broken_links(folder: Path) -> Iterator[str]:
    """Names in a snapshot that lead nowhere."""
    for parent, _, names in os.walk(folder):
        for name in names[:MAX_ENTRIES]:
            path = Path(parent, name)
            if path.is_symlink() and not path.exists():
                yield path.relative_to(folder).as_posix()


def _is_answer(path: Path) -> bool:
    """Whether a small file holds what a server or git said instead of it. Weights are looked at elsewhere."""
    from kleinctl.identify import identify

    if path.name.endswith((".safetensors", ".gguf")):
        return False
    try:
        if path.stat().st_size > MAX_ANSWER:
            return False
    except OSError:
        return False
    found = identify(path)
    return found.kind in ("web-page", "lfs-pointer", "empty", "zeros") or "server's error" in found.saw


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:100].strip()
    except OSError:
        return ""
