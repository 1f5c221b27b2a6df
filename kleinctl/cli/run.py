"""`kleinctl run`"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, KleinctlError

if TYPE_CHECKING:
    from kleinctl.backends import Job
    from kleinctl.generate import Result
    from kleinctl.manifest import Model


@click.command("run", short_help="Make pictures from a prompt.")
@click.argument("prompt", required=False)
@options.out
@options.together(options.model, options.backend, options.size, options.steps, options.guidance)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="The seed; by default a new one each time.")
@click.option("--count", type=click.IntRange(1, 1000), default=1, help="How many pictures, of this seed and the next.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="REF",
    help="Edit this picture; may be given several times.",
)
@click.option(
    "--from", "origin", type=click.Path(path_type=Path), metavar="PNG", help="Repeat the picture in this file."
)
@options.vram_limit
@options.ram_limit
@click.option("--executor", metavar="NAME", help="Where the worker runs: `process`, or a plugin's executor.")
@options.as_json
def command(
    prompt: str | None,
    out: str | None,
    model: str | None,
    backend: str | None,
    size: str | None,
    steps: int | None,
    guidance: float | None,
    seed: int | None,
    count: int,
    images: tuple[Path, ...],
    origin: Path | None,
    vram_limit: str | None,
    ram_limit: str | None,
    executor: str | None,
    as_json: bool,
) -> int:
    """Make pictures from PROMPT with an installed model; the path of each is a line on stdout.

    With --image a picture is edited as PROMPT says. --from repeats a picture of kleinctl's from the record in it; other
    options change what they name.
    """
    from kleinctl import generate, records, road
    from kleinctl.cli import steps as show
    from kleinctl.plugins import Plugins

    asked: dict[str, Any] = {
        "prompt": prompt,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "images": images or None,
    }
    asked["width"], asked["height"], typed = show.nearest_size(size)
    if origin is not None:
        record = records.read_record(origin)
        old = records.job_from_record(record, images)
        given = {name: value for name, value in asked.items() if value is not None}
        asked = {**vars(old), **given}
        model, backend = model or record["model"], backend or record["backend"]
    elif prompt is None:
        raise click.UsageError("A prompt is wanted, or --from and a picture.", click.get_current_context())
    road.check_prompt(asked["prompt"] or "")
    asked["seed"] = secrets.randbelow(2**32) if asked["seed"] is None else asked["seed"]
    changes = {name: value for name, value in asked.items() if value is not None}
    plugins = Plugins()
    hardware = options.limited(options.this_machine(), vram_limit, ram_limit)
    try:
        way = options.way(plugins, hardware, model, backend, changes, installed=True)
    except KleinctlError as error:
        show.show_misfit(error, plugins.models_for(model)[0], hardware, changes)
        raise
    jobs = jobs_of(way.model, changes, count)
    outputs = generate.choose_outputs(jobs, out, many=count > 1)
    generate.check_jobs(jobs)
    generate.prepare_outputs(jobs, outputs)
    plan = road.files(way)
    if not plan.in_place:
        raise road.not_installed(way)
    show.get_files(plan)  # hashes what has not been hashed since it came
    place = road.executor(plugins, executor)
    where = road.place(way, hardware)
    environment = show.get_environment(way, where, hardware)
    result = show.make_pictures(way, environment, where, hardware, jobs, outputs, place, typed)
    print_result(result, as_json=as_json)
    return OK


def jobs_of(model: Model, changes: dict[str, Any], count: int) -> list[Job]:
    """`count` jobs with the model's defaults, what was asked differently, and one seed after the other."""
    from dataclasses import replace

    from kleinctl.planner import default_job

    first = default_job(model, **changes)
    return [replace(first, seed=(first.seed + number) % 2**63) for number in range(count)]


def print_result(result: Result, *, as_json: bool) -> None:
    """The paths of the pictures, one a line, or the document."""
    if as_json:
        output.print_json(result.to_json())
        return
    for image in result.images:
        output.answer(str(image.path))
