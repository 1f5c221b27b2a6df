"""What a machine is, as frozen facts, and the JSON they travel as. Sizes are in bytes throughout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kleinctl import documents
from kleinctl.hardware.rates import NO_RATES, Rates

if TYPE_CHECKING:
    from kleinctl.hardware.catalogue import Performance

NvmlStatus = Literal["ok", "absent", "driver-library-mismatch", "no-permission", "no-driver", "error"]


@dataclass(frozen=True)
class MigInstance:
    """A slice of a card whose multi-instance mode is on; to CUDA it is a card of its own."""

    uuid: str
    vram_bytes: int
    vram_free_bytes: int


@dataclass(frozen=True)
class Mig:
    """Whether a card is cut into slices, and the slices there are. A process can use one of them."""

    enabled: bool = False
    instances: tuple[MigInstance, ...] = ()


@dataclass(frozen=True)
class GpuProcess:
    """A program that holds VRAM. `vram_bytes` is None where the driver keeps it to itself (Windows does)."""

    pid: int
    name: str
    vram_bytes: int | None = None


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA card that the driver answers for.

    `vram_bytes` is NVML's total; torch sees less of it (15,933 of 16,376 MiB on a 4070 Ti SUPER). With MIG on, both
    sizes are those of the slice with the most free memory, since a process can use no more. `pcie_generation` and
    `pcie_width` are the most that card and board can do, the `_now` ones what the link does at this moment (an idle
    card drops to generation 1). `throttled` names why the card runs slower than it could at this moment ("power",
    "heat", "hardware"; an idle card is not throttled). `hidden` is true where `CUDA_VISIBLE_DEVICES` keeps the card
    from CUDA programs.
    """

    name: str
    compute_capability: str
    vram_bytes: int
    vram_free_bytes: int
    driver: str | None = None
    cuda_driver: str | None = None
    pcie_generation: int | None = None
    pcie_generation_now: int | None = None
    pcie_width: int | None = None
    pcie_width_now: int | None = None
    display_active: bool | None = None
    mig: Mig = Mig()
    processes: tuple[GpuProcess, ...] = ()
    hidden: bool = False
    uuid: str | None = None
    power_limit_watts: int | None = None
    power_default_watts: int | None = None
    throttled: tuple[str, ...] = ()
    temperature_celsius: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{1,2}\.\d{1,2}", self.compute_capability, re.ASCII):
            raise documents.unreadable(
                f"compute_capability of {self.name}", "two numbers such as 8.9", self.compute_capability
            )

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability as numbers that compare: `(8, 9)`."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def arch(self) -> str:
        """The compute capability as compilers write it: `sm_89`."""
        return "sm_{}{}".format(*self.capability)

    @property
    def bf16(self) -> bool:
        """Whether the card does bf16 maths in hardware: Ampere (8.0) and later."""
        return self.capability >= (8, 0)

    @property
    def cuda_id(self) -> str | None:
        """What names this card, or the slice of it to use, in `CUDA_VISIBLE_DEVICES`."""
        roomiest = max(self.mig.instances, key=lambda slice: slice.vram_free_bytes, default=None)
        return roomiest.uuid if self.mig.enabled and roomiest else self.uuid

    @property
    def performance(self) -> Performance:
        """Rates from the catalogue, or estimated for a card that is not in it."""
        from kleinctl.hardware.catalogue import performance_of

        return performance_of(self)

    def to_json(self) -> dict[str, Any]:
        """The card as it stands in `doctor --json`."""
        facts = {key: documents.plain(value) for key, value in vars(self).items() if key != "uuid" or value is not None}
        return {"name": facts.pop("name"), "arch": self.arch, **facts}

    to_document = to_json


@dataclass(frozen=True)
class OtherGpu:
    """A GPU that CUDA cannot use as things are: another maker's, or an NVIDIA card without NVIDIA's driver."""

    vendor: str
    name: str
    found_by: str
    driver: str | None = None


@dataclass(frozen=True)
class NvmlState:
    """How the NVIDIA driver's library answered, and its words where it did not."""

    status: NvmlStatus
    detail: str = ""


@dataclass(frozen=True)
class Disk:
    """The file system that holds, or would hold, `path`. `max_file_bytes` is None where no file is too large.

    `rotational`: it turns (a hard disk); None where the system does not say.
    """

    path: str
    free_bytes: int
    total_bytes: int
    filesystem: str = "unknown"
    hard_links: bool = False
    max_file_bytes: int | None = None
    rotational: bool | None = None
    network: bool = False


@dataclass(frozen=True)
class Python:
    """The interpreter that runs kleinctl."""

    version: str
    executable: str
    bits: int = 64
    venv: bool = False


@dataclass(frozen=True)
class Package:
    """An installed Python package, read from its files without importing it.

    `cuda` matters for torch: the CUDA version it was built for ("13.0"), None for a build without CUDA, "unknown"
    where its version.py cannot be read. `version` is None where only remains of an installation were found.
    """

    version: str | None
    location: str | None = None
    cuda: str | None = None


@dataclass(frozen=True)
class Hardware:
    """What this machine is, asked once and passed around. Unknown facts keep their defaults.

    RAM sizes honour the limits of the control group (container, batch job, systemd slice) that kleinctl runs in;
    `ram_limit_source` is the file that sets the limit. `commit_free_bytes` is what Windows will still promise to
    programs, RAM and paging file together. `disk_free_bytes` is that of the disk for models. `rates` are what
    `kleinctl bench --calibrate` measured. `remarks` are sentences about questions that had no answer, or about what was
    assumed.
    """

    gpus: tuple[Gpu, ...] = ()
    other_gpus: tuple[OtherGpu, ...] = ()
    nvml: NvmlState = NvmlState("absent")
    ram_bytes: int = 0
    ram_available_bytes: int = 0
    ram_limit_source: str | None = None
    swap_bytes: int = 0
    commit_free_bytes: int | None = None
    disk_free_bytes: int | None = None
    disks: Mapping[str, Disk] = field(default_factory=dict)
    platform: str = "unknown"
    os: str = "unknown"
    kernel: str = "unknown"
    wsl: int | None = None
    container: str | None = None
    machine: str = "unknown"
    cpu: str = "unknown"
    cpu_count: int = 1
    python: Python = Python("unknown", "unknown")
    packages: Mapping[str, Package] = field(default_factory=dict)
    rates: Rates = NO_RATES
    remarks: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        """The card to use: of those CUDA may see, the one with the most free VRAM (a slice, where MIG is on).

        Without bf16 a picture takes several times as long: what such a card has free counts half.
        """
        usable = [gpu for gpu in self.gpus if not gpu.hidden and gpu.vram_bytes]
        return max(usable, key=lambda gpu: (gpu.vram_free_bytes * (1 + gpu.bf16), gpu.vram_bytes), default=None)

    def to_json(self) -> dict[str, Any]:
        """The facts as `doctor --json` carries them under "hardware"."""
        document: dict[str, Any] = documents.plain(self)
        for name, package in document["packages"].items():
            if name != "torch":
                del package["cuda"]
        return document

    @classmethod
    def from_json(cls, document: object) -> Hardware:
        """Read what `to_json` wrote, perhaps by another version of kleinctl. Unknown keys are ignored.

        Raises:
            KleinctlError: a value has the wrong type or is out of bounds, or `gpus`, `ram_bytes` or `platform` is
                missing. Characters that a terminal would act on are replaced, not refused.
        """
        given = documents.sized(document, dict, "hardware")
        for key in ("gpus", "ram_bytes", "platform"):
            if key not in given:
                raise documents.unreadable(f"hardware.{key}", "a value", "nothing")
        return documents.read(cls, {"nvml": {"status": "ok" if given["gpus"] else "absent"}, **given}, "hardware")


def text_of(path: Path) -> str:
    """A small file of the system's, or an empty string where there is none or it may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
