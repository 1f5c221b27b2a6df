"""`kleinctl plan`"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS

if TYPE_CHECKING:
    from rich.table import Table

    from kleinctl.backends import Stage
    from kleinctl.hardware import Hardware
    from kleinctl.planner import Candidate

#: Sides of the square pictures that the table shows, in pixels.
SIDES = (512, 1024, 1536, 2048)


@click.command("plan", short_help="Predicted VRAM, RAM, disk and seconds for every backend.")
@click.option("--gpu", metavar="NAME", help='Answer for this card instead, as in "RTX 4070 Ti SUPER"; "none" for none.')
@click.option("--ram", metavar="BYTES", help="Answer for this much RAM; a bare number is GiB.")
@options.together(options.model, options.backend, options.size, options.vram_limit, options.ram_limit, options.as_json)
@click.option("-v", "--verbose", is_flag=True, help="Draw the stages of every backend, not of the chosen one alone.")
def command(
    gpu: str | None,
    ram: str | None,
    model: str | None,
    backend: str | None,
    size: str | None,
    vram_limit: str | None,
    ram_limit: str | None,
    as_json: bool,
    verbose: bool,
) -> int:
    """Predicted VRAM, RAM, disk and seconds for every backend and size, here or on another machine."""
    from kleinctl.cli.steps import nearest_size
    from kleinctl.plugins import Plugins
    from kleinctl.survey import best

    plugins = Plugins()
    here = not (gpu or ram)
    machine = options.this_machine() if here else elsewhere(gpu, ram)
    hardware = options.limited(machine, vram_limit, ram_limit)
    models = plugins.models_for(model)
    offers = plugins.backends_for(backend)
    sizes = [nearest_size(size)[:2]] if size else [(side, side) for side in SIDES]
    rows = []
    for width, height in sizes:
        for each in best(offers, models, hardware, {"width": width, "height": height}, here=here)[0]:
            row = {"backend": each.backend, "model": each.model, "width": width, "height": height}
            rows.append({**row, "fit": each.fit.to_json(), "why_not": each.why_not})
    changes = dict(zip(("width", "height"), sizes[0], strict=True)) if size else {}
    compared, choice = best(offers, models, hardware, changes, here=here)
    if as_json:
        output.print_json(
            {
                "schema": "kleinctl.plan/1",
                "hardware": hardware.to_json(),
                "rows": rows,
                "choice": choice.to_json() if choice else None,
            }
        )
    else:
        show(hardware, rows, f"{choice.candidate.model}: {choice.why}" if choice else "Nothing would run.")
        drawn = [each for each in compared if verbose or (choice and each == choice.candidate)]
        for each in drawn:
            show_stages(each, hardware, sizes[0] if size else None)
        say(f"\n{how_known(hardware)}")
        for sentence in hardware.remarks:
            say(sentence)
    return OK if choice else PROBLEMS


def elsewhere(gpu: str | None, ram: str | None) -> Hardware:
    """The hardware of a machine that is described; what is not said stays as it is here."""
    from kleinctl.hardware import imagine
    from kleinctl.units import parse_bytes

    amount = None if ram is None else parse_bytes(f"{ram} GiB" if ram.strip()[-1:].isdecimal() else ram)
    none = gpu is not None and gpu.lower() == "none"
    hardware = imagine(None if none else gpu, amount, None if gpu and ram else options.this_machine())
    hardware = replace(hardware, gpus=()) if none else hardware
    return hardware


def show(hardware: Hardware, rows: list[dict[str, Any]], why: str) -> None:
    """A table for each model: what each backend would take at each size."""
    from kleinctl.units import bytes_text, gib

    card = hardware.gpu
    has = f"{card.name}, {gib(card.vram_free_bytes)} of VRAM free" if card else "no NVIDIA card"
    say(f"{has}, {gib(hardware.ram_available_bytes)} of RAM available")
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        say(f"\n{model}, {bytes_text(own[0]['fit']['disk_bytes'])} on disk; VRAM and RAM in GiB")
        _show_table(own)
        for backend, reason in dict.fromkeys((row["backend"], row["why_not"]) for row in own if row["why_not"]):
            say(f"no: {reason}" if reason.startswith(backend) else f"{backend}, no: {reason}")
    say(f"\n{why}")


def say(text: str) -> None:
    """Lines of the answer; on a terminal that is too narrow for one, its words stay whole."""
    target = output.console()
    target.print(text, markup=False, soft_wrap=not target.is_terminal)


def how_known(hardware: Hardware) -> str:
    """Where the seconds come from."""
    rates = hardware.rates.of(hardware.gpu.name if hardware.gpu else None)
    if rates.forward:
        return f"Seconds go by rates measured on this machine ({rates.date}); memory is arithmetic on sizes."
    measure = "`kleinctl bench --calibrate` measures this machine."
    return f"Predicted, not measured: arithmetic on sizes and the card's data sheet. {measure}"


def show_stages(candidate: Candidate, hardware: Hardware, size: tuple[Any, Any] | None) -> None:
    """The stages of one picture as bars of VRAM, what each is made of, and its seconds."""
    from kleinctl.memory import usable_vram
    from kleinctl.units import gib

    fit, card = candidate.fit, hardware.gpu
    if not fit.stages or not fit.vram_bytes or card is None:
        return
    room = usable_vram(card)
    where = f" at {size[0]}x{size[1]}" if size else ""
    say(f"\n{candidate.backend}{where}: VRAM in each stage, {gib(room)} can be used")
    for stage in fit.stages:
        say(stage_line(stage, room, max(room, fit.vram_bytes), narrow=narrow()))
    weights, working, context = marks()
    legend = f"{weights} weights  {working} activations", f"{context} CUDA context  | what can be used"
    between, indent = (f"\n{'':2}", 2) if narrow() else ("  ", 9)
    say(f"{'':{indent}}{between.join(legend)}")


#: Columns of a bar that is as long as the budget or the largest stage; and of a console, what is narrower than wide.
BAR, WIDE = 35, 78


def narrow() -> bool:
    """Whether figures do not go beside each other on this console: it then has 40 columns, or nearly."""
    return output.console().width < WIDE


def marks() -> tuple[str, str, str]:
    """The characters of weights, activations and context: told apart by shape, in characters this console has."""
    return ("█", "▒", "░") if output.can_show("█▒░") else ("#", "+", ":")


def stage_line(stage: Stage, room: int, longest: int, *, narrow: bool = False) -> str:
    """`denoise  ███████▒▒░|      8.6 GiB    0.35 s`; the line across is the budget. Narrow: the bar on its own line."""
    from kleinctl.memory import CONTEXT_BYTES
    from kleinctl.units import gib

    parts = stage.weights_bytes, max(0, stage.vram_bytes - stage.weights_bytes - CONTEXT_BYTES)
    ends = [round(BAR * sum(parts[: number + 1]) / longest) for number in range(2)]
    ends.append(max(ends[-1], round(BAR * stage.vram_bytes / longest)))
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    bar = "".join(mark * length for mark, length in zip(marks(), lengths, strict=True)).ljust(BAR + 1)
    at = round(BAR * room / longest)
    bar, over = f"{bar[:at]}|{bar[at:]}", "  too much" if stage.vram_bytes > room else ""
    figures = f"{gib(stage.vram_bytes):>9} {stage.seconds:7.2f} s{over}"
    return f"{stage.name:8}{figures}\n  {bar.rstrip()}" if narrow else f"{stage.name:8} {bar} {figures}"


def _show_table(rows: list[dict[str, Any]]) -> None:
    """What each backend would take at each size; where that is too wide, one table for each backend."""
    if not narrow():
        output.console().print(_table(rows))
        return
    for backend in dict.fromkeys(row["backend"] for row in rows):
        say(f"\n{backend}")
        output.console().print(_narrow_table([row for row in rows if row["backend"] == backend]))


def _narrow_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("size", *TITLES):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        times = (f"{row['fit'][key]:.{1 if row['fit'][key] < 10 else 0}f} s" for key in SECONDS)
        table.add_row(_size(row), *_memory(row), *times, "no" if row["why_not"] else "yes", style=_style(row))
    return table


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    from kleinctl.units import seconds_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("backend", no_wrap=True)
    for title in ("size", *TITLES):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        times = (seconds_text(row["fit"][key]) for key in SECONDS)
        fits = "no" if row["why_not"] else "yes"
        table.add_row(row["backend"], _size(row), *_memory(row), *times, fits, style=_style(row))
    return table


#: Columns of figures, and the keys of a fit that they show.
TITLES = ("VRAM", "RAM", "first", "next")
MEMORY, SECONDS = ("vram_bytes", "ram_bytes"), ("seconds_first", "seconds_next")


def _size(row: dict[str, Any]) -> str:
    return f"{row['width']}x{row['height']}"


def _memory(row: dict[str, Any]) -> list[str]:
    from kleinctl.units import GIB

    return [f"{row['fit'][key] / GIB:.1f}" for key in MEMORY]


def _style(row: dict[str, Any]) -> str | None:
    return "dim" if row["why_not"] else None
