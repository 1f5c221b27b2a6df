"""Have a ComfyUI of kleinctl's own: plan it, bring program and environment, move on from an older one, take it away.

The program lies in `comfyui/ComfyUI-<version>-<commit>/`, its environment in `envs/comfyui-...`, and what ComfyUI
writes and the user adds in `comfyui/data`, which no install touches. What is whole is not done again, so what broke off
goes on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kleinctl import environment as environments
from kleinctl import store
from kleinctl.comfyui import adopt, checkout, find, packages, record
from kleinctl.comfyui.checkout import DATA, Say, Wanted, releases
from kleinctl.comfyui.record import Checkout
from kleinctl.environment import EnvironmentPlan, OnEvent, numbers
from kleinctl.fetch import no_room
from kleinctl.problem import KleinctlError, Problem

if TYPE_CHECKING:
    from kleinctl.environment import Environment
    from kleinctl.hardware import Hardware

#: The first CUDA version with ComfyUI's fast fp8 kernels, the oldest driver for it, and the first card with them.
KERNELS, KERNEL_DRIVER, KERNEL_CARD = (13,), (580,), (7, 5)
#: The first card that ComfyUI computes in nvfp4 on: RTX 50.
NVFP4_CARD = (12, 0)


@dataclass(frozen=True)
class ComfyPlan:
    """What has to be done to have a ComfyUI of kleinctl's own. Bytes.

    `program` is where it lies already, `environment` is planned for what is there (sizes alone, where nothing is yet),
    `ready` whether that is built, `former` the one in use until now. `remarks` are sentences, `problems` in the way.
    """

    wanted: Wanted
    program: Path | None
    environment: EnvironmentPlan
    ready: bool
    former: Checkout | None
    remarks: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is to be done."""
        return self.program is not None and self.ready and self.former is not None and self.former.path == self.program

    @property
    def fetch_bytes(self) -> int:
        """What is still to come over the network, about."""
        program = 0 if self.program else releases()["checkout_bytes"]
        return program + (0 if self.ready else self.environment.download_bytes)

    @property
    def steps(self) -> tuple[str, ...]:
        """What would be done, in order."""
        told = []
        if self.program is None:
            told.append(f"bring ComfyUI {self.wanted.ref} (commit {self.wanted.commit[:8]}) from {self.wanted.shown}")
        if not self.ready:
            told.append(f"make a Python environment for it with torch {_torch(self.environment)}")
        if self.former is not None and self.former.path != self.program:
            kept = "its pictures, settings and custom nodes stay" if self.former.owned else "it stays as it is"
            told.append(f"use it in place of {self.former.path}; {kept}")
        return tuple(told)


def _torch(plan: EnvironmentPlan) -> str:
    return f"{plan.build.torch} ({plan.build.name})" if plan.build else ""


# Planning


def plan(
    hardware: Hardware,
    cuda: bool,
    ref: str | None = None,
    address: str | None = None,
    precision: str | None = None,
    more_bytes: int = 0,
    requires: Sequence[str] = (),
) -> ComfyPlan:
    """What has to be done. Without `ref` and `address` one that kleinctl installed stays as it is.

    `more_bytes` is what else will be written to the same disk, the model's files; `requires` is what kleinctl's own
    worker needs, which is put into the same environment.

    Raises:
        KleinctlError: there is no such commit, git is missing, or there is no torch for this machine.
    """
    former = record.known()
    stays = former is not None and former.owned and not (ref or address) and (former.path / "main.py").is_file()
    wanted = _as_it_is(former) if stays and former is not None else checkout.wanted(ref, address)
    program = checkout.present(wanted.commit)
    environment = packages.plan(program, hardware, cuda, requires)
    ready = program is not None and environment.name in {each.name for each in environments.list_managed()}
    return ComfyPlan(
        wanted, program, environment, ready, former,
        remarks=(
            *_remarks(former, wanted, program),
            *kernel_remarks(hardware, environment.build.cuda if environment.build else None, precision),
        ),
        problems=tuple(_no_room(program is None, None if ready else environment, more_bytes)),
    )  # fmt: skip


def _as_it_is(former: Checkout) -> Wanted:
    """The commit that is in use, as what is wanted."""
    from kleinctl.fixes import git

    commit = git.head(former.path) or former.commit or ""
    known = {pin: tag for tag, pin in releases()["commits"].items()}
    try:
        address = git.run(former.path, "remote", "get-url", "origin")
    except KleinctlError:  # what git knows of it is damaged
        address = releases()["address"]
    return Wanted(address, known.get(commit, commit), commit, pinned=commit in known)


def _no_room(program: bool, environment: EnvironmentPlan | None, more: int) -> list[Problem]:
    need = releases()["checkout_bytes"] if program else 0
    need += environment.download_bytes + environment.disk_bytes if environment else 0
    folder = store.existing_parent(record.folder())
    free = store.free_bytes(folder)
    return [no_room(folder, need + more, free)] if need and need + more > free else []


def _remarks(former: Checkout | None, wanted: Wanted, program: Path | None) -> list[str]:
    told, newest = [], releases()["release"]
    if program is None and not wanted.pinned:
        told.append(f"{wanted.ref} is no release that kleinctl knows: its commit is compared with nothing")
    if former is not None and former.owned and wanted.pinned and numbers(wanted.ref) < numbers(newest):
        told.append(f"{newest} is newer: kleinctl install --backend comfy --comfyui-ref {newest}")
    if former is None:
        told += [f"{each.path} has a ComfyUI ({each.how}); --comfyui uses it instead" for each in find.candidates()[:3]]
    return told


def kernel_remarks(hardware: Hardware, cuda: str | None, precision: str | None = None) -> list[str]:
    """Why fp8 or nvfp4 is not as fast here as it can be, with torch for this CUDA version."""
    gpu, kind = hardware.gpu, precision or "fp8"
    if precision == "bf16":
        return []
    if gpu is None:
        return ["without an NVIDIA card ComfyUI computes on the processor: minutes a picture, and fp8 gains nothing"]
    if cuda is None:
        return []
    if gpu.capability < KERNEL_CARD:
        return [f"{gpu.name} ({gpu.arch}) has no fast fp8 kernels; pictures come out the same, more slowly"]
    if numbers(cuda) >= KERNELS:
        return []
    driver = gpu.driver is not None and numbers(gpu.driver) < KERNEL_DRIVER
    why = f"and that driver 580; here is {gpu.driver}" if driver else f"here it is for {cuda}"
    return [f"the fast {kind} kernels want torch for CUDA 13 {why}. Pictures come out the same, more slowly"]


def check_precision(precision: str | None, hardware: Hardware) -> None:
    """Whether this machine's card computes in it.

    Raises:
        KleinctlError: it does not.
    """
    gpu = hardware.gpu
    if precision == "nvfp4" and (gpu is None or gpu.capability < NVFP4_CARD):
        has = f"{gpu.name} has {gpu.compute_capability}" if gpu else "there is no NVIDIA card here"
        raise KleinctlError(
            Problem(
                "nvfp4 weights are not for this machine",
                f"They want a card of compute capability 12.0 (RTX 50); {has}.",
                "kleinctl install --backend comfy --precision fp8",
                name="nvfp4-without-card",
            )
        )


# Carrying it out


def carry_out(
    asked: ComfyPlan, hardware: Hardware, cuda: bool, say: Say, on_event: OnEvent, requires: Sequence[str] = ()
) -> Checkout:
    """Have the ComfyUI of `asked`, and use it from now on. The former one is in use until the new one is whole.

    `say` hears what is done, `on_event` how the environment is built.

    Raises:
        KleinctlError: something of it cannot be had. What was in use stays in use.
    """
    for problem in asked.problems:
        raise KleinctlError(problem)
    with store.locked(say):
        program = checkout.bring(asked.wanted, say)
    environments.build(packages.plan(program, hardware, cuda, requires), on_event)
    with store.locked(say):  # another install may have ended meanwhile, and have tidied away what it does not use
        program = checkout.bring(asked.wanted, say)
        environment = environments.build(packages.plan(program, hardware, cuda, requires), on_event)
        return _use(program, asked.wanted, environment, say)


def _use(program: Path, wanted: Wanted, environment: Environment, say: Say) -> Checkout:
    """Put a program and an environment that are whole to use, and take away what they replace."""
    for name in DATA:
        store.make_folder(record.data_folder() / name)
    new = Checkout(
        path=program,
        python=environment.python,
        owned=True,
        version=adopt.program(program).version,
        commit=wanted.commit,
        base=record.data_folder(),
    )
    former = record.known()
    if former != new:
        record.remember(new)
    record.paths_file()
    if former is not None and former.owned and former.python != new.python:
        for listed in sorted(record.data_folder().glob("custom_nodes/*/requirements.txt")):
            say(f'{listed.parent.name} stays; what it needs: "{new.python}" -m pip install -r "{listed}"')
    for path in checkout.tidy(program):
        say(f"moved to {path}")
    for path in checkout.programs():
        if path != program:
            say(f"left, for it runs or files of it were changed: {path}")
    for name in packages.names():
        if name != environment.name:
            environments.remove(name)
    return new


def use(adoption: adopt.Adoption) -> Checkout:
    """Use a ComfyUI of the user's from now on: kleinctl's own record is all that is written.

    Raises:
        KleinctlError: `KLEINCTL_HOME` cannot be written.
    """
    record.remember(adoption.checkout)
    record.paths_file()
    return adoption.checkout


# Taking it away


@dataclass(frozen=True)
class Removed:
    """What an uninstall took away: folders of programs, and environments; `left` is what the user or ComfyUI made.

    `changed` are programs that stay as well: files of them were changed, or git does not know them.
    """

    programs: tuple[Path, ...]
    environments: tuple[str, ...]
    left: tuple[Path, ...]
    changed: tuple[Path, ...]
    freed_bytes: int


def uninstall(say: Say = lambda text: None) -> Removed:
    """Take away what kleinctl brought of ComfyUI. An adopted one is no longer used, and is as it was.

    Raises:
        KleinctlError: something cannot be removed, or is in use.
    """
    with store.locked(say):
        before = checkout.programs()
        _check_idle(before)
        sizes = {path: _size(path) for path in before}
        record.forget()
        checkout.tidy(None)
        record.list_file().unlink(missing_ok=True)
        for left in record.folder().glob(".new-*"):
            checkout.remove(left)
        _remove_run()
        gone = tuple(packages.names())
        for name in gone:
            environments.remove(name)
        own = (record.data_folder(), record.run_folder())  # of the latter what workflows have saved
        kept = tuple(sorted(path for data in own for path in data.rglob("*") if path.is_file() or path.is_symlink()))
        _remove_empty(record.folder())
        programs = tuple(path for path in before if not path.exists())
        changed = tuple(path for path in before if path.exists())
        return Removed(programs, gone, kept, changed, sum(sizes[path] for path in programs))


def _remove_run() -> None:
    """Remove what servers that kleinctl started have written, but for what users' own workflows saved: `output`.

    Links are removed, and what they lead to stays.
    """
    run = record.run_folder()
    with store.writing(run):
        for path in [run] if run.is_symlink() else sorted(run.glob("*")):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            elif path.name != "output":
                checkout.remove(path)


def _check_idle(programs: Sequence[Path]) -> None:
    """Raise where one of these runs, or a server that kleinctl started: it would fail in the middle of a picture."""
    from filelock import FileLock, Timeout

    for lock in record.run_folder().glob("*.lock"):
        try:
            FileLock(lock).acquire(timeout=0).lock.release()
        except Timeout:
            raise KleinctlError(
                Problem(
                    "a ComfyUI that kleinctl started is running",
                    "Nothing of it can be taken away while a picture is being made.",
                    "kleinctl serve --stop   # or wait until the picture is there",
                    name="comfyui-running",
                    path=str(lock),
                )
            ) from None
    for each in find.running():
        if any(each.of(program) for program in programs):
            raise KleinctlError(
                Problem(
                    f"the ComfyUI in {each.path} is running",
                    f"Nothing of it can be taken away while it listens on port {each.port}.",
                    "kleinctl serve --stop   # or end it where it was started",
                    name="comfyui-running",
                    path=str(each.path),
                )
            )


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _remove_empty(folder: Path) -> None:
    """Remove empty folders, but for git's own: without those a checkout that stays, or a custom node, is broken."""
    for parent, _, _ in os.walk(folder, topdown=False):
        if ".git" not in Path(parent).relative_to(folder).parts:
            with contextlib.suppress(OSError):
                Path(parent).rmdir()
