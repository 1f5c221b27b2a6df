"""What a machine is, as frozen facts, and the JSON they travel as. Sizes are in bytes throughout."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kleinctl.problem import KleinctlError, Problem

if TYPE_CHECKING:
    from kleinctl.hardware.catalogue import Performance

NvmlStatus = Literal["ok", "absent", "driver-library-mismatch", "no-permission", "no-driver", "error"]

#: Bounds of what `Hardware.from_json` takes: these documents come from strangers.
MAX_TEXT, MAX_ITEMS, MAX_NUMBER = 2000, 512, 2**63


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
    card drops to generation 1). `hidden` is true where `CUDA_VISIBLE_DEVICES` keeps the card from CUDA programs.
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

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{1,2}\.\d{1,2}", self.compute_capability, re.ASCII):
            raise _wrong(f"compute_capability of {self.name}", "two numbers such as 8.9", self.compute_capability)

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
        facts = {key: _plain(value) for key, value in vars(self).items() if key != "uuid" or value is not None}
        return {"name": facts.pop("name"), "arch": self.arch, **facts}


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
    """The file system that holds, or would hold, `path`. `max_file_bytes` is None where no file is too large."""

    path: str
    free_bytes: int
    total_bytes: int
    filesystem: str = "unknown"
    hard_links: bool = False
    max_file_bytes: int | None = None


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
    programs, RAM and paging file together. `disk_free_bytes` is that of the disk for models. `remarks` are sentences
    about questions that had no answer, or about what was assumed.
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
    remarks: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        """The card to use: of those CUDA may see, the one with the most free VRAM (a slice, where MIG is on)."""
        usable = [gpu for gpu in self.gpus if not gpu.hidden and gpu.vram_bytes]
        return max(usable, key=lambda gpu: (gpu.vram_free_bytes, gpu.vram_bytes), default=None)

    def to_json(self) -> dict[str, Any]:
        """The facts as `doctor --json` carries them under "hardware"."""
        document: dict[str, Any] = _plain(self)
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
        given = _sized(document, dict, "hardware")
        for key in ("gpus", "ram_bytes", "platform"):
            if key not in given:
                raise _wrong(f"hardware.{key}", "a value", "nothing")
        return _read(cls, {"nvml": {"status": "ok" if given["gpus"] else "absent"}, **given}, "hardware")


def text_of(path: Path) -> str:
    """A small file of the system's, or an empty string where there is none or it may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _plain(value: Any) -> Any:
    """Facts as JSON's own types, in the order they are declared."""
    if isinstance(value, Gpu):
        return value.to_json()
    if is_dataclass(value):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


Fact = TypeVar("Fact")


def _read(kind: type[Fact], value: Any, where: str) -> Fact:
    """`value` as `kind`, which is a type of the facts above: the annotations are the schema."""
    found: Any
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # always `X | None` here
        found = None if value is None else _read(inner[0], value, where)
    elif is_dataclass(kind):
        found = _read_fact(kind, value, where)
    elif origin is tuple:
        items = _sized(value, list, where)
        found = tuple(_read(inner[0], item, f"{where}[{number}]") for number, item in enumerate(items))
    elif origin is Mapping:
        pairs = _sized(value, dict, where).items()
        found = {_read(str, key, where): _read(inner[1], item, f"{where}.{key}"[:MAX_TEXT]) for key, item in pairs}
    elif origin is Literal:
        if value not in inner:
            raise _wrong(where, "one of " + ", ".join(inner), value)
        found = value
    else:
        found = _read_scalar(kind, value, where)
    return found


def _read_fact(kind: Any, value: Any, where: str) -> Any:
    given = _sized(value, dict, where)
    hints = _hints(kind)
    for wanted in fields(kind):
        if wanted.name not in given and wanted.default is MISSING and wanted.default_factory is MISSING:
            raise _wrong(f"{where}.{wanted.name}", "a value", "nothing")
    return kind(**{key: _read(hints[key], given[key], f"{where}.{key}") for key in hints if key in given})


def _read_scalar(kind: type, value: Any, where: str) -> Any:
    exactly = type(value) is kind  # True is no number here
    if not exactly:
        raise _wrong(where, {int: "a whole number", str: "text", bool: "true or false"}[kind], value)
    if kind is str:
        if len(value) > MAX_TEXT:
            raise _wrong(where, f"text of at most {MAX_TEXT} characters", f"{len(value)} characters")
        return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in value)
    if kind is int and not 0 <= value < MAX_NUMBER:
        raise _wrong(where, "a number from 0 to 2^63", value)
    return value


def _sized(value: Any, kind: type, where: str) -> Any:
    fits = isinstance(value, kind)
    if not fits:
        raise _wrong(where, "a list" if kind is list else "an object", value)
    if len(value) > MAX_ITEMS:
        raise _wrong(where, f"at most {MAX_ITEMS} entries", f"{len(value)} entries")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    return {name: hint for name, hint in get_type_hints(kind).items() if name in names}


def _wrong(where: str, wanted: str, found: object) -> KleinctlError:
    return KleinctlError(
        Problem(
            what=f"{where[:80]} in this report cannot be read",
            why=f"Wanted is {wanted}; found is {ascii(found)[:80]}.",
            fix="kleinctl doctor --json   # on the machine in question, to make a fresh one",
            name="report-unreadable",
        )
    )
