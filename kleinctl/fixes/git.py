"""git in checkouts that are not ours: where one is on its branch, and the way forward and back along it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kleinctl.home import offline
from kleinctl.hub import offline_problem
from kleinctl.problem import KleinctlError, Problem

#: Seconds: for a look, for a question to a server, and for a whole fetch on a slow line.
LOOK, ASK, FETCH = 30, 60, 3600
#: Variables that would lead git to another repository than the one in the folder.
MISLEADING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE", "GIT_COMMON_DIR")
#: Looking changes nothing, nothing of the checkout's own is run, and nobody is asked for a password.
INSTEAD = (
    *(f"core.hooksPath={os.devnull}", "core.fsmonitor=false", "credential.helper=", "submodule.recurse=false"),
    *("fetch.recurseSubmodules=false", "maintenance.auto=false", "gc.auto=0"),
)
QUIET = ("--no-optional-locks", *(word for setting in INSTEAD for word in ("-c", setting)))
SILENT = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "GIT_SSH_COMMAND": "ssh -oBatchMode=yes", "LC_ALL": "C"}
#: Settings that a checkout may have of its own: they run no program and lead nowhere else, or are overruled above.
#: Of git-config(1); any other may name a program (filter, gpg, uploadpack), another address or another folder.
HARMLESS = re.compile(
    r"core\.(repositoryformatversion|filemode|bare|logallrefupdates|ignorecase|precomposeunicode|symlinks|autocrlf|eol"
    r"|safecrlf|longpaths|fscache|untrackedcache|preloadindex|quotepath|protectntfs|protecthfs|abbrev|compression"
    r"|hookspath|fsmonitor|sshcommand|askpass)"
    r"|remote\..+\.(url|pushurl|fetch|tagopt|prune|gh-resolved)|branch\..+\.(?!mergeoptions$)[a-z0-9-]+"
    r"|submodule\.(.+\.)?(active|url|recurse)|http\.(proxy|postbuffer|version|lowspeedlimit|lowspeedtime)"
    r"|lfs\.repositoryformatversion|maintenance\.auto|gc\.auto|fetch\.(prune|recursesubmodules)"
    r"|(user|gui|advice|color|credential|pull|push|init)\..+"
)
#: git in a submodule would go by that one's own settings.
LOOKING = ("--porcelain", "--untracked-files=no", "--ignore-submodules=all")
COMMIT = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True)
class Branch:
    """The branch that a checkout is on: the commit it is at, and what it follows (`ref` of `remote`, at `address`)."""

    name: str
    commit: str
    remote: str
    ref: str
    address: str


def branch(folder: Path, addresses: Sequence[str]) -> Branch:
    """The branch of a checkout that can be moved forward: unchanged, and following one of `addresses`.

    Raises:
        ValueError: it cannot; the text says why.
        KleinctlError: git is missing, or refuses to look.
    """
    inner = folder / ".git"
    if not inner.is_dir() or inner.is_symlink():
        raise ValueError(f"{inner} leads elsewhere" if os.path.lexists(inner) else f"{folder} is no git checkout")
    if settings := risky(folder):
        raise ValueError(f"with {', '.join(settings[:3])} in {inner / 'config'} git may run a program or go elsewhere")
    name, commit = _answer(folder, "symbolic-ref", "-q", "--short", "HEAD"), head(folder)
    if not name:
        raise ValueError(f"{folder} is at a commit, {commit[:10]}, on no branch")
    remote, ref = (_answer(folder, "config", f"branch.{name}.{key}") for key in ("remote", "merge"))
    if not ref:
        raise ValueError(f"its branch {name} follows no other")
    followed = _answer(folder, "config", "--get-all", f"remote.{remote}.url").splitlines() or [remote]
    address = next((each for each in followed if not any(same(each, known) for known in addresses)), None)
    if address is not None:
        raise ValueError(f"its branch {name} follows {without_user(address)}, which is not {addresses[0]}")
    changed = changes(folder)
    if changed:
        raise ValueError(f"files of it were changed: {', '.join(changed[:3])}")
    own = _answer(folder, "rev-list", "--count", f"{name}@{{upstream}}..{name}")
    if own not in ("", "0"):
        raise ValueError(f"its branch {name} has {own} commits of its own")
    return Branch(name, commit, remote, ref, without_user(followed[0]))


def risky(folder: Path) -> list[str]:
    """The settings of a checkout's own that may run a program, or lead to another server or folder.

    Raises:
        KleinctlError: git is missing, or refuses to look: the folder may be another user's.
    """
    run(folder, "rev-parse", "--git-dir")
    names = run(folder, "config", "--local", "--list", "--name-only", "-z").split("\0")
    return sorted({name for name in names if name and not HARMLESS.fullmatch(name)})


def newest(remote: str, ref: str, folder: Path | None = None) -> str:
    """The commit that a server has for `ref`; asking changes nothing here.

    Raises:
        KleinctlError: the network is switched off or the server does not answer.
    """
    _online()
    told = run(folder, "ls-remote", "--exit-code", "--", remote, ref, seconds=ASK)
    found = COMMIT.match(told)
    if found is None:
        raise _failed(folder, f"it says: {told[:200]}")
    return found[0]


def forward(folder: Path, remote: str, ref: str, commit: str) -> None:
    """Fetch, and move the branch forward to `commit`; git refuses where that is not forward.

    Raises:
        KleinctlError: it could not; the checkout is where it was.
    """
    _online()
    run(folder, "fetch", "--quiet", "--", remote, ref, seconds=FETCH)
    run(folder, "merge", "--quiet", "--ff-only", commit, seconds=FETCH)


def back(folder: Path, commit: str) -> None:
    """Set the branch to `commit`; git refuses where a changed file would be lost.

    Raises:
        KleinctlError: it could not.
    """
    run(folder, "reset", "--quiet", "--keep", commit, seconds=FETCH)


def clone(address: str, folder: Path) -> None:
    """A new checkout in `folder`; git takes away what it made where it fails.

    Raises:
        KleinctlError: it failed.
    """
    _online()
    run(None, "clone", "--quiet", "--", address, str(folder), seconds=FETCH)


def head(folder: Path) -> str:
    """The commit that a checkout is at; empty where there is none."""
    return _answer(folder, "rev-parse", "--verify", "-q", "HEAD")


def on(folder: Path) -> str:
    """The name of the branch that a checkout is on; empty where there is none."""
    return _answer(folder, "symbolic-ref", "-q", "--short", "HEAD")


def changes(folder: Path) -> list[str]:
    """Files of git's own that were changed; what it does not know (models, pictures) does not count."""
    return [line[3:] for line in run(folder, "status", *LOOKING).splitlines()]


def same(address: str, other: str) -> bool:
    """Whether two addresses are of one repository: by https or ssh, with `.git` or without."""
    return _plain(address) == _plain(other)


def _plain(address: str) -> str:
    start = re.match(r"(?:https|ssh)://(?:[^/@]*@)?|git@(?=[^/:]+:)", address.strip())
    if start is None:  # a folder, or another protocol
        return address
    host = address.strip()[start.end() :].replace(":", "/", 1)
    return f"https://{host.rstrip('/').removesuffix('.git').lower()}"


def without_user(address: str) -> str:
    """An address without the name and password that may stand before its host."""
    return re.sub(r"(://)[^/@]*@", r"\1", address)


def run(folder: Path | None, *arguments: str, seconds: float = LOOK) -> str:
    """What git says.

    Raises:
        KleinctlError: it is not installed, fails or takes longer than `seconds`.
    """
    done = _run(folder, arguments, seconds)
    if done.returncode:
        raise _failed(folder, without_user(" ".join(done.stderr.split())[-500:]) or f"exit code {done.returncode}")
    return done.stdout.rstrip("\n")


def _answer(folder: Path, *arguments: str) -> str:
    """What git says, or nothing where it says no."""
    done = _run(folder, arguments, LOOK)
    return done.stdout.strip() if done.returncode == 0 else ""


def _run(folder: Path | None, arguments: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    program = shutil.which("git")
    if program is None:
        raise _failed(folder, "git is not installed", "install git from https://git-scm.com/downloads")
    variables = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    where = ("-C", str(folder)) if folder else ()
    if folder:  # never a repository around it
        variables["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)
    try:
        return subprocess.run(
            [program, *QUIET, *where, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=variables | SILENT,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise _failed(folder, f"it took longer than {seconds:g} s") from None
    except OSError as error:
        raise _failed(folder, f"{error.strerror}: {program}") from None


def _online() -> None:
    if offline():
        raise KleinctlError(offline_problem(()))


def _failed(folder: Path | None, said: str, fix: str = "") -> KleinctlError:
    return KleinctlError(
        Problem(
            what=f"git failed in {folder}" if folder else "git failed",
            why=f"{said[:1].upper()}{said[1:].rstrip('.')}.",
            fix=fix or (f'git -C "{folder}" status   # shows how it stands there' if folder else "git --version"),
            name="git-failed",
            path=str(folder) if folder else None,
        )
    )
