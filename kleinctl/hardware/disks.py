"""The disks for models and environments: room, and what their file systems can do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kleinctl.hardware.facts import Disk, text_of

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
#: File systems whose bytes come over a network.
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "davfs", "fuse.sshfs", "fuse.rclone", "fuse.davfs2"}
_VIRTUAL = re.compile(r"virtual|qemu|vmware|vbox", re.IGNORECASE)


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
    mounts = psutil.disk_partitions(all=True)
    filesystem = filesystem_of(folder, _column(mounts, "fstype"))
    device, options = (mounted_nearest(folder, _column(mounts, name)) for name in ("device", "opts"))
    return Disk(
        path=str(path),
        free_bytes=usage.free,
        total_bytes=usage.total,
        filesystem=filesystem,
        hard_links=_links(folder, filesystem),
        max_file_bytes=FAT_MAX_FILE if filesystem in _FAT else None,
        rotational=_seeks(folder) if sys.platform == "win32" else rotational(device),
        network=filesystem in _NETWORK or "remote" in options.split(",") or str(folder).startswith("\\\\"),
    )


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists, without links."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir()).resolve()


def filesystem_of(folder: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """The type of the file system mounted nearest above `folder`, in lower case; the last of several at one place."""
    return mounted_nearest(folder, mounts).lower() or "unknown"


def _column(mounts: Iterable[Any], name: str) -> Iterable[tuple[str, str]]:
    return ((part.mountpoint, getattr(part, name, "")) for part in mounts)


def mounted_nearest(folder: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """What `mounts` says of the mount point nearest above `folder`; the last of several at one place."""
    above = [(len(Path(point).parts), said) for point, said in mounts if folder.is_relative_to(point)]
    return max(reversed(above), key=lambda found: found[0], default=(0, ""))[1]


def rotational(device: str, root: Path = Path("/")) -> bool | None:
    """Whether the disk of a device ("/dev/nvme0n1p2", "/dev/mapper/...") turns, as Linux has it; None where unknown.

    A virtual machine's disk says that it turns whatever it is made of, so it is not believed.
    """
    if not device.startswith("/dev/"):
        return None
    named = root / "sys/class/block" / (root / device.lstrip("/")).resolve().name
    for folder in (named.resolve(), named.resolve().parent):  # a partition has its disk's folder above it
        told = text_of(folder / "queue/rotational").strip()
        if told:
            virtual = folder.name.startswith(("vd", "xvd")) or _VIRTUAL.search(text_of(folder / "device/model"))
            return None if virtual else told == "1"
    return None


def _seeks(folder: Path) -> bool | None:
    """Whether reading elsewhere costs time on this disk (StorageDeviceSeekPenaltyProperty of Windows).

    https://learn.microsoft.com/windows/win32/api/winioctl/ns-winioctl-device_seek_penalty_descriptor
    """
    import ctypes

    query, answer, length = (ctypes.c_uint32 * 3)(7, 0, 0), (ctypes.c_uint32 * 3)(), ctypes.c_uint32()
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    kernel.CreateFileW.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(kernel.CreateFileW(f"\\\\.\\{folder.drive}", 0, 3, None, 3, 0, None))
    try:
        asked = kernel.DeviceIoControl(
            handle, 0x2D1400, query, 12, answer, 12, ctypes.byref(length), None
        )  # IOCTL_STORAGE_QUERY_PROPERTY
        return bool(answer[2] & 0xFF) if asked else None
    finally:
        kernel.CloseHandle(handle)


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
