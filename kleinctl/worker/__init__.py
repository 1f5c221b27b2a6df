"""The process that has torch: it loads one backend and makes pictures, while the control process watches it."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask Linux to kill this process as soon as the thread that started it is gone; does nothing elsewhere.

    A backend that starts processes of its own can give this as `preexec_fn`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
