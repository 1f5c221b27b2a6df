"""The disks for models and environments: room, and what their file systems can do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kleinctl.hardware.facts import Disk

#: FAT keeps a file's length in 32 bits.
FAT_MAX_FILE = 2**32 - 1
_FAT = {"vfat", "msdos", "fat", "fat16", "fat32"}
_WITH_HARD_LINKS = {
    "ext2",
    "ext3",
    "ext4",
    "xfs",
    "btrfs",
    "zfs",
    "f2fs",
    "ntfs",
    "ntfs3",
    "refs",
    "apfs",
    "hfs",
    "tmpfs",
}


def disk_facts(home: Path) -> dict[str, Any]:
    """The disks under `home`, by the names `Hardware` gives them."""
    disks = {name: disk_of(home / name) for name in ("models", "envs")}
    return {"disks": disks, "disk_free_bytes": disks["models"].free_bytes}


def disk_of(path: Path) -> Disk:
    """The disk that `path` is on, or would be: nothing is made but two small files for a moment, to try a hard link.

    Raises:
        OSError: the disk cannot be asked.
    """
    import psutil

    folder = nearest_folder(path)
    usage = psutil.disk_usage(str(folder))
    filesystem = filesystem_of(folder, ((part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)))
    return Disk(
        path=str(path),
        free_bytes=usage.free,
        total_bytes=usage.total,
        filesystem=filesystem,
        hard_links=_links(folder, filesystem),
        max_file_bytes=FAT_MAX_FILE if filesystem in _FAT else None,
    )


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists, without links."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir()).resolve()


def filesystem_of(folder: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """The type of the file system mounted nearest above `folder`, in lower case; the last of several at one place."""
    above = [(len(Path(point).parts), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(reversed(above), key=lambda found: found[0], default=(0, ""))[1].lower() or "unknown"


def _links(folder: Path, filesystem: str) -> bool:
    """Whether a file here can have two names: tried where we may write, else as the file system is known to do."""
    if not os.access(folder, os.W_OK):
        return filesystem in _WITH_HARD_LINKS
    first = folder / f".kleinctl-{os.getpid()}-{os.urandom(4).hex()}"
    second = first.with_suffix(".link")
    try:
        first.touch(exist_ok=False)
        os.link(first, second)
        return True
    except OSError:
        return False
    finally:
        for file in (second, first):
            with suppress(OSError):
                file.unlink()
