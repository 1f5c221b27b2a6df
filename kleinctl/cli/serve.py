"""`kleinctl serve`, and what `kleinctl run` does when a server runs"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, KleinctlError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kleinctl.backends import Job
    from kleinctl.generate import Event, OnEvent, Output, Result
    from kleinctl.plugins import Plugins
    from kleinctl.serve import Server, State
    from kleinctl.server import Done, Freed, Ready

SCHEMA = "kleinctl.serve/1"
#: What a running server leaves in KLEINCTL_HOME; where it is not, `kleinctl.serve` need not be imported.
SERVER_FILE = "serve.json"


@click.command("serve", short_help="Keep a model loaded, so that `run` starts at once.")
@options.together(options.model, options.backend)
@click.option(
    "--idle",
    type=click.FloatRange(min=1),
    default=600.0,
    metavar="SECONDS",
    help="Let go of the model's memory after so long without a job (600).",
)
@options.together(options.vram_limit, options.ram_limit)
@click.option("--free", is_flag=True, help="Have the running server let go of the memory; the next job loads again.")
@click.option("--stop", is_flag=True, help="End the running server.")
@click.option("--status", is_flag=True, help="Say what the running server has and does.")
@options.as_json
def command(
    model: str | None,
    backend: str | None,
    idle: float,
    vram_limit: str | None,
    ram_limit: str | None,
    free: bool,
    stop: bool,
    status: bool,
    as_json: bool,
) -> int:
    """Keep a model loaded in this terminal, until Ctrl-C; `kleinctl run` then starts at once.

    Model and backend are chosen as `run` chooses them. Jobs wait for each other. The server listens on this machine
    alone, for programs of the user who started it.
    """
    if free + stop + status > 1 or (as_json and not (free or stop or status)):
        raise click.UsageError(
            "One of --status, --free and --stop is wanted; --json goes with them.", click.get_current_context()
        )
    if free or stop or status:
        return manage(free=free, stop=stop, as_json=as_json)
    from kleinctl import road
    from kleinctl.plugins import Plugins
    from kleinctl.server import Server as Running
    from kleinctl.server import end_on_signals, listening, only_one

    plugins, named = Plugins(), (model, backend)

    def prepare() -> Ready:
        nonlocal named
        ready = get_ready(plugins, *named, vram_limit, ram_limit)
        named = (ready.way.model.name, ready.way.backend.name)  # whatever comes later, it stays with these
        return ready

    with only_one():
        end_on_signals()
        try:
            server = Running(plugins, prepare, road.executor(plugins, None), idle, show_event)
            with listening(server):
                load(server)
                server.run()
        except KeyboardInterrupt:
            pass
    _say("the server has ended")
    return OK


def get_ready(
    plugins: Plugins, model: str | None, backend: str | None, vram_limit: str | None, ram_limit: str | None
) -> Ready:
    """The model and its backend with verified files and an environment, as `run` chooses and gets them.

    Raises:
        KleinctlError: it does not fit, or is not installed.
    """
    from kleinctl import road
    from kleinctl.cli import steps
    from kleinctl.server import Ready

    hardware = options.limited(options.this_machine(), vram_limit, ram_limit)
    way = options.way(plugins, hardware, model, backend, installed=True)
    plan = road.files(way)
    if not plan.in_place:
        raise road.not_installed(way)
    steps.get_files(plan)
    where = road.place(way, hardware)
    return Ready(way, steps.get_environment(way, where, hardware), where, hardware)


def load(server: Any) -> None:
    """Load the model, with a bar."""
    from kleinctl.cli.progress import Bars
    from kleinctl.units import seconds_text

    way, start = server.ready.way, time.monotonic()
    output.heading(f"{way.model.name} with {way.backend.name} on {server.ready.device}")
    with Bars() as bars:
        bars.show("stage", "starting the worker", 0, None)
        server.load(lambda said: bars.show("stage", said.stage, said.done, said.total))
    _say(f"loaded in {seconds_text(time.monotonic() - start)}; waiting for jobs of `kleinctl run`, Ctrl-C ends")


def show_event(event: Done | Freed) -> None:
    """A line for each job."""
    from kleinctl.server import Freed
    from kleinctl.units import seconds_text

    at = time.strftime("%H:%M:%S")
    if isinstance(event, Freed):
        _say(f"{at}  memory freed {event.why}; the next job loads the model again")
        return
    job = event.job
    result = event.why or seconds_text(event.seconds)
    _say(f"{at}  {event.output.name}  {job.width}x{job.height}  {job.steps} steps  seed {job.seed}  {result}")


def _say(text: str) -> None:
    """A line for whoever still looks: terminals are closed, logs fill their disk, and jobs come all the same."""
    with suppress(OSError, SystemExit):  # rich ends the program where a pipe's reader has gone
        output.remark(text)


def manage(*, free: bool, stop: bool, as_json: bool) -> int:
    """Ask the running server, or have it free its memory or end, and say how it is then.

    Raises:
        KleinctlError: none runs that could free or end, or it does not answer.
    """
    from kleinctl.serve import connect

    server = connect()
    if server is None and (free or stop):
        why = "No process keeps a model for this KLEINCTL_HOME."
        raise KleinctlError(Problem("no server runs", why, "kleinctl serve", name="server-not-running"))
    state = server.state if server is not None else None
    if server is not None and free:
        if server.state.working:
            output.remark("  waiting: a run has the model; its memory is freed when that ends, also after Ctrl-C here")
        state = server.free()
    if server is not None and stop:
        server.end()
        state = None
    if as_json:
        output.print_json(document(state))
    else:
        output.answer(told(state))
    return OK


def document(state: State | None) -> dict[str, Any]:
    """`kleinctl.serve/1`."""
    if state is None:
        return {"schema": SCHEMA, "running": False}
    return {
        "schema": SCHEMA,
        "running": True,
        "pid": state.pid,
        "model": state.request.model.name,
        "backend": state.request.backend,
        "device": state.device,
        "loaded": state.loaded,
        "working": state.working,
        "waiting": state.waiting,
    }


def told(state: State | None) -> str:
    """The same in a line."""
    if state is None:
        return "no server runs"
    doing = "at work" if state.working else "idle"
    held = "loaded" if state.loaded else "not loaded"
    what = f"{state.request.model.name} with {state.request.backend} on {state.device}"
    return f"{what}: {held}, {doing}, {state.waiting} waiting (pid {state.pid})"


# What `run` does with it


@contextmanager
def server_for(
    model: str | None,
    backend: str | None,
    vram_limit: str | None = None,
    ram_limit: str | None = None,
    executor: str | None = None,
    precision: str | None = None,
    *,
    ignored: bool = False,
) -> Iterator[Server | None]:
    """The running server, if it can do what was asked and is not `ignored`; else None, and a remark says why."""
    from kleinctl.home import home

    server = None
    if not ignored and (home() / SERVER_FILE).exists():
        server = _found(Asked(model, backend, precision, vram_limit, ram_limit, executor))
    try:
        yield server
    finally:
        if server is not None:
            server.stop()


@dataclass(frozen=True)
class Asked:
    """What was typed that a loaded model may not be able to answer."""

    model: str | None
    backend: str | None
    precision: str | None
    vram_limit: str | None
    ram_limit: str | None
    executor: str | None


def _found(asked: Asked) -> Server | None:
    from kleinctl.serve import connect

    try:
        server = connect(_show_wait)
        why = "" if server is None else _other(server.state, asked)
    except KleinctlError as error:
        server, why = None, error.problem.why
    if why:
        output.remark(f"this runs without the server: {why}")
    if server is not None and why:
        server.stop()
        return None
    return server


def _show_wait(before: int) -> None:
    if before:
        output.remark(f"  waiting: {before} {'run is' if before == 1 else 'runs are'} before this one")


def _other(state: State, asked: Asked) -> str:
    """What of the options the loaded model cannot answer, in a sentence; empty where it can."""
    model, backend = state.request.model.name, state.request.backend
    keeps = "`kleinctl serve --free` lets go of its memory."
    if asked.executor not in (None, "process"):
        return f"Its worker is not where --executor {asked.executor} would have it. {keeps}"
    if asked.model not in (None, model) or asked.backend not in (None, *state.names):
        return f"It has {model} with {backend}. {keeps}"
    if asked.precision and asked.precision not in state.precisions:
        return f"It has {model} with {backend}, which cannot hold weights in {asked.precision!r}. {keeps}"
    limits = {"--vram-limit": (state.vram_bytes, asked.vram_limit), "--ram-limit": (state.ram_bytes, asked.ram_limit)}
    if any(_over(*each, option) for option, each in limits.items()):
        return f"It has loaded {model} for more memory than the limit. {keeps}"
    return ""


def _over(planned: int, limit: str | None, option: str) -> bool:
    """Whether the server planned with more than the `limit` that `option` gave."""
    from kleinctl.units import parse_bytes

    return limit is not None and planned > parse_bytes(limit, option)


def make_pictures(
    server: Server,
    jobs: Sequence[Job],
    outputs: tuple[Output, ...],
    asked: tuple[int, int] | None = None,
    *,
    origins: Sequence[str] = (),
) -> Result:
    """Run the jobs on the server, told and shown as `steps.make_pictures` does. Of a batch's jobs that has been done.

    Raises:
        KleinctlError: as without the server.
    """
    from kleinctl import generate
    from kleinctl.serve import Ended

    before = server.judged(jobs[0], asked)
    told = () if origins else before.problems
    if told:
        output.show_problems(told)
    if before.refused is not None and not origins:
        raise KleinctlError(before.refused)
    request = replace(server.state.request, jobs=tuple(jobs), outputs=outputs, origins=tuple(origins))
    with ExitStack() as shown:
        result = generate.run(request, _show_late(server.state, len(jobs), shown), server)
    for remark in result.remarks:
        output.remark(f"warning: {remark}")
    after = server.told(Ended(before.fit)).problems if result.images and before.fit is not None else ()
    if after:
        output.show_problems(after)
    return replace(result, problems=(*told, *after))


def _show_late(state: State, count: int, shown: ExitStack) -> OnEvent:
    """What shows the events of a run, from the first on: what it needs is imported while the server is at work."""
    show: OnEvent | None = None

    def hear(event: Event) -> None:
        nonlocal show
        if show is None:
            from kleinctl.cli import steps
            from kleinctl.cli.progress import Bars

            output.heading(f"{state.request.model.name} with {state.request.backend} on {state.device}")
            if state.request.model.note:
                output.remark(state.request.model.note)
            show = steps.shown_on(shown.enter_context(Bars()), count)
        show(event)

    return hear
