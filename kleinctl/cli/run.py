"""`kleinctl run`"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS, KleinctlError, Misuse, Problem

if TYPE_CHECKING:
    from kleinctl.backends import Job
    from kleinctl.batch import Batch, Fault, Line, Task
    from kleinctl.generate import Output, Result
    from kleinctl.hardware import Hardware
    from kleinctl.manifest import Model
    from kleinctl.plugins import Plugins
    from kleinctl.road import Way
    from kleinctl.serve import Server


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
@click.option("--batch", metavar="FILE", help="Make the picture of each line of this file; - reads stdin.")
@click.option("--workflow", type=options.FILE, metavar="FILE", help="Run this workflow of ComfyUI's (API format).")
@click.option(
    "--write-workflow",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the job as a workflow for ComfyUI's own page, and make no picture.",
)
@options.together(options.precision, options.vram_limit, options.ram_limit)
@click.option("--executor", metavar="NAME", help="Where the worker runs: `process`, or a plugin's executor.")
@click.option("--no-server", is_flag=True, help="Load the model anew, though `kleinctl serve` has one loaded.")
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
    batch: str | None,
    workflow: Path | None,
    write_workflow: Path | None,
    precision: str | None,
    vram_limit: str | None,
    ram_limit: str | None,
    executor: str | None,
    no_server: bool,
    as_json: bool,
) -> int:
    """Make pictures from PROMPT with an installed model; the path of each is a line on stdout.

    With --image a picture is edited as PROMPT says. --from repeats a picture of kleinctl's from the record in it; other
    options change what they name.

    With --batch each line of FILE is a JSON object: "prompt", and if wanted "seed", "size", "steps", "guidance" and
    "image" (a path or several, from FILE's folder); options go for lines that do not say. A line without a seed gets
    --seed (0 without it) plus the line's number. -o names the folder (klein- and FILE's name without it). The same
    command once more makes only those pictures that are not there yet.

    With --workflow the prompt, the seed and the size are put into a workflow of your own; its steps and guidance stay.
    """
    from kleinctl.cli.serve import server_for
    from kleinctl.cli.steps import nearest_size

    asked: dict[str, Any] = {"prompt": prompt, "steps": steps, "guidance": guidance, "seed": seed}
    asked |= {"images": images or None, "precision": precision, "workflow": workflow}
    asked["width"], asked["height"], typed = nearest_size(size) if size else (None, None, None)
    changes = {name: value for name, value in asked.items() if value is not None}
    if batch is not None:
        only_batch(prompt, origin, count, workflow or write_workflow)
    elif origin is not None:
        changes, model, backend = from_record(origin, changes, model, backend)
    elif prompt is None:
        raise click.UsageError("A prompt is wanted, or --from and a picture.", click.get_current_context())
    wanted = Wanted(model, backend, changes, typed, out, executor, (vram_limit, ram_limit))
    if write_workflow is not None:
        only_written(count, workflow)
        return write_down(wanted, write_workflow, as_json=as_json)
    if workflow is not None:
        only_kept(steps=steps, guidance=guidance)
        wanted = with_workflow(wanted, workflow)
    with server_for(model, wanted.backend, vram_limit, ram_limit, executor, precision, ignored=no_server) as server:
        if batch is not None:
            return run_batch(wanted, batch, server, as_json=as_json)
        print_result(run_jobs(wanted, count, server), as_json=as_json)
    return OK


@dataclass(frozen=True)
class Wanted:
    """What was asked for: `changes` to the model's default job, the size as it was `typed`; the rest as named.

    `limits` are of VRAM and RAM. The machine is looked at when it is first asked for: a server has done so.
    """

    model: str | None
    backend: str | None
    changes: dict[str, Any]
    typed: tuple[int, int] | None
    out: str | None
    executor: str | None
    limits: tuple[str | None, str | None]

    @cached_property
    def plugins(self) -> Plugins:
        """The plugins of this installation."""
        from kleinctl.plugins import Plugins

        return Plugins()

    @cached_property
    def hardware(self) -> Hardware:
        """This machine, within the limits."""
        return options.limited(options.this_machine(), *self.limits)


def only_batch(prompt: str | None, origin: Path | None, count: int, workflow: Path | None) -> None:
    """Whether nothing was typed that a batch has in its lines, or that goes for one job alone."""
    other = "PROMPT" if prompt is not None else "--from" if origin is not None else "--count" if count > 1 else None
    other = other or ("workflows" if workflow is not None else None)
    if other is not None:
        raise click.UsageError(f"--batch has its jobs in FILE: leave {other} out.", click.get_current_context())


def from_record(
    origin: Path, changes: dict[str, Any], model: str | None, backend: str | None
) -> tuple[dict[str, Any], str, str]:
    """The job, model and backend of the picture `origin`, but for what was asked differently."""
    from kleinctl import records
    from kleinctl.workflows import in_record

    record = records.read_record(origin)
    in_record(record, changes.get("workflow"))
    old = records.job_from_record(record, changes.get("images", ()))
    return {**vars(old), **changes}, model or record["model"], backend or record["backend"]


def with_workflow(wanted: Wanted, path: Path) -> Wanted:
    """The same with a backend that runs the workflow, which has been looked at."""
    from kleinctl.workflows import runner

    backend = runner(wanted.plugins, wanted.backend)
    model = wanted.plugins.models_for(wanted.model)[0]
    backend.check_workflow(path, jobs_of(model, {"seed": 0, **wanted.changes}, 1)[0])
    return replace(wanted, backend=backend.name)


def only_kept(**typed: Any) -> None:
    """Whether nothing was typed that stays as the workflow has it."""
    other = next((name for name, value in typed.items() if value is not None), None)
    if other is not None:
        raise click.UsageError(f"--workflow keeps its own {other}: leave --{other} out.")


def only_written(count: int, workflow: Path | None) -> None:
    """Whether nothing was typed that a workflow which is written cannot hold."""
    other = "--workflow" if workflow is not None else "--count" if count > 1 else None
    if other is not None:
        raise click.UsageError(f"--write-workflow writes one job of kleinctl's: leave {other} out.")


def write_down(wanted: Wanted, path: Path, *, as_json: bool) -> int:
    """The job of one prompt as a workflow; its path is the answer."""
    from kleinctl import generate
    from kleinctl.workflows import write

    generate.check_prompt(wanted.changes["prompt"])
    model = wanted.plugins.models_for(wanted.model)[0]
    seed = int.from_bytes(os.urandom(4), "little")
    write(wanted.plugins, wanted.backend, model, jobs_of(model, {"seed": seed, **wanted.changes}, 1)[0], path)
    if as_json:
        output.print_json({"workflow": str(path)})
    else:
        output.answer(str(path))
    return OK


# Jobs of one prompt


def run_jobs(wanted: Wanted, count: int, server: Server | None) -> Result:
    """The pictures of one prompt."""
    from kleinctl import generate

    generate.check_prompt(wanted.changes["prompt"])
    wanted.changes.setdefault("seed", int.from_bytes(os.urandom(4), "little"))
    place = Served(server) if server is not None else Here(wanted, way_of(wanted))
    jobs = jobs_of(place.model, wanted.changes, count)
    outputs = outputs_of(wanted, jobs)
    place.get_ready()
    return place.pictures(jobs, outputs, wanted.typed)


def way_of(wanted: Wanted) -> Way:
    """The way for the jobs of one prompt."""
    from kleinctl.cli import steps as show

    try:
        return options.way(
            wanted.plugins, wanted.hardware, wanted.model, wanted.backend, wanted.changes, installed=True
        )
    except KleinctlError as error:
        show.show_misfit(error, wanted.plugins.models_for(wanted.model)[0], wanted.hardware, wanted.changes)
        raise


def jobs_of(model: Model, changes: dict[str, Any], count: int) -> list[Job]:
    """`count` jobs with the model's defaults, what was asked differently, and one seed after the other."""
    from kleinctl.planner import default_job

    first = default_job(model, **changes)
    return [replace(first, seed=(first.seed + number) % 2**63) for number in range(count)]


def outputs_of(wanted: Wanted, jobs: Sequence[Job]) -> tuple[Output, ...]:
    """The file of each job, with all that is wrong with inputs and outputs told before anything is made."""
    from kleinctl import generate

    outputs = generate.choose_outputs(jobs, wanted.out)
    generate.check_jobs(jobs)
    generate.check_outputs(outputs)
    return outputs


# Jobs of a batch


def run_batch(wanted: Wanted, source: str, server: Server | None, *, as_json: bool) -> int:
    """The pictures of the lines of a file that are not there yet; what failed is told at the end once more."""
    from kleinctl import batch as batches
    from kleinctl import generate

    folder = generate.output_folder(Path(wanted.out) if wanted.out else batches.default_folder(source)).absolute()
    batch = batches.read(source)
    if not batch.lines:
        raise nothing_good(batch, batch.faults)
    place = Served(server) if server is not None else Here(wanted, way_of_batch(wanted, batch))
    refused, odd = judged(wanted, place, batch)
    faults = [*batch.faults, *refused]
    show_in_short(faults)
    output.show_problems(odd)
    lines = [line for line in batch.lines if line.number not in {fault.line for fault in refused}]
    if not lines:
        raise nothing_good(batch, faults)
    generate.check_outputs([generate.Output(folder / "picture.png")])
    place.get_ready()
    with batches.only_one(folder):
        tasks = tasks_of(wanted, place, lines, folder)
        show_skipped(tasks)
        left = [task for task in tasks if not task.done]
        result = batch_pictures(place, batch, left, folder) if left else nothing_left(place)
    faults += [batches.Fault(left[each.index].line, each.problem) for each in result.failures]
    result = replace(result, problems=(*odd, *result.problems))
    print_batch(result, tasks, sorted(faults, key=lambda fault: fault.line), as_json=as_json)
    return PROBLEMS if faults else OK


def way_of_batch(wanted: Wanted, batch: Batch) -> Way:
    """The way for a batch: the model is chosen by the line that asks for least, the backend by the most that fits."""
    from kleinctl import batch as batches
    from kleinctl import road
    from kleinctl.planner import default_job

    groups = sorted((changes for changes, _ in batches.demands(batch.lines, wanted.changes)), key=_pixels)
    way = options.way(wanted.plugins, wanted.hardware, wanted.model, wanted.backend, groups[0], installed=True)
    groups.sort(key=lambda changes: _pixels(vars(default_job(way.model, **changes))), reverse=True)
    for changes in groups:
        found = road.ways(wanted.plugins, [way.model], wanted.backend, wanted.hardware, changes)
        if found:
            return found[0]
    return way


def _pixels(changes: Mapping[str, Any]) -> tuple[int, int]:
    """How much a job asks for. One of the model's own size, as long as that is not known, asks for least."""
    return changes.get("width", 0) * changes.get("height", 0), len(changes.get("images", ()))


def judged(wanted: Wanted, place: Place, batch: Batch) -> tuple[list[Fault], list[Problem]]:
    """The lines that do not fit, and what is odd about the others, each thing once."""
    from kleinctl import batch as batches
    from kleinctl.planner import default_job

    faults: list[Fault] = []
    odd: dict[str, Problem] = {}
    for changes, own in batches.demands(batch.lines, wanted.changes):
        job = default_job(place.model, **changes)
        try:
            for asked in dict.fromkeys(line.asked or wanted.typed for line in own):  # drawn alike, typed otherwise
                odd.update((each.what, each) for each in place.judged(job, asked))
        except KleinctlError as error:
            faults += [batches.fault(batch.name, line.number, error.problem) for line in own]
    return faults, list(odd.values())


def tasks_of(wanted: Wanted, place: Place, lines: Iterable[Line], folder: Path) -> list[Task]:
    """The job and the file of each line."""
    from kleinctl import batch as batches
    from kleinctl import records
    from kleinctl.planner import default_job

    parts = place.parts()
    jobs = {line.number: default_job(place.model, **batches.changes(line, wanted.changes)) for line in lines}
    return batches.tasks(jobs, folder, lambda job: records.begin(job, place.model, place.backend, parts))


def batch_pictures(place: Place, batch: Batch, left: Sequence[Task], folder: Path) -> Result:
    """The pictures of the tasks that are `left`. After Ctrl-C it is told how to go on."""
    from kleinctl.generate import Output

    jobs, outputs = [task.job for task in left], tuple(Output(task.path) for task in left)
    try:
        return place.pictures(jobs, outputs, None, [batch.origin(task.line) for task in left])
    except KeyboardInterrupt:
        made, rest = sum(task.path.exists() for task in left), "; the same command goes on with the rest"
        output.remark(f"\n{made} of {len(left)} pictures are in {folder}{rest if made < len(left) else ''}")
        raise


def nothing_left(place: Place) -> Result:
    """The result of a batch of which all pictures are there."""
    from kleinctl.generate import Result

    return Result(place.backend, place.model.name, (), {}, 0.0)


def nothing_good(batch: Batch, faults: Sequence[Fault]) -> KleinctlError:
    """The problem of a batch of which no line can be drawn. What is wrong with them has been told."""
    first = faults[0].problem
    why = f"None of its {len(faults)} lines can be drawn. {first.what}: {first.why}"
    return Misuse(Problem(f"{batch.name} has no job", why, first.fix, name="batch-empty", path=batch.name))


# Where pictures are made


class Here:
    """A worker of this command's own."""

    def __init__(self, wanted: Wanted, way: Way) -> None:
        self._wanted, self._way = wanted, way
        self.model, self.backend = way.model, str(way.backend.name)

    def get_ready(self) -> None:
        """Hash what of the model has not been hashed since it came.

        Raises:
            KleinctlError: the model is not installed, or damaged.
        """
        from kleinctl import road
        from kleinctl.cli import steps as show

        plan = road.files(self._way)
        if not plan.in_place:
            raise road.not_installed(self._way)
        show.get_files(plan)

    def parts(self) -> dict[str, str]:
        """The sha256 of the model's parts by id."""
        from kleinctl import road

        return road.digests(self._way)

    def judged(self, job: Job, asked: tuple[int, int] | None) -> list[Problem]:
        """What is odd about `job`, of which `asked` is the size as it was typed.

        Raises:
            KleinctlError: it does not fit.
        """
        from kleinctl import road
        from kleinctl.cli.steps import job_problems
        from kleinctl.planner import compare

        plugins, hardware = self._wanted.plugins, self._wanted.hardware
        candidates = compare([self._way.offer], self.model, hardware, job)
        if not any(each.runs for each in candidates):
            changes = {name: value for name, value in vars(job).items() if name != "prompt"}
            raise road.no_way(plugins, self.model, self.backend, hardware, changes)
        return job_problems(self._way, hardware, job, asked)

    def pictures(
        self,
        jobs: Sequence[Job],
        outputs: tuple[Output, ...],
        asked: tuple[int, int] | None,
        origins: Sequence[str] = (),
    ) -> Result:
        """The pictures of `jobs`; see `steps.make_pictures`. Of a batch's jobs it is known what is odd."""
        from kleinctl import road
        from kleinctl.cli import steps as show

        way, hardware = self._way, self._wanted.hardware
        executor = road.executor(self._wanted.plugins, self._wanted.executor)
        where = road.place(way, hardware)
        environment = show.get_environment(way, where, hardware)
        return show.make_pictures(way, environment, where, hardware, jobs, outputs, executor, asked, origins=origins)


class Served:
    """The worker of a running server; the same as `Here` in each respect."""

    def __init__(self, server: Server) -> None:
        self._server, self._request = server, server.state.request
        self.model, self.backend = self._request.model, self._request.backend

    def get_ready(self) -> None:
        """The server is."""

    def parts(self) -> dict[str, str]:
        """The sha256 of the model's parts by id."""
        return dict(self._request.parts)

    def judged(self, job: Job, asked: tuple[int, int] | None) -> list[Problem]:
        """What is odd about `job`, as `Here.judged`."""
        told = self._server.judged(job, asked)
        if told.refused is not None:
            raise KleinctlError(told.refused)
        return list(told.problems)

    def pictures(
        self,
        jobs: Sequence[Job],
        outputs: tuple[Output, ...],
        asked: tuple[int, int] | None,
        origins: Sequence[str] = (),
    ) -> Result:
        """The pictures of `jobs`, as `Here.pictures`."""
        from kleinctl.cli.serve import make_pictures

        return make_pictures(self._server, jobs, outputs, asked, origins=origins)


Place = Here | Served


# What is told


def print_result(result: Result, *, as_json: bool) -> None:
    """The paths of the pictures, one a line, or the document."""
    if as_json:
        output.print_json(result.to_json())
        return
    for image in result.images:
        output.answer(str(image.path))


def print_batch(result: Result, tasks: Sequence[Task], faults: Sequence[Fault], *, as_json: bool) -> None:
    """The paths of all pictures that are there now, in the order of the lines, or the document; what failed, again."""
    failed = {fault.line for fault in faults}
    if as_json:
        skipped = [task.to_json() for task in tasks if task.done]
        output.print_json({**result.to_json(), "failed": [fault.to_json() for fault in faults], "skipped": skipped})
    else:
        for task in tasks:
            if task.line not in failed:
                output.answer(str(task.path))
    if faults:
        output.heading(f"{_lines(len(faults))} of the batch failed")
        output.show_problems(fault.problem for fault in faults)


def show_in_short(faults: Iterable[Fault]) -> None:
    """What is wrong with lines, before the others are drawn."""
    for fault in faults:
        output.show_problem_line(fault.problem, output.err_console())


def show_skipped(tasks: Sequence[Task]) -> None:
    """How many pictures are there already."""
    count = sum(task.done for task in tasks)
    if count:
        output.remark(f"{_lines(count)} skipped: the picture is there, made by the same job")


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"
