"""A ComfyUI out of git: which commit is meant, and bringing it here. Its code is never imported."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from kleinctl import store
from kleinctl.comfyui import record
from kleinctl.home import offline
from kleinctl.problem import KleinctlError, Problem, did_you_mean, shell

Say = Callable[[str], None]
#: A commit as git writes it in full.
COMMIT = re.compile(r"[0-9a-f]{40}")
#: What is never a file of the user's: byte code that Python leaves behind.
BYTE_CODE = re.compile(r"(?:^|/)__pycache__/|\.pyc$")
#: How the address of a server begins: `https://`, or `git@host:`; one letter is a disk of Windows.
SERVER = re.compile(r"[\w+.-]+://|[\w.@-]{2,}:")
#: What git says in the same words each time, around what it means.
NOISE = re.compile(r"^Fatal: | fatal: Could not read from remote repository\. Please make sure .*")
#: Folders that `--base-directory` leads to: files in them move there, all others stay beside main.py.
DATA = ("models", "input", "output", "custom_nodes", "user")


@cache
def releases() -> dict[str, Any]:
    """`releases.toml`."""
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    return tomllib.loads(Path(__file__).with_name("releases.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Wanted:
    """A commit of a repository, `ref` as it was named. `pinned` is whether the commit is the one in `releases.toml`."""

    address: str
    ref: str
    commit: str
    pinned: bool

    @property
    def shown(self) -> str:
        """The address as people and logs may see it."""
        from kleinctl.fixes import git

        return git.without_user(self.address)


def wanted(ref: str | None = None, address: str | None = None) -> Wanted:
    """Which commit is meant: of a release that is known, or what the repository calls `ref`.

    Raises:
        KleinctlError: git is missing, or the repository does not answer, or has no such thing.
    """
    if shutil.which("git") is None:
        fix = "winget install --id Git.Git" if os.name == "nt" else "sudo apt install git"
        why = "ComfyUI comes out of git; wanted is the program git, and there is none in the folders of PATH."
        raise _problem("git is not installed", why, f"{fix}   # or from https://git-scm.com/downloads", "git-failed")
    ref, address = ref or releases()["release"], _whole(address or releases()["address"])
    pin = releases()["commits"].get(ref if ref.startswith("v") else f"v{ref}")
    if pin:
        return Wanted(address, ref if ref.startswith("v") else f"v{ref}", pin, pinned=True)
    if COMMIT.fullmatch(ref):
        return Wanted(address, ref, ref, pinned=False)
    return Wanted(address, ref, _asked(address, ref), pinned=False)


def _whole(address: str) -> str:
    """An address; of a repository on this machine its whole path, where there is one."""
    path = Path(address).expanduser()
    if SERVER.match(address):
        return address
    repository = path.is_file() or any((path / name).exists() for name in (".git", "HEAD"))  # a file may be a bundle
    if not repository:
        found = "it has no .git" if path.is_dir() else "there is no such folder"
        raise _cannot_be_had(str(path.absolute()), f"Wanted is a URL, or the folder of a git repository; {found}.")
    return str(path.absolute())


def _cannot_be_had(address: str, why: str) -> KleinctlError:
    from kleinctl.fixes import git

    shown = git.without_user(address)
    fix = f"{shell('git', 'ls-remote', shown)}   # shows whether it answers; --comfyui-url names another"
    return _problem(f"ComfyUI cannot be had from {shown}", why, fix, "git-failed")


def _asked(address: str, ref: str, of: str = "commit") -> str:
    """The commit (or the `name`) of a tag or branch, by the repository."""
    from kleinctl.fixes import git

    _reachable(address)
    with _asking(address):
        lines = git.run(None, "ls-remote", "--tags", "--heads", "--", address, seconds=git.ASK).splitlines()
    there = {name: commit for commit, _, name in (line.partition("\t") for line in lines)}
    for name in (f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", f"refs/heads/{ref}", ref):
        if name in there:
            return there[name] if of == "commit" else name.removesuffix("^{}")
    names = [re.sub(r"^refs/\w+/", "", name) for name in there if not name.endswith("^{}")]
    few = f": {', '.join(names)}" if 0 < len(names) <= 5 else ""
    raise _unknown(address, ref, f"it has {len(names)} of these{few}.{did_you_mean(ref, names)}")


def _unknown(address: str, ref: str, found: str) -> KleinctlError:
    from kleinctl.fixes import git

    return _problem(
        f"there is no {ref[:60]!r} in {git.without_user(address)}",
        f"Wanted is a tag, a branch or a whole commit; {found}",
        f"kleinctl install --backend comfy --comfyui-ref {releases()['release']}",
        "comfyui-ref-unknown",
    )


def _reachable(address: str) -> None:
    """Raise where the network is switched off; a repository on this machine needs none."""
    from kleinctl.hub import offline_problem

    if offline() and not Path(address).exists():
        raise KleinctlError(offline_problem(()))


def _problem(what: str, why: str, fix: str, name: str, path: Path | None = None) -> KleinctlError:
    return KleinctlError(Problem(what, why, fix, name=name, path=str(path) if path else None))


# What is here


def programs() -> list[Path]:
    """The ComfyUIs that kleinctl installed and that are still here."""
    return sorted(path.parent for path in record.folder().glob("*/main.py") if not path.parent.name.startswith("."))


def present(commit: str) -> Path | None:
    """Where that commit lies whole already.

    Raises:
        KleinctlError: files of it were changed; or git is missing.
    """
    from kleinctl.fixes import git

    here = next((path for path in programs() if git.head(path) == commit), None)
    if here is None:
        return None
    changed = git.changes(here)
    if changed:
        raise _problem(
            f"files of the ComfyUI in {here} were changed",
            f"Wanted is commit {commit[:8]} as it was published; changed are {', '.join(changed[:3])}.",
            f'git -C "{here}" checkout -- .   # takes the changes back, then: kleinctl install --backend comfy',
            "comfyui-changed",
            here,
        )
    return here


# Bringing it


def bring(asked: Wanted, say: Say = lambda text: None) -> Path:
    """Have that commit, in a folder of its own: made beside and renamed, so that half of it is never there.

    Raises:
        KleinctlError: it cannot be had, is no ComfyUI that knows klein, or the disk does not take it.
    """
    here = present(asked.commit)
    if here is not None:
        return here
    for left in record.folder().glob(".new-*"):
        remove(left)
    beside = store.make_folder(record.folder()) / f".new-{os.getpid()}"
    try:
        _check_out(asked, beside, say)
        target = record.folder() / f"ComfyUI-{_version(beside, asked)}-{asked.commit[:8]}"
        with store.writing(target):
            if target.exists():  # it has become another commit, or broken; what the user put there is looked after
                target.rename(target.with_name(f"{target.name}-until-{os.getpid()}"))
            beside.rename(target)
        store.sync_folder(target.parent)
    except KleinctlError as error:
        if "No space left" not in error.problem.why:  # as git puts it
            raise
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise KleinctlError(store.disk_problem(full, record.folder() / "ComfyUI")) from None
    finally:
        remove(beside)
        with contextlib.suppress(OSError):  # where nothing came of it, nothing is left
            record.folder().rmdir()
    return target


def _version(program: Path, asked: Wanted) -> str | None:
    """Which ComfyUI came. A problem of it is told as the repository's: the folder is taken away at once."""
    from kleinctl.comfyui import adopt

    try:
        return adopt.program(program).version
    except KleinctlError as error:
        is_it = "too old for klein" if error.problem.name == "comfyui-too-old" else "no ComfyUI"
        what = f"{asked.ref} of {asked.shown} is {is_it}"
        fix = f"kleinctl install --backend comfy --comfyui-ref {releases()['release']}"
        raise KleinctlError(replace(error.problem, what=what, fix=fix, path=None, evidence=(), remedy=None)) from None


def _check_out(asked: Wanted, beside: Path, say: Say) -> None:
    from kleinctl.fixes import git

    _reachable(asked.address)
    say(f"fetching {asked.ref} of {asked.shown}")
    git.run(None, "init", "--quiet", "--", str(beside))
    try:
        _fetch(beside, asked.address, asked.commit)
    except KleinctlError as error:  # an old server gives out what has a name, and nothing else
        if COMMIT.fullmatch(asked.ref) and "not our ref" in str(error):
            raise _unknown(asked.address, asked.ref, "it has no such commit.") from None
        if COMMIT.fullmatch(asked.ref) or not re.search(r"not our ref|not allow request|unadvertised", str(error)):
            raise
        _fetch(beside, asked.address, _asked(asked.address, asked.ref, of="name"))
    found = git.run(beside, "rev-parse", "--verify", "FETCH_HEAD^{commit}")
    if found != asked.commit:
        raise _problem(
            f"{asked.ref} of {asked.shown} is not the release that kleinctl knows",
            f"Wanted is commit {asked.commit}; {asked.ref} there is {found}.",
            f"kleinctl install --backend comfy --comfyui-url {releases()['address']}",
            "comfyui-not-the-pin",
        )
    say(f"checking out {found[:8]}")
    git.run(beside, "remote", "add", "origin", asked.shown)
    git.run(beside, "-c", "advice.detachedHead=false", "checkout", "--quiet", "--detach", found, seconds=git.FETCH)


def _fetch(folder: Path, address: str, ref: str) -> None:
    from kleinctl.fixes import git

    with _asking(address):
        git.run(folder, "fetch", "--quiet", "--no-tags", "--depth", "1", "--", address, ref, seconds=git.FETCH)


@contextlib.contextmanager
def _asking(address: str) -> Iterator[None]:
    """What git says of a repository, as a problem of that one: the folder that it was to come to is gone by then."""
    try:
        yield
    except KleinctlError as error:
        said = NOISE.sub("", error.problem.why)
        raise _cannot_be_had(address, f"git says: {said.strip()}") from None


# Taking it away


def tidy(keep: Path | None) -> list[Path]:
    """Take away every program but `keep`; what the user put into them moves to its place. Returns what moved.

    Without `keep` all of it goes to the data folder. What runs stays, and what was changed or is no checkout any more.

    Raises:
        KleinctlError: the disk does not take it.
    """
    from kleinctl.comfyui import find
    from kleinctl.fixes import git

    moved: list[Path] = []
    running = find.running()
    for old in programs():
        busy = any(each.of(old) for each in running)
        if old != keep and not busy and git.head(old):  # where git is broken, none can tell what is whose
            for name in own_files(old):
                to_data = keep is None or name.split("/")[0] in DATA
                target = (record.data_folder() if to_data else keep or old) / name
                if not os.path.lexists(target):
                    store.make_folder(target.parent)
                    with store.writing(target):
                        (old / name).rename(target)
                    moved.append(target)
            if not own_files(old) and not git.changes(old):
                discard(old)
    return moved


def own_files(program: Path) -> list[str]:
    """Files in a program that git did not bring: what the user, or ComfyUI for the user, put there."""
    from kleinctl.fixes import git

    listed = git.run(program, "ls-files", "-z", "--others", seconds=git.FETCH).split("\0")
    return [name for name in listed if name and not BYTE_CODE.search(name)]


def discard(folder: Path) -> None:
    """Take a folder away at once, and then delete it, however long that takes."""
    if folder.exists():
        hidden = folder.with_name(f".new-{os.getpid()}-{folder.name}")
        with store.writing(folder):
            folder.rename(hidden)
        remove(hidden)


def remove(folder: Path) -> None:
    """Delete a folder; git's own files are read-only, which Windows minds."""
    if os.name == "nt":
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                path.chmod(stat.S_IWRITE)
    shutil.rmtree(folder, ignore_errors=True)
