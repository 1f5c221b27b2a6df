"""Building a managed environment: venv, pinned packages, torch from its own index, and a first import."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from kleinctl import __version__
from kleinctl.environment import (
    PYTHON,
    RECORD,
    BuildEvent,
    EnvironmentPlan,
    OnEvent,
    TorchBuild,
    data,
    inspect,
    install_command,
    numbers,
    usable,
)
from kleinctl.hardware.facts import Python
from kleinctl.home import envs_folder, home, logs_folder, offline
from kleinctl.hub import certificates
from kleinctl.problem import KleinctlError, Problem

#: Seconds: an answer from a package index, a first `import torch` from a slow disk, gigabytes over a slow line.
PROBE_SECONDS, IMPORT_SECONDS, LONGEST_SECONDS = 5, 300, 24 * 3600
#: Seconds that a Python has to say its version.
PYTHON_SECONDS = 10
#: Nothing is compiled here, C or Python: byte code of all files takes 28 s and 190 MB, of those ever imported 8 s.
WHEELS = ("--only-binary", ":all:", "--no-compile")


def reachable(index: str) -> bool:
    """Whether a package index answers for torch within seconds. A certificate we do not trust is pip's to judge."""
    import http.client
    import ssl
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(f"{index}/torch/", method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    except (OSError, http.client.HTTPException, ValueError):
        return False


def trusting() -> dict[str, str]:
    """A variable that lets pip trust the certificates that were named for the hub; its own settings come first."""
    file = (certificates() or ("", ""))[1]
    return {"PIP_CERT": file} if file else {}


#: What the last words of pip mean, and what to do about it; the first that is found counts.
_HINTS = {
    r"No space left on device|not enough space": "make room, or set KLEINCTL_HOME to a folder on another disk",
    r"Windows Long Path": "allow long paths: https://pip.pypa.io/warnings/enable-long-paths",
    r"CERTIFICATE_VERIFY_FAILED|certificate verify failed": "pip config set global.cert YOUR-COMPANYS-CERTIFICATE.pem",
    r"DO NOT MATCH THE HASHES": "python -m pip cache purge",
    r"ensurepip|No module named '?venv": "sudo apt install python3-venv",
    r"WinError (126|1114)": "install https://aka.ms/vs/17/release/vc_redist.x64.exe",
    r"name resolution|NewConnection|[Tt]imed? ?out|refused|reset by|Proxy": "check the network, then: kleinctl install",
    r"torchvision::nms|libtorch_cuda": "let this machine reach https://download.pytorch.org",  # of another build
    r"No matching distribution": "let this machine reach https://pypi.org and https://download.pytorch.org",
}  # fmt: skip
_DOWNLOADING = re.compile(r"\s*Downloading (?:\S*/)?([\w.]+?)-\d\S*\.(?:whl|tar\.gz|zip) ")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass
class Builder:
    """One build under way: the step it is at, and the last lines of what its subprocesses print."""

    plan: EnvironmentPlan
    progress: OnEvent
    allow_large: bool
    step: int = 0
    package: str = ""
    last: deque[str] = field(default_factory=lambda: deque(maxlen=40))

    @property
    def beside(self) -> Path:
        """A short name: torch has files 175 characters down, and Windows takes paths of 260."""
        return envs_folder() / f".new-{os.getpid()}"

    @property
    def log(self) -> Path:
        return logs_folder() / f"install-{self.plan.name}.log"

    def run(self) -> None:
        """All steps, as `EnvironmentPlan.steps` tells them."""
        start = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text(f"kleinctl {__version__}, {self.plan.name}\n", encoding="utf-8")
        self.make_venv()
        if self.plan.build:
            self.begin()
            self.install("--no-deps", *WHEELS, *self.plan.pins)
            self.begin()
            self.install(*WHEELS, *self.torch_source(self.plan.build))
        if self.plan.extras:
            self.begin()
            constraints = self.beside / "tmp" / "constraints.txt"
            constraints.write_text("\n".join(self.plan.held), encoding="utf-8")
            self.install("--constraint", str(constraints), *self.plan.extras)
        self.begin()
        self.pip("check")
        torch = self.import_torch(self.plan.build) if self.plan.build else None
        self.write_record(torch, seconds=time.monotonic() - start)
        shutil.rmtree(self.beside / "tmp", ignore_errors=True)

    def begin(self) -> None:
        self.step += 1
        self.say()

    def say(self, detail: str = "", done: int = 0, total: int = 0) -> None:
        title = self.plan.steps[max(self.step, 1) - 1]
        self.progress(BuildEvent(self.step, len(self.plan.steps), title, detail, done, total))

    def waiting(self) -> None:
        self.say("another kleinctl is building one; waiting for it")

    def make_venv(self) -> None:
        self.begin()
        (self.beside / "tmp").mkdir(parents=True)
        self.call(str(self.plan.python), "-I", "-m", "venv", "--prompt", self.plan.name, str(self.beside))
        if not self.pip_is_new():
            with contextlib.suppress(KleinctlError):  # an older pip does as well, and tells less
                self.install(f"pip=={data()['pip']['pin']}")

    def pip_is_new(self) -> bool:
        return numbers(inspect(self.beside / PYTHON).packages.get("pip", "0")) >= numbers(data()["pip"]["oldest"])

    def torch_source(self, wanted: TorchBuild) -> list[str]:
        """pip's arguments for torch: PyTorch's own index, or else what pip is configured for, if that is the same."""
        if not offline() and reachable(wanted.index):
            return ["--index-url", wanted.index, f"torch=={wanted.torch}+{wanted.name}", *self.plan.companions]
        self.say(f"{wanted.index} cannot be reached; asking pip's own index for torch {wanted.torch}")
        source, report = [f"torch=={wanted.torch}", *self.plan.companions], self.beside / "tmp" / "report.json"
        self.install("--dry-run", "--quiet", "--report", str(report), *WHEELS, *source)
        offered = [each["metadata"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]
        found = offered_build({each["name"]: each["version"] for each in offered})
        if found == wanted.name or (self.allow_large and wanted.cuda is None):
            return source
        why = f"{wanted.index} cannot be reached, and pip's own index has the {found} build."
        fix = f"PIP_EXTRA_INDEX_URL=https://YOUR-MIRROR/whl/{wanted.name} kleinctl install"
        raise self.failure(why, fix, what=f"torch {wanted.torch} ({wanted.name}) cannot be had")

    def import_torch(self, wanted: TorchBuild) -> tuple[str, str | None]:
        """torch's version and CUDA, by importing it and its companions: that finds broken and foreign libraries."""
        modules = ", ".join(("torch", *(each.partition("=")[0] for each in self.plan.companions)))
        code = f"import json, {modules}; print(json.dumps([torch.__version__, torch.version.cuda]))"
        self.call(str(self.beside / PYTHON), "-I", "-c", code, timeout=IMPORT_SECONDS)
        version, cuda = json.loads(self.last[-1])
        if cuda != wanted.cuda and not (self.allow_large and wanted.cuda is None):
            raise self.failure(f"Installed was torch {version} for CUDA {cuda}; wanted is {wanted.name}.")
        return version, cuda

    def write_record(self, torch: tuple[str, str | None] | None, seconds: float) -> None:
        told = dict(zip(("version", "cuda"), torch or (), strict=False))
        build = {"torch": {**told, "build": asdict(self.plan.build)}} if self.plan.build else {}
        packages = sorted(inspect(self.beside / PYTHON).packages.items())  # pip, like `pip freeze`, leaves itself out
        record = {
            "schema": "kleinctl.environment/1",
            "name": self.plan.name,
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "made_from": str(self.plan.python),
            **build,
            "requirements": [*(self.plan.pins if torch else ()), *self.plan.extras],
            "freeze": [f"{name}=={version}" for name, version in packages if name != "pip"],
        }
        (self.beside / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    def install(self, *arguments: str) -> None:
        """Run the new environment's pip. The user's configuration of it holds; what is secret in there stays there."""
        options = ["--no-user", "--progress-bar", "raw" if self.pip_is_new() else "off"]
        self.pip("install", *options, *(["--no-index"] if offline() else []), *arguments)

    def pip(self, *arguments: str) -> None:
        self.call(str(self.beside / PYTHON), "-I", "-X", "utf8", "-u", "-m", "pip", *arguments)

    def call(self, *command: str, timeout: float = LONGEST_SECONDS) -> None:
        """Run a command to its end, every line into the log; whatever interrupts us ends the command too."""
        tmp = str(self.beside / "tmp")  # on the disk that was found to have room; /tmp may be small
        quiet = {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "TMPDIR": tmp, "TEMP": tmp, "TMP": tmp}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        pipes |= {"encoding": "utf-8", "errors": "replace", "env": {**trusting(), **os.environ, **quiet}}
        self.last.clear()
        with self.log.open("a", encoding="utf-8") as log, subprocess.Popen(command, **pipes) as child:
            log.write(f"\n$ {' '.join(command)}\n")
            limit = threading.Timer(timeout, child.kill)
            try:
                limit.start()
                for line in child.stdout or ():
                    self.heard(line.rstrip(), log)
                if child.wait():
                    self.heard(f"(ended with exit code {child.returncode})", log)
            except BaseException:
                child.kill()
                raise
            finally:
                limit.cancel()
        if child.returncode:
            raise self.failure()

    def heard(self, line: str, log: IO[str]) -> None:
        """A line of pip's: progress goes to the caller, the rest to the log."""
        if amount := re.fullmatch(r"Progress (\d+) of (\d+)", line):
            self.say(self.package, int(amount[1]), int(amount[2]))
            return
        line = _CREDENTIALS.sub("****@", line)
        log.write(line + "\n")
        self.last.append(line)
        if download := _DOWNLOADING.match(line):
            self.package = download[1].replace("_", "-")
            self.say(self.package)
        elif line.startswith("Installing collected packages: "):
            self.say(f"unpacking {line.count(',') + 1} packages")

    def failure(self, why: str = "", fix: str = "", what: str = "") -> KleinctlError:
        """The problem of a build that failed: the last lines that were printed, and where the others are."""
        said = "\n".join([line for line in self.last if "ERROR" in line][-4:] or list(self.last)[-4:])
        again = install_command(self.plan.name)
        hints = (hint for pattern, hint in _HINTS.items() if re.search(pattern, f"{why}\n{said}"))
        hint = (fix or next(hints, "kleinctl install")).replace("kleinctl install", again)
        return KleinctlError(
            Problem(
                what=what or f"the environment {self.plan.name} could not be built",
                why=f"{why or said}\nAll of it: {self.log}",
                fix=hint,
                name="install-failed",
                path=str(self.log),
            )
        )


# Another Python


def pythons_folder() -> Path:
    """Pythons that were fetched for environments."""
    return home() / "pythons"


def another_python() -> Python | None:
    """A Python on this machine that an environment can be made from, the newest version first; None if there is none.

    Each is run for a moment: names promise much, and a Python may lack its `venv`.
    """
    seen: set[str] = set()
    for path in _interpreters():
        real = os.path.realpath(path)
        if real not in seen and (found := _asked(path)) is not None and usable(found):
            return found
        seen.add(real)
    return None


def _interpreters() -> Iterator[Path]:
    """Where Pythons lie: fetched by us, on the PATH, in the folders of pyenv, uv and the installer for Windows."""
    rows = data()["python"]
    last = numbers(rows["newest"])[1]
    for minor in range(last, numbers(rows["oldest"])[1] - 1, -1):
        folders = (
            *pythons_folder().glob(f"cpython-3.{minor}*"),
            *Path.home().glob(f".pyenv/versions/3.{minor}.*"),
            *Path.home().glob(f".local/share/uv/python/cpython-3.{minor}.*"),
            *Path(os.environ.get("APPDATA") or os.devnull).glob(f"uv/python/cpython-3.{minor}.*"),
            *Path(os.environ.get("LOCALAPPDATA") or os.devnull).glob(f"Programs/Python/Python3{minor}"),
            *Path(os.environ.get("PROGRAMFILES") or os.devnull).glob(f"Python3{minor}"),
        )
        on_path = shutil.which(f"python3.{minor}")
        yield from (Path(on_path),) if on_path else ()
        for folder in folders:
            yield from (path for path in (folder / "bin" / "python3", folder / "python.exe") if path.exists())


def _asked(python: Path) -> Python | None:
    """What a Python says of itself; None where it does not run or cannot make an environment."""
    code = (  # wheels are for CPython with its lock
        "import ensurepip, json, struct, sys, sysconfig, venv; "
        "assert sys.implementation.name == 'cpython' and not sysconfig.get_config_var('Py_GIL_DISABLED'); "
        "print(json.dumps(['.'.join(map(str, sys.version_info[:3])), "
        "getattr(sys, '_base_executable', None) or sys.executable, struct.calcsize('P') * 8]))"
    )
    try:
        said = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, stdin=subprocess.DEVNULL, timeout=PYTHON_SECONDS
        ).stdout
        version, executable, bits = json.loads(said)
        return Python(str(version), str(executable), int(bits), venv=True)
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def offered_build(packages: Mapping[str, str]) -> str:
    """Which build of torch these packages make up: "cpu", "cu130" ..., by names and versions.

    PyPI's torch has no "+cu130" after its version. For Windows it is the CPU build; for Linux it is one with CUDA and
    asks for gigabytes of nvidia packages, whose versions the package cuda-toolkit sets.
    """
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in packages.items()}
    tag = versions.get("torch", "").partition("+")[2]
    toolkit = numbers(versions.get("cuda-toolkit", ""))
    if tag:
        return tag
    if toolkit:
        return "cu" + "".join(map(str, toolkit[:2]))
    return "CUDA" if any(name.startswith("nvidia-") for name in versions) else "cpu"
