"""The stretches of the road with their progress on the screen, as `up`, `install` and `run` show them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import output
from kleinctl.cli.progress import Bars, Pace
from kleinctl.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from kleinctl.backends import Job
    from kleinctl.environment import Environment
    from kleinctl.generate import Event, OnEvent, Output, Result, Step
    from kleinctl.hardware import Hardware
    from kleinctl.install import InstallPlan
    from kleinctl.manifest import Model
    from kleinctl.problem import KleinctlError, Problem
    from kleinctl.road import Place, Way

#: Downloads beyond this many bytes are asked about, where somebody can answer.
ASK_FROM = 10**9
#: Parts below this many bytes are told in one line.
SMALL = 2**20
#: What is counted while a stage is done ahead for several pictures.
AHEAD = {"encode": "prompts", "denoise": "pictures denoised"}
WORDS = {"rehash": "checking what is here", "download": "fetching", "verify": "verifying", "done": "done"}


def accept_licence(model: Model, *, yes: bool) -> None:
    """Show the licence of a model that wants to be accepted, and ask."""
    from kleinctl import install

    if not model.accept_licence or install.licence_accepted(model):
        return
    output.heading(f"{model.title} has a licence of its own")
    output.remark(f"{model.licence}\nread it at {model.licence_url}")
    if yes or (_somebody_there() and click.confirm("Do you accept it?", default=False, err=True)):
        install.accept_licence(model)


def show_files(plan: InstallPlan) -> None:
    """What the install will do: what, from where, how many bytes, where to, and is there room."""
    if plan.complete:
        output.remark(f"{plan.model.name} is here: {len(plan.steps)} verified files in {plan.folder}")
        return
    output.heading(f"files of {plan.model.name}, to {plan.folder}")
    small = [step for step in plan.steps if step.action != "present" and (step.part.size or SMALL) < SMALL]
    for step in plan.steps:
        if step.action != "present" and step not in small:
            size = bytes_text(step.part.size) if step.part.size is not None else "?"
            where = step.target.relative_to(plan.folder).as_posix()
            output.remark(f"  {step.action:9} {size:>9}  {where}  from {step.source}")
    if small:
        size = bytes_text(sum(step.part.size or 0 for step in small))
        output.remark(f"  {'small':9} {size:>9}  {len(small)} configuration files")
    here = sum(step.action == "present" for step in plan.steps)
    total = f"{bytes_text(plan.fetch_bytes)} to fetch, {bytes_text(plan.disk_bytes)} to write"
    total += f"; {bytes_text(plan.free_bytes)} are free"
    files = "file is" if here == 1 else "files are"
    output.remark(f"  {total}{f'; {here} {files} here' if here else ''}")


def ask_to_fetch(count: int, *, yes: bool) -> None:
    """Ask before a large download, where somebody can answer; Ctrl-C later keeps what has arrived."""
    if count >= ASK_FROM and not yes and _somebody_there():
        click.confirm(f"Fetch {bytes_text(count)}?", default=True, abort=True, err=True)


def _somebody_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def get_files(plan: InstallPlan) -> None:
    """Carry the plan out, with a bar for each file and one in total."""
    from kleinctl import install

    if plan.complete:
        return
    with Bars(in_bytes=True, rate=True) as bars:

        def show(event: Any) -> None:
            if event.stage == "wait":
                bars.remark(f"  {event.note}")
                return
            name = event.part.rpartition("/")[2]
            if (event.total or SMALL) >= SMALL:
                bars.show(event.part, f"{name} ({WORDS[event.stage]})", event.done, event.total)
            if event.stage == "done":
                bars.remove(event.part)
            if event.all_total:
                bars.show("", "all files", event.all_done, event.all_total)

        install.install_files(plan, show)


def show_environment(way: Way, where: Place, hardware: Hardware) -> None:
    """Where the model will run, or what has to be built for it."""
    from kleinctl import road

    if where.environment is not None:
        name = where.environment.name
        output.remark("environment: this Python" if name == "this" else f"environment: {name}")
        return
    plan = road.plan_environment(way, where, hardware)
    output.heading(f"Python environment {plan.name}, to {plan.folder}")
    output.remark(f"  about {bytes_text(plan.download_bytes)} to fetch, {bytes_text(plan.disk_bytes)} on disk")


def get_environment(way: Way, where: Place, hardware: Hardware) -> Environment:
    """The environment of `where`, built if it has to be, with its steps shown."""
    from kleinctl import environment as environments
    from kleinctl import road

    if where.environment is not None:
        return where.environment
    told: set[str] = set()
    with Bars(in_bytes=True) as bars:

        def show(event: Any) -> None:
            title = f"{event.step}/{event.steps} {event.title}"
            if title not in told:
                told.add(title)
                bars.remark(f"  {title}")
            bars.remove("now" if event.total else "download")  # one line tells what is going on
            if event.total:
                bars.show("download", event.detail, event.done, event.total)
            else:
                bars.show("now", event.detail or event.title, 0, None)

        return environments.build(road.plan_environment(way, where, hardware), show)


def make_pictures(
    way: Way,
    environment: Environment,
    where: Place,
    hardware: Hardware,
    jobs: Sequence[Job],
    outputs: tuple[Output, ...],
    executor: Any,
    asked: tuple[int, int] | None = None,
    *,
    origins: Sequence[str] = (),
) -> Result:
    """Run the jobs, with a bar for the stage and one for the pictures; what is odd is told before and after.

    `asked` is the size that was typed, before it was rounded. `origins` is where each job of a batch stands (see
    `generate.Request`), of which it has been told already what is odd.
    """
    from kleinctl import road
    from kleinctl.checks.run import run_problems
    from kleinctl.facts.run import finished_run

    before = [] if origins else job_problems(way, hardware, jobs[0], asked, environment)
    output.show_problems(before)
    device = hardware.gpu.name if where.cuda and hardware.gpu else "the CPU"
    output.heading(f"{way.model.name} with {way.backend.name} on {device}")
    if way.model.note:
        output.remark(way.model.note)
    if way.candidate.faster:
        output.remark(way.candidate.faster)
    with Bars() as bars:
        show = shown_on(bars, len(jobs))
        result = road.pictures(way, environment, where, hardware, jobs, outputs, show, executor, origins)
    for remark in result.remarks:
        output.remark(f"warning: {remark}")
    after = run_problems(finished_run(result, way.candidate.fit, where.device), hardware) if result.images else []
    output.show_problems(after)
    return replace(result, problems=(*before, *after))


def shown_on(bars: Bars, count: int) -> OnEvent:
    """What shows the events of a run of `count` pictures: a bar for the stage, and one for several pictures.

    Of what a backend calls otherwise, such as a queue, nobody can tell how long it takes: there it is told since when.
    """
    from kleinctl.generate import STAGES, Failure, Step

    pace, told, since = Pace(count), "", ""
    if count > 1:
        bars.show("all", "pictures", 0, count)
    bars.show("stage", "starting the worker", 0, None)

    def show(event: Event) -> None:
        nonlocal told, since
        pace.hear(event)
        if isinstance(event, Step):
            text = stage_text(event)
            if text != told:
                told, since = text, time.strftime("%H:%M")
            bars.show("stage", text if event.stage in STAGES else f"since {since}: {text}", event.done, event.total)
            return
        bars.show("all", "pictures", event.number, count, pace.note)
        if isinstance(event, Failure):
            output.show_problem_line(event.problem, output.err_console())
        else:
            seconds = seconds_text(sum(event.image.seconds.values()))
            bars.remark(f"  {event.image.path.name}: seed {event.image.job.seed}, {seconds}")

    return show


def stage_text(step: Step) -> str:
    """What is being done: `denoise`, of several pictures `picture 3 of 16: denoise`, ahead for several `prompts`."""
    if step.number and step.count > 1:
        return f"picture {step.number} of {step.count}: {step.stage}"
    return step.stage if step.number else AHEAD.get(step.stage, step.stage)


def job_problems(
    way: Way,
    hardware: Hardware,
    job: Job,
    asked: tuple[int, int] | None = None,
    environment: Environment | None = None,
) -> list[Problem]:
    """What is odd about `job`, of which `asked` is the size as it was typed."""
    from kleinctl.checks.job import job_problems as problems
    from kleinctl.facts.run import job_facts

    return problems(job_facts(job, asked), job, way.model, hardware, way.candidate.fit, environment)


def show_misfit(error: KleinctlError, model: Model, hardware: Hardware, changes: Mapping[str, Any]) -> None:
    """Where a job does not fit, what of it is impossible here whatever the backend."""
    from kleinctl.checks.job import job_problems as problems
    from kleinctl.facts.run import job_facts
    from kleinctl.planner import default_job

    if error.problem.name == "does-not-fit":
        job = default_job(model, **changes)
        output.show_problems(
            each for each in problems(job_facts(job), job, model, hardware) if each.severity == "error"
        )


def nearest_size(text: str | None, option: str = "--size") -> tuple[int | None, int | None, tuple[int, int] | None]:
    """`option` as width and height that can be drawn, and as it was typed; or nothing."""
    from kleinctl.cli import options
    from kleinctl.units import asked_size
    from kleinctl.units import nearest_size as nearest

    if not text:
        return None, None, None
    return *options.parsed_size(nearest(text), option), asked_size(text)
