"""Fixes of Python environments: a managed one built again, packages of any other."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kleinctl import environment, environment_build, store
from kleinctl.environment import EnvironmentPlan
from kleinctl.environment_build import pythons_folder
from kleinctl.fixes.pip import command, run, versions
from kleinctl.fixes.request import DISK_RATE, LINE_RATE, UNKNOWN, Plan, Request
from kleinctl.hardware.facts import Python
from kleinctl.home import envs_folder
from kleinctl.journal import Made, Packages, Progress, Record, log_file
from kleinctl.problem import KleinctlError, Problem, shell

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware

#: Where packages may come from; an empty index is whatever that pip is configured for.
INDEX_HOSTS = ("pypi.org", "download.pytorch.org")
MAX_PACKAGES = 30
#: Bytes of a Python as uv fetches it, and the seconds that may take.
PYTHON_BYTES, FETCH_SECONDS = 35_000_000, 1800


def install_packages(request: Request) -> Plan:
    """`install-packages`: packages into a Python, by its own pip."""
    python = _python(request)
    wanted = tuple(_requirement(request, each) for each in request.text("packages").split())
    if not 0 < len(wanted) <= MAX_PACKAGES:
        raise request.refuse(f"1 to {MAX_PACKAGES} packages are wanted")
    index = request.text("index")
    if index and (urlsplit(index).scheme != "https" or urlsplit(index).netloc not in INDEX_HOSTS):
        raise request.refuse(f"{index} is none of the package indexes {', '.join(INDEX_HOSTS)}")
    arguments = (*(("--index-url", index) if index else ()), *wanted)

    def work(record: Record, progress: Progress) -> None:
        step = Packages("packages", str(python), versions(python))
        record.perform(step, ("install", *arguments), log_file("fix"), progress)

    before = versions(python)
    names = [_name(each) for each in wanted]
    now = ", ".join(f"{name} {before.get(name, 'absent')}" for name in names)
    return request.plan(
        f"install {' '.join(wanted)} into {python}",
        f"there now: {now}",
        work=work,
        commands=(shell(*command(python, "install", *arguments)),),
        **UNKNOWN,
    )


def uninstall_packages(request: Request) -> Plan:
    """`uninstall-packages`: packages that are not needed away from a Python."""
    python, before = _python(request), versions(_python(request))
    names = [_name(_requirement(request, each)) for each in request.text("packages").split()]
    if not 0 < len(names) <= MAX_PACKAGES or not set(names) <= set(before):
        raise request.refuse(f"wanted are 1 to {MAX_PACKAGES} packages that are in {python}")

    def work(record: Record, progress: Progress) -> None:
        step = Packages("packages", str(python), versions(python))
        record.perform(step, ("uninstall", *names), log_file("fix"), progress)

    built = [f"{name} {before[name]}" for name in names if not _in_an_index(before[name])]
    return request.plan(
        f"uninstall {', '.join(f'{name} {before[name]}' for name in names)} from {python}",
        work=work,
        commands=(shell(*command(python, "uninstall", *names)),),
        seconds=10.0,
        why_not_undoable=f"No package index has {' and '.join(built)}; keep its wheel." if built else "",
    )


def _in_an_index(version: str) -> bool:
    """Whether pip can find a version again: PyPI's, or with the tag of one of PyTorch's indexes."""
    tag = version.partition("+")[2]
    return re.fullmatch(r"(cu\d+|cpu)?", tag) is not None


def _python(request: Request) -> Path:
    """The interpreter to install into: a managed environment's, or one the problem names."""
    given = request.text("python")
    python = Path(given).absolute()
    if not python.is_file() or python.name.removesuffix(".exe").rstrip("0123456789.") != "python":
        raise request.refuse(f"{python} is no Python that is here")
    known = any(each.python == python for each in environment.known())
    if not (store.inside(python.parent, envs_folder()) or known or request.names(given)):
        raise request.refuse(f"{python} is not a path that the problem names")
    return python


def _requirement(request: Request, text: str) -> str:
    """A requirement from an index: no option, no address, no file."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        parsed = Requirement(text)
    except InvalidRequirement:
        raise request.refuse(f"{text[:80]!r} is no package") from None
    if parsed.url:
        raise request.refuse(f"{text[:80]!r} is an address")
    return text


def _name(requirement: str) -> str:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    return canonicalize_name(Requirement(requirement).name)


# A managed environment


def rebuild_environment(request: Request) -> Plan:
    """`rebuild-environment`: a managed environment again, or the one that takes its place now."""
    name = request.text("environment")
    if name not in environment.names():
        raise request.refuse(f"there is no managed environment {name!r}")
    plan = _build_plan(request, name)
    old = envs_folder() / name
    stale = [] if plan.name == name else [f"take the broken {old} away"]
    total = plan.download_bytes / LINE_RATE + plan.disk_bytes / DISK_RATE

    def work(record: Record, progress: Progress) -> None:
        with _called_broken(plan.folder):
            environment.build(plan, progress)
        if plan.name != name:
            environment.remove(name)

    return request.plan(
        f"build {plan.folder} from scratch, in place of the broken one: {', then '.join(plan.steps)}",
        *stale,
        work=work,
        commands=(
            shell(*(("rmdir", "/s", "/q") if os.name == "nt" else ("rm", "-r")), old),
            shell("kleinctl", "install"),
        ),
        fetch_bytes=plan.download_bytes,
        disk_bytes=plan.disk_bytes,
        seconds=total,
        why_not_undoable="What was broken takes gigabytes and is not kept.",
    )


def build_environment(request: Request) -> Plan:
    """`build-environment`: a managed environment, made from another Python where this one does not do.

    That is one on this machine, or one that uv fetches to kleinctl's own folder.
    """
    cuda = request.hardware.gpu is not None
    fetched = environment_build.another_python() is None
    uv, folder = shutil.which("uv"), pythons_folder()
    if fetched and uv is None:
        raise KleinctlError(environment.no_python(request.hardware))
    judged = replace(request.hardware, python=Python("unknown", "")) if fetched else request.hardware
    plan = next(_possible(request, cuda, judged), None)
    if plan is None:
        raise request.refuse("no backend wants an environment on this machine")
    get = (uv or "uv", "python", "install", "--install-dir", str(folder), environment.data()["python"]["fetch"])

    def work(record: Record, progress: Progress) -> None:
        if fetched:
            step = Made("made", str(folder))
            fetch = functools.partial(_fetch_python, get, progress)
            fetch() if folder.exists() else record.perform(step, fetch)
        found = next(_possible(request, cuda))
        record.perform(Made("made", str(found.folder)), lambda: environment.build(found, progress))

    return request.plan(
        *([f"let uv fetch Python {get[-1]} to {folder}"] if fetched else [f"take {plan.python}"]),
        f"build a managed environment in {envs_folder()}: {', then '.join(plan.steps)}",
        work=work,
        commands=(*([shell(*get)] if fetched else []), "kleinctl install"),
        fetch_bytes=plan.download_bytes + PYTHON_BYTES * fetched,
        disk_bytes=plan.disk_bytes + 4 * PYTHON_BYTES * fetched,
        seconds=plan.download_bytes / LINE_RATE + plan.disk_bytes / DISK_RATE,
    )


def _fetch_python(words: tuple[str, ...], progress: Progress) -> None:
    """Let uv fetch a Python.

    Raises:
        KleinctlError: it failed, or what it fetched does not run here.
    """
    log = log_file("fix")
    status, last = run(words, log, progress, FETCH_SECONDS)
    if status or environment_build.another_python() is None:
        why = f"uv ended with status {status}: {' '.join(last[-3:])[:500]}\nAll of it: {log}"
        fix = shell(*words)
        raise KleinctlError(Problem("uv brought no Python", why, fix, name="install-failed", path=str(log)))


def _build_plan(request: Request, name: str) -> EnvironmentPlan:
    """The plan that makes the environment of that name; else one for the same kind of device."""
    plans = list(_possible(request, cuda=not name.startswith("cpu-")))
    if not plans:
        raise request.refuse(f"no backend wants an environment like {name} on this machine")
    return next((plan for plan in plans if plan.name == name), plans[0])


def _possible(request: Request, cuda: bool, hardware: Hardware | None = None) -> Iterator[EnvironmentPlan]:
    """What could be built for the backends that are here, on this machine or `hardware`."""
    refused: KleinctlError | None = None
    found = False
    every = [offer.thing.requires for offer in request.plugins.backends.values()]
    for requires in sorted(every, key=lambda each: not environment.wants_torch(each)):
        try:
            yield environment.plan(requires, hardware or request.hardware, cuda)
            found = True
        except KleinctlError as error:
            refused = error
    if refused and not found:
        raise refused


@contextlib.contextmanager
def _called_broken(folder: Path) -> Iterator[None]:
    """Take the record of an environment away, so that another is built beside it and replaces it; not if that fails."""
    record = folder / environment.RECORD
    aside = record.with_suffix(".old")
    if record.exists():
        with store.writing(record):
            record.replace(aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            aside.replace(record)
        raise
