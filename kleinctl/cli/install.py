"""`kleinctl install`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS, KleinctlError, Misuse, Problem, shell

if TYPE_CHECKING:
    from kleinctl.comfyui.adopt import Adoption
    from kleinctl.comfyui.install import ComfyPlan
    from kleinctl.comfyui.record import Checkout
    from kleinctl.hardware import Hardware
    from kleinctl.install import InstallPlan
    from kleinctl.plugins import Plugins

#: The layout of a backend that runs in ComfyUI.
LAYOUT = "comfyui"
#: Problems that are put right by the same command with one more option.
OPTIONS = {"licence-not-accepted": "--accept-licence", "part-unverified": "--allow-unverified"}


@click.command("install", short_help="Fetch and verify a model's files and build its environment.")
@options.together(options.model, options.backend)
@click.option("--variant", type=click.Choice(["distilled", "base"]), help="The variant of the model's size.")
@click.option("--precision", metavar="NAME", help="Which weights, as in fp8, bf16 or nvfp4; for ComfyUI.")
@click.option("--comfyui", type=options.FOLDER, metavar="DIR", help="Use this ComfyUI, or take copies out of it.")
@click.option("--adopt", is_flag=True, help="Use the ComfyUI that is on this machine.")
@click.option("--comfyui-python", type=options.FILE, metavar="FILE", help="The Python that runs it.")
@click.option("--comfyui-ref", metavar="REF", help="A tag, branch or commit of ComfyUI to install.")
@click.option("--comfyui-url", metavar="URL", help="Where to have ComfyUI from: a mirror, or a local repository.")
@options.together(options.unverified, options.accept, options.yes)
@click.option("--dry-run", is_flag=True, help="Show the plan and do nothing.")
@options.as_json
def command(
    model: str | None,
    backend: str | None,
    variant: str | None,
    precision: str | None,
    comfyui: Path | None,
    adopt: bool,
    comfyui_python: Path | None,
    comfyui_ref: str | None,
    comfyui_url: str | None,
    allow_unverified: bool,
    accept_licence: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Fetch and verify a model's files and build the Python environment they need.

    Without --model it is the one that `kleinctl doctor` would choose. What is here is not fetched again; what broke off
    goes on where it stopped. With --backend comfy, ComfyUI comes too; or yours is used, of which nothing is changed.
    """
    from kleinctl import road
    from kleinctl.cli import steps
    from kleinctl.plugins import Plugins

    plugins = Plugins()
    hardware = options.this_machine()
    asked = Asked(comfyui, adopt, comfyui_python, comfyui_ref, comfyui_url, yes)
    backend = backend or (_backend(plugins) if asked.anything else None)
    in_comfyui = backend is not None and all(each.thing.layout == LAYOUT for each in plugins.backends_for(backend))
    asked.check(in_comfyui)
    if comfyui is not None and not in_comfyui and not comfyui.is_dir():  # else all of it would be fetched again
        why, fix = "It is to be searched for the model's files.", "name a folder that is there, or leave --comfyui out"
        raise Misuse(Problem(f"{comfyui} is not there", why, fix, name="usage"))
    must_fit = model is None and not in_comfyui  # what keeps it from running may be that ComfyUI is not here yet
    way = options.way(plugins, hardware, model, backend, variant=variant, must_fit=must_fit)
    in_comfyui = way.backend.layout == LAYOUT
    if not dry_run:
        steps.accept_licence(way.model, yes=yes or accept_licence)
    comfy = Comfy(asked, hardware, precision, way.backend.requires) if in_comfyui else None
    copies = comfy.folder if comfy else comfyui
    plan = road.files(way, precision=precision, comfyui=copies, allow_unverified=allow_unverified)
    plan = replace(plan, problems=tuple(map(_as_typed, plan.problems)))
    if comfy:
        comfy.show(plan, plugins)
    steps.show_files(plan)
    where = road.place(way, hardware)
    if not way.candidate.runs and not (in_comfyui and way.candidate.problem):
        output.remark(f"warning: it would not run here now. {way.candidate.why_not}")
    builds = way.candidate.runs or where.environment is not None or in_comfyui
    if builds and (comfy is None or comfy.plan is None):  # one of kleinctl's own has room for the worker
        steps.show_environment(way, where, hardware)
        crowded = road.room(way, plan, hardware) if comfy is None else None
        plan = replace(plan, problems=(*plan.problems, crowded)) if crowded and not plan.problems else plan
    if dry_run:
        if as_json:
            output.print_json(_document(plan, comfy))
        problems = [*(comfy.problems if comfy else ()), *plan.problems]
        output.show_problems(problems)
        return PROBLEMS if problems else OK
    for problem in plan.problems:  # before a ComfyUI is brought for files that cannot be had
        if problem.severity == "error":
            raise KleinctlError(problem)
    if not plan.problems:
        steps.ask_to_fetch(plan.fetch_bytes + (comfy.fetch_bytes if comfy else 0), yes=yes)
    if comfy:
        comfy.carry_out()
        where = road.place(way, hardware)
    steps.get_files(plan)
    if comfy:
        comfy.tell_of_files()
    if builds:
        steps.get_environment(way, where, hardware)
    if as_json:
        output.print_json(_document(road.files(way, precision=precision, allow_unverified=allow_unverified), comfy))
    else:
        output.answer(f"{way.model.name} is installed for {way.backend.name}")
    return OK


def _as_typed(problem: Problem) -> Problem:
    """The problem with a command that installs the same files: for the same backend, of the same precision."""
    if problem.name not in OPTIONS:
        return problem
    typed = [word for word in options.typed() if word not in ("--dry-run", "--json")]
    return replace(problem, fix=shell(*typed, OPTIONS[problem.name]))


@dataclass(frozen=True)
class Asked:
    """What was typed about ComfyUI."""

    folder: Path | None
    find: bool
    python: Path | None
    ref: str | None
    url: str | None
    yes: bool

    @property
    def adopts(self) -> bool:
        """Whether a ComfyUI of the user's is to be used."""
        return self.folder is not None or self.find

    @property
    def anything(self) -> bool:
        """Whether something was."""
        return any((self.folder, self.find, self.python, self.ref, self.url))

    def check(self, in_comfyui: bool) -> None:
        """Whether it goes together.

        Raises:
            Misuse: it does not.
        """
        own = {"--comfyui-ref": self.ref, "--comfyui-url": self.url}
        given = [name for name, value in own.items() if value]
        theirs = ["--adopt"] if self.find else ["--comfyui-python"] if self.python else []
        if (given or theirs) and not in_comfyui:
            why = "It is about the ComfyUI that pictures are made in; this is no backend of ComfyUI's."
            raise _misuse(f"{[*given, *theirs][0]} wants --backend comfy", why)
        if given and self.adopts:
            why = "One installs a ComfyUI, the other uses yours."
            raise _misuse(f"{given[0]} and {'--adopt' if self.find else '--comfyui'} exclude each other", why)
        if self.find and self.folder:
            raise _misuse("--adopt and --comfyui exclude each other", "One finds a ComfyUI, the other names it.")
        if self.python and not self.adopts:
            raise _misuse("--comfyui-python wants --comfyui", "It is the Python of the ComfyUI that is named so.")


def _document(files: InstallPlan, comfy: Comfy | None) -> dict[str, Any]:
    """The plan, or the outcome, as a document."""
    document = files.to_json()
    if comfy is not None:
        document["comfyui"] = comfy.to_json()
        document["problems"] = [*(problem.to_json() for problem in comfy.problems), *document["problems"]]
    return document


def _backend(plugins: Plugins) -> str | None:
    """The backend that runs in ComfyUI."""
    return next((name for name, offer in plugins.backends.items() if offer.thing.layout == LAYOUT), None)


def _misuse(what: str, why: str) -> Misuse:
    return Misuse(Problem(what, why, "kleinctl install --help", name="usage"))


class Comfy:
    """The ComfyUI of an install: the user's that is adopted, one that is in use already, or one to be installed."""

    def __init__(self, asked: Asked, hardware: Hardware, precision: str | None, requires: Sequence[str]) -> None:
        from kleinctl import comfyui
        from kleinctl.comfyui import adopt, find, install

        install.check_precision(precision, hardware)
        self.asked, self.hardware, self.precision, self.requires = asked, hardware, precision, requires
        self.adoption: Adoption | None = None
        self.plan: ComfyPlan | None = None
        self.used: Checkout | None = comfyui.known()
        if asked.adopts:
            self.adoption = adopt.examine(asked.folder or find.the_one(), asked.python)

    @property
    def stays(self) -> bool:
        """Whether one of the user's is in use, and nothing else was asked for."""
        from kleinctl import comfyui

        used, asked = self.used, self.asked
        return used is not None and not used.owned and not (asked.ref or asked.url) and comfyui.trouble(used) is None

    @property
    def folder(self) -> Path | None:
        """A ComfyUI of the user's, which may have the files."""
        from kleinctl.comfyui import adopt

        used = self.adoption.checkout if self.adoption else self.used if self.stays else None
        return adopt.shown_by(used) if used else None

    @property
    def fetch_bytes(self) -> int:
        """What is to come over the network, but for the model's files."""
        return self.plan.fetch_bytes if self.plan and not self.plan.complete else 0

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What stands in the way."""
        return self.plan.problems if self.plan else ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What people should know about it."""
        from kleinctl.comfyui import install

        if self.adoption is None:
            return self.plan.remarks if self.plan else ()
        cuda = self.adoption.environment.torch_cuda
        return (*self.adoption.remarks, *install.kernel_remarks(self.hardware, cuda, self.precision))

    def to_json(self) -> dict[str, Any]:
        """What is to be done; `action` is "present" where nothing is, and of one to be installed no place is known."""
        adopted = self.adoption.checkout if self.adoption else None
        there = adopted or (self.used if self.plan is None or self.plan.complete else None)
        action = "present" if there and there == self.used else "adopt" if there else "install"
        return {
            "action": action,
            "owned": there is None or there.owned,
            "path": str(there.path) if there else None,
            "python": str(there.python) if there else None,
            "version": there.version if there else None,
            "ref": self.plan.wanted.ref if self.plan else None,
            "commit": there.commit if there else self.plan.wanted.commit if self.plan else None,
            "fetch_bytes": self.fetch_bytes,
            "remarks": list(self.remarks),
        }

    def show(self, files: InstallPlan, plugins: Plugins) -> None:
        """Say what will be done."""
        from kleinctl.comfyui import install
        from kleinctl.units import bytes_text

        if self.adoption is not None:
            self._show_adoption(self.adoption, plugins)
            return
        if self.stays and self.used:
            output.remark(f"ComfyUI {self.used.version} in {self.used.path} is in use; it stays as it is")
            return
        self.plan = install.plan(
            self.hardware,
            self.hardware.gpu is not None,
            self.asked.ref,
            self.asked.url,
            self.precision,
            more_bytes=files.disk_bytes,
            requires=self.requires,
        )
        if self.plan.complete and self.used:
            output.remark(f"ComfyUI {self.used.version} is here: {self.used.path}")
        else:
            output.heading(f"ComfyUI {self.plan.wanted.ref}")
            for step in self.plan.steps:
                output.remark(f"  {step}")
            output.remark(f"  about {bytes_text(self.plan.fetch_bytes)} to fetch")
        for remark in self.remarks:
            output.remark(f"  note: {remark}")

    def _show_adoption(self, adoption: Adoption, plugins: Plugins) -> None:
        from kleinctl.comfyui import record

        found = adoption.checkout
        output.heading(f"ComfyUI {found.version} in {found.path}, with {found.python}")
        if found.base:
            output.remark(f"  its models, settings and custom nodes lie in {found.base}")
        for remark in self.remarks:
            output.remark(f"  note: {remark}")
        output.show_problems(_what_would_fail(self.folder or found.path, plugins, self.hardware))
        output.remark(f"  nothing in it is changed; that it is used is written to {record.record_file()}")
        output.remark(f"  models stay in kleinctl's own folder, which it is told of by {record.list_file()}")
        output.remark(f"  while you run it at {found.url}, pictures are made there, if it lists the model's files")

    def carry_out(self) -> None:
        """Adopt or install it; `used` and `plan` are then as it is."""
        from kleinctl import comfyui
        from kleinctl.comfyui import install

        if self.adoption is not None:
            if self.adoption.checkout != self.used:
                _confirm(f"Use the ComfyUI in {self.adoption.checkout.path}?", self.asked.yes)
                install.use(self.adoption)
        elif self.plan is not None:  # complete or not: what an interrupted one left is taken away
            _build(self.plan, self.hardware, self.requires)
        self.used = comfyui.known()
        if self.plan and self.used:
            self.plan = replace(self.plan, program=self.used.path, ready=True, former=self.used)

    def tell_of_files(self) -> None:
        """Put the model that has come among those that ComfyUI is told of."""
        from kleinctl import comfyui

        comfyui.paths_file()


def _what_would_fail(folder: Path, plugins: Plugins, hardware: Hardware) -> list[Problem]:
    """What doctor finds in a ComfyUI; none of it keeps it from being used."""
    from kleinctl import facts
    from kleinctl.checks import own_checks, run_checks

    found = facts.gather(plugins, hardware, folders=[folder])
    asked = [check for check in own_checks() if "comfyui" in check.wants]
    return [problem for each in run_checks(asked, found.once(), list(found.scenes())) for problem in each.problems]


def _confirm(question: str, yes: bool) -> None:
    """Ask; where nobody is there to answer, --yes is wanted."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise options.nobody_there(f"The question is: {question}")
    click.confirm(question, default=True, abort=True, err=True)


def _build(plan: ComfyPlan, hardware: Hardware, requires: Sequence[str]) -> None:
    """Install it, with what is done on the screen."""
    from kleinctl.cli.progress import Bars
    from kleinctl.comfyui import install

    told: set[str] = set()
    with Bars(in_bytes=True) as bars:

        def say(text: str) -> None:
            bars.remark(f"  {text}")
            bars.show("now", text, 0, None)

        def show(event: Any) -> None:
            title = f"{event.step}/{event.steps} {event.title}"
            if title not in told:
                told.add(title)
                bars.remark(f"  {title}")
            bars.remove("now" if event.total else "download")
            if event.total:
                bars.show("download", event.detail, event.done, event.total)
            else:
                bars.show("now", event.detail or event.title, 0, None)

        install.carry_out(plan, hardware, hardware.gpu is not None, say, show, requires)
