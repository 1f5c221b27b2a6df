"""pip in an environment that is not ours: what is there, what it is asked for, and how it is set back."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from kleinctl.environment import inspect
from kleinctl.environment_build import _CREDENTIALS, _HINTS, trusting
from kleinctl.home import offline
from kleinctl.journal import Progress
from kleinctl.problem import KleinctlError, Problem

#: Seconds: torch has gigabytes, lines are slow.
LONGEST_SECONDS = 2 * 3600
#: Variables that would let another Python's packages in.
MISLEADING = ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")
TORCH_INDEX = "https://download.pytorch.org/whl"


def versions(python: Path) -> dict[str, str]:
    """What is installed for `python`, read from file names."""
    return dict(inspect(python).packages)


def command(python: Path, *arguments: str) -> tuple[str, ...]:
    """The command line: that Python's own pip, without packages of the user's own folder."""
    return (str(python), "-s", "-m", "pip", *arguments)


def pip(
    python: Path, arguments: tuple[str, ...], log: Path, progress: Progress, longest: float = LONGEST_SECONDS
) -> None:
    """Run pip to its end, every line into `log`.

    Raises:
        KleinctlError: it failed or took longer than `longest` seconds; the problem has its last words.
    """
    first, *rest = arguments
    words = command(python, first, "--no-input" if first == "install" else "-y", *rest, *_no_index(first))
    status, last = run(words, log, progress, longest)
    if status:
        raise _failed(python, [*last, f"pip ended with exit code {status}"], log)


def run(
    words: tuple[str, ...], log: Path, progress: Progress, longest: float = LONGEST_SECONDS
) -> tuple[int, list[str]]:
    """Run a program to its end, every line into `log`, for at most `longest` seconds. Its exit status and last words.

    A program that cannot be started has the status 127, as in a shell.
    """
    variables = trusting() | {name: value for name, value in os.environ.items() if name not in MISLEADING}
    variables |= {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUTF8": "1"}
    last: deque[str] = deque(maxlen=20)
    with log.open("a", encoding="utf-8") as written:
        written.write(_CREDENTIALS.sub("****@", f"$ {' '.join(words)}\n"))
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env=variables,
                cwd=log.parent,  # `-m` looks for modules here first, and nobody else writes here
            )
        except OSError as error:
            return 127, [f"{error.strerror}: {words[0]}"]
        with child:
            timer = threading.Timer(longest, child.kill)
            timer.start()
            try:
                for line in child.stdout or ():
                    last.append(_CREDENTIALS.sub("****@", line.rstrip()))
                    written.write(f"{last[-1]}\n")
                    progress(last[-1])
            except BaseException:
                child.kill()
                raise
            finally:
                timer.cancel()
    return child.returncode, list(last)


def _no_index(first: str) -> tuple[str, ...]:
    return ("--no-index",) if offline() and first == "install" else ()


def _failed(python: Path, last: list[str], log: Path) -> KleinctlError:
    said = "\n".join([line for line in last if "ERROR" in line or "error" in line][-3:] or last[-3:])
    hint = next((hint for pattern, hint in _HINTS.items() if re.search(pattern, said)), f"see {log}")
    return KleinctlError(
        Problem(
            what=f"pip could not change the packages of {python}",
            why=f"{said}\nAll of it: {log}",
            fix=hint,
            name="install-failed",
            path=str(log),
        )
    )


def set_back(python: Path, former: Mapping[str, str | None], log: Path, progress: Progress) -> None:
    """Install these versions again, without what they depend on, and uninstall those that were not there.

    Raises:
        KleinctlError: pip failed.
    """
    now = versions(python)
    wanted = [f"{name}=={version}" for name, version in former.items() if version and now.get(name) != version]
    unwanted = tuple(name for name, version in former.items() if version is None and name in now)
    builds = dict.fromkeys(found[1] for each in wanted if (found := re.search(r"\+(cu\d+|cpu)$", each)))
    indexes = [word for build in builds for word in ("--extra-index-url", f"{TORCH_INDEX}/{build}")]
    if wanted:
        pip(python, ("install", "--no-deps", *indexes, *wanted), log, progress)
    if unwanted:
        pip(python, ("uninstall", *unwanted), log, progress)
