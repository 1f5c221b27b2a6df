"""Hugging Face's cache: which of klein's repositories are in it, and how whole they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kleinctl.plugins import Plugins


@dataclass(frozen=True)
class CachedRepo:
    """One snapshot of a repository in the cache. Paths are relative to the snapshot.

    `missing` are files of the model's manifest that the snapshot lacks, `broken_links` names whose blob is gone,
    `unfinished` blobs that a download left half done (with their bytes in `unfinished_bytes`).
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


@dataclass(frozen=True)
class HubCache:
    """The cache's folder, the disk it is on, and klein's repositories in it."""

    path: str
    free_bytes: int | None = None
    same_disk_as_home: bool | None = None
    repos: tuple[CachedRepo, ...] = ()


def gather(plugins: Plugins) -> HubCache | None:
    """The cache as it is now; None where there is none."""
    return None
