"""Is a ComfyUI of the user's one that klein runs in? Read from its files; nothing of it is imported or changed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kleinctl.comfyui import find, packages, record
from kleinctl.comfyui.record import Checkout
from kleinctl.facts import comfyui as facts
from kleinctl.facts.comfyui import ComfyUI
from kleinctl.problem import Evidence, KleinctlError, Misuse, Problem

if TYPE_CHECKING:
    from kleinctl.environment import Environment

#: Seconds that its Python has to say which version it is, from a slow disk.
PYTHON_SECONDS = 30
#: Where Windows and other systems have the interpreter of an environment.
INTERPRETERS = (Path("Scripts", "python.exe"), Path("bin", "python"), Path("python.exe"))
#: Flags of a start script that a server started by kleinctl needs as well: where things are, and what works there.
MATTER = (
    "--models-directory", "--output-directory", "--input-directory", "--temp-directory", "--user-directory",
    "--extra-model-paths-config", "--database-url", "--cuda-malloc", "--disable-cuda-malloc", "--directml",
    "--force-fp32", "--force-fp16", "--fp16-vae", "--fp32-vae", "--bf16-vae", "--cpu", "--use-sage-attention",
    "--disable-dynamic-vram", "--default-device", "--cuda-device", "--oneapi-device-selector", "--cpu-vae",
    "--disable-all-custom-nodes", "--whitelist-custom-nodes", "--disable-xformers", "--use-split-cross-attention",
    "--use-quad-cross-attention", "--use-pytorch-cross-attention", "--use-flash-attention", "--force-upcast-attention",
    "--dont-upcast-attention", "--supports-fp8-compute", "--disable-triton-backend", "--disable-pinned-memory",
    "--disable-async-offload", "--disable-mmap",
)  # fmt: skip


@dataclass(frozen=True)
class Adoption:
    """A ComfyUI that can be used, and sentences about it that people should know."""

    checkout: Checkout
    remarks: tuple[str, ...]
    environment: Environment


def program(folder: Path) -> ComfyUI:
    """The ComfyUI whose main.py is in `folder` (or right below it).

    Raises:
        KleinctlError: there is none, or it is from before klein.
    """
    from kleinctl.checks import comfyui as checks

    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise _unreadable(folder)
    found = facts.read(folder)
    if found is None or found.layout not in ("checkout", "portable"):
        raise not_comfyui(folder)
    if found.version is None:
        raise not_comfyui(folder, "its comfyui_version.py says no version")
    problem = checks.comfyui_too_old.function(found)
    if isinstance(problem, Problem):
        raise KleinctlError(replace(problem, name=checks.comfyui_too_old.name))
    return found


def not_comfyui(folder: Path, found: str = "") -> KleinctlError:
    """The problem of a folder that is taken for a ComfyUI."""
    names = sorted(path.name for path in folder.iterdir())[:5] if folder.is_dir() else []
    has = found or (f"it has {', '.join(names)}" if names else "it is empty" if folder.is_dir() else "it is not there")
    return KleinctlError(
        Problem(
            f"{folder} is no ComfyUI",
            f"Wanted is the folder with ComfyUI's main.py and comfyui_version.py; {has}.",
            "kleinctl install --backend comfy   # installs one of its own",
            name="not-comfyui",
            path=str(folder),
        )
    )


def _unreadable(folder: Path) -> KleinctlError:
    return KleinctlError(
        Problem(
            f"{folder} cannot be read",
            "This user has to be allowed to list it and to read its files; the system does not allow it.",
            f'ls -ld "{folder}"   # shows whose it is',
            name="comfyui-unreadable",
            path=str(folder),
        )
    )


# The whole of it


def examine(given: Path, python: Path | None = None) -> Adoption:
    """Whether the ComfyUI in `given` can be used, with that `python` or its own.

    Raises:
        KleinctlError: it cannot; the problem says why.
        Misuse: it is kleinctl's own.
    """
    given = Path(os.path.abspath(given.expanduser()))  # noqa: PTH100 (links keep the name people know)
    if find._ours(given):
        why = "It is in use without being named; --comfyui is for yours."
        raise Misuse(Problem(f"{given} is kleinctl's own", why, "kleinctl install --backend comfy", name="usage"))
    try:
        folder, base = _parts(given)
        found = program(folder)
    except PermissionError:  # not of the folder itself, but of one around or in it
        raise _unreadable(given) from None
    root = Path(found.path)
    if not str(root).isprintable():  # no document of ours could carry it
        raise not_comfyui(given, "the folder's name has characters that cannot be shown, and has to be changed first")
    named = found.argument("--base-directory")
    base = base or (Path(os.path.normpath(_start(found) / named)) if named else None)
    running = [each for each in find.running() if each.of(root) and not each.ours]
    runs = running[0] if running else None
    interpreter = Path(os.path.abspath(python or _python(found, base, runs)))  # noqa: PTH100 (in an environment it is a link)
    environment = _environment(root, interpreter)
    remarks = [*_incomplete(found, environment), *_remarks(found, environment)]
    if running[1:]:
        remarks.append(f"it runs at ports {', '.join(str(each.port) for each in running)}; the first of these is used")
    _check_writable(base or root)
    checkout = Checkout(
        path=root,
        python=interpreter,
        owned=False,
        version=found.version,
        commit=_commit(root),
        base=base,
        arguments=_arguments(found),
        url=f"http://127.0.0.1:{runs.port if runs else _port(found)}",
    )
    return Adoption(checkout, tuple(remarks), environment)


def _parts(given: Path) -> tuple[Path, Path | None]:
    """The folder with the program, and the base directory where that is another one, as the Desktop app has it."""
    found = facts.read(given)
    if found is not None and found.layout == "base-directory":
        program = find.desktop_program()
        if program is None:
            raise not_comfyui(given, "it has models and settings, and the app that reads them was not found")
        return program, Path(found.path)
    if found is None:
        inside = find.inside(given)
        if len(inside) > 1:
            raise find.several([find.Candidate(each, "in that folder") for each in inside])
        return (inside[0] if inside else given), None
    return given, None


def _start(found: ComfyUI) -> Path:
    """The folder in which its script starts it."""
    return Path(found.path).parent if found.layout == "portable" else Path(found.path)


def _arguments(found: ComfyUI) -> tuple[str, ...]:
    """Those of its script's arguments that matter, with paths that hold anywhere."""
    kept: list[str] = []
    flag = ""
    for word in found.arguments:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        if flag in MATTER:
            folder = flag.endswith(("-directory", "-config")) and not word.startswith("--")
            kept.append(os.path.normpath(_start(found) / word) if folder else word)
    return tuple(kept)


def _port(found: ComfyUI) -> int:
    """Where it listens by its start script."""
    named = found.argument("--port") or ""
    return int(named) if named.isdecimal() and int(named) < 2**16 else find.PORT


# Its Python


def _python(found: ComfyUI, base: Path | None, running: find.Running | None) -> Path:
    """The interpreter that runs it: its own, that of the server that runs from it, or the Desktop app's."""
    homes = [base / ".venv"] if base else []
    own = next((path for each in homes for part in INTERPRETERS if (path := each / part).exists()), None)
    own = own or (Path(found.python) if found.python else None)
    python = own or (running.python if running else None) or _named_before(found) or _cut_off(Path(found.path))
    if python is None:
        raise KleinctlError(
            Problem(
                f"the Python of {found.name} was not found",
                f"It was looked for in venv and .venv of {found.path}, and beside it; a conda environment is not seen.",
                f'kleinctl install --backend comfy --comfyui "{found.path}" --comfyui-python PATH-OF-PYTHON',
                name="comfyui-without-python",
                path=found.path,
            )
        )
    return python


def _named_before(found: ComfyUI) -> Path | None:
    """The interpreter that it is used with already."""
    used = record.known()
    return used.python if used and used.path == Path(found.path) and used.python.exists() else None


def _cut_off(program: Path) -> Path | None:
    """The interpreter of an environment whose Python was taken away: a link to nothing."""
    links = (program / home / part for home in ("venv", ".venv") for part in INTERPRETERS)
    return next((path for path in links if path.is_symlink()), None)


def _environment(root: Path, python: Path) -> Environment:
    """What that Python has, where it starts: it alone knows all the folders that it imports from."""
    try:
        done = subprocess.run(
            [python, "-I", "-B", "-c", "import json, sys; print(json.dumps(sys.path))"],
            capture_output=True, stdin=subprocess.DEVNULL, timeout=PYTHON_SECONDS,
        )  # fmt: skip
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        if done.returncode == 0:
            return packages.environment(python, root.name, [str(each) for each in json.loads(done.stdout)])
    except subprocess.TimeoutExpired:
        said = f"nothing in {PYTHON_SECONDS} s"
    except OSError as error:
        said = error.strerror or str(error)[:300]
    except (ValueError, TypeError) as error:
        said = str(error)[:300]
    raise KleinctlError(
        Problem(
            f"the Python of {root} does not start",
            f"{python} has to run; it says: {' '.join(said.split()) or 'nothing'}",
            "kleinctl install --backend comfy   # installs a ComfyUI with an environment of its own",
            name="comfyui-python-broken",
            path=str(python),
        )
    )


def _incomplete(found: ComfyUI, environment: Environment) -> Iterator[str]:
    """Remarks about packages that it can do without; raises where one is missing that it cannot do without."""
    lacking = packages.lacking(Path(found.path), environment)
    needed = [each for each in lacking if each.needed]
    if needed:
        line = f'"{environment.python}" -m pip install -r "{Path(found.path) / "requirements.txt"}"'
        raise KleinctlError(
            Problem(
                f"{found.name} lacks {needed[0].name}" + (f" and {len(needed) - 1} more" if needed[1:] else ""),
                f"Its requirements.txt wants {', '.join(each.wanted for each in needed[:5])}; "
                f"{environment.python} has {', '.join(each.found for each in needed[:5])}.",
                line,
                name="comfyui-incomplete",
                path=str(environment.python),
                evidence=tuple(Evidence(each.name, each.found, each.wanted) for each in needed[:20]),
            )
        )
    for each in lacking:
        yield f"it asks for {each.wanted} and has {each.found}; klein runs all the same"


# What people should know


def _remarks(found: ComfyUI, environment: Environment) -> Iterator[str]:
    from kleinctl.fixes import git
    from kleinctl.fixes.comfyui import REPOSITORIES

    root, changed, address = Path(found.path), list[str](), ""
    try:
        risky = git.risky(root) if found.git else []  # settings that name programs, which git would run
        if risky:
            yield f"its git state is not known: with {', '.join(risky[:3])} set in it, git may run a program"
        elif found.git:
            changed = git.changes(root)
            address = git.run(root, "config", "--default", "", "--get", "remote.origin.url")
    except KleinctlError as error:
        yield f"its git state is not known: {error.problem.why}"
    if changed:
        count = (
            f"{len(changed)} of its files, {changed[0]} among them, were" if changed[1:] else f"its {changed[0]} was"
        )
        yield f"{count} changed, and {'stay as they are' if changed[1:] else 'stays as it is'}"
    if address and not any(git.same(address, each) for each in REPOSITORIES):
        yield f"it is a fork: {git.without_user(address)}"
    nodes = [each.name for each in found.custom_nodes if not each.disabled]
    if nodes:
        yield f"it has {len(nodes)} custom nodes ({', '.join(nodes[:3])}); klein needs none of them"
    if found.yaml_error:
        yield f"its {Path(found.yaml_file).name} cannot be read: {found.yaml_error}"
    if "torch" in environment.packages and environment.torch_cuda is None:
        yield f"its torch {environment.packages['torch']} has no CUDA, so it runs on the processor"


def _commit(root: Path) -> str | None:
    from kleinctl.fixes import git

    try:
        return (git.head(root) or None) if (root / ".git").exists() else None
    except KleinctlError:
        return None


def _check_writable(base: Path) -> None:
    """Raise where ComfyUI could not write its log, its settings and pictures."""
    places = [path for name in ("", "user", "output", "temp") if (path := base / name).is_dir()]
    closed = [path for path in places if not os.access(path, os.W_OK | os.X_OK)]
    if closed:
        raise KleinctlError(
            Problem(
                f"{closed[0]} cannot be written",
                "ComfyUI writes its log, settings and pictures there; this user is not allowed to.",
                f'ls -ld "{closed[0]}"   # shows whose it is; or: kleinctl install --backend comfy',
                name="folder-not-writable",
                path=str(closed[0]),
            )
        )


# The facts that doctor judges


def shown_by(checkout: Checkout) -> Path:
    """The folder that leads to all of it: its own, whose script names its base; or its base, as of the Desktop app."""
    own = facts.read(checkout.path)
    return checkout.path if checkout.base is None or (own and own.argument("--base-directory")) else checkout.base


def facts_of(checkout: Checkout) -> ComfyUI | None:
    """The ComfyUI in use, as a server that kleinctl starts would see it; None where it is gone."""
    with contextlib.suppress(KleinctlError):  # a home that cannot be written is for others to tell
        record.paths_file()
    more = ("--extra-model-paths-config", str(record.list_file()))
    base = ("--base-directory", str(checkout.base)) if checkout.base else ()
    found = facts.read(checkout.path, arguments=(*checkout.arguments, *base, *more), python=checkout.python)
    if found is None or not checkout.owned:
        return found
    return replace(found, environment=checkout.python.parents[1].name)  # one of the managed ones, judged among these
