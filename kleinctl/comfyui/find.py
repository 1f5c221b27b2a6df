"""Where ComfyUIs lie on people's machines: those that run, and the folders that installers use."""

from __future__ import annotations

import contextlib
import json
import os
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kleinctl import documents
from kleinctl.comfyui import record
from kleinctl.facts import comfyui as facts
from kleinctl.problem import KleinctlError, Misuse, Problem

#: The port that ComfyUI listens on if nothing else is said.
PORT = 8188
#: Where a ComfyUI lies in the folder of: a portable, Stability Matrix (also with its library beside it), SwarmUI on
#: Linux and on Windows, the Desktop app.
INSIDE = (
    "ComfyUI", "Packages/*", "Data/Packages/*", "dlbackend/ComfyUI", "dlbackend/comfy/ComfyUI", "resources/ComfyUI",
)  # fmt: skip
#: Folders of such programs, as their installers and guides name them.
NAMES = (
    "ComfyUI", "comfyui", "ComfyUI_windows_portable", "ComfyUI_windows_portable_nvidia", "StabilityMatrix", "SwarmUI",
    "StableSwarmUI",
)  # fmt: skip
#: Folders of a home that people unpack and clone into.
PARENTS = (".", "Documents", "Downloads", "Desktop", "git", "src", "code", "projects", "ai", "AI", "apps")
#: Bytes of another program's settings.
MAX_SETTINGS = 2**16


@dataclass(frozen=True)
class Candidate:
    """A folder that has a ComfyUI, and how it was found."""

    path: Path
    how: str


@dataclass(frozen=True)
class Running:
    """A ComfyUI that runs: the folder of its main.py, the Python that runs it, and where it answers, if it does.

    The folder is named as the system has it, past links. `ours` is whether kleinctl started it, on a port for that
    time alone.
    """

    path: Path
    python: Path | None
    port: int
    ours: bool = False

    def of(self, program: Path) -> bool:
        """Whether it runs from this folder."""
        return os.path.realpath(self.path) == os.path.realpath(program)


def candidates() -> list[Candidate]:
    """ComfyUIs of the user's on this machine, each once, those that run first."""
    found: dict[str, Candidate] = {}
    for candidate in _places():
        read = facts.read(candidate.path)
        if read is None or read.layout == "models" or _ours(Path(read.path)):
            continue
        if read.layout == "base-directory" and desktop_program() is None:
            continue
        found.setdefault(os.path.realpath(read.path), candidate)
    return list(found.values())


def the_one() -> Path:
    """The user's ComfyUI, where there is one.

    Raises:
        KleinctlError: there is none.
        Misuse: there are several; all are named.
    """
    found = candidates()
    if len(found) > 1:
        raise several(found)
    if not found:
        raise KleinctlError(
            Problem(
                "no ComfyUI was found on this machine",
                f"None runs, and none lies in {', '.join(NAMES[:4])} or the like of the home folder.",
                "kleinctl install --backend comfy --comfyui FOLDER   # or, without --adopt, install one",
                name="comfyui-none-found",
            )
        )
    return found[0].path


def several(found: Sequence[Candidate]) -> Misuse:
    """The problem of more than one ComfyUI where one has to be named."""
    listed = "\n".join(f"{each.path}  ({each.how})" for each in found[:20])
    return Misuse(
        Problem(
            f"there are {len(found)} ComfyUIs, and one has to be named",
            listed,
            f'kleinctl install --backend comfy --comfyui "{found[0].path}"',
            name="comfyui-several",
        )
    )


def inside(folder: Path) -> list[Path]:
    """ComfyUIs in the folder of a program that brings one."""
    below = [path for pattern in INSIDE for path in sorted(folder.glob(pattern))]
    read = ((path, facts.read(path)) for path in below if path.is_dir())
    return [path for path, found in read if found is not None and found.layout in ("checkout", "portable")]


def _places() -> Iterator[Candidate]:
    for each in running():
        if not each.ours:
            yield Candidate(each.path, f"running, port {each.port}")
    base = _desktop_base()
    if base is not None:
        yield Candidate(base, "the Desktop app's")
    library = _library()
    roots = [*([library] if library else []), *_roots()]
    for root in roots:
        yield Candidate(root, "found in its folder")
        with contextlib.suppress(OSError):
            for path in inside(root):
                yield Candidate(path, f"of {root.name}")


def _roots() -> Iterator[Path]:
    """Folders that may be, or have, a ComfyUI: in the home folder, on Windows also on each disk and in AppData."""
    homes = [Path.home() / parent for parent in PARENTS]
    if os.name == "nt":
        homes += [Path(f"{letter}:\\") for letter in string.ascii_uppercase if Path(f"{letter}:\\").is_dir()]
        homes += [Path(value) for name in ("APPDATA", "LOCALAPPDATA") if (value := os.environ.get(name))]
    else:
        homes += [Path("/opt"), Path("/workspace")]
    for parent in homes:
        with contextlib.suppress(OSError):  # one that this user may not look into
            yield from [path for name in NAMES if (path := parent / name).is_dir()]


def _ours(path: Path) -> bool:
    return path.resolve().is_relative_to(record.folder().resolve())


def _desktop_base() -> Path | None:
    """The folder that the Desktop app keeps models and settings in, by its own settings."""
    named = _setting(facts._desktop_settings() / "config.json", "basePath")
    return Path(named) if named and Path(named).is_dir() else None


def desktop_program() -> Path | None:
    """Where the Desktop app has ComfyUI's program: its resources, by the folders its installer uses."""
    local = os.environ.get("LOCALAPPDATA")
    roots = [Path(local, "Programs", name) for name in ("ComfyUI", "@comfyorgcomfyui-electron")] if local else []
    roots += [Path("/opt/ComfyUI"), Path("/Applications/ComfyUI.app/Contents")]
    places = (root / name / "ComfyUI" for root in roots for name in ("resources", "Resources"))
    return next((path for path in places if (path / "main.py").is_file()), None)


def _library() -> Path | None:
    """The folder in which Stability Matrix keeps its packages, by its own settings."""
    roaming = os.environ.get("APPDATA") or os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    named = _setting(Path(roaming, "StabilityMatrix", "library.json"), "LibraryPath")
    return Path(named) if named and Path(named).is_dir() else None


def _setting(file: Path, key: str) -> str | None:
    """A text out of another program's JSON settings; None where there is no such thing."""
    try:
        value = json.loads(documents.start_of(file, MAX_SETTINGS).removeprefix(b"\xef\xbb\xbf")).get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return value if isinstance(value, str) and value.isprintable() else None


# Those that run


def running() -> list[Running]:
    """ComfyUIs that run as this user: processes with a ComfyUI's main.py among their arguments."""
    import psutil

    found: list[Running] = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.endswith("main.py") for word in words[1:4]):
            with contextlib.suppress(psutil.Error, OSError):
                found += _running(process, words)
    return found


def _running(process: object, words: Sequence[str]) -> Iterator[Running]:
    start = Path(process.cwd())  # type: ignore[attr-defined]
    script = next(word for word in words[1:4] if word.endswith("main.py"))
    program = Path(os.path.normpath(start / script)).parent
    if facts._is_program(program):
        port, user = (facts.argument(tuple(words), flag) or "" for flag in ("--port", "--user-directory"))
        ours = Path(user).is_relative_to(record.run_folder())
        yield Running(program, _interpreter(process, start, words[0]), int(port) if port.isdigit() else PORT, ours)


def _interpreter(process: object, start: Path, word: str) -> Path | None:
    """The Python of a process by the name it was started with: what that is a link to is not the environment's."""
    active = process.environ().get("VIRTUAL_ENV")  # type: ignore[attr-defined]
    named = [start / word] if os.path.dirname(word) else []  # noqa: PTH120 (an empty one tells a bare name)
    named += [Path(active, "bin", "python"), Path(active, "Scripts", "python.exe")] if active else []
    whole = (Path(os.path.normpath(path)) for path in (*named, Path(process.exe())))  # type: ignore[attr-defined]
    return next((path for path in whole if path.is_file()), None)
