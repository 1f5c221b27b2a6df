"""The system around the card: driver files, settings, variables, and what Windows and WSL keep apart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from kleinctl.home import home


@dataclass(frozen=True)
class WslConfig:
    """`.wslconfig` in the Windows user's folder. `encoding` is that of its bytes ("utf-8", "utf-16", "latin-1").

    `misnamed` are files beside it whose names WSL does not read, such as `.wslconfig.txt`.
    """

    path: str
    exists: bool
    encoding: str = "utf-8"
    memory_bytes: int | None = None
    swap_bytes: int | None = None
    misnamed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Battery:
    """A laptop's battery."""

    percent: int
    plugged_in: bool


@dataclass(frozen=True)
class LocalServer:
    """What listens on a port of this machine where ComfyUI would. `comfyui` is its version; None: something else."""

    port: int
    comfyui: str | None = None
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """Facts of the system that are no hardware. None: could not be asked, or does not exist on this system.

    `home` is kleinctl's folder and `home_error` why it cannot be written to. `variables` are the environment variables
    that change what happens (values of credentials left out); `secrets` the names of those that hold a credential.
    `libcuda`: the driver's library for programs can be found; `device_nodes` are the driver's files in /dev;
    `nouveau`: the open driver without CUDA is loaded; `kernel_driver` is the version of the loaded kernel module.
    `oom_kills` counts processes of this control group that the kernel has killed for memory. `vc_runtime` is the
    version of the Visual C++ runtime, `long_paths` whether Windows allows paths over 260 characters, `symlinks`
    whether this user may make them. `part_files_bytes` is what unfinished downloads of kleinctl take.
    """

    home: str = ""
    home_error: str = ""
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)
    secrets: tuple[str, ...] = ()
    libcuda: bool | None = None
    device_nodes: tuple[str, ...] = ()
    nouveau: bool = False
    kernel_driver: str | None = None
    docker_nvidia: bool | None = None
    docker_snap: bool = False
    wslconfig: WslConfig | None = None
    battery: Battery | None = None
    oom_kills: int | None = None
    vc_runtime: str | None = None
    long_paths: bool | None = None
    symlinks: bool | None = None
    part_files_bytes: int = 0
    servers: tuple[LocalServer, ...] = ()


def gather() -> System:
    """The system as it is now."""
    return System(home=str(home()), home_error=home_error())


def home_error() -> str:
    """Why kleinctl's folder cannot be written to, or an empty string."""
    folder = home()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is a file"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} does not let this user write"
