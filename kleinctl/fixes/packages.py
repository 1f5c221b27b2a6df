"""Fixes of Python environments: a managed one built again, packages of any other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kleinctl import environment, store
from kleinctl.environment import EnvironmentPlan
from kleinctl.fixes.pip import command, versions
from kleinctl.fixes.request import DISK_RATE, LINE_RATE, Plan, Request, shell
from kleinctl.home import envs_folder
from kleinctl.journal import Packages, Progress, Record, log_file
from kleinctl.problem import KleinctlError

#: Where packages may come from; an empty index is whatever that pip is configured for.
INDEX_HOSTS = ("pypi.org", "download.pytorch.org")
MAX_PACKAGES = 30


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
        record.perform(step, arguments, log_file("fix"), progress)

    before = versions(python)
    names = [_name(each) for each in wanted]
    now = ", ".join(f"{name} {before.get(name, 'absent')}" for name in names)
    return request.plan(
        f"install {' '.join(wanted)} into {python}",
        f"there now: {now}",
        work=work,
        commands=(shell(*command(python, "install", *arguments)),),
        seconds=None,
    )


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


def _build_plan(request: Request, name: str) -> EnvironmentPlan:
    """The plan that makes the environment of that name; else one for the same kind of device."""
    plans = list(_possible(request, cuda=not name.startswith("cpu-")))
    if not plans:
        raise request.refuse(f"no backend wants an environment like {name} on this machine")
    return next((plan for plan in plans if plan.name == name), plans[0])


def _possible(request: Request, cuda: bool) -> Iterator[EnvironmentPlan]:
    refused: KleinctlError | None = None
    found = False
    for offer in request.plugins.backends.values():
        try:
            yield environment.plan(offer.thing.requires, request.hardware, cuda)
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
