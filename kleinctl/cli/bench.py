"""`kleinctl bench`"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl import atomic
from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS, KleinctlError, Misuse, Problem

if TYPE_CHECKING:
    from kleinctl.bench import Asked, Line
    from kleinctl.environment import Environment
    from kleinctl.hardware import Hardware, Rates
    from kleinctl.plugins import Plugins
    from kleinctl.road import Way

#: Options that take several values after one name, as in `--free 16 12 8`.
SEVERAL = ("--sizes", "--free", "--backend", "--image")


class Listed(click.Command):
    """Takes `--sizes 512 1024` for `--sizes 512 --sizes 1024`: there is nothing else that the values could be."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        name, spread = "", []
        for word in args:
            if word.startswith("-"):
                name = word if word in SEVERAL else ""
                spread.append(word)
            else:
                spread += [name, word] if name and spread[-1] != name else [word]
        return super().parse_args(ctx, spread)


@click.command("bench", cls=Listed, short_help="Time and memory of this machine, as a table, a file and a picture.")
@click.option("--calibrate", is_flag=True, help="Measure this machine's rates once; predictions then go by them.")
@options.model
@click.option("--backend", "backends", multiple=True, metavar="NAME...", help="Backends; by default the one chosen.")
@click.option("--sizes", multiple=True, metavar="WxH...", help="Sizes in pixels; by default the model's own.")
@click.option("--free", multiple=True, metavar="BYTES...", help="VRAM to leave free, as in 12GiB, or 12.")
@click.option("--runs", type=click.IntRange(1, 100), default=5, help="New prompts that count.  [default: 5]")
@click.option("--against", type=click.Choice(["diffusers", "comfyui"]), help="Another program to compare with.")
@click.option("--url", default="http://127.0.0.1:8188", help="The ComfyUI server, on this machine.")
@options.together(options.steps, options.guidance, options.precision)
@click.option("--image", "images", multiple=True, type=options.FILE, metavar="REF...", help="Edit these pictures.")
@click.option("-o", "--output", "out", type=options.FILE, metavar="FILE.json", help="Write the document here.")
@click.option("--chart", type=options.FILE, metavar="FILE.png", help="Draw bars of time and memory.")
@options.as_json
def command(
    calibrate: bool,
    model: str | None,
    backends: tuple[str, ...],
    sizes: tuple[str, ...],
    free: tuple[str, ...],
    runs: int,
    against: str | None,
    url: str,
    steps: int | None,
    guidance: float | None,
    precision: str | None,
    images: tuple[Path, ...],
    out: Path | None,
    chart: Path | None,
    as_json: bool,
) -> int:
    """Time and memory of this machine for each size and budget of VRAM, beside what was predicted.

    With --free, other memory of the card is really taken meanwhile. Two pictures warm up; new prompts follow, then the
    last one again. Each line is written as soon as it is there.
    """
    from kleinctl import bench, generate, road
    from kleinctl.plugins import Plugins

    plugins, hardware = Plugins(), options.this_machine()
    given = {"steps": steps, "guidance": guidance, "precision": precision, "images": images or None}
    changes = {name: value for name, value in given.items() if value is not None}
    way = options.way(plugins, hardware, model, backends[0] if backends else None, changes, installed=True,
                      must_fit=not free)  # fmt: skip
    if free and hardware.gpu is None:
        raise bench.no_card()
    uuid = hardware.gpu.uuid if hardware.gpu else None
    asked = _asked(plugins, way, partial(_machine, uuid), changes, backends, sizes, free, runs, against, url)
    if not road.files(way).in_place:
        raise road.not_installed(way)
    if calibrate:
        return calibrated(way, hardware, as_json=as_json)
    generate.check_jobs([_first_job(asked)])
    check_files({"-o": out, "--chart": chart})
    environment = asked.environment(way, hardware)
    lines: list[Line] = []
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def document() -> dict[str, Any]:
        return bench.document(asked, lines, hardware, f"kleinctl {shlex.join(sys.argv[1:])}", date)

    for line in _measured(asked, as_json=as_json):
        lines.append(line)
        if out is not None:
            written(out, document())
    if as_json:
        output.print_json(document())
    if chart is not None:
        draw_chart(document(), chart, environment.python)
    return PROBLEMS if any(line.problem for line in lines) else OK


def _asked(
    plugins: Plugins,
    way: Way,
    detect: Callable[[], Hardware],
    changes: dict[str, Any],
    backends: Sequence[str],
    sizes: Sequence[str],
    free: Sequence[str],
    runs: int,
    against: str | None,
    url: str,
) -> Asked:
    from kleinctl import bench
    from kleinctl.cli.steps import nearest_size
    from kleinctl.units import parse_bytes

    if against == "comfyui":
        try:
            plugins.backend(against).thing.check_server(url)
        except KleinctlError as error:
            raise Misuse(error.problem) from None
    wanted = [nearest_size(size, "--sizes")[:2] for size in sizes]
    own = way.model.defaults
    amounts = [parse_bytes(text, "--free") for text in free]
    return bench.Asked(
        plugins=plugins,
        model=way.model,
        backends=tuple(plugins.backend(name).thing.name for name in backends) or (None,),
        sizes=tuple((width or own.width, height or own.height) for width, height in wanted)
        or ((own.width, own.height),),
        free=tuple(amounts) or (None,),
        runs=runs,
        changes=changes,
        detect=detect,
        environment=_environment,
        against=against,
        url=url,
    )


def _machine(uuid: str | None) -> Hardware:
    """This machine as it is now, with the one card that is measured: another may have more free by then."""
    found = options.this_machine()
    return replace(found, gpus=tuple(gpu for gpu in found.gpus if gpu.uuid == uuid))


def _environment(way: Way, hardware: Hardware) -> Environment:
    from kleinctl import road
    from kleinctl.cli import steps

    return steps.get_environment(way, road.place(way, hardware), hardware)


def _first_job(asked: Asked) -> Any:
    from kleinctl.planner import default_job

    return default_job(asked.model, **asked.changes)


def _measured(asked: Asked, *, as_json: bool) -> Any:
    """The lines, each shown as soon as it is there, with a bar for what goes on."""
    from kleinctl import bench
    from kleinctl.cli.progress import Bars

    say = output.remark if as_json else output.answer
    say(f"{asked.model.name}, seconds and GiB; in brackets what was predicted")
    say(HEAD)
    with Bars() as bars:

        def show(text: str, done: int, total: int) -> None:
            bars.show("line", text, done, total)

        for line in bench.measure(asked, show):
            bars.remove("line")
            say(row(line))
            yield line


HEAD = (
    f"{'size':>9} {'free':>5}  {'by':17} {'first':>6} {'new prompt':>13} {'share':>5} {'again':>6} {'VRAM':>13}"
    f" {'host':>5} {'same':>4}  held"
)


def row(line: Line) -> str:
    """A line of the table."""
    from kleinctl.units import GIB

    head = f"{line.width}x{line.height}".rjust(9)
    head += f" {'-' if line.free_bytes is None else f'{line.free_bytes / GIB:.1f}':>5}  {line.who:17} "
    if line.figures is None:
        problem = line.problem
        return f"{head}[{problem.name}] {problem.what}: {problem.why}" if problem else head
    own, fit = line.figures, line.fit
    seconds = f"{own.seconds:.2f}" + (f" ({fit.seconds_next:.2f})" if fit else "")
    memory = f"{own.vram_bytes / GIB:.2f}" + (f" ({fit.vram_bytes / GIB:.2f})" if fit else "")
    first = "-" if own.seconds_first is None else f"{own.seconds_first:.2f}"
    share = "-" if line.share is None else f"{line.share:.2f}"
    same = "-" if line.same is None else "yes" if line.same else "NO"
    return (
        f"{head}{first:>6} {seconds:>13} {share:>5} {own.seconds_again:6.2f} {memory:>13}"
        f" {own.host_bytes / GIB:5.1f} {same:>4}  {own.strategy}"
    )


def calibrated(way: Way, hardware: Hardware, *, as_json: bool) -> int:
    """Measure, keep and show this machine's rates."""
    from kleinctl import bench, store
    from kleinctl.cli.progress import Bars
    from kleinctl.hardware import rates
    from kleinctl.home import home

    environment = _environment(way, hardware)
    with Bars() as bars:
        found = bench.calibrate(way, environment, hardware, lambda *said: bars.show("rates", *said))
    with store.writing(home() / rates.FILE):
        path = rates.write(home(), found)
    if as_json:
        output.print_json(rates.document(found))
    else:
        small = found.card and bench.too_small(way.model)
        unknown = f"not kept: {found.model} is too small for this card; name a larger one with --model" if small else ""
        output.show_rows(rate_rows(found, unknown), width=16, target=output.console())
        output.answer(f"kept in {path}; `kleinctl plan` goes by it")
    return OK


def rate_rows(rates: Rates, unknown: str = "") -> list[tuple[str, str]]:
    """Measured rates for people: a head and what was found, for each that was; `unknown` says why others have none."""
    from kleinctl.units import speed_text, work_text

    def speed(rate: float | None) -> str:
        return speed_text(rate) if rate else ""

    unknown = unknown or "not measured; the worker's log says why"
    tokens = ", ".join(f"{work_text(each.flops)} at {each.size} tokens" for each in rates.forward)
    pixels = ", ".join(f"{work_text(each.flops)} at {each.size / 2**20:.2f} megapixels" for each in rates.decode)
    rows = [
        ("measured on", f"{rates.card or rates.cpu}, in the shape of {rates.model}"),
        ("to the card", f"{speed(rates.pinned)} pinned, {speed(rates.pageable)} pageable" if rates.pinned else ""),
        ("from the card", speed(rates.back)),
        ("from disk", speed(rates.disk) or rates.disk_note),
        ("from page cache", speed(rates.cached)),
        ("text encoder", work_text(rates.encode) if rates.encode else unknown),
        ("transformer", tokens or unknown),
        ("VAE", pixels or unknown),
        ("writing a PNG", f"{rates.save_seconds * 2**20:.2f} s a megapixel" if rates.save_seconds else unknown),
        ("worker's start", f"{rates.start_seconds:.1f} s" if rates.start_seconds else ""),
    ]
    return [(head, text) for head, text in rows if text]


def check_files(files: Mapping[str, Path | None]) -> None:
    """Make the folders of the files that options name, and try whether they can be written before anything is drawn.

    Raises:
        Misuse: it cannot.
    """
    for option, path in files.items():
        if path is not None:
            try:
                atomic.try_writing(path)
            except OSError as error:
                raise Misuse(_unwritable(path, error, option)) from None


def written(path: Path, document: dict[str, Any]) -> None:
    """Write the document, in place of the last one: a run that is killed leaves what it has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise Misuse(_unwritable(path, error)) from None


def _unwritable(path: Path, error: OSError, option: str = "-o") -> Problem:
    why, fix = f"{error.strerror}.", f"kleinctl bench {option} bench.{'png' if option == '--chart' else 'json'}"
    return Problem(f"{path} cannot be written to", why, fix, name="output-unwritable", path=str(path))


def draw_chart(document: dict[str, Any], target: Path, python: Path) -> None:
    """Draw the chart of a document."""
    import tempfile

    from kleinctl import bench

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "bench.json")
        written(source, document)
        bench.chart(source, target.absolute(), python)
    output.remark(f"the chart is {target}")
