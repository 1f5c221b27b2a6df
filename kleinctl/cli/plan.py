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
    machine = elsewhere(gpu, ram) if gpu or ram else options.this_machine()
    hardware = options.limited(machine, vram_limit, ram_limit)
    models = plugins.models_for(model)
    offers = plugins.backends_for(backend)
    sizes = [nearest_size(size)[:2]] if size else [(side, side) for side in SIDES]
    rows = []
    for width, height in sizes:
        for each in best(offers, models, hardware, {"width": width, "height": height})[0]:
            row = {"backend": each.backend, "model": each.model, "width": width, "height": height}
            rows.append({**row, "fit": each.fit.to_json(), "why_not": each.why_not})
    compared, choice = best(
        offers, models, hardware, dict(zip(("width", "height"), sizes[0], strict=True)) if size else {}
    )
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
        output.answer(f"\n{how_known(hardware)}")
        for sentence in hardware.remarks:
            output.answer(sentence)
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
    output.answer(f"{has}, {gib(hardware.ram_available_bytes)} of RAM available")
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        output.answer(f"\n{model}, {bytes_text(own[0]['fit']['disk_bytes'])} on disk; VRAM and RAM in GiB")
        output.console().print(_table(own))
        for reason in dict.fromkeys(row["why_not"] for row in own if row["why_not"]):
            output.answer(f"no: {reason}")
    output.answer(f"\n{why}")


def how_known(hardware: Hardware) -> str:
    """Where the seconds come from."""
    rates = hardware.rates.of(hardware.gpu.name if hardware.gpu else None)
    if rates.forward:
        return f"Seconds go by rates measured on this machine ({rates.date}); memory is arithmetic on sizes."
    measure = "`kleinctl bench --calibrate` measures this machine."
    return f"Predicted, not measured: arithmetic on sizes and the card's data sheet. {measure}"


def show_stages(candidate: Candidate, hardware: Hardware, size: tuple[Any, Any] | None) -> None:
    """The stages of one picture as bars of VRAM, what each is made of, and its seconds; at most 80 columns."""
    from kleinctl.memory import usable_vram
    from kleinctl.units import gib

    fit, card = candidate.fit, hardware.gpu
    if not fit.stages or not fit.vram_bytes or card is None:
        return
    room = usable_vram(card)
    where = f" at {size[0]}x{size[1]}" if size else ""
    output.answer(f"\n{candidate.backend}{where}: VRAM in each stage, {gib(room)} can be used")
    for stage in fit.stages:
        output.answer(stage_line(stage, room, max(room, fit.vram_bytes)))
    weights, working, context = marks()
    output.answer(f"{'':9}{weights} weights  {working} activations  {context} CUDA context  | what can be used")


#: Columns of a bar that is as long as the budget or the largest stage.
BAR = 38


def marks() -> tuple[str, str, str]:
    """The characters of weights, activations and context: told apart by shape, in characters this console has."""
    return ("█", "▒", "░") if output.can_show("█▒░") else ("#", "+", ":")


def stage_line(stage: Stage, room: int, longest: int) -> str:
    """`denoise  ███████▒▒░|      8.6 GiB    0.35 s`; the line across is the budget."""
    from kleinctl.memory import CONTEXT_BYTES
    from kleinctl.units import gib

    parts = stage.weights_bytes, max(0, stage.vram_bytes - stage.weights_bytes - CONTEXT_BYTES)
    ends = [round(BAR * sum(parts[: number + 1]) / longest) for number in range(2)]
    ends.append(max(ends[-1], round(BAR * stage.vram_bytes / longest)))
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    bar = "".join(mark * length for mark, length in zip(marks(), lengths, strict=True)).ljust(BAR + 1)
    at = round(BAR * room / longest)
    over = "  too much" if stage.vram_bytes > room else ""
    return f"{stage.name:8} {bar[:at]}|{bar[at:]} {gib(stage.vram_bytes):>9} {stage.seconds:7.2f} s{over}"


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    from kleinctl.units import GIB, seconds_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("backend", no_wrap=True)
    for title in ("size", "VRAM", "RAM", "first", "next"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        fit = row["fit"]
        memory = tuple(f"{fit[key] / GIB:.1f}" for key in ("vram_bytes", "ram_bytes"))
        times = (seconds_text(fit["seconds_first"]), seconds_text(fit["seconds_next"]))
        size, dim = f"{row['width']}x{row['height']}", "dim" if row["why_not"] else None
        table.add_row(row["backend"], size, *memory, *times, "no" if dim else "yes", style=dim)
    return table
