"""`kleinctl install`"""

from __future__ import annotations

from pathlib import Path

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS


@click.command("install", short_help="Fetch and verify a model's files and build its environment.")
@options.together(options.model, options.backend)
@click.option("--variant", type=click.Choice(["distilled", "base"]), help="The variant of the model's size.")
@options.together(options.comfyui, options.unverified, options.accept, options.yes)
@click.option("--dry-run", is_flag=True, help="Show the plan and do nothing.")
@options.as_json
def command(
    model: str | None,
    backend: str | None,
    variant: str | None,
    comfyui: Path | None,
    allow_unverified: bool,
    accept_licence: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Fetch and verify a model's files and build the Python environment they need.

    Without --model it is the one that `kleinctl doctor` would choose. What is here is not fetched again; what broke off
    goes on where it stopped.
    """
    from kleinctl import road
    from kleinctl.cli import steps
    from kleinctl.plugins import Plugins

    plugins = Plugins()
    hardware = options.this_machine()
    way = options.way(plugins, hardware, model, backend, variant=variant, must_fit=model is None)
    if not dry_run:
        steps.accept_licence(way.model, yes=yes or accept_licence)
    plan = road.files(way, comfyui=comfyui, allow_unverified=allow_unverified)
    where = road.place(way, hardware)
    steps.show_files(plan)
    if not way.candidate.runs:
        output.remark(f"warning: it would not run here now. {way.candidate.why_not}")
    builds = way.candidate.runs or where.environment is not None
    if builds:
        steps.show_environment(way, where, hardware)
    if dry_run:
        if as_json:
            output.print_json(plan.to_json())
        output.show_problems(plan.problems)
        return PROBLEMS if plan.problems else OK
    if not plan.problems:
        steps.ask_to_fetch(plan.fetch_bytes, yes=yes)
    steps.get_files(plan)
    if builds:
        steps.get_environment(way, where, hardware)
    if as_json:
        output.print_json(road.files(way, allow_unverified=allow_unverified).to_json())
    else:
        output.answer(f"{way.model.name} is installed for {way.backend.name}")
    return OK
