"""Is this machine one that can run it?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from kleinctl.checks import CouldNotCheck, check, remedies
from kleinctl.environment import Environment
from kleinctl.facts.comfyui import ComfyUI
from kleinctl.facts.system import System, WslConfig
from kleinctl.hardware import Gpu, Hardware
from kleinctl.problem import Evidence, KleinctlError, Problem, Remedy
from kleinctl.units import GIB, gib

#: The largest file of klein 4B: the text encoder in bf16.
LARGEST_PART = 8_044_982_048
#: What loading takes at most of RAM and swap together: diffusers-offload, or a ComfyUI with the bf16 files
#: (docs/measurements.md).
LOADING_BYTES = 17 * GIB
#: What reads a file whole has Windows promise it and what it becomes: half as much again (a margin of ours).
COMMIT_BYTES = LARGEST_PART * 3 // 2
#: The first version of the Visual C++ runtime that torch's libraries are known to load with.
VC_RUNTIME = (14, 40)
#: A card that may draw less than this share of its default power is held back; people save a third on purpose.
POWER_SHARE = 0.6

#: Files of torch lie 150 characters below kleinctl's folder, and Windows ends at 260.
LONGEST_HOME = 100

DRIVERS = "https://www.nvidia.com/drivers"

#: Cards whose driver cannot allocate asynchronously: ComfyUI, cuda_malloc.py.
NO_CUDA_MALLOC = re.compile(
    r"GTX (TITAN X|9[5-8]0|75\d|745|8[56]0M|16[35]0)\b|9[1-4][05]M\b|8[34]0M\b|MX1[13]0\b"
    r"|Quadro (K620|K1200|K2200|M\d{3,4})\b|Tesla M(4|6|10|40|60)\b"
)


def chosen_card(hardware: Hardware) -> Gpu:
    """The card that would be used; without one there is nothing to look at."""
    if hardware.gpu is None:
        raise CouldNotCheck("There is no NVIDIA card to use.")
    return hardware.gpu


def known(system: System) -> System:
    """The system; a document of an old kind says nothing of it."""
    if system == System():
        raise CouldNotCheck("Nothing is known of the system around the card.")
    return system


def with_arguments(comfyui: ComfyUI) -> ComfyUI:
    """A ComfyUI of which it is known how it is started."""
    if not comfyui.arguments:
        raise CouldNotCheck(f"No script or setting says with which arguments {comfyui.name} is started.")
    return comfyui


def variable(name: str, value: str = "") -> Remedy:
    """Set a variable of the user's, or unset it."""
    return Remedy("set-variable", {"name": name, "value": value}, "ask")


def without(variable: str, hardware: Hardware) -> str:
    """How to get rid of a variable, as a line to paste."""
    if hardware.platform == "win32":
        return rf"reg delete HKCU\Environment /v {variable} /f   # then open a new terminal"
    return f"unset {variable}"


# The driver


@check("nvidia-card")
def nvidia_card(hardware: Hardware, system: System) -> Problem | None:
    """An NVIDIA card is there and its driver answers."""
    if hardware.gpus:
        return _lost(hardware)
    if hardware.nvml.status in _NVML:
        return _NVML[hardware.nvml.status](hardware)
    ways = (_outside_of_container, _without_driver)
    return next((problem for way in ways if (problem := way(hardware, system))), None) or _no_card(hardware)


def _lost(hardware: Hardware) -> Problem | None:
    """NVML names each card that stopped to answer, "GPU is lost" for one that has fallen off the bus."""
    if not hardware.nvml.detail:
        return None
    return Problem(
        "a card has stopped to answer",
        f"The driver says: {hardware.nvml.detail}. Laptops lose a card when they sleep or change to battery.",
        "restart the computer, then: kleinctl doctor",
        name="card-lost",
        ref="A31",
        evidence=(Evidence("the NVIDIA driver (NVML)", hardware.nvml.detail, "an answer of every card"),),
    )


def _no_card(hardware: Hardware) -> Problem:
    others = ", ".join(gpu.name for gpu in hardware.other_gpus)
    why = f"Found {others} instead; kleinctl runs on NVIDIA cards." if others else "No NVIDIA driver is installed."
    return Problem(
        "no NVIDIA card was found",
        f"{why} What runs on the processor still works.",
        f"install the NVIDIA driver from {DRIVERS} if there is a card, then: kleinctl doctor",
        severity="warning",
        evidence=(Evidence("the NVIDIA driver (NVML)", hardware.nvml.detail or hardware.nvml.status, "a card"),),
    )


def _outside_of_container(hardware: Hardware, system: System) -> Problem | None:
    """The card's kernel module is there, its files are not: a container that was started without the card."""
    card = next((gpu.name for gpu in hardware.other_gpus if gpu.vendor == "NVIDIA" and gpu.driver == "nvidia"), None)
    if hardware.container is None or not (card or system.kernel_driver):
        return None
    there = f"driver {system.kernel_driver}" if system.kernel_driver else card
    return Problem(
        f"this {hardware.container} container was started without the card",
        f"The machine around it has {there}; in here are "
        f"{', '.join(system.device_nodes) or 'no files of it in /dev'} and "
        f"{'a' if system.libcuda else 'no'} libcuda.so.1.",
        "start it with: docker run --gpus all …   # needs the NVIDIA Container Toolkit on the machine",
        name="container-without-gpu",
        ref="A10",
        evidence=(
            Evidence("/proc/driver/nvidia/version", system.kernel_driver or "absent"),
            Evidence("/dev", ", ".join(system.device_nodes) or "no device files", "/dev/nvidiactl, /dev/nvidia0"),
            Evidence("NVIDIA_VISIBLE_DEVICES", system.variables.get("NVIDIA_VISIBLE_DEVICES", "not set"), "all"),
        ),
    )


def _without_driver(hardware: Hardware, system: System) -> Problem | None:
    """There is a card and no driver of NVIDIA's for it."""
    card = next((gpu for gpu in hardware.other_gpus if gpu.vendor == "NVIDIA"), None)
    if hardware.wsl:
        return _wsl_without_driver(hardware, system)
    if card is None and hardware.nvml.status != "no-driver":
        return None
    name = card.name if card else "the NVIDIA card"
    running = "nouveau, which has no CUDA," if system.nouveau or (card and card.driver == "nouveau") else "no driver"
    windows = hardware.platform == "win32"
    return Problem(
        f"{name} has no NVIDIA driver",
        f"{running[:1].upper()}{running[1:]} runs it; CUDA wants NVIDIA's own ({hardware.nvml.detail or 'not found'}).",
        f"install the driver from {DRIVERS}, restart"
        if windows
        else "sudo ubuntu-drivers install   # or your distribution's NVIDIA driver; then restart",
        name="no-driver",
        ref="A13",
        evidence=(
            Evidence(card.found_by if card else "NVML", card.driver or "no driver" if card else "no driver", "nvidia"),
            Evidence("libcuda", "found" if system.libcuda else "not found", "found"),
        ),
    )


def _wsl_without_driver(hardware: Hardware, system: System) -> Problem | None:
    if hardware.wsl == 1:
        why, fix = (
            "WSL 1 has no way to a card; WSL 2 has.",
            "wsl --set-version Ubuntu 2   # in PowerShell; see wsl -l -v",
        )
    elif "/dev/dxg" in system.device_nodes:
        why = "An NVIDIA card's comes with the Windows driver, to /usr/lib/wsl/lib; a Linux driver in WSL breaks it."
        fix = f"install the driver from {DRIVERS} in Windows, then: wsl --shutdown"
    else:
        return None
    return Problem(
        "WSL has no NVIDIA driver",
        why,
        fix,
        name="no-driver",
        severity="warning",
        ref="A13",
        evidence=(
            Evidence("/proc/version", f"WSL {hardware.wsl}", "WSL 2"),
            Evidence("libcuda.so.1", "found" if system.libcuda else "not found", "/usr/lib/wsl/lib/libcuda.so.1"),
        ),
    )


def _mismatch(hardware: Hardware) -> Problem:
    return Problem(
        "the NVIDIA driver was updated but not restarted",
        f"Its library and its kernel module differ in version ({hardware.nvml.detail}).",
        "restart the computer, then: kleinctl doctor",
        name="driver-library-mismatch",
        ref="A11",
        evidence=(Evidence("/proc/driver/nvidia/version and NVML", hardware.nvml.detail, "one version"),),
    )


def _no_permission(hardware: Hardware) -> Problem:
    return Problem(
        "the NVIDIA driver refuses to answer",
        f"This user may not open the card's device files ({hardware.nvml.detail}).",
        "ls -l /dev/nvidia*   # then join the group that owns them, or ask the machine's owner",
        name="driver-no-permission",
        evidence=(Evidence("the NVIDIA driver (NVML)", hardware.nvml.detail, "an answer"),),
    )


def _broken(hardware: Hardware) -> Problem:
    return Problem(
        "the NVIDIA driver does not answer",
        f"NVML says: {hardware.nvml.detail}",
        "nvidia-smi   # if it fails as well, reinstall the driver",
        name="driver-broken",
        evidence=(Evidence("the NVIDIA driver (NVML)", hardware.nvml.detail, "an answer"),),
    )


_NVML = {"driver-library-mismatch": _mismatch, "no-permission": _no_permission, "error": _broken}


@check("no-driver")
def libcuda_found(hardware: Hardware, system: System) -> Problem | None:
    """The driver's library for programs, libcuda, can be found."""
    if not hardware.gpus:
        raise CouldNotCheck("There is no NVIDIA card.")
    if system.libcuda is None:
        raise CouldNotCheck("Nothing is known of libcuda.")
    if system.libcuda:
        return None
    library = "nvcuda.dll" if hardware.platform == "win32" else "libcuda.so.1"
    folder = "/usr/lib/wsl/lib" if hardware.wsl else "/run/opengl-driver/lib" if "NixOS" in hardware.os else ""
    fix = f"export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH" if folder else "reinstall the NVIDIA driver, then restart"
    if hardware.container:
        fix = "start the container with: -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    return Problem(
        f"{library} is missing",
        f"The driver answers for {hardware.gpus[0].name}, but programs reach CUDA through {library}, "
        "which lies in none of the folders where they look.",
        fix,
        ref="A13",
        evidence=(Evidence("the loader's cache, LD_LIBRARY_PATH and usual folders", f"no {library}", library),),
    )


@check("container-without-gpu")
def container_passes_the_card(hardware: Hardware, system: System) -> Problem | None:
    """A container that has the card has all of its device files."""
    if not hardware.container or not hardware.gpus:
        raise CouldNotCheck("There is no NVIDIA card." if hardware.container else "This is no container.")
    lacking = [node for node in ("/dev/nvidiactl", "/dev/nvidia-uvm") if node not in system.device_nodes]
    if not hardware.wsl and system.device_nodes and lacking:
        return Problem(
            f"this {hardware.container} container lacks {' and '.join(lacking)}",
            f"The card was passed on in part: found are {', '.join(system.device_nodes)}. CUDA does not start without.",
            "start it with: docker run --gpus all …",
            ref="A10",
            evidence=(Evidence("/dev", ", ".join(system.device_nodes), ", ".join(lacking)),),
        )
    return None


@check("no-torch-build")
def torch_is_made_for_it(hardware: Hardware, environments: tuple[Environment, ...]) -> Problem | None:
    """There is a build of torch for the card, its driver and this Python."""
    from kleinctl.environment import torch_build

    try:
        torch_build(hardware, cuda=hardware.gpu is not None)
    except KleinctlError as error:
        found = error.problem
        if found.remedy and any(each.managed and "torch" in each.packages for each in environments):
            return None  # made from another Python
        return replace(
            found,
            name=_NO_BUILD.get(found.ref or "", found.name),
            severity="error" if hardware.gpu else "warning",
            fix=f"{found.fix} in Windows" if hardware.wsl and found.ref == "A01" else found.fix,
            evidence=_build_evidence(hardware, found.ref),
        )
    return None


#: What a build that is lacking is called where the card or its driver is the cause.
_NO_BUILD = {"A01": "driver-too-old", "A03": "torch-lacks-card", "A04": "torch-dropped-card"}


def _build_evidence(hardware: Hardware, ref: str | None) -> tuple[Evidence, ...]:
    if hardware.gpu is not None and ref != "A05":
        found = f"{hardware.gpu.name}, {hardware.gpu.arch}, driver {hardware.gpu.driver}"
        return (Evidence("the NVIDIA driver (NVML)", found, "a card and driver that a build of torch is made for"),)
    python = hardware.python
    return (Evidence(python.executable, f"Python {python.version}, {python.bits} bits, {hardware.machine}"),)


# The card


@check("card-hidden")
def card_hidden(hardware: Hardware, system: System) -> Problem | None:
    """CUDA_VISIBLE_DEVICES keeps no card from programs that is better than those it shows."""
    if not hardware.gpus:
        raise CouldNotCheck("There is no NVIDIA card.")
    hidden = [gpu for gpu in hardware.gpus if gpu.hidden]
    shown = [gpu for gpu in hardware.gpus if not gpu.hidden]
    if not hidden or max(gpu.vram_bytes for gpu in hidden) <= max((gpu.vram_bytes for gpu in shown), default=0):
        return None
    best = max(hidden, key=lambda gpu: gpu.vram_bytes)
    value = system.variables.get("CUDA_VISIBLE_DEVICES", "")
    rest = f"It shows {shown[0].name} alone." if shown else "It shows no card at all."
    return Problem(
        f"{best.name} is hidden",
        f"The variable CUDA_VISIBLE_DEVICES is {value!r} and keeps it from programs that use CUDA. {rest}",
        without("CUDA_VISIBLE_DEVICES", hardware),
        severity="warning" if shown else "error",
        ref="A15",
        evidence=(Evidence("CUDA_VISIBLE_DEVICES", value, "not set"),),
        remedy=variable("CUDA_VISIBLE_DEVICES"),
    )


@check("several-cards")
def several_cards(hardware: Hardware, system: System) -> Problem | None:
    """Of several cards, the best is the one that is used."""
    shown, used = [gpu for gpu in hardware.gpus if not gpu.hidden and gpu.vram_bytes], chosen_card(hardware)
    if len(shown) < 2:
        return None
    largest = max(shown, key=lambda gpu: gpu.vram_bytes)
    if largest.vram_bytes > used.vram_bytes and largest.vram_free_bytes <= used.vram_free_bytes:
        return Problem(
            f"{used.name} is used, for {largest.name} is taken",
            f"{largest.name} has {gib(largest.vram_free_bytes)} of {gib(largest.vram_bytes)} free"
            f"{_held_by(largest)}; {used.name} has {gib(used.vram_free_bytes)} of {gib(used.vram_bytes)}.",
            f"close what is on {largest.name}, then: kleinctl doctor",
            severity="warning",
            ref="A15",
            evidence=tuple(Evidence(gpu.name, f"{gib(gpu.vram_free_bytes)} free") for gpu in shown),
        )
    numbered = re.fullmatch(r"[\d, ]+", system.variables.get("CUDA_VISIBLE_DEVICES", ""))
    order = system.variables.get("CUDA_DEVICE_ORDER", "not set")
    if numbered and order != "PCI_BUS_ID" and len({gpu.name for gpu in hardware.gpus}) > 1:
        return Problem(
            f"CUDA_VISIBLE_DEVICES={numbered[0].strip()} may mean another card than you think",
            "CUDA counts cards by speed, nvidia-smi by slot. kleinctl names a card by its UUID; other programs do not.",
            "setx CUDA_DEVICE_ORDER PCI_BUS_ID   # then open a new terminal"
            if hardware.platform == "win32"
            else "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
            severity="warning",
            ref="A15",
            evidence=(Evidence("CUDA_DEVICE_ORDER", order, "PCI_BUS_ID"),),
            remedy=variable("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        )
    return None


@check("mig-slice")
def mig_slice(hardware: Hardware, system: System) -> Problem | None:
    """A card that is cut into slices (MIG) has one to use."""
    if not hardware.gpus:
        raise CouldNotCheck("There is no NVIDIA card.")
    cut = next((gpu for gpu in hardware.gpus if gpu.mig.enabled), None)
    if cut is None:
        return None
    value = system.variables.get("CUDA_VISIBLE_DEVICES", "")
    if not cut.mig.instances:
        return Problem(
            f"{cut.name} is cut into slices, and there is none to use",
            "Its multi-instance mode (MIG) is on, and no slice was made or shown to this user; "
            "a program can use a slice alone.",
            "nvidia-smi -L   # lists slices; ask the machine's owner to make one",
            ref="A14",
            evidence=(Evidence("the NVIDIA driver (NVML)", "MIG on, 0 slices", "a slice"),),
        )
    if not re.fullmatch(r"[\d, ]+", value):
        return None  # kleinctl names the slice to its worker
    slice_ = max(cut.mig.instances, key=lambda each: each.vram_free_bytes)
    return Problem(
        f"CUDA_VISIBLE_DEVICES={value.strip()} names no slice of {cut.name}",
        f"It is cut into {len(cut.mig.instances)} slices (MIG), which go by their UUIDs; the roomiest has "
        f"{gib(slice_.vram_free_bytes)} of {gib(slice_.vram_bytes)} free. kleinctl names it itself.",
        f"export CUDA_VISIBLE_DEVICES={slice_.uuid}",
        severity="warning",
        ref="A14",
        evidence=(Evidence("CUDA_VISIBLE_DEVICES", value, slice_.uuid),),
        remedy=variable("CUDA_VISIBLE_DEVICES", slice_.uuid) if slice_.uuid else None,
    )


@check("vram-taken")
def vram_taken(hardware: Hardware, system: System) -> Problem | None:
    """Other programs leave the card most of its memory."""
    gpu = chosen_card(hardware)
    if not gpu.vram_bytes:
        raise CouldNotCheck(f"The driver does not say how much memory {gpu.name} has.")
    if gpu.vram_free_bytes >= 0.75 * gpu.vram_bytes:
        return None
    users = [p for p in gpu.processes if p.vram_bytes][:3] or list(gpu.processes[:5])
    named = ", ".join(f"{p.name} (pid {p.pid}){f' {gib(p.vram_bytes)}' if p.vram_bytes else ''}" for p in users)
    sized = any(p.vram_bytes for p in users)
    said = f"The largest users are {named}." if sized else f"On it are {named}; Windows does not say how much each has."
    return Problem(
        f"{gib(gpu.vram_bytes - gpu.vram_free_bytes)} of {gpu.name}'s {gib(gpu.vram_bytes)} of VRAM are taken",
        said if named else "The driver does not say by whom.",
        _close(named, system.serving),
        severity="warning",
        ref="A16",
        evidence=(
            Evidence("the NVIDIA driver (NVML)", f"{gib(gpu.vram_free_bytes)} free", f"{gib(0.75 * gpu.vram_bytes)}"),
        ),
    )


def _close(named: str, serving: bool) -> str:
    if serving:
        return "kleinctl serve --free   # a model that kleinctl keeps warm may be among them; close the others"
    return "close them, then: kleinctl doctor" if named else "nvidia-smi   # names programs, where it may; close them"


def _held_by(gpu: Gpu) -> str:
    names = ", ".join(dict.fromkeys(process.name for process in gpu.processes[:3]))
    return f" ({names})" if names else ""


@check("no-bf16")
def no_bf16(hardware: Hardware) -> Problem | None:
    """The card computes in bf16, the precision of the weights."""
    gpu = chosen_card(hardware)
    if gpu.bf16:
        return None
    return Problem(
        f"{gpu.name} does not compute in bf16",
        f"It is {gpu.arch}; bf16 came with sm_80 (RTX 30). It is emulated, slowly.",
        "kleinctl plan   # shows what to expect",
        severity="warning",
        ref="A17",
        evidence=(Evidence("the card's compute capability", gpu.compute_capability, "8.0"),),
    )


@check("no-fp8-maths")
def no_fp8_maths(hardware: Hardware, comfyui: ComfyUI) -> Problem | None:
    """ComfyUI is not told to calculate in fp8 on a card that cannot."""
    gpu = chosen_card(hardware)
    asked = next(
        (each for each in ("--supports-fp8-compute", "fp8_matrix_mult") if each in with_arguments(comfyui).arguments),
        None,
    )
    if gpu.capability >= (8, 9) or asked is None:
        return None
    forced = asked == "--supports-fp8-compute"
    follows = "It will stop at the first layer." if forced else "fp8 weights save memory here, not time."
    return Problem(
        f"{gpu.name} does not calculate in fp8",
        f"ComfyUI in {comfyui.name} is started with {asked}; fp8 maths came with sm_89 (RTX 40), this is {gpu.arch}. "
        f"{follows}",
        f"start ComfyUI without {asked}",
        severity="error" if forced else "warning",
        path=comfyui.path,
        ref="A18",
        evidence=(
            Evidence(comfyui.script or "ComfyUI's arguments", " ".join(comfyui.arguments)),
            Evidence("the card's compute capability", gpu.compute_capability, "8.9"),
        ),
        remedy=remedies.without_fp8_maths(comfyui),
    )


@check("cuda-malloc-wanted")
def cuda_malloc(hardware: Hardware, system: System) -> Problem | None:
    """The asynchronous allocator of CUDA is not asked for on a card that lacks it."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    asked = next((name for name in names if "cudaMallocAsync" in known(system).variables.get(name, "")), None)
    gpu = chosen_card(hardware)
    if asked is None or not NO_CUDA_MALLOC.search(gpu.name):
        return None
    return Problem(
        f"{gpu.name} does not support cudaMallocAsync",
        f"{asked}={system.variables[asked]} asks for it; ComfyUI's own list has this card among those that answer with "
        "`CUDA error: operation not supported`.",
        without(asked, hardware),
        name="cuda-malloc-unsupported",
        ref="A29",
        evidence=(Evidence(asked, system.variables[asked], "no cudaMallocAsync"),),
        remedy=variable(asked),
    )


@check("card-throttled")
def card_throttled(hardware: Hardware, system: System) -> Problem | None:
    """Nothing holds the card back: heat, power, the battery, a narrow link."""
    gpu = chosen_card(hardware)
    battery = system.battery
    on_battery = "Laptop" in gpu.name and battery is not None and not battery.plugged_in
    held = [_HELD_BY[reason] for reason in gpu.throttled if reason in _HELD_BY]
    limit, usual = gpu.power_limit_watts, gpu.power_default_watts
    if limit and usual and limit < POWER_SHARE * usual:
        held.append(f"it may draw {limit} of its usual {usual} W")
    if gpu.pcie_width and gpu.pcie_width_now and gpu.pcie_width_now * 4 <= gpu.pcie_width:
        held.append(f"its link runs on {gpu.pcie_width_now} of {gpu.pcie_width} lanes")
    if on_battery and battery:
        held.append(f"the computer runs on its battery ({battery.percent}%)")
    if not held:
        return None
    hot = f" It is at {gpu.temperature_celsius} °C." if gpu.temperature_celsius and "heat" in gpu.throttled else ""
    return Problem(
        f"{gpu.name} is held back",
        f"{'; '.join(held)[:1].upper()}{'; '.join(held)[1:]}.{hot} It works, and slowly.",
        "plug the computer in, and choose its performance mode"
        if on_battery
        else "nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE   # says more; check cooling, power cables and slot",
        severity="warning",
        ref="A31",
        evidence=(Evidence("the NVIDIA driver (NVML)", "; ".join(held), "nothing that holds the card back"),),
    )


_HELD_BY = {"heat": "it is too hot and runs slower", "hardware": "its power supply or a sensor slows it down"}


# Memory


@check("wsl-memory")
def wsl_memory(hardware: Hardware, system: System) -> Problem | None:
    """WSL gives Linux enough of the computer's memory."""
    has = hardware.ram_bytes + hardware.swap_bytes
    if not hardware.wsl or not hardware.ram_bytes:
        raise CouldNotCheck("Nothing is known of its memory." if hardware.wsl else "This is not WSL.")
    if has >= LOADING_BYTES:
        return None
    config = system.wslconfig
    changeable = config is not None and not config.memory_bytes and not wslconfig_ignored.function(hardware, system)
    return Problem(
        f"WSL gives Linux only {gib(hardware.ram_bytes)} of RAM",
        f"By default it is half of the computer's. diffusers-offload and ComfyUI take up to {gib(LOADING_BYTES)}; "
        f"with {gib(hardware.swap_bytes)} of swap there are {gib(has)}. staged-decode runs with less, and slower.",
        "raise memory= and swap= under [wsl2] in %UserProfile%\\.wslconfig, then: wsl --shutdown",
        severity="warning",
        path=config.path if config else None,
        ref="A06",
        evidence=(Evidence("/proc/meminfo", f"{gib(has)} of RAM and swap", gib(LOADING_BYTES)),),
        remedy=_more_memory(config, hardware.ram_bytes) if config and changeable else None,
    )


def _more_memory(config: WslConfig, ram_bytes: int) -> Remedy:
    """Write the file with three quarters of the computer's memory for Linux, which has half of it now, and swap."""
    wanted = [f"memory={max(4, round(ram_bytes * 1.5 / GIB))}GB", f"swap={round(LOADING_BYTES / GIB) - 1}GB"]
    kept = [line for line in config.lines if not re.match(r"\s*(memory|swap)\s*=", line, re.IGNORECASE)]
    at = next((number for number, line in enumerate(kept) if line.strip().lower() == "[wsl2]"), None)
    lines = [*kept, "[wsl2]", *wanted] if at is None else [*kept[: at + 1], *wanted, *kept[at + 1 :]]
    return Remedy("write-text", {"path": config.path, "text": "\n".join(lines) + "\n"}, "ask")


@check("wslconfig-ignored")
def wslconfig_ignored(hardware: Hardware, system: System) -> Problem | None:
    """What `.wslconfig` asks for is what WSL does."""
    config = system.wslconfig
    if config is None:
        raise CouldNotCheck("The folder of the Windows user was not found." if hardware.wsl else "This is not WSL.")
    if not config.exists and config.misnamed:
        return _ignored(
            config,
            f"{config.misnamed[0]} is not read by WSL",
            "WSL reads .wslconfig, without anything after it; Windows hides the end of a name.",
            f"ren %UserProfile%\\{config.misnamed[0]} .wslconfig && wsl --shutdown",
            Remedy(
                "move-file",
                {"path": str(config.path)[: -len(".wslconfig")] + config.misnamed[0], "to": config.path},
                "ask",
            ),
        )
    if config.exists and config.encoding == "utf-16":
        return _ignored(
            config,
            ".wslconfig is not read by WSL",
            f"It is saved as {config.encoding.upper()} (PowerShell's > does that); WSL wants UTF-8 without a mark.",
            "save it again as UTF-8 in Notepad, then: wsl --shutdown",
            Remedy("write-text", {"path": config.path, "text": "\n".join(config.lines) + "\n"}, "ask"),
        )
    wanted, has = config.memory_bytes, hardware.ram_bytes
    if hardware.wsl and wanted and has and not 0.85 * wanted <= has <= 1.05 * wanted:
        return _ignored(
            config,
            ".wslconfig was changed and WSL not restarted",
            f"It says memory={gib(wanted)}; Linux has {gib(has)}.",
            "wsl --shutdown   # in PowerShell; it ends what runs in WSL",
            None,
        )
    return None


def _ignored(config: WslConfig, what: str, why: str, fix: str, remedy: Remedy | None) -> Problem:
    found = f"{config.encoding}, memory {config.memory_bytes or 'not set'}" if config.exists else config.misnamed[0]
    return Problem(
        what,
        why,
        fix,
        severity="warning",
        path=config.path,
        ref="A07",
        evidence=(Evidence(config.path, found, ".wslconfig in UTF-8, as WSL was started with"),),
        remedy=remedy,
    )


@check("page-file-too-small")
def page_file_too_small(hardware: Hardware) -> Problem | None:
    """Windows can promise programs the memory that loading asks for."""
    free = hardware.commit_free_bytes
    if free is None:
        raise CouldNotCheck(_not_windows(hardware))
    if free >= COMMIT_BYTES:
        return None
    return Problem(
        "Windows has little memory left to promise",
        f"{gib(free)} of RAM and paging file are left; what loads a file whole asks for {gib(COMMIT_BYTES)} at once, "
        "and Windows refuses what it cannot promise, even where RAM looks free.",
        "SystemPropertiesPerformance.exe   # Advanced, Virtual memory: let Windows manage it; then restart",
        severity="warning",
        ref="A08",
        evidence=(Evidence("GlobalMemoryStatusEx, ullAvailPageFile", gib(free), gib(COMMIT_BYTES)),),
    )


def _not_windows(hardware: Hardware) -> str:
    return "Windows did not say." if hardware.platform == "win32" else "This is not Windows."


@check("vc-runtime-missing")
def vc_runtime_missing(hardware: Hardware, system: System) -> Problem | None:
    """Windows has the Visual C++ runtime that torch's libraries want."""
    found = system.vc_runtime
    if found is None:
        raise CouldNotCheck(_not_windows(hardware))
    if tuple(map(int, re.findall(r"\d+", found)))[:2] >= VC_RUNTIME:
        return None
    wanted = "{}.{}".format(*VC_RUNTIME)
    return Problem(
        f"the Visual C++ runtime is {found}" if found else "the Visual C++ runtime is missing",
        f"torch's libraries want {wanted} or newer, and do not load without it (WinError 126 or 1114).",
        "winget install Microsoft.VCRedist.2015+.x64",
        severity="warning" if found else "error",
        ref="A20",
        evidence=(Evidence(r"HKLM\SOFTWARE\Microsoft\VisualStudio\14.0\VC\Runtimes\X64", found or "absent", wanted),),
        remedy=Remedy("install-vc-runtime", {}, "ask"),
    )


# Disks and folders


@check("path-trouble")
def path_trouble(hardware: Hardware, system: System) -> Problem | None:
    """kleinctl's folder lies where programs get along: on a disk of this machine, under a plain name."""
    known(system)
    disk = hardware.disks.get("envs")
    kind = _WSL_DISK if hardware.wsl and disk and disk.filesystem in ("9p", "drvfs") else None
    kind = kind or ("a network disk" if disk and disk.network else None)
    kind = kind or ("exFAT, which knows no links" if disk and disk.filesystem == "exfat" else None)
    long = f"{len(system.home)} characters long, of the 260 that Windows allows a file"
    too_long = long if system.long_paths is False and len(system.home) > LONGEST_HOME else None
    return _path_problem(hardware, system.home, "kleinctl's folder", "set KLEINCTL_HOME to", kind, too_long)


_WSL_DISK = "a Windows disk seen from WSL, many times slower than WSL's own"


@check("comfyui-path")
def comfyui_path(hardware: Hardware, comfyui: ComfyUI) -> Problem | None:
    """ComfyUI lies where programs get along."""
    return _path_problem(hardware, comfyui.path, f"ComfyUI in {comfyui.name}", "move it to")


def _path_problem(hardware: Hardware, path: str, whose: str, move: str, *known: str | None) -> Problem | None:
    troubles = [trouble for trouble in (*known, *_in_name(hardware, path)) if trouble]
    if not troubles:
        return None
    good = r"C:\kleinctl" if hardware.platform == "win32" else "a folder of this machine's own disk, as ~/kleinctl"
    return Problem(
        f"{whose} lies where things go wrong",
        f"{path} is {', and '.join(troubles)}. Installers and Git stumble over such places.",
        f"{move} {good}",
        name="path-trouble",
        severity="warning",
        path=path,
        ref="A33",
        evidence=(Evidence(path, ", ".join(troubles), "a short path of plain letters on NTFS or ext4"),),
    )


def _in_name(hardware: Hardware, path: str) -> Iterator[str]:
    """What is troublesome about a path's name. Linux takes any letters."""
    parts = re.split(r"[\\/]", path)
    if any(re.match(r"onedrive\b", part, re.IGNORECASE) for part in parts):
        yield "in OneDrive, which moves files away and locks them"
    if hardware.platform != "win32":
        return
    if not path.isascii():
        yield "spelled with letters that are not plain ASCII"
    if re.match(r"[A-Za-z]:\\Program Files", path):
        yield "in Program Files, where this user may not write"
