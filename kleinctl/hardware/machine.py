"""Memory, processors and operating system, with the limits a container or a batch system sets."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Any

from kleinctl.hardware.facts import text_of

_ROOT = Path("/")
# cgroup v1 writes "no limit" as the largest multiple of a page below 2^63.
_NO_LIMIT = 2**60


def memory_facts(root: Path = _ROOT) -> dict[str, Any]:
    """RAM and swap in bytes, by the names `Hardware` gives them; `root` is where /proc and /sys lie."""
    import psutil

    memory = psutil.virtual_memory()
    total, available, swap, source = memory.total, memory.available, _swap_bytes(), None
    for folder, version in cgroup_folders("memory", root):
        limit, used = _memory_limit(folder, version)
        if limit is not None and limit < memory.total:
            available = min(available, max(0, limit - used))
            if limit < total:
                total, source = limit, "/" + folder.relative_to(root).as_posix()
        swap_limit = _number(folder / "memory.swap.max")
        swap = swap if swap_limit is None else min(swap, swap_limit)
    return {
        "ram_bytes": total,
        "ram_available_bytes": available,
        "ram_limit_source": source,
        "swap_bytes": swap,
        "commit_free_bytes": _windows_commit_free() if sys.platform == "win32" else None,
    }


def cgroup_folders(controller: str, root: Path = _ROOT) -> Iterator[tuple[Path, int]]:
    """The folders of this process's control group and of the groups around it, innermost first, each with 1 or 2 for
    the version of its files. A limit anywhere on the way up holds.

    In a container the group's own path is often not visible; the walk then starts further up, and the top of what is
    mounted is the container's group itself.
    """
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        names = ("",) if not controllers else (controllers, controller)
        mounts = [root / "sys/fs/cgroup" / name for name in names]
        mount = next((folder for folder in mounts if folder.is_dir()), mounts[0])
        inner = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
        for folder in (inner, *inner.parents):
            if (mount / folder).is_dir():
                yield mount / folder, 1 if controllers else 2


def _memory_limit(folder: Path, version: int) -> tuple[int | None, int]:
    """A group's limit (None without one) and what counts against it in bytes: not the file cache it can drop."""
    if version == 2:
        limits = [_number(folder / "memory.max"), _number(folder / "memory.high")]
        used, cache = _number(folder / "memory.current") or 0, "inactive_file"
    else:
        limits = [_number(folder / "memory.limit_in_bytes")]
        used, cache = _number(folder / "memory.usage_in_bytes") or 0, "total_inactive_file"
    limit = min((limit for limit in limits if limit is not None), default=None)
    match = re.search(rf"^{cache} (\d+)$", text_of(folder / "memory.stat"), re.MULTILINE)
    return limit, max(0, used - int(match[1]) if match else used)


def cpu_count(root: Path = _ROOT) -> int:
    """Processors this process may use: its affinity, and the control group's share of processor time rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, version in cgroup_folders("cpu", root):
        if version == 2:
            quota, _, period = text_of(folder / "cpu.max").partition(" ")
        else:
            quota, period = text_of(folder / "cpu.cfs_quota_us"), text_of(folder / "cpu.cfs_period_us")
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):  # else "max", or -1 in version 1
            count = min(count, max(1, ceil(int(quota) / int(period))))
    return count


def system_facts(root: Path = _ROOT, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Operating system and processor, by the names `Hardware` gives them."""
    if sys.platform == "win32":
        facts = _windows()
    elif sys.platform == "darwin":
        facts = _macos()
    else:
        facts = _linux(root, environ)
    return {"platform": sys.platform, "cpu_count": cpu_count(root), **facts}


def _linux(root: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    named = re.search(r'^PRETTY_NAME="?([^"\n]*)', text_of(root / "etc/os-release"), re.MULTILINE)
    processor = re.search(r"^(?:model name|Model|Processor)\s*:\s*(.+)$", text_of(root / "proc/cpuinfo"), re.MULTILINE)
    system = os.uname()  # type: ignore[attr-defined]
    return {
        "os": named[1] if named else "Linux",
        "kernel": system.release,
        "machine": system.machine,
        "cpu": processor[1] if processor else system.machine,
        "wsl": wsl(root),
        "container": container(root, environ),
    }


def wsl(root: Path = _ROOT) -> int | None:
    """1 or 2 inside the Windows Subsystem for Linux. Version 1 has no GPU; 2 runs a kernel, perhaps of one's own."""
    version = text_of(root / "proc/version")
    if re.search(r"version 4\.4\.\d+-\d+-Microsoft", version):
        return 1
    marks = ("proc/sys/fs/binfmt_misc/WSLInterop", "usr/lib/wsl/lib/libcuda.so.1")
    return 2 if "microsoft" in version.lower() or any((root / mark).exists() for mark in marks) else None


def container(root: Path = _ROOT, environ: Mapping[str, str] = os.environ) -> str | None:
    """What kind of container this is ("docker", "podman", "lxc", "kubernetes", "apptainer" ...), or None."""
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "kubernetes"
    if (root / ".singularity.d").exists() or "APPTAINER_CONTAINER" in environ:
        return "apptainer"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    # systemd's note of who started it, the same in process 1's environment, then the name of the control group.
    told = text_of(root / "run/systemd/container").strip() or environ.get("container", "")
    if told and told != "wsl":
        return told
    match = re.search(r"/(docker|lxc|kubepods)(?:[/-]|\.slice)", text_of(root / "proc/self/cgroup"))
    return {"kubepods": "kubernetes"}.get(match[1], match[1]) if match else None


def _windows() -> dict[str, Any]:
    import winreg

    version = sys.getwindowsversion()  # type: ignore[attr-defined]
    key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as processor:  # type: ignore[attr-defined]
        name = winreg.QueryValueEx(processor, "ProcessorNameString")[0]  # type: ignore[attr-defined]
    return {
        # Windows 11 still calls itself version 10; its builds start at 22000.
        "os": f"Windows {11 if version.build >= 22000 else version.major} (build {version.build})",
        "kernel": f"{version.major}.{version.minor}.{version.build}",
        "machine": os.environ.get("PROCESSOR_ARCHITEW6432") or os.environ.get("PROCESSOR_ARCHITECTURE", "unknown"),
        "cpu": name.strip(),
    }


def _macos() -> dict[str, Any]:
    import platform

    return {
        "os": f"macOS {platform.mac_ver()[0]}",
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": macos_processor(),
    }


def macos_processor() -> str:
    """`Apple M2 Pro`; on such a machine the processor's name is also the GPU's."""
    import subprocess

    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, timeout=2, check=False).stdout.strip() or "unknown"


def _swap_bytes() -> int:
    import psutil

    try:
        return psutil.swap_memory().total
    except (OSError, RuntimeError):  # no /proc/vmstat in some containers; performance counters off on Windows
        return 0


def _windows_commit_free() -> int:
    """What Windows will still promise to programs, in bytes: `ullAvailPageFile` of GlobalMemoryStatusEx."""
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *(
                (name, ctypes.c_uint64)
                for name in ("ram", "ram_free", "commit", "commit_free", "space", "space_free", "_")
            ),
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.commit_free)


def _number(path: Path) -> int | None:
    """A limit or a count in a control group's file; None where there is none (or "max")."""
    text = text_of(path).strip()
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None
