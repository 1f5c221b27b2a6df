"""The device a job runs on: its name, its limit, and how much of it this process has used at most."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from kleinctl.backends import Budget
from kleinctl.memory import CONTEXT_BYTES
from kleinctl.units import GIB
from kleinctl.worker.protocol import StageUse

#: Functions that torch leaves to oneMKL's vector mathematics on a processor (aten/src/ATen/cpu/vml.h).
VECTOR_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2"),
    *("sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)
#: More than this is no CUDA context but another program that has started meanwhile.
MOST_CONTEXT_BYTES = GIB


class Device:
    """A processor without memory of its own. `budget` is what a backend may plan with."""

    name = "cpu"
    #: All of its VRAM.
    total_bytes = 0

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def measure(self) -> StageUse:
        """What has been used since this was asked last."""
        return StageUse()

    def peak_vram(self) -> tuple[int, str]:
        """Most bytes of VRAM that this process has held, and how that is known."""
        return 0, "none"

    def peak_rss(self) -> int:
        """Most bytes of RAM that what computes has held."""
        return peak_rss_bytes()


class Cuda(Device):
    """An NVIDIA card, with this process held to its budget.

    A plan counts CONTEXT_BYTES for the CUDA context. Where it takes more (0.60 GiB on an H100), the backend gets so
    much less to plan with, and torch may allocate what is left: the process as a whole stays within the budget.
    """

    def __init__(self, budget: Budget) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._device = torch.device(budget.device)
        properties = torch.cuda.get_device_properties(self._device)
        self.name = properties.name
        self._uuid = str(getattr(properties, "uuid", ""))
        self.total_bytes = properties.total_memory
        self._used_before = nvml_used_bytes(self._uuid)
        self._peak = self._held = 0
        torch.zeros(1, device=self._device)  # makes the context
        excess = max(0, (self._context() or 0) - CONTEXT_BYTES)
        super().__init__(replace(budget, vram_bytes=max(0, budget.vram_bytes - excess)))
        share = max(0, self.budget.vram_bytes - CONTEXT_BYTES) / properties.total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), self._device)

    def synchronize(self) -> None:
        self._cuda.synchronize(self._device)

    def measure(self) -> StageUse:
        """Torch's peaks since this was asked last, and what the driver says of the card now."""
        reserved, allocated = (
            self._cuda.max_memory_reserved(self._device),
            self._cuda.max_memory_allocated(self._device),
        )
        context = self._context() or CONTEXT_BYTES
        use = StageUse(
            vram_peak_bytes=reserved + context,
            vram_rise_bytes=max(0, allocated - self._held),
            card_used_bytes=nvml_used_bytes(self._uuid) or 0,
            gpu_percent=nvml_busy_percent(self._uuid),
        )
        self._peak = max(self._peak, reserved)
        self._cuda.reset_peak_memory_stats(self._device)
        self._held = self._cuda.memory_allocated(self._device)
        return use

    def peak_vram(self) -> tuple[int, str]:
        """Torch's peak, with the CUDA context on top."""
        peak, context = max(self._peak, self._cuda.max_memory_reserved(self._device)), self._context()
        if context is None:
            return peak + CONTEXT_BYTES, "torch, and an assumed CUDA context"
        return peak + context, "torch, and the CUDA context by NVML"

    def _context(self) -> int | None:
        """What the card has lost since the start beyond torch's own; None where the driver does not say."""
        used = nvml_used_bytes(self._uuid)
        if used is None or self._used_before is None:
            return None
        context = used - self._used_before - self._cuda.memory_reserved(self._device)
        return context if 0 < context < MOST_CONTEXT_BYTES else None


def open_device(budget: Budget) -> Device:
    """The device that `budget` names, its limit set. Imports torch for a card alone."""
    return Cuda(budget) if budget.device.startswith("cuda") else Device(budget)


def settle_processor() -> None:
    """Have oneMKL choose its kernels now, in one thread, where torch has been imported.

    It does so at a function's first call; when several threads make that at once, one of them can get a kernel with
    half of the digits, and the picture other bits: see docs/measurements.md, and
    https://github.com/pytorch/pytorch/issues/188792.
    """
    torch: Any = sys.modules.get("torch")
    for name in VECTOR_FUNCTIONS if torch else ():
        for dtype in (torch.float32, torch.float64):
            getattr(torch, name)(torch.zeros(1, dtype=dtype))


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]  # nvmlMemory_t


class _Utilization(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gpu", "memory")]  # nvmlUtilization_t, in percent


def nvml_used_bytes(uuid: str) -> int | None:
    """Bytes in use on the card, by every process; None where the driver does not say."""
    memory = _Memory()
    return memory.used if _ask_nvml(uuid, "nvmlDeviceGetMemoryInfo", memory) else None


def nvml_busy_percent(uuid: str) -> int | None:
    """How much of the last moment (a second at most) the card was busy; None where the driver does not say."""
    use = _Utilization()
    return use.gpu if _ask_nvml(uuid, "nvmlDeviceGetUtilizationRates", use) else None


def _ask_nvml(uuid: str, function: str, answer: ctypes.Structure) -> bool:
    """Whether the driver has filled in `answer` for the card."""
    with contextlib.suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        return (
            nvml.nvmlInit_v2() == 0
            and nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle)) == 0
            and nvml[function](handle, ctypes.byref(answer)) == 0
        )
    return False


def peak_rss_bytes() -> int:
    """Most bytes of RAM that this process has held, memory-mapped files included."""
    if sys.platform == "linux":  # ru_maxrss would count the process that started this one
        return _of_status("VmHWM")
    if sys.platform == "win32":
        return _counters().peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def rss_bytes() -> int:
    """Bytes of RAM that are this process's own now, without memory-mapped files; zero where the system is not asked."""
    if sys.platform == "linux":
        return _of_status("RssAnon")
    return _counters().pagefile if sys.platform == "win32" else 0


def _of_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _counters() -> Any:
    """What Windows counts for this process; zeros where it does not say."""

    class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
        _fields_ = [
            ("cb", ctypes.c_uint32),
            ("faults", ctypes.c_uint32),
            *((name, ctypes.c_size_t) for name in ("peak", "size", "a", "b", "c", "d", "pagefile", "peak_pagefile")),
        ]

    counters = Counters(cb=ctypes.sizeof(Counters))
    kernel32 = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel32.GetCurrentProcess())
    kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return counters
