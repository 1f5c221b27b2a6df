"""Which Python runs the worker: this one where it has what a backend needs, else a managed one.

A managed environment is a venv `envs/<torch build>-<digest of what is in it>/` with an `environment.json`. Its versions
are data, `environments.toml`. kleinctl is not in it: the worker's bootstrap says where kleinctl lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import site
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import documents
from kleinctl.home import envs_folder
from kleinctl.problem import Evidence, KleinctlError, Misuse, Problem, Remedy, did_you_mean
from kleinctl.units import bytes_text

if TYPE_CHECKING:
    from kleinctl.hardware import Gpu, Hardware, Package, Python

RECORD = "environment.json"
DRIVERS = "https://www.nvidia.com/drivers"
#: What `Environment.to_json` shows: the packages that pictures depend on.
SHOWN = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "pillow", "numpy")
#: What wants torch. An environment for nothing of these is a light one, with a few packages (bytes on disk).
NEED_TORCH, LIGHT, LIGHT_BYTES = frozenset(("torch", "diffusers", "transformers", "accelerate")), "light", 60_000_000
#: Where a venv has its interpreter.
PYTHON = Path("Scripts", "python.exe") if os.name == "nt" else Path("bin", "python")


@dataclass(frozen=True)
class Environment:
    """A Python and what is installed in it: `packages` by normalized name, and their versions.

    `torch_cuda` is the CUDA version that torch was built for ("13.0"), None for a build without CUDA or no torch.
    `name` is the folder's name of a managed environment, "this" for the interpreter that runs kleinctl, the name of a
    ComfyUI for the Python that runs it. `requires` has what the packages that matter ask for, as their metadata says
    (`Requires-Dist`), `user_site` is whether packages of the user's own folder are mixed in. `leaks` are packages that
    matter and come from outside of it, by where they come from: "PYTHONPATH", or the user's own folder ("user site").
    """

    python: Path
    packages: Mapping[str, str]
    torch_cuda: str | None = None
    managed: bool = False
    name: str = "this"
    python_version: str | None = None
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    user_site: bool = False
    leaks: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        """The environment as JSON documents carry it."""
        shown = {name: self.packages[name] for name in SHOWN if name in self.packages}
        told = {key: getattr(self, key) for key in ("torch_cuda", "managed", "name")}
        return {"python": str(self.python), "packages": shown, **told}


@dataclass(frozen=True)
class TorchBuild:
    """One build of torch as it is offered for download. Bytes are approximate and include its CUDA packages.

    `companions` are the torchvision and torchaudio that belong to it, from the same index.
    """

    name: str
    torch: str
    index: str
    cuda: str | None = None
    download_bytes: int = 0
    disk_bytes: int = 0
    companions: tuple[str, ...] = ()


@dataclass(frozen=True)
class EnvironmentPlan:
    """A managed environment before it is built.

    `python` is the interpreter it will be made from, `pins` exact requirements, a complete set but for torch; `extras`
    are those of a plugin that the pinned set does not know, `companions` what comes with torch. Without a `build` of
    torch only the extras are installed, as the pins have them. Bytes are approximate.
    """

    name: str
    folder: Path
    python: Path
    build: TorchBuild | None
    pins: tuple[str, ...]
    extras: tuple[str, ...] = ()
    download_bytes: int = 0
    disk_bytes: int = 0
    companions: tuple[str, ...] = ()

    @property
    def held(self) -> tuple[str, ...]:
        """The versions that no other package may replace."""
        return (*self.pins, *((f"torch=={self.build.torch}",) if self.build else ()), *self.companions)

    @property
    def steps(self) -> tuple[str, ...]:
        """What `build` will do, in order."""
        some = ", ".join(self.extras[:3]) + (f" and {len(self.extras) - 3} more" if len(self.extras) > 3 else "")
        torch = self.build and (
            f"install {len(self.pins)} packages",
            f"install torch {self.build.torch} ({self.build.name})",
        )
        return (
            "make a virtual environment",
            *(torch or ()),
            *((f"install {some}",) if self.extras else ()),
            "import torch and check versions" if torch else "check versions",
        )


@dataclass(frozen=True)
class BuildEvent:
    """Progress: step `step` of `steps`, what it is at, and bytes of the present download (0 of 0 outside of one)."""

    step: int
    steps: int
    title: str
    detail: str = ""
    done: int = 0
    total: int = 0


OnEvent = Callable[[BuildEvent], None]


# What is installed


#: Packages whose versions have to agree: who asks for something, and what is asked for.
MATTER = frozenset(
    (*SHOWN, "torchvision", "torchaudio", "huggingface-hub", "xformers", "flash-attn", "sageattention", "triton")
)
_ASKING = MATTER | {"scipy", "pandas", "opencv-python", "opencv-python-headless", "numba", "onnxruntime", "peft"}
#: The most that is read of a package's metadata, in bytes; what it asks for stands in its first lines.
MAX_METADATA = 2**17
#: Files `*.pth` of an environment that are read, and lines of each.
MAX_PTH = 50


def inspect(python: Path | None = None, name: str = "this", folders: Sequence[str] | None = None) -> Environment:
    """What another interpreter, or this one, has: read from file names, nothing is run or imported.

    `folders` are those that it imports from, by default its own.
    """
    from kleinctl.hardware.packages import packages_in

    if folders is None:
        folders = site.getsitepackages() if python is None else [str(folder) for folder in _site_packages(python)]
    torch = packages_in(folders).get("torch")
    infos = _infos(folders)
    version = "{}.{}.{}".format(*sys.version_info[:3]) if python is None else _python_version(python)
    leaks = _leaks(python, version)
    return Environment(
        python=python or Path(sys.executable),
        packages={package: found for package, (found, _) in infos.items()},
        torch_cuda=_cuda_of(torch) if torch else None,
        name=name,
        python_version=version,
        requires={package: asked for package, (_, info) in infos.items() if (asked := _requires(package, info))},
        user_site="user site" in leaks,
        leaks=leaks,
    )


def _cuda_of(torch: Package) -> str | None:
    """The CUDA version torch was built for; by its version's tag (`+cu128`) where its own file cannot be read."""
    tag = re.search(r"\+cu(\d+)(\d)$", torch.version or "")
    return torch.cuda if torch.cuda != "unknown" else f"{tag[1]}.{tag[2]}" if tag else None


def _site_packages(python: Path) -> list[Path]:
    """The folders that `python` imports packages from: of a venv, of an installation, of an embedded Python."""
    prefix = _prefix(python)
    found = (prefix / "Lib" / "site-packages", *sorted(prefix.glob("lib*/python3*/*-packages")))
    return [folder for folder in found if folder.is_dir()]


def import_folders(python: Path) -> list[str]:
    """The folders that `python` imports from: its own, those a `.pth` names, and the system's where it shares them.

    Python's own rules: https://docs.python.org/3/library/site.html; Debian's Python has packages in /usr/local too.

    Raises:
        OSError: they cannot be read.
    """
    own = _site_packages(python)
    files = [path for folder in own for path in sorted(folder.glob("*.pth"))[:MAX_PTH]]
    lines = [(path.parent, line.strip()) for path in files for line in _text(path).splitlines()[:MAX_PTH]]
    named = [folder / line for folder, line in lines if line and not line.startswith(("#", "import ", "import\t"))]
    prefix, shared = python.parent.parent, list[Path]()
    home = re.search(r"(?m)^home *= *(.+?)\s*$", _text(prefix / "pyvenv.cfg"))
    if home and _shares(prefix):
        shared += Path(home[1]).parent.glob("local/lib/python3*/dist-packages")
        shared += _site_packages(Path(home[1], "python3"))
    return list(dict.fromkeys(str(folder) for folder in (*own, *named, *shared) if folder.is_dir()))


def _text(path: Path) -> str:
    """The beginning of a small file; empty where there is none."""
    try:
        return documents.start_of(path, MAX_METADATA).decode("utf-8", "replace")
    except OSError:
        return ""


def _prefix(python: Path) -> Path:
    """The folder of the environment or installation that `python` belongs to."""
    prefix = python.parent.parent
    if (prefix / "pyvenv.cfg").is_file():
        return prefix
    return python.parent if (python.parent / "Lib").is_dir() else python.resolve().parent.parent


def _infos(folders: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Versions and metadata folders by name, as installers write them: `torch-2.13.0+cu130.dist-info`."""
    found: dict[str, tuple[str, str]] = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            for entry in os.listdir(folder):  # noqa: PTH208 (a third of the time)
                match = re.fullmatch(r"([A-Za-z0-9][\w.]*)-(\d[^-]*)(?:-py[\d.]+)?\.(?:dist|egg)-info", entry)
                if match:
                    name = re.sub(r"[_.]+", "-", match[1]).lower()
                    found.setdefault(name, (match[2], os.path.join(folder, entry)))  # noqa: PTH118
    return found


def _requires(package: str, info: str) -> tuple[str, ...]:
    """What a package that matters asks of others that do, without what it asks for its extras."""
    if package not in _ASKING:
        return ()
    try:
        with Path(info, "METADATA").open("rb") as file:
            head = file.read(MAX_METADATA).decode("utf-8", "replace").replace("\r", "").partition("\n\n")[0]
    except OSError:
        return ()
    lines = re.findall(r"^Requires-Dist: *([^\r\n]{1,300})", head, re.MULTILINE)
    return tuple(line for line in lines if "extra ==" not in line and _asked_for(line) in MATTER)


def _asked_for(requirement: str) -> str:
    """The name in a requirement, normalized: `huggingface-hub` of `huggingface_hub<3.0,>=1.31`."""
    return re.sub(r"[_.]+", "-", re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]).lower()


def _python_version(python: Path) -> str | None:
    """The version of another Python: a venv's as its `pyvenv.cfg` has it, else by the names of its files."""
    prefix = _prefix(python)
    with contextlib.suppress(OSError):
        noted = (prefix / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")[:10_000]
        match = re.search(r"^version(?:_info)? *= *(\d+\.\d+(?:\.\d+)?)", noted, re.MULTILINE)
        if match:
            return match[1]
    named = [
        path.name for pattern in ("lib/python3.*", "python3*._pth", "python3*.dll") for path in prefix.glob(pattern)
    ]
    match = next(
        filter(None, (re.fullmatch(r"python(3)\.?(\d+)(?:\._pth|\.dll)?", each) for each in sorted(named))), None
    )
    return f"{match[1]}.{match[2]}" if match else None


def _leaks(
    python: Path | None, version: str | None, environ: Mapping[str, str] = os.environ
) -> dict[str, tuple[str, ...]]:
    """Packages that matter which a program run with this Python imports from outside of it, by where they come from.

    Python's own rules: https://docs.python.org/3/library/site.html. kleinctl runs its workers with `-I`, past both.
    """
    prefix = Path(sys.prefix) if python is None else _prefix(python)
    if any(prefix.glob("python3*._pth")):  # an embedded Python looks nowhere else
        return {}
    folders = {"PYTHONPATH": [folder for folder in environ.get("PYTHONPATH", "").split(os.pathsep) if folder]}
    if not environ.get("PYTHONNOUSERSITE") and _shares(prefix):
        folders["user site"] = [_user_site(version or "", environ)]
    found = {source: sorted(MATTER & set(_infos(each))) for source, each in folders.items()}
    return {source: tuple(names) for source, names in found.items() if names}


def _shares(prefix: Path) -> bool:
    """Whether the Python there reads the user's own folder: one that is no venv, or a venv that was told to."""
    noted = _text(prefix / "pyvenv.cfg")
    told = re.search(r"^include-system-site-packages *= *true", noted, re.MULTILINE | re.IGNORECASE)
    return not noted or told is not None


def _user_site(version: str, environ: Mapping[str, str]) -> str:
    """The user's own folder of packages for a Python version."""
    major_minor = version.split(".")[:2]
    if os.name == "nt":
        return str(Path(environ.get("APPDATA", ""), "Python", f"Python{''.join(major_minor)}", "site-packages"))
    return str(Path.home() / ".local" / "lib" / f"python{'.'.join(major_minor)}" / "site-packages")


def missing(environment: Environment, requires: Sequence[str], cuda: bool, hardware: Hardware) -> list[str]:
    """Why `environment` does not do, in sentences: packages, and for `cuda` the card and driver of `hardware`."""
    reasons = [_unmet(requirement, environment.packages) for requirement in requires]
    torch = (wants_torch(requires) or not requires) and "torch" in environment.packages
    if cuda and torch and (unfit := unfit_torch(environment, hardware)):
        reasons.append(unfit[1])
    return [reason for reason in reasons if reason]


def _unmet(requirement: str, packages: Mapping[str, str]) -> str | None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    wanted = Requirement(requirement)
    version = packages.get(canonicalize_name(wanted.name))
    if wanted.marker and not wanted.marker.evaluate():
        return None
    if version is None:
        return f"{wanted.name} is not installed."
    return (
        None
        if _within(version, str(wanted.specifier))
        else f"{wanted.name} is {version}; wanted is {wanted.specifier}."
    )


def _within(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(specifier).contains(version, prereleases=True)
    except InvalidVersion:  # people rename folders
        return False


def unfit_torch(environment: Environment, hardware: Hardware) -> tuple[str, str] | None:
    """Why the torch of `environment` does not serve the card of `hardware`: a problem's name, and a sentence."""
    torch, cuda, gpu = environment.packages["torch"], environment.torch_cuda, hardware.gpu
    if gpu is None:
        return "nvidia-card", "There is no NVIDIA card to use."
    if cuda is None:
        return "torch-without-cuda", f"torch {torch} is a build without CUDA; {gpu.name} needs one with it."
    kernels = _kernels(cuda, torch, hardware.platform)
    if kernels and not _covers(kernels, gpu):
        newer = gpu.capability > max(map(numbers, kernels))
        name = "torch-lacks-card" if newer else "torch-dropped-card"
        return name, f"torch {torch} (CUDA {cuda}) has no kernels for {gpu.name} ({gpu.arch})."
    wanted = _driver_wanted(cuda, gpu)
    if not _driver_reaches(gpu, wanted):
        return (
            "driver-too-old",
            f"torch {torch} (CUDA {cuda}) wants driver {wanted} or newer; {gpu.name} has {gpu.driver}.",
        )
    return None


def known() -> tuple[Environment, ...]:
    """The environments a worker could run in, in the order in which they are tried: this one, then managed ones."""
    return (inspect(), *list_managed())


def find(
    requires: Sequence[str], hardware: Hardware, cuda: bool, among: Iterable[Environment] | None = None
) -> Environment | None:
    """The environment to run a worker in: of `known()`, or those given, the first that fits; None if there is none."""
    candidates = known() if among is None else among
    return next((each for each in candidates if not missing(each, requires, cuda, hardware)), None)


# Managed environments


def list_managed() -> list[Environment]:
    """The managed environments that are whole, the newest first; then those with a purpose of their own."""
    whole = [(folder / RECORD, _managed(folder)) for folder in _folders()]
    ready = [(record.stat().st_mtime, found) for record, found in whole if isinstance(found, Environment)]
    newest = [environment for _, environment in sorted(ready, key=lambda each: each[0], reverse=True)]
    return sorted(newest, key=lambda each: each.name.count("-") > 1)


def broken() -> list[Problem]:
    """A problem for each managed environment that cannot be used any more. `build` replaces such a one."""
    found = {folder: _managed(folder) for folder in _folders()}
    return [
        Problem(
            what=f"the environment {folder.name} is broken",
            why=why,
            fix=install_command(folder.name),
            name="environment-broken",
            path=str(folder),
            evidence=(Evidence(str(folder / RECORD), why.rstrip("."), "every package as it was installed"),),
            remedy=None
            if folder.name.startswith("comfyui-")
            else Remedy("rebuild-environment", {"environment": folder.name}),
        )
        for folder, why in found.items()
        if isinstance(why, str)
    ]


def install_command(name: str) -> str:
    """What builds the managed environment of that name."""
    return "kleinctl install" + (" --backend comfy" if name.startswith("comfyui-") else "")


def remove(name: str) -> None:
    """Delete a managed environment, whole or broken.

    Raises:
        Misuse: there is none of that name.
    """
    folders = {folder.name: folder for folder in _folders()}
    if name not in folders:
        why = f"There is {', '.join(folders) or 'none'}.{did_you_mean(name, folders)}"
        raise Misuse(Problem(f"there is no environment {name!r}", why, "kleinctl uninstall --help"))
    try:
        with _lock():
            discard(folders[name])
    except PermissionError as error:
        why = f"{error.strerror}: {error.filename}."
        raise KleinctlError(Problem(f"{name} is in use", why, "end what runs in it, and try again")) from None


def names() -> list[str]:
    """The names of all managed environments, the broken ones too."""
    return [folder.name for folder in _folders()]


def _folders() -> list[Path]:
    try:
        return sorted(path for path in envs_folder().iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _managed(folder: Path) -> Environment | str:
    """The environment in `folder`, or a sentence saying what is wrong with it."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        wanted = dict(line.split("==") for line in record["freeze"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{RECORD} is missing or damaged: the installation was not finished."
    python = folder / PYTHON
    if not python.exists():  # a venv's python is a link to the one it was made from
        return f"The Python it was made from is gone: {record.get('made_from', 'unknown')}."
    found = inspect(python, folder.name)
    lost = [name for name, version in wanted.items() if found.packages.get(name) != version]
    if lost:
        return f"{len(lost)} of its {len(wanted)} packages are not as they were installed: {', '.join(lost[:5])}."
    return replace(found, managed=True)


# Which torch


@cache
def data() -> dict[str, Any]:
    """`environments.toml`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(Path(__file__).with_name("environments.toml").read_text(encoding="utf-8"))


def torch_build(hardware: Hardware, cuda: bool) -> TorchBuild:
    """The build of torch to install: for the card and driver of `hardware`, or without CUDA.

    Of several that fit, the one that serves most of the machine's cards, then the one named first in the data.

    Raises:
        KleinctlError: no build fits this system, Python, card or driver.
    """
    _check_system(hardware)
    *with_cuda, cpu = (_build(row, hardware.platform) for row in data()["builds"])
    if not cuda:
        return cpu
    gpu = hardware.gpu
    if gpu is None:
        raise _no_build("there is no NVIDIA card to use", "The driver offers none.", "kleinctl doctor")
    serving = {build: _kernels(build.cuda, build.torch, hardware.platform) for build in with_cuda}
    covering = [build for build, kernels in serving.items() if _covers(kernels, gpu)]
    if not covering:
        newer = gpu.capability >= (10, 0)
        why = f"It has compute capability {gpu.compute_capability}; PyTorch's builds start at 5.0 (6.1 on Windows)."
        if newer:
            why = f"It has compute capability {gpu.compute_capability}, newer than the builds this kleinctl knows."
        fix, ref = 'kleinctl up --model klein-tiny "a red circle"', "A03" if newer else "A04"
        raise _no_build(f"no torch can use {gpu.name}", why, fix, ref=ref)
    fitting = [build for build in covering if _driver_reaches(gpu, _driver_wanted(build.cuda, gpu))]
    if not fitting:
        wanted = min((_driver_wanted(build.cuda, gpu) for build in covering), key=numbers)
        why = f"It has driver {gpu.driver}; the oldest that a torch for it works with is {wanted}."
        raise _no_build(f"the driver of {gpu.name} is too old", why, f"install driver 580 from {DRIVERS}", ref="A01")
    cards = [card for card in hardware.gpus if not card.hidden]
    return max(fitting, key=lambda build: sum(_covers(serving[build], card) for card in cards))


def _build(row: Mapping[str, Any], platform: str) -> TorchBuild:
    sizes = {key: row[key].get(platform, 0) for key in ("download_bytes", "disk_bytes")}
    return TorchBuild(**{**row, **sizes, "companions": tuple(row["companions"])})


def _kernels(cuda: str | None, torch: str, platform: str) -> list[str]:
    """The compute capabilities that a torch has kernels for; none where that is not known."""
    rows = [row for row in data()["kernels"] if row["cuda"] == cuda and _within(torch, row["torch"])]
    return rows[0].get(platform, rows[0]["capabilities"]) if rows else []


def _covers(kernels: Iterable[str], gpu: Gpu) -> bool:
    """Whether one of these runs on the card: the same first number, and a second no larger (CUDA C++ guide, 5.1)."""
    major, minor = gpu.capability
    return any((first, second) <= (major, minor) and first == major for first, second in map(numbers, kernels))


def _driver_wanted(cuda: str | None, gpu: Gpu) -> str:
    """The oldest driver for a build of this CUDA version on this card."""
    rows, major = data(), (cuda or "").partition(".")[0]
    return max(rows["drivers"].get(major, "0"), rows["card_drivers"].get(str(gpu.capability[0]), "0"), key=numbers)


def _driver_reaches(gpu: Gpu, wanted: str) -> bool:
    return gpu.driver is None or numbers(gpu.driver) >= numbers(wanted)


def numbers(version: str) -> tuple[int, ...]:
    """`580.65.06` as numbers that compare. Good for drivers, compute capabilities and pip's releases."""
    return tuple(map(int, re.findall(r"\d+", version)))


def _check_system(hardware: Hardware) -> None:
    """Raise where PyTorch offers no wheel at all: entry A05 of the failure catalogue."""
    if hardware.platform not in ("linux", "win32") or hardware.machine.lower() not in ("x86_64", "amd64", "unknown"):
        why = f"kleinctl makes them for Linux and Windows on x86-64; this is {hardware.os} on {hardware.machine}."
        fix = "pip install torch diffusers transformers accelerate"
        raise _no_build("there is no environment for this system", why, fix)
    if not usable(hardware.python):
        raise KleinctlError(no_python(hardware))


def usable(python: Python | None) -> bool:
    """Whether an environment can be made from this Python: one of 64 bits, of a version that the packages are for."""
    allowed = data()["python"]
    if python is None or python.version == "unknown":
        return True
    return python.bits == 64 and numbers(allowed["oldest"]) <= numbers(python.version)[:2] <= numbers(allowed["newest"])


def no_python(hardware: Hardware) -> Problem:
    """The problem of a Python that no environment can be made from. `doctor --fix` makes one from another."""
    allowed, python = data()["python"], hardware.python
    if python.bits != 64:
        what, why = "this Python is a 32-bit one", "PyTorch is made for 64-bit Pythons alone."
    else:
        what = f"Python {python.version} cannot run a model"
        why = f"The packages to install are made for {allowed['oldest']} to {allowed['newest']}."
    fetch = f"install uv (https://docs.astral.sh/uv), or Python {allowed['fetch']} from https://www.python.org"
    remedy = Remedy("build-environment", {}, "ask")
    fix = f"kleinctl doctor --fix   # makes an environment from another Python; where there is none: {fetch}"
    return Problem(what, why, fix, name="no-torch-build", ref="A05", remedy=remedy)


def _no_build(what: str, why: str, fix: str, ref: str = "A05") -> KleinctlError:
    return KleinctlError(Problem(what, why, fix, name="no-torch-build", ref=ref))


# The plan


def wants_torch(requires: Sequence[str]) -> bool:
    """Whether an environment for these requirements has torch; else it is a light one."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    return any(canonicalize_name(Requirement(each).name) in NEED_TORCH for each in requires)


def plan(requires: Sequence[str], hardware: Hardware, cuda: bool, purpose: str = "") -> EnvironmentPlan:
    """The managed environment that meets `requires` on this machine; made from another Python where this does not do.

    One with a `purpose` of its own is named after it, and has what comes with torch.

    Raises:
        KleinctlError: there is no torch for this machine, or a requirement contradicts the pinned versions.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from kleinctl.environment_build import another_python

    other = None if usable(hardware.python) else another_python()
    stack, here = data()["stack"], replace(hardware, python=other) if other else hardware
    build = torch_build(here, cuda) if purpose or wants_torch(requires) else None
    _check_system(here)
    _check_libc()
    version = other.version if other else "{}.{}.{}".format(*sys.version_info)
    told = {"python_version": ".".join(version.split(".")[:2]), "python_full_version": version}
    pinned = [pin for pin in map(Requirement, stack["pins"]) if not pin.marker or pin.marker.evaluate(told)]
    pins = tuple(f"{pin.name}{pin.specifier}" for pin in pinned)
    versions = {**({"torch": build.torch} if build else {}), **dict(pin.split("==") for pin in pins)}
    known = [each for each in requires if canonicalize_name(Requirement(each).name) in versions]
    against = [reason for each in known if (reason := _unmet(each, versions))]
    if against:
        raise KleinctlError(
            Problem(
                "a backend wants other versions than kleinctl installs",
                " ".join(against),
                f"pip install {shlex.join(requires)}",
                name="versions-clash",
            )
        )
    extras = tuple(each for each in requires if each not in known or build is None)
    extras = extras if build else (*extras, "pluggy")  # with which a plugin says what it offers
    version = "{}.{}".format(*sys.version_info)
    companions = build.companions if build and purpose else ()
    content = "\n".join([version, build.torch if build else "", *pins, *extras, *companions])
    kind = f"{purpose}{'-' if purpose else ''}{build.name if build else LIGHT}"
    name = f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return EnvironmentPlan(
        name=name,
        folder=envs_folder() / name,
        python=Path(other.executable if other else getattr(sys, "_base_executable", None) or sys.executable),
        build=build,
        pins=pins,
        extras=extras,
        download_bytes=build.download_bytes + stack["download_bytes"] if build else LIGHT_BYTES // 2,
        disk_bytes=build.disk_bytes + stack["disk_bytes"] if build else LIGHT_BYTES,
        companions=companions,
    )


def _check_libc() -> None:
    """Raise on a Linux whose C library PyTorch's wheels do not run with (musl; glibc before 2.28)."""
    from packaging.tags import platform_tags

    if sys.platform == "linux" and "manylinux_2_28_x86_64" not in platform_tags():
        why = "PyTorch's wheels want glibc 2.28 or newer; here is an older one, or musl."
        raise _no_build("this Linux's C library cannot run PyTorch", why, "use a newer Linux, or a container of one")


# Building


def build(plan: EnvironmentPlan, progress: OnEvent = lambda event: None, *, allow_large: bool = False) -> Environment:
    """Build the environment, or return it where it is there and whole.

    It is made beside and renamed, so an interrupted build leaves its log (`logs/install-<name>.log`) and nothing else.
    `allow_large` takes a torch with CUDA where one without was wanted and cannot be had.

    Raises:
        KleinctlError: something could not be installed; the problem has the last lines of the log and its path.
    """
    from kleinctl.environment_build import Builder

    builder = Builder(plan, progress, allow_large)
    with _lock(builder.waiting):
        found = _managed(plan.folder)
        if isinstance(found, Environment):
            return found
        for left in envs_folder().glob(".new-*"):  # we have the lock: whoever made these is gone
            shutil.rmtree(left, ignore_errors=True)
        _check_room(plan)
        try:
            builder.run()
            discard(plan.folder)
            _rename(builder.beside, plan.folder)
        except OSError as error:
            raise builder.failure(f"{error.strerror}: {error.filename}") from error
        finally:
            shutil.rmtree(builder.beside, ignore_errors=True)
        built = _managed(plan.folder)
    if isinstance(built, str):
        raise builder.failure(f"It was built, and then: {built}")
    return built


@contextlib.contextmanager
def _lock(waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time changes the environments; the operating system lets go of the lock when a process dies."""
    import filelock

    from kleinctl.store import make_folder

    make_folder(envs_folder())
    lock = filelock.FileLock(envs_folder() / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_room(plan: EnvironmentPlan) -> None:
    """Raise where the disk has no room for the downloads and what comes out of them, which are there together."""
    wanted, free = plan.download_bytes + plan.disk_bytes, shutil.disk_usage(envs_folder()).free
    if free < wanted:
        why = f"Wanted for a while are {bytes_text(wanted)}; {bytes_text(free)} are free."
        fix = "make room, or set KLEINCTL_HOME to a folder on another disk"
        raise KleinctlError(Problem(f"{envs_folder()} has no room for {plan.name}", why, fix, name="disk-full"))


def discard(folder: Path) -> None:
    """Take a folder away at once, and then delete it, however long that takes.

    Raises:
        PermissionError: Windows, where a program in it is running.
    """
    if folder.exists():
        hidden = folder.with_name(f".new-{os.getpid()}-{folder.name}")
        _rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    """Rename a folder; on Windows a virus scanner may hold new files for a moment."""
    for wait in (0.2, 0.5, 1, 2, 4):
        with contextlib.suppress(PermissionError):
            source.rename(target)
            return
        time.sleep(wait)
    source.rename(target)
