"""The card while another process computes on it, such as a server that a backend drives."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from kleinctl.backends import Budget
from kleinctl.worker.device import Device, nvml_busy_percent, nvml_used_bytes, peak_rss_bytes
from kleinctl.worker.protocol import StageUse

#: Seconds between two looks at the card: it is asked for a peak that lasts for a tenth of a second.
LOOK_SECONDS = 0.05


class WatchedDevice(Device):
    """A card that is looked at and not used: what every process together has taken of it since this began.

    Nothing is set on the card and torch is not imported. `process` is the id of the one that computes, if it is known.
    """

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        gpu = budget.hardware.gpu if budget.hardware and budget.device != "cpu" else None
        self.name, self.total_bytes = (gpu.name, gpu.vram_bytes) if gpu else ("cpu", 0)
        self.process: int | None = None
        self._uuid = (gpu.uuid or "").removeprefix("GPU-") if gpu else ""
        self._before = nvml_used_bytes(self._uuid) if self._uuid else None
        self._peak = self._most = 0
        if self._before is not None:
            threading.Thread(target=self._look, daemon=True).start()

    def measure(self) -> StageUse:
        """The most that was taken since this was asked last."""
        if self._before is None:
            return StageUse()
        taken = self._taken()
        most, self._peak = self._peak, taken
        return StageUse(
            vram_peak_bytes=most,
            card_used_bytes=taken + self._before,
            gpu_percent=nvml_busy_percent(self._uuid),
        )

    def peak_vram(self) -> tuple[int, str]:
        """The most that was taken at any time."""
        return (self._most, "NVML, all processes together") if self._before is not None else (0, "none")

    def peak_rss(self) -> int:
        """Most bytes of RAM that `process` has held, with mapped files; this process's where that is not told."""
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path(f"/proc/{self.process}/status").read_text(encoding="ascii", errors="replace").splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        return peak_rss_bytes()

    def _taken(self) -> int:
        taken = max(0, (nvml_used_bytes(self._uuid) or 0) - (self._before or 0))
        self._peak, self._most = max(self._peak, taken), max(self._most, taken)
        return taken

    def _look(self) -> None:
        while True:
            self._taken()
            threading.Event().wait(LOOK_SECONDS)
