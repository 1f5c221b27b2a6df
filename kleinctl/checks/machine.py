"""Is this machine one that can run it?"""

from __future__ import annotations

from kleinctl.checks import check
from kleinctl.hardware import Hardware
from kleinctl.problem import KleinctlError, Problem
from kleinctl.units import GIB, bytes_text, gib

#: An fp32 or bf16 part is at most 9.8 GB; FAT32 ends at 4 GiB.
LARGEST_PART = 8_044_982_048


@check("nvidia-card")
def nvidia_card(hardware: Hardware) -> Problem | None:
    """An NVIDIA card is there and its driver answers."""
    if hardware.gpus:
        return None
    return _NVML.get(hardware.nvml.status, _no_card)(hardware)


def _no_card(hardware: Hardware) -> Problem:
    others = ", ".join(gpu.name for gpu in hardware.other_gpus)
    why = f"Found {others} instead; kleinctl runs on NVIDIA cards." if others else "No NVIDIA driver is installed."
    return Problem(
        "no NVIDIA card was found",
        f"{why} What runs on the processor still works.",
        "install the NVIDIA driver from https://www.nvidia.com/drivers if there is a card, then: kleinctl doctor",
        severity="warning",
    )


def _mismatch(hardware: Hardware) -> Problem:
    return Problem(
        "the NVIDIA driver was updated but not restarted",
        f"Its library and its kernel module differ in version ({hardware.nvml.detail}).",
        "restart the computer, then: kleinctl doctor",
        name="driver-library-mismatch",
        ref="A11",
    )


def _no_permission(hardware: Hardware) -> Problem:
    return Problem(
        "the NVIDIA driver refuses to answer",
        f"This user may not open the card's device files ({hardware.nvml.detail}).",
        "ls -l /dev/nvidia*   # then join the group that owns them, or ask the machine's owner",
        name="driver-no-permission",
    )


def _broken(hardware: Hardware) -> Problem:
    return Problem(
        "the NVIDIA driver does not answer",
        f"NVML says: {hardware.nvml.detail}",
        "nvidia-smi   # if it fails as well, reinstall the driver",
        name="driver-broken",
    )


_NVML = {"driver-library-mismatch": _mismatch, "no-permission": _no_permission, "error": _broken}


@check("card-hidden")
def card_hidden(hardware: Hardware) -> Problem | None:
    """No card is kept from programs by CUDA_VISIBLE_DEVICES."""
    hidden = [gpu.name for gpu in hardware.gpus if gpu.hidden]
    if not hidden:
        return None
    return Problem(
        f"{hidden[0]} is hidden",
        "The variable CUDA_VISIBLE_DEVICES keeps it from programs that use CUDA.",
        "unset CUDA_VISIBLE_DEVICES",
        severity="warning",
        ref="A15",
    )


@check("driver")
def driver(hardware: Hardware) -> Problem | None:
    """There is a build of torch for the card and its driver."""
    from kleinctl.environment import torch_build

    if hardware.gpu is None:
        return None
    try:
        torch_build(hardware, cuda=True)
    except KleinctlError as error:
        return error.problem
    return None


@check("vram-free")
def vram_free(hardware: Hardware) -> Problem | None:
    """Other programs leave the card most of its memory."""
    gpu = hardware.gpu
    if gpu is None or gpu.vram_free_bytes >= 0.75 * gpu.vram_bytes:
        return None
    users = sorted((p for p in gpu.processes if p.vram_bytes), key=lambda p: -(p.vram_bytes or 0))[:3]
    named = ", ".join(f"{p.name} (pid {p.pid}) {gib(p.vram_bytes or 0)}" for p in users)
    return Problem(
        f"{gib(gpu.vram_bytes - gpu.vram_free_bytes)} of {gpu.name}'s {gib(gpu.vram_bytes)} of VRAM are taken",
        f"The largest users are {named}." if named else "The driver does not say by whom.",
        "close them, then: kleinctl doctor",
        severity="warning",
        ref="A16",
    )


@check("bf16")
def bf16(hardware: Hardware) -> Problem | None:
    """The card computes in bf16, the precision of the weights."""
    gpu = hardware.gpu
    if gpu is None or gpu.capability >= (8, 0):
        return None
    return Problem(
        f"{gpu.name} does not compute in bf16",
        f"It is {gpu.arch}; bf16 came with sm_80 (RTX 30). It is emulated, slowly.",
        "kleinctl plan   # shows what to expect",
        severity="warning",
        ref="A17",
    )


@check("large-files")
def large_files(hardware: Hardware) -> Problem | None:
    """The disk of the models can hold files of 8 GB."""
    disk = hardware.disks.get("models")
    if disk is None or disk.max_file_bytes is None or disk.max_file_bytes > LARGEST_PART:
        return None
    return Problem(
        f"{disk.path} cannot hold the model's files",
        f"Its filesystem, {disk.filesystem}, ends at {bytes_text(disk.max_file_bytes)} a file; "
        f"one of {bytes_text(LARGEST_PART)} is wanted.",
        "set KLEINCTL_HOME to a folder on another disk",
        path=str(disk.path),
    )


@check("wsl-memory")
def wsl_memory(hardware: Hardware) -> Problem | None:
    """WSL gives Linux enough of the computer's memory."""
    if not hardware.wsl or hardware.ram_bytes >= 15 * GIB:
        return None
    return Problem(
        f"WSL gives Linux only {gib(hardware.ram_bytes)} of RAM",
        "By default it is half of the computer's; loading takes up to 17 GiB.",
        "raise memory= under [wsl2] in %UserProfile%\\.wslconfig, then: wsl --shutdown",
        severity="warning",
        ref="A06",
    )
