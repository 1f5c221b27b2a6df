"""NVIDIA cards, through the driver's own library (NVML). Every question goes through one adapter, so that the answers
of another machine can be recorded (`tools/record_hardware.py`) and replayed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from kleinctl.hardware.facts import Gpu, GpuProcess, Mig, MigInstance, NvmlState, NvmlStatus, text_of

# Return codes: nvmlReturn_t, https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceEnumvs.html
_STATUS: dict[int, NvmlStatus] = {4: "no-permission", 9: "no-driver", 12: "absent", 18: "driver-library-mismatch"}
_LOST = (15, 16)  # the card has fallen off the bus, or wants a restart
# Why clocks are lower than they could be: nvmlClocksEventReasons, in bits. An idle card is not held back.
# https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
_IDLE = 0x1
_THROTTLED = {"power": 0x4, "heat": 0x20 | 0x40, "hardware": 0x8 | 0x80}
#: nvmlTemperatureSensors_t: the card's own.
_ON_DIE = 0
#: Not a code of NVML's: nvidia-ml-py is missing, or could not read the answer.
UNREADABLE = -1

# Where libnvidia-ml.so.1 lies when the loader's own search does not reach it: WSL, NixOS, container runtimes.
_STRAY_LIBRARIES = ("usr/lib/wsl/lib", "run/opengl-driver/lib", "usr/local/nvidia/lib64", "usr/lib/x86_64-linux-gnu")


class NvmlFault(Exception):
    """NVML answered with an error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Nvml(Protocol):
    """Whom questions are put to: the live library, or a recording of one."""

    def ask(self, function: str, *arguments: Any) -> Any:
        """The answer of NVML's `function` in JSON's types. A card is named by its number, a slice `"0/1"`.

        Raises:
            NvmlFault: NVML said no.
        """


class LiveNvml:
    """This machine's NVML. `answers` keeps each question with its answer, in the form fixtures have."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}

    def ask(self, function: str, *arguments: Any) -> Any:
        """See `Nvml.ask`."""
        question = _question(function, arguments)
        try:
            answer = self.answers[question] = self._call(function, *arguments)
        except NvmlFault as fault:
            self.answers[question] = {"error": fault.code, "text": str(fault)}
            raise
        return answer

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            import pynvml

            of_card = function.startswith("nvmlDevice") and function != "nvmlDeviceGetCount"
            given = [self._handle(str(arguments[0])), *arguments[1:]] if of_card else arguments
            return _plain(getattr(pynvml, function)(*given))
        except ImportError as error:
            raise NvmlFault(UNREADABLE, f"nvidia-ml-py cannot be imported: {error}") from error
        except Exception as error:  # NVMLError, or nvidia-ml-py tripping over what a driver returned
            raise NvmlFault(getattr(error, "value", UNREADABLE), str(error) or type(error).__name__) from error

    def _handle(self, card: str) -> Any:
        import pynvml

        if card not in self._handles:
            number, _, slot = card.partition("/")
            if slot:
                handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(self._handle(number), int(slot))
            else:
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(number))
            self._handles[card] = handle
        return self._handles[card]


class RecordedNvml:
    """The NVML of another machine: what `LiveNvml.answers` had there.

    Asking what nobody asked then is a `KeyError`.
    """

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = answers

    def ask(self, function: str, *arguments: Any) -> Any:
        """See `Nvml.ask`."""
        answer = self.answers[_question(function, arguments)]
        if isinstance(answer, dict) and "error" in answer:
            raise NvmlFault(answer["error"], answer["text"])
        return answer


def _question(function: str, arguments: tuple[Any, ...]) -> str:
    return f"{function}({', '.join(map(str, arguments))})"


def _plain(answer: Any) -> Any:
    """nvidia-ml-py's answer without ctypes: a structure becomes the dictionary of its fields."""
    if isinstance(answer, (list, tuple)):
        return [_plain(item) for item in answer]
    names = [name for name, *_ in getattr(answer, "_fields_", ())] or list(getattr(answer, "__dict__", ()))
    return {name: getattr(answer, name) for name in names} if names else answer


def nvidia_facts(nvml: Nvml, root: Path = Path("/")) -> tuple[NvmlState, tuple[Gpu, ...]]:
    """How NVML answers, and the cards it knows. `root` is where /proc and the libraries lie."""
    try:
        nvml.ask("nvmlInit")
        cards, faults = _cards(nvml, os.environ)
        _maybe(nvml, "nvmlShutdown")  # an open library keeps a laptop's card awake
        return NvmlState("ok", "; ".join(faults)), cards
    except NvmlFault as fault:
        status = _STATUS.get(fault.code, "error")
        return NvmlState(status, _detail(status, fault, nvml, root)), ()


def _detail(status: NvmlStatus, fault: NvmlFault, nvml: Nvml, root: Path) -> str:
    if status == "driver-library-mismatch":
        library = _maybe(nvml, "nvmlSystemGetNVMLVersion") or "?.unknown"  # CUDA's, then the driver's: 12.575.51.03
        module = kernel_module_version(root) or "unknown"
        return f"the loaded kernel module is {module}, the library {library.partition('.')[2]}"
    if status == "absent":
        stray = next((folder for folder in _STRAY_LIBRARIES if (root / folder / "libnvidia-ml.so.1").exists()), None)
        return f"{fault}; there is one in /{stray}, where the loader does not look" if stray else str(fault)
    return f"{fault} (NVML code {fault.code})" if fault.code != UNREADABLE else str(fault)


def kernel_module_version(root: Path = Path("/")) -> str | None:
    """The version of the loaded NVIDIA kernel module, from /proc; None without one."""
    text = text_of(root / "proc/driver/nvidia/version")
    match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else None


def gpus_from_nvml(nvml: Nvml, environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The cards NVML lists, in its order (that of the PCI bus, as nvidia-smi has it), without those that do not answer.

    `environ` is where `CUDA_VISIBLE_DEVICES` is read. Its numbers are taken in NVML's order.

    Raises:
        NvmlFault: NVML does not even say how many cards there are.
    """
    return _cards(nvml, environ)[0]


def _cards(nvml: Nvml, environ: Mapping[str, str]) -> tuple[tuple[Gpu, ...], list[str]]:
    """The cards, and a line on each that failed while it was asked (one that has fallen off the bus does)."""
    cards, faults = [], []
    versions = {"driver": _maybe(nvml, "nvmlSystemGetDriverVersion"), "cuda_driver": _cuda_driver(nvml)}
    for number in range(nvml.ask("nvmlDeviceGetCount")):
        try:
            cards.append(replace(_gpu(nvml, number, environ.get("CUDA_VISIBLE_DEVICES")), **versions))
        except NvmlFault as fault:
            faults.append(f"card {number}: {fault}")
    return tuple(cards), faults


def _gpu(nvml: Nvml, number: int, visible: str | None) -> Gpu:
    major, minor = nvml.ask("nvmlDeviceGetCudaComputeCapability", number)
    uuid = _maybe(nvml, "nvmlDeviceGetUUID", number)
    mig = _mig(nvml, number, visible)
    total, free = _memory(nvml, number)
    if mig.enabled:
        total, free = max(
            ((one.vram_bytes, one.vram_free_bytes) for one in mig.instances), default=(0, 0), key=itemgetter(1)
        )
    names = [str(number), uuid or "", *(one.uuid for one in mig.instances)]
    display = _maybe(nvml, "nvmlDeviceGetDisplayActive", number)
    return Gpu(
        name=nvml.ask("nvmlDeviceGetName", number),
        compute_capability=f"{major}.{minor}",
        vram_bytes=total,
        vram_free_bytes=free,
        pcie_generation=_maybe(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", number),
        pcie_generation_now=_maybe(nvml, "nvmlDeviceGetCurrPcieLinkGeneration", number),
        pcie_width=_maybe(nvml, "nvmlDeviceGetMaxPcieLinkWidth", number),
        pcie_width_now=_maybe(nvml, "nvmlDeviceGetCurrPcieLinkWidth", number),
        display_active=None if display is None else bool(display),
        mig=mig,
        processes=_processes(nvml, number),
        hidden=not any(_visible(visible, name) for name in names),
        uuid=uuid,
        power_limit_watts=_watts(nvml, "nvmlDeviceGetEnforcedPowerLimit", number),
        power_default_watts=_watts(nvml, "nvmlDeviceGetPowerManagementDefaultLimit", number),
        throttled=_throttled(nvml, number),
        temperature_celsius=_maybe(nvml, "nvmlDeviceGetTemperature", number, _ON_DIE),
    )


def _watts(nvml: Nvml, function: str, number: int) -> int | None:
    """NVML's milliwatts in watts."""
    limit = _maybe(nvml, function, number)
    return limit and round(limit / 1000)


def _throttled(nvml: Nvml, number: int) -> tuple[str, ...]:
    """Why the card runs slower than it could. The function's old name is known to old and new drivers."""
    bits = _maybe(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", number) or 0
    return () if bits & _IDLE else tuple(reason for reason, mask in _THROTTLED.items() if bits & mask)


def _memory(nvml: Nvml, card: int | str) -> tuple[int, int]:
    """Total and free bytes; zeros where the card has no memory of its own (GB10 says "not supported")."""
    memory = _maybe(nvml, "nvmlDeviceGetMemoryInfo", card)
    return (memory["total"], memory["free"]) if memory else (0, 0)


def _mig(nvml: Nvml, number: int, visible: str | None) -> Mig:
    """Multi-instance mode, and the slices that CUDA may see."""
    mode = _maybe(nvml, "nvmlDeviceGetMigMode", number)
    if not mode or not mode[0]:
        return Mig()
    instances = []
    for slot in range(_maybe(nvml, "nvmlDeviceGetMaxMigDeviceCount", number) or 0):
        uuid = _maybe(nvml, "nvmlDeviceGetUUID", f"{number}/{slot}")
        if uuid and any(_visible(visible, name) for name in (uuid, str(number))):
            instances.append(MigInstance(uuid, *_memory(nvml, f"{number}/{slot}")))
    return Mig(True, tuple(instances))


def _visible(visible: str | None, name: str) -> bool:
    """Whether `CUDA_VISIBLE_DEVICES` names this card: by number, or by the start of its UUID. Unset, it names all."""
    if visible is None:
        return True
    entries = [entry.strip() for entry in visible.split(",")]
    return name in entries or any(entry[:4] in ("GPU-", "MIG-") and name.startswith(entry) for entry in entries)


def _processes(nvml: Nvml, number: int) -> tuple[GpuProcess, ...]:
    """Programs with memory on the card, largest first. Only the last part of a name is kept: paths name people."""
    used: dict[int, int | None] = {}
    for kind in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for process in _maybe(nvml, kind, number) or ():
            known = (used.get(process["pid"]), process["usedGpuMemory"])
            used[process["pid"]] = max((size for size in known if size is not None), default=None)
    found = [GpuProcess(pid, _process_name(nvml, pid), size) for pid, size in used.items()]
    return tuple(sorted(found, key=lambda process: (-(process.vram_bytes or 0), process.pid)))


def _process_name(nvml: Nvml, pid: int) -> str:
    path = _maybe(nvml, "nvmlSystemGetProcessName", pid) or "unknown"
    return re.split(r"[\\/]", path)[-1].split(" --")[0] or path


def _cuda_driver(nvml: Nvml) -> str | None:
    """The newest CUDA the driver runs: NVML's 12040 is "12.4"."""
    number = _maybe(nvml, "nvmlSystemGetCudaDriverVersion_v2")
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _maybe(nvml: Nvml, function: str, *arguments: Any) -> Any:
    """The answer, or None where card or driver do not know the question."""
    try:
        return nvml.ask(function, *arguments)
    except NvmlFault as fault:
        if fault.code in _LOST:
            raise
        return None
