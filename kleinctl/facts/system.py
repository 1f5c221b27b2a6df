"""The system around the card: driver files, settings, variables, and what Windows and WSL keep apart."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kleinctl.hardware.facts import text_of
from kleinctl.home import downloads_folder, home, server_file

#: The variables that change what happens, by name or by how the name starts.
VARIABLES = set(
    """
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_HOME CUDA_PATH CUDA_LAUNCH_BLOCKING NVIDIA_VISIBLE_DEVICES
    NVIDIA_DRIVER_CAPABILITIES PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF HF_HOME HF_HUB_CACHE HF_ENDPOINT
    HUGGINGFACE_HUB_CACHE HF_HUB_DISABLE_XET HF_HUB_ENABLE_HF_TRANSFER HF_HUB_OFFLINE HF_HUB_DISABLE_SYMLINKS
    HF_HUB_DISABLE_SYMLINKS_WARNING HF_HUB_DOWNLOAD_TIMEOUT TRANSFORMERS_OFFLINE PYTHONPATH PYTHONHOME
    PYTHONNOUSERSITE LD_LIBRARY_PATH LD_PRELOAD SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY OMP_NUM_THREADS
    """.split()  # noqa: SIM905
)
VARIABLE_STARTS = ("MALLOC_", "KLEINCTL_")
#: The variables that hold a credential; of these the names alone are kept.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|KEY", re.IGNORECASE)
#: The longest value kept; facts travel in documents that hold no longer text.
MAX_VALUE = 1000

#: The ports of ComfyUI (`--port`, comfy/cli_args.py) and of its Desktop app.
PORTS = (8188, 8000)
#: How long a server on this machine may take, in seconds, and how much of its answer is read, in bytes.
SERVER_SECONDS, CONNECT_SECONDS, MAX_ANSWER = 0.5, 0.1, 2**16

#: WSL reads `.wslconfig` and nothing else: https://learn.microsoft.com/windows/wsl/wsl-config
WSLCONFIG = ".wslconfig"
MISNAMED = (".wslconfig.txt", "wslconfig", "wslconfig.txt", ".wslconfig.ini", ".wslconf", ".wslconfig.conf")
#: Folders of C:\Users that are nobody's.
_NOBODY = {"public", "default", "default user", "all users", "defaultappprofile", "wsiaccount"}

_LIBCUDA = (
    "usr/lib/wsl/lib",
    "run/opengl-driver/lib",
    "usr/local/nvidia/lib64",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
)
_NODES = ("nvidiactl", "nvidia-uvm", "dxg")


@dataclass(frozen=True)
class WslConfig:
    """`.wslconfig` in the Windows user's folder. `encoding` is that of its bytes ("utf-8", "utf-16", "latin-1").

    `misnamed` are files beside it whose names WSL does not read, such as `.wslconfig.txt`. Sizes are in bytes; `lines`
    are those of the file, so that one can be changed and the others kept.
    """

    path: str
    exists: bool
    encoding: str = "utf-8"
    memory_bytes: int | None = None
    swap_bytes: int | None = None
    misnamed: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


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
    version of the Visual C++ runtime ("": there is none), `long_paths` whether Windows allows paths over 260
    characters, `symlinks` whether this user may make them. `part_files_bytes` is what unfinished downloads of kleinctl
    take. `serving`: `kleinctl serve` keeps a model here.
    """

    home: str = ""
    home_error: str = ""
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)
    secrets: tuple[str, ...] = ()
    libcuda: bool | None = None
    device_nodes: tuple[str, ...] = ()
    nouveau: bool = False
    kernel_driver: str | None = None
    wslconfig: WslConfig | None = None
    battery: Battery | None = None
    oom_kills: int | None = None
    vc_runtime: str | None = None
    long_paths: bool | None = None
    symlinks: bool | None = None
    part_files_bytes: int = 0
    servers: tuple[LocalServer, ...] = ()
    serving: bool = False


def gather(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> System:
    """The system as it is now. `root` is where /proc, /etc, /dev and libraries lie."""
    from kleinctl.exits import oom_kills

    system = windows_facts(environ) if sys.platform == "win32" else linux_facts(root, environ)
    return System(
        home=str(home()),
        home_error=home_error(),
        variables=variables(environ),
        secrets=tuple(name for name in SECRETS if environ.get(name)),
        battery=_or_none(battery),
        oom_kills=oom_kills(),
        part_files_bytes=folder_bytes(downloads_folder()),
        servers=servers(PORTS),
        serving=server_file().exists(),
        **system,
    )


def home_error() -> str:
    """Why kleinctl's folder cannot be written to, or an empty string."""
    folder = home()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is a file"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} does not let this user write"


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `VARIABLES` that are set, without what stands before an `@` in an address."""
    kept = sorted(name for name in environ if name.upper() in VARIABLES or name.upper().startswith(VARIABLE_STARTS))
    return {
        name: re.sub(r"(^|://)[^/@\s]*@", r"\1", environ[name])[:MAX_VALUE] for name in kept if not _SECRET.search(name)
    }


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take, in bytes; folders in it are not looked into."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except OSError:
        return 0


def battery() -> Battery | None:
    """The battery, as far as it says whether it is being charged."""
    import psutil

    found = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if found is None or found.power_plugged is None:
        return None
    return Battery(max(0, min(100, round(found.percent))), bool(found.power_plugged))


# Linux


def linux_facts(root: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """What Linux tells of driver, Docker and WSL, by the names `System` gives them."""
    from kleinctl.hardware.machine import wsl
    from kleinctl.hardware.nvml import kernel_module_version

    nodes = [root / "dev" / name for name in _NODES] + sorted(root.glob("dev/nvidia[0-9]*"))[:64]
    in_wsl = wsl(root)
    return {
        "libcuda": libcuda(root, environ),
        "device_nodes": tuple(f"/dev/{node.name}" for node in nodes if node.exists()),
        "nouveau": re.search(r"^nouveau\s", text_of(root / "proc/modules"), re.MULTILINE) is not None,
        "kernel_driver": kernel_module_version(root),
        "wslconfig": _or_none(lambda: wslconfig(windows_home(root, environ))) if in_wsl else None,
    }


def libcuda(root: Path, environ: Mapping[str, str]) -> bool:
    """Whether libcuda.so.1 lies where programs look: the loader's cache, usual folders, `LD_LIBRARY_PATH`."""
    given = [folder.lstrip("/") for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    if any((root / folder / "libcuda.so.1").exists() for folder in (*given, *_LIBCUDA)):
        return True
    try:
        cache = (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return False
    paths = {path.decode(errors="replace") for path in re.findall(rb"(/[^\0]{1,500}/libcuda\.so\.1)\0", cache)}
    return any((root / path.lstrip("/")).exists() for path in paths)


def windows_home(root: Path, environ: Mapping[str, str]) -> Path | None:
    """The Windows user's folder, seen from WSL: of `USERPROFILE` where WSLENV hands it over, else by looking around."""
    given = environ.get("USERPROFILE", "")
    if given:
        drive, _, rest = given.replace("\\", "/").partition(":/")
        return root / "mnt" / drive.lower() / rest if rest else root / given.lstrip("/")
    users = root / "mnt/c/Users"
    with contextlib.suppress(OSError):
        names = [name for name in sorted(os.listdir(users))[:64] if name.lower() not in _NOBODY]  # noqa: PTH208
        found = [users / name for name in names if (users / name).is_dir()]
        own = [each for each in found if each.name.lower() == environ.get("USER", "").lower()]
        own = own or [each for each in found if (each / WSLCONFIG).exists()] or found
        return own[0] if len(own) == 1 else None
    return None


def wslconfig(folder: Path | None) -> WslConfig | None:
    """`.wslconfig` in the folder of a Windows user, or that there is none; None where that folder is not known."""
    if folder is None or not folder.is_dir():
        return None
    misnamed = tuple(name for name in MISNAMED if (folder / name).is_file())
    path = folder / WSLCONFIG
    if not path.is_file():
        return WslConfig(str(path), False, misnamed=misnamed)
    with path.open("rb") as file:
        text, encoding = decoded(file.read(20_000))
    sizes = {match[1].lower(): size_of(match[2]) for match in _SIZE_LINE.finditer(text)}
    lines = tuple(line[:300] for line in text.splitlines()[:200])
    return WslConfig(str(path), True, encoding, sizes.get("memory"), sizes.get("swap"), misnamed, lines)


_SIZE_LINE = re.compile(r"^[ \t]*(memory|swap)[ \t]*=[ \t]*(\d{1,15}[ \t]*[A-Za-z]{0,3})", re.MULTILINE | re.IGNORECASE)


def decoded(raw: bytes) -> tuple[str, str]:
    """A Windows user's text file, and the encoding it is in."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace"), "utf-16"
    if b"\0" in raw:
        return raw.decode("utf-16-le", "replace"), "utf-16"
    try:
        return raw.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        return raw.decode("latin-1"), "latin-1"


def size_of(text: str) -> int:
    """`8GB`, `512 MB` or a number of bytes, in bytes; units are powers of two, as WSL takes them."""
    number, unit = re.findall(r"\d+|[A-Za-z]", f"{text} b")[:2]
    return int(number) * {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}.get(unit.lower(), 1)


# Windows


def windows_facts(environ: Mapping[str, str]) -> dict[str, Any]:
    """What Windows tells of its runtime and settings, by the names `System` gives them."""
    import tempfile

    profile = environ.get("USERPROFILE")
    return {
        "libcuda": (Path(environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll").exists(),
        "vc_runtime": vc_runtime(_registry(r"SOFTWARE\Microsoft\VisualStudio\14.0\VC\Runtimes\X64")),
        "long_paths": bool(_registry(r"SYSTEM\CurrentControlSet\Control\FileSystem").get("LongPathsEnabled")),
        "symlinks": symlinks(Path(tempfile.gettempdir())),
        "wslconfig": _or_none(lambda: wslconfig(Path(profile) if profile else None)),
    }


def vc_runtime(values: Mapping[str, Any]) -> str:
    """The version of the Visual C++ runtime by the values of its registry key, or an empty string."""
    if not values.get("Installed", 1):
        return ""
    numbers = [values.get(name) for name in ("Major", "Minor", "Bld")]
    if all(isinstance(number, int) for number in numbers):
        return ".".join(map(str, numbers))
    return ".".join(str(values.get("Version", "")).lstrip("v").split(".")[:3])


def symlinks(folder: Path) -> bool | None:
    """Whether this user may make symbolic links: one is made in `folder` for a moment. None: it cannot be tried."""
    link = folder / f".kleinctl-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        link.symlink_to("target")
        link.unlink()
    except (NotImplementedError, PermissionError):
        return False
    except OSError as error:
        return False if getattr(error, "winerror", None) == 1314 else None  # ERROR_PRIVILEGE_NOT_HELD
    return True


def _registry(key: str) -> dict[str, Any]:
    """The values of a key of HKEY_LOCAL_MACHINE; none where there is no such key."""
    import winreg

    def values(opened: Any) -> Iterator[tuple[str, Any]]:
        for number in range(200):
            yield winreg.EnumValue(opened, number)[:2]  # type: ignore[attr-defined]

    found: dict[str, Any] = {}
    with (
        contextlib.suppress(OSError),
        winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened,  # type: ignore[attr-defined]
    ):
        for name, value in values(opened):
            found[name] = value
    return found


# What listens where ComfyUI would


def servers(ports: tuple[int, ...]) -> tuple[LocalServer, ...]:
    """What listens on these ports of this machine. A closed port costs nothing on Linux, `CONNECT_SECONDS` on Windows,
    which tries again; so they are asked side by side."""
    import threading

    found: dict[int, LocalServer | None] = {}

    def ask(port: int) -> None:
        found[port] = _or_none(lambda: server(port))

    threads = [threading.Thread(target=ask, args=(port,), daemon=True) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(CONNECT_SECONDS + SERVER_SECONDS + 0.5)
    return tuple(known for port in ports if (known := found.get(port)) is not None)


def server(port: int) -> LocalServer | None:
    """What listens on a port of this machine, by its answer to ComfyUI's own question; None: nothing does."""
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=CONNECT_SECONDS)
    except OSError:
        return None
    with connection:
        try:
            stats = json.loads(_answer(connection, port))["system"]
            arguments = tuple(str(each)[:300] for each in stats.get("argv", ())[:64])
            return LocalServer(port, str(stats["comfyui_version"])[:40], arguments)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return LocalServer(port)


def _answer(connection: socket.socket, port: int) -> str:
    """What the server says to `GET /system_stats`, without headers.

    Raises:
        OSError: it took longer than `SERVER_SECONDS` in all.
    """
    end = time.monotonic() + SERVER_SECONDS
    # HTTP/1.0: one answer, in one piece, ended by closing the connection.
    connection.sendall(f"GET /system_stats HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    raw = b""
    while len(raw) < MAX_ANSWER:
        connection.settimeout(max(0.001, end - time.monotonic()))
        piece = connection.recv(MAX_ANSWER)
        if not piece:
            break
        raw += piece
        if time.monotonic() > end:
            raise TimeoutError
    return raw.partition(b"\r\n\r\n")[2].decode("utf-8", "replace")


def _or_none(ask: Callable[[], Any]) -> Any:
    """The answer; None where the system does not give one. Gathering never raises."""
    try:
        return ask()
    except Exception:
        return None
