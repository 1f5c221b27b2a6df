"""What if: recorded facts with some of them changed (`doctor --set vram_free=6GiB`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kleinctl import documents
from kleinctl.facts import Facts
from kleinctl.hardware import Gpu, NvmlState, Package, imagine
from kleinctl.problem import Misuse, Problem, did_you_mean
from kleinctl.units import gib, parse_bytes

#: How a card is named here; see `hardware.imagine`.
GPU = 'doctor --set "gpu={}"'


def changed(facts: Facts, settings: Iterable[str]) -> Facts:
    """`facts` with each `NAME=VALUE` carried out, in their order.

    Raises:
        Misuse: there is no such name, or the value is none that it can have.
    """
    for setting in settings:
        name, equals, value = (part.strip() for part in setting.partition("="))
        if name not in SETTINGS or not equals:
            raise _unknown(setting, name)
        facts = SETTINGS[name](facts, value)
    return facts


def _unknown(setting: str, name: str) -> Misuse:
    known = name in SETTINGS
    lacks_value = known or "=" not in setting
    what = f"--set {setting} has no value" if lacks_value else f"there is nothing called {name!r} to set"
    near = "" if known else did_you_mean(name, SETTINGS)
    why = f"What can be set are {', '.join(SETTINGS)}, each as NAME=VALUE.{near}"
    return Misuse(Problem(what, why, "kleinctl doctor --set vram_free=6GiB", name="unknown-setting"))


def _impossible(what: str, why: str, fix: str) -> Misuse:
    return Misuse(Problem(what, why, f"kleinctl doctor --set {fix}", name="unknown-setting"))


def _hardware(facts: Facts, **changes: Any) -> Facts:
    return replace(facts, hardware=replace(facts.hardware, **changes))


def _cards(facts: Facts, change: Callable[[Gpu], Gpu]) -> Facts:
    """Facts with every card changed.

    Raises:
        Misuse: there is none.
    """
    if not facts.hardware.gpus:
        why = "The facts have no NVIDIA card that the driver answers for."
        raise _impossible("there is no card to change", why, '"gpu=RTX 4070"')
    return _hardware(facts, gpus=tuple(change(gpu) for gpu in facts.hardware.gpus))


def _amount(name: str, value: str) -> int:
    """Bytes."""
    with suppress(OverflowError):
        try:
            amount = parse_bytes(value, name)
        except Misuse as error:
            raise _impossible(error.problem.what, error.problem.why, f"{name}=6GiB") from None
        if amount < documents.MAX_NUMBER:
            return amount
    raise _impossible(f"{name} cannot be {value[:40]}", "No machine has as much.", f"{name}=6GiB")


def _vram(facts: Facts, value: str) -> Facts:
    """All of a card's memory; what is taken of it stays taken."""
    total = _amount("vram", value)

    def change(gpu: Gpu) -> Gpu:
        taken = gpu.vram_bytes - gpu.vram_free_bytes
        return replace(gpu, vram_bytes=total, vram_free_bytes=max(0, total - taken))

    return _cards(facts, change)


def _vram_free(facts: Facts, value: str) -> Facts:
    free = _amount("vram_free", value)

    def change(gpu: Gpu) -> Gpu:
        if free > gpu.vram_bytes:
            why = f"{gpu.name} has {gib(gpu.vram_bytes)} in all."
            raise _impossible(f"{gib(free)} of VRAM cannot be free", why, f"vram={value} --set vram_free={value}")
        return replace(gpu, vram_free_bytes=free)

    return _cards(facts, change)


def _ram(facts: Facts, value: str) -> Facts:
    """All of the machine's memory; what is taken of it stays taken."""
    total, hardware = _amount("ram", value), facts.hardware
    free = max(0, total - (hardware.ram_bytes - hardware.ram_available_bytes))
    return _hardware(facts, ram_bytes=total, ram_available_bytes=free)


def _ram_available(facts: Facts, value: str) -> Facts:
    free = _amount("ram_available", value)
    if free > facts.hardware.ram_bytes:
        why = f"The machine has {gib(facts.hardware.ram_bytes)} in all."
        raise _impossible(f"{gib(free)} of RAM cannot be available", why, f"ram={value} --set ram_available={value}")
    return _hardware(facts, ram_available_bytes=free)


def _disk_free(facts: Facts, value: str) -> Facts:
    free = _amount("disk_free", value)
    disks = {name: replace(disk, free_bytes=free) for name, disk in facts.hardware.disks.items()}
    cache = facts.hub_cache and replace(facts.hub_cache, free_bytes=free)
    return replace(_hardware(facts, disk_free_bytes=free, disks=disks), hub_cache=cache)


def _driver(facts: Facts, value: str) -> Facts:
    version = _version("driver", value)
    system = replace(facts.system, kernel_driver=facts.system.kernel_driver and version)
    return replace(_cards(facts, lambda gpu: replace(gpu, driver=version)), system=system)


def _cuda_driver(facts: Facts, value: str) -> Facts:
    return _cards(facts, lambda gpu: replace(gpu, cuda_driver=_version("cuda_driver", value)))


def _version(name: str, value: str) -> str:
    if not re.fullmatch(r"\d{1,4}(?:\.\d{1,4}){0,3}", value, re.ASCII):
        raise _impossible(f"{value!r} is no version", "Numbers with dots between them are wanted.", f"{name}=550.90")
    return value


def _gpu(facts: Facts, value: str) -> Facts:
    """Another card, with the driver that is there; where none answers for a card, nothing is known of the driver."""
    imagined, old = imagine(value, None, facts.hardware, GPU), facts.hardware.gpus
    unknown = {} if old else {"libcuda": None, "device_nodes": (), "nouveau": False, "kernel_driver": None}
    system = replace(facts.system, **unknown)  # type: ignore[arg-type]
    known = {"driver": old[0].driver, "cuda_driver": old[0].cuda_driver} if old else {}
    cards = tuple(replace(gpu, **known) for gpu in imagined.gpus)  # type: ignore[arg-type]
    return replace(facts, hardware=replace(imagined, gpus=cards, nvml=NvmlState("ok")), system=system)


def _platform(facts: Facts, value: str) -> Facts:
    first = value.lower().split()[0] if value else ""
    known = {"linux": "linux", "ubuntu": "linux", "windows": "win32", "win32": "win32", "wsl": "linux"}
    if first not in known:
        raise _impossible(f"{value!r} is no system that can be set", "Linux, Windows and WSL are known.", "os=windows")
    title = value if " " in value else {"win32": "Windows 11"}.get(known[first], "Ubuntu 24.04 LTS")
    return _hardware(facts, platform=known[first], os=title, wsl=2 if first == "wsl" else None, container=None)


def _torch(facts: Facts, value: str) -> Facts:
    """Another torch wherever there is one: `2.8.0+cu128`; `+cpu` is a build without CUDA."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,4}){1,3}\w{0,12})(?:\+(cpu|cu(\d{2,3})))?", value, re.ASCII)
    if not match:
        raise _impossible(
            f"{value!r} is no version of torch", "One such as 2.8.0+cu128 is wanted.", "torch=2.8.0+cu128"
        )
    cuda = f"{match[3][:-1]}.{match[3][-1]}" if match[3] else None

    def change(packages: Any, old: str | None) -> tuple[dict[str, str], str | None]:
        return {**packages, "torch": value}, cuda if match[2] else old

    environments = []
    for each in facts.environments:
        packages, own = change(each.packages, each.torch_cuda)
        had = "torch" in each.packages
        environments.append(replace(each, packages=packages, torch_cuda=own) if had else each)
    known = facts.hardware.packages.get("torch", Package(None, cuda=None))
    torch = replace(known, version=value, cuda=cuda if match[2] else known.cuda)
    moved = _hardware(facts, packages={**facts.hardware.packages, "torch": torch})
    return replace(moved, environments=tuple(environments), probes=())  # what torch said is no longer true


SETTINGS: dict[str, Callable[[Facts, str], Facts]] = {
    "vram": _vram,
    "vram_free": _vram_free,
    "ram": _ram,
    "ram_available": _ram_available,
    "disk_free": _disk_free,
    "driver": _driver,
    "cuda_driver": _cuda_driver,
    "gpu": _gpu,
    "os": _platform,
    "platform": _platform,
    "torch": _torch,
}
