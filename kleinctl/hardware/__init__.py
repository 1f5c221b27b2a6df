"""What this machine is: cards, memory, disks, driver, Python. Anything missing is a fact, not an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kleinctl.hardware.catalogue import Performance, imagine, performance_of
from kleinctl.hardware.facts import (
    Disk,
    Gpu,
    GpuProcess,
    Hardware,
    Mig,
    MigInstance,
    NvmlState,
    OtherGpu,
    Package,
    Python,
)
from kleinctl.hardware.nvml import LiveNvml, RecordedNvml, gpus_from_nvml
from kleinctl.hardware.packages import packages_in
from kleinctl.hardware.rates import NO_RATES, Rates, Speed, current

__all__ = [
    "NO_RATES",
    "Disk",
    "Gpu",
    "GpuProcess",
    "Hardware",
    "LiveNvml",
    "Mig",
    "MigInstance",
    "NvmlState",
    "OtherGpu",
    "Package",
    "Performance",
    "Python",
    "Rates",
    "RecordedNvml",
    "Speed",
    "detect",
    "gpus_from_nvml",
    "imagine",
    "packages_in",
    "performance_of",
]

#: How long a question may take, in seconds. A driver without its persistence daemon wakes each card first.
NVML_SECONDS, OTHER_SECONDS = 10.0, 3.0


def detect(home: Path | None = None) -> Hardware:
    """Everything about this machine that kleinctl goes by. Never raises, and ends within `NVML_SECONDS`.

    `home` is the folder whose disk models and environments would go to, by default kleinctl's own. What had no
    answer keeps its default in `Hardware`, and `remarks` says so.
    """
    questions = [
        _Question("the NVIDIA driver", _nvidia, NVML_SECONDS),
        _Question("memory", _memory, OTHER_SECONDS),
        _Question("disks", partial(_disks, home), OTHER_SECONDS),
        _Question("the system", _system, OTHER_SECONDS),
        _Question("other GPUs", _other_gpus, OTHER_SECONDS),
        _Question("Python packages", _python, OTHER_SECONDS),
        _Question("the calibration", partial(_rates, home), OTHER_SECONDS),
    ]
    facts: dict[str, Any] = {"nvml": NvmlState("error", "no answer")}
    for question in questions:
        facts |= question.answer()
    remarks = (*facts.pop("remarks", ()), *(question.remark for question in questions if question.remark))
    found = _agreed(Hardware(**facts, remarks=remarks))
    rates, why_not = current(found)
    return replace(found, rates=rates, remarks=(*remarks, why_not) if why_not else remarks)


class _Question(threading.Thread):
    """A question to the machine on a thread of its own, so that a dead network disk or driver holds up nothing else."""

    def __init__(self, about: str, ask: Callable[[], dict[str, Any]], seconds: float) -> None:
        super().__init__(name=f"kleinctl asks about {about}", daemon=True)
        self.about, self.ask, self.deadline = about, ask, time.monotonic() + seconds
        self.facts: dict[str, Any] = {}
        self.remark = f"{about}: no answer within {seconds:.0f} s"
        self.start()

    def run(self) -> None:
        try:
            self.facts = self.ask()
            self.remark = ""
        except Exception as error:  # whatever it is, the other facts still count
            self.remark = f"{self.about}: {type(error).__name__}: {error}"

    def answer(self) -> dict[str, Any]:
        """The facts; none where the question failed or took too long."""
        self.join(max(0.0, self.deadline - time.monotonic()))
        return self.facts


# Each question imports what it needs, so that importing this module stays fast.


def _nvidia() -> dict[str, Any]:
    from kleinctl.hardware.nvml import nvidia_facts

    state, gpus = nvidia_facts(LiveNvml())
    return {"nvml": state, "gpus": gpus}


def _memory() -> dict[str, Any]:
    from kleinctl.hardware.machine import memory_facts

    return memory_facts()


def _disks(home: Path | None) -> dict[str, Any]:
    from kleinctl.hardware.disks import disk_facts
    from kleinctl.home import home as own_home

    return disk_facts(home or own_home())


def _system() -> dict[str, Any]:
    from kleinctl.hardware.machine import system_facts

    return system_facts()


def _other_gpus() -> dict[str, Any]:
    from kleinctl.hardware.other_gpus import other_gpu_facts

    return other_gpu_facts()


def _python() -> dict[str, Any]:
    from kleinctl.hardware.packages import python_facts

    return python_facts()


def _rates(home: Path | None) -> dict[str, Any]:
    from kleinctl.hardware.rates import facts
    from kleinctl.home import home as own_home

    return facts(home or own_home())


def _agreed(hardware: Hardware) -> Hardware:
    """The facts made consistent: a card NVML answers for is no other GPU, and one without memory uses the machine's."""
    served = bool(hardware.gpus)
    others = (
        gpu for gpu in hardware.other_gpus if not (served and gpu.vendor == "NVIDIA" and gpu.driver in (None, "nvidia"))
    )
    gpus = (
        gpu
        if gpu.vram_bytes or gpu.mig.enabled
        else replace(gpu, vram_bytes=hardware.ram_bytes, vram_free_bytes=hardware.ram_available_bytes)
        for gpu in hardware.gpus
    )
    return replace(hardware, gpus=tuple(gpus), other_gpus=tuple(others))
