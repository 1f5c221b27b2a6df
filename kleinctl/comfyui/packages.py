"""What a ComfyUI asks for of Python's packages, and the environment that is made for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kleinctl import environment as environments
from kleinctl.comfyui.checkout import releases
from kleinctl.environment import Environment, EnvironmentPlan
from kleinctl.problem import KleinctlError, Problem

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware

#: What environments made for ComfyUI are named after.
PURPOSE = "comfyui"
#: What belongs to the build of torch, and is never taken from requirements.txt.
TORCH = ("torch", "torchvision", "torchaudio")
#: ComfyUI starts without these: pages of help and examples, one node. What follows this comment it can do without too.
SPARE = ("comfyui-workflow-templates", "comfyui-embedded-docs", "comfy-angle")
REST = "#non essential"
#: Bytes of a requirements.txt; it has a page.
MAX_BYTES = 2**16


@dataclass(frozen=True)
class Lack:
    """A requirement that is not met: the package's name, what is wanted and found. `needed`: ComfyUI fails without."""

    name: str
    wanted: str
    found: str
    needed: bool


def requirements(program: Path) -> Iterator[tuple[str, bool]]:
    """The lines of its requirements.txt, where it has one, and whether it fails without.

    Raises:
        KleinctlError: it cannot be read, or a line is no requirement.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    file, needed = program / "requirements.txt", True
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise _unreadable(file, "it is no file")
    try:
        with file.open("rb") as opened:
            lines = opened.read(MAX_BYTES).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, f"the system says: {error}") from None
    for number, line in enumerate(lines, 1):
        needed = needed and not line.lower().startswith(REST)
        text = line.partition(" #")[0].strip()
        if text and not text.startswith(("#", "-")):
            try:
                name = environments._asked_for(Requirement(text).name)
            except InvalidRequirement:
                raise _unreadable(file, f"line {number} is {text[:60]!r}") from None
            yield text, needed and name not in SPARE


def _unreadable(file: Path, found: str) -> KleinctlError:
    return KleinctlError(
        Problem(
            f"{file} cannot be read",
            f"Wanted is a list of packages, one a line; {found}.",
            f'git -C "{file.parent}" checkout -- requirements.txt',
            name="comfyui-incomplete",
            path=str(file),
        )
    )


def environment(python: Path, name: str, folders: Sequence[str]) -> Environment:
    """What a Python has that imports from `folders`; a package without a version in an installer's words has none."""
    found = environments.inspect(python, name, folders)
    bare = (path.parent.name for folder in folders for path in Path(folder).glob("*/__init__.py"))
    return replace(found, packages={**dict.fromkeys(map(environments._asked_for, bare), ""), **found.packages})


def lacking(program: Path, environment: Environment) -> list[Lack]:
    """Which of its requirements an environment does not meet. Another version than it pins is none to fail by."""
    from packaging.requirements import Requirement

    found = []
    for text, needed in requirements(program):
        wanted = Requirement(text)
        version = environment.packages.get(environments._asked_for(wanted.name))
        if version != "" and environments._unmet(text, environment.packages) is not None:
            pinned = version is not None and all(each.operator == "==" for each in wanted.specifier)
            has = f"{wanted.name} {version}" if version else f"no {wanted.name}"
            found.append(Lack(wanted.name, f"{wanted.name}{wanted.specifier}", has, needed and not pinned))
    return found


def plan(program: Path | None, hardware: Hardware, cuda: bool, requires: Sequence[str] = ()) -> EnvironmentPlan:
    """The environment for a ComfyUI (None: one that is still to come, of which sizes alone are known) and `requires`.

    Raises:
        KleinctlError: there is no torch for this machine, or it asks for versions that exclude kleinctl's.
    """
    lines = [text for text, _ in requirements(program)] if program else []
    own = [line for line in lines if environments._asked_for(line) not in TORCH]
    own += [each for each in requires if environments._asked_for(each) not in {*map(environments._asked_for, own)}]
    made, more = environments.plan(own, hardware, cuda, PURPOSE), releases()
    return replace(
        made,
        download_bytes=made.download_bytes + more["download_bytes"],
        disk_bytes=made.disk_bytes + more["disk_bytes"],
    )


def names() -> list[str]:
    """The environments that were made for ComfyUI."""
    return [name for name in environments.names() if name.startswith(f"{PURPOSE}-")]
