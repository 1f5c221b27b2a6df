"""`kleinctl up`"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, KleinctlError, Problem

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware
    from kleinctl.install import InstallPlan
    from kleinctl.plugins import Plugins
    from kleinctl.road import Way


@click.command("up", short_help="One line to a picture: doctor, choose, install, verify, run.")
@click.argument("prompt")
@options.together(options.out, options.model, options.backend, options.size)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="The seed; by default a new one each time.")
@options.together(
    options.vram_limit, options.ram_limit, options.unverified, options.accept, options.yes, options.as_json
)
def command(
    prompt: str,
    out: str | None,
    model: str | None,
    backend: str | None,
    size: str | None,
    seed: int | None,
    vram_limit: str | None,
    ram_limit: str | None,
    allow_unverified: bool,
    accept_licence: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """One line to a picture: look at the machine, choose, install, verify, and run PROMPT.

    The path of the picture is the last line on stdout. Where FLUX.2 [klein] cannot run, it says why, and what
    ships with kleinctl runs instead. A model that `kleinctl serve` has loaded is used as `run` uses it.
    """
    from kleinctl import generate, road
    from kleinctl.cli import steps
    from kleinctl.cli.doctor import machine_rows
    from kleinctl.cli.run import Wanted, jobs_of, print_result, run_jobs
    from kleinctl.cli.serve import server_for
    from kleinctl.facts import gather
    from kleinctl.plugins import Plugins
    from kleinctl.survey import survey

    generate.check_prompt(prompt)
    width, height, typed = steps.nearest_size(size)
    asked = {"prompt": prompt, "width": width, "height": height, "seed": seed}
    changes = {name: value for name, value in asked.items() if value is not None}
    changes.setdefault("seed", secrets.randbelow(2**32))
    limits = vram_limit, ram_limit
    with server_for(model, backend, *limits) as server:
        if server is not None:
            output.remark("`kleinctl serve` has a model loaded: nothing has to be chosen or installed")
            wanted = Wanted(
                model=model, backend=backend, changes=changes, typed=typed, out=out, executor=None, limits=limits
            )
            print_result(run_jobs(wanted, 1, server), as_json=as_json)
            return OK
    plugins = Plugins()
    hardware = options.this_machine()
    limit = options.limited(hardware, *limits)
    output.show_rows(machine_rows(hardware), width=7, target=output.err_console())
    found = survey(plugins, gather(plugins, hardware), model=model, backend=backend, changes=changes, plan_for=limit)
    output.show_at_a_glance(found.problems, output.err_console())
    way, plan = choose(plugins, limit, model, backend, changes, allow_unverified, accept=accept_licence or yes)
    jobs = jobs_of(way.model, changes, 1)
    outputs = generate.choose_outputs(jobs, out)
    generate.check_outputs(outputs)
    where = road.place(way, limit)
    steps.show_files(plan)
    steps.show_environment(way, where, hardware)
    steps.ask_to_fetch(plan.fetch_bytes, yes=yes)
    steps.get_files(plan)
    environment = steps.get_environment(way, where, hardware)
    now = options.limited(options.this_machine(), *limits)  # what is free may have changed since
    result = steps.make_pictures(way, environment, where, now, jobs, outputs, road.executor(plugins, None), typed)
    print_result(result, as_json=as_json)
    return OK


def choose(
    plugins: Plugins,
    hardware: Hardware,
    model: str | None,
    backend: str | None,
    changes: dict,
    allow_unverified: bool,
    *,
    accept: bool,
) -> tuple[Way, InstallPlan]:
    """The first model that fits and can be had, and what has to be fetched for it; says why the ones before it can't.

    Raises:
        KleinctlError: none can, or the one that was named cannot.
    """
    from kleinctl import road
    from kleinctl.cli import steps
    from kleinctl.fetch import reachable
    from kleinctl.hub import PATIENT

    models = plugins.models_for(model)
    if not models:
        raise KleinctlError(no_models())
    for each in models:
        try:
            found = road.ways(plugins, [each], backend, hardware, changes)
            if not found:
                raise road.no_way(plugins, each, backend, hardware, changes)
            steps.accept_licence(each, yes=accept)
            plan = road.files(found[0], allow_unverified=allow_unverified)
            for problem in (*plan.problems, road.room(found[0], plan, hardware)):
                if problem is not None:
                    raise KleinctlError(problem)
            unreachable = reachable(timeout=PATIENT.connect) if plan.fetch_bytes else None  # as patient as the download
            if unreachable is not None:
                raise KleinctlError(unreachable)
            if each is not models[0]:
                output.remark(f"so {each.name} runs instead")
            return found[0], plan
        except KleinctlError as error:
            if each is models[-1]:
                raise
            missing = reachable() if error.problem.name == "does-not-fit" and not each.is_packaged else None
            for problem in filter(None, (error.problem, missing)):
                output.remark(f"{problem.what}: {problem.why}")
                if f"--model {models[-1].name}" not in problem.fix:  # which is done at once
                    output.remark(f"hint: {problem.fix}")
    raise AssertionError("the last model either runs or raises")


def no_models() -> Problem:
    """The problem of an installation without any model."""
    why = "No plugin offers one that can be chosen."
    return Problem("there is no model to run", why, "kleinctl plugins", name="no-models")
