"""How a process ended, in words."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

#: What the signals that end a Python process by surprise mostly mean.
_SIGNALS = {
    "SIGABRT": "a library gave up",
    "SIGBUS": "a file was cut off while it was read, or shared memory is full",
    "SIGFPE": "an arithmetic fault in native code",
    "SIGILL": "code for another processor",
    "SIGKILL": "ended by the system or a user",
    "SIGSEGV": "a crash in native code",
    "SIGTERM": "ended by a user or the system",
}

#: NTSTATUS values that Windows gives as exit status: [MS-ERREF] 2.3.1.
_NTSTATUS = {
    0xC0000005: "access violation, a crash in native code",
    0xC0000017: "not enough memory",
    0xC000001D: "illegal instruction, code for another processor",
    0xC00000FD: "stack overflow",
    0xC000012D: "commitment limit: memory and paging file are full",
    0xC0000135: "a DLL was not found",
    0xC0000139: "a DLL is of the wrong version",
    0xC000013A: "ended by Ctrl-C",
    0xC0000142: "a DLL did not start",
    0xC0000374: "heap corruption, a crash in native code",
    0xC0000409: "a library gave up",
}
_OUT_OF_MEMORY = {0xC0000017, 0xC000012D}


def exit_text(status: int) -> str:
    """`exit status 3`, `signal 11 (SIGSEGV, a crash in native code)`, `exit status 0xC0000017 (not enough memory)`."""
    code = status & 0xFFFFFFFF
    if code in _NTSTATUS:
        return f"exit status 0x{code:08X} ({_NTSTATUS[code]})"
    if status >= 0:
        return f"exit status {status}"
    name = ""
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
    known = ", ".join(filter(None, (name, _SIGNALS.get(name, ""))))
    return f"signal {-status} ({known})" if known else f"signal {-status}"


def looks_like_no_memory(status: int) -> bool:
    """Whether a process that ended so was most likely ended for want of memory."""
    return status & 0xFFFFFFFF in _OUT_OF_MEMORY or (os.name == "posix" and status in (-9, 128 + 9))  # behind a shell


def oom_kills() -> int | None:
    """How many processes of this control group the kernel has ended for want of memory; None where it does not count.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.events), and memory.oom_control of version 1.
    """
    root = Path("/sys/fs/cgroup")
    own = ""
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        own = next((line[4:] for line in groups if line.startswith("0::/")), "")
    for file in (root / own / "memory.events", root / "memory.events", root / "memory" / "memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            words = file.read_text(encoding="ascii").split()
            return int(words[words.index("oom_kill") + 1])
    return None
