"""`kleinctl plan`"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS

if TYPE_CHECKING:
    from rich.table import Table

    from kleinctl.backends import Stage
    from kleinctl.hardware import Hardware
    from kleinctl.planner import Candidate
    from kleinctl.plugins import Plugins

NOTHING = "Nothing would run."
#: Sides of the square pictures that the table shows, in pixels.
SIDES = (512, 1024, 1536, 2048)


@click.command("plan", short_help="Predicted VRAM, RAM, disk and seconds for every backend.")
@click.option("--gpu", metavar="NAME", help='Answer for this card instead, as in "RTX 4070 Ti SUPER"; "none" for none.')
@click.option("--ram", metavar="BYTES", help="Answer for this much RAM, as in 16GiB, or 16.")
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
    here = gpu is None and ram is None
    machine = options.this_machine() if here else elsewhere(gpu, ram)
    hardware = options.limited(machine, vram_limit, ram_limit)
    models = plugins.models_for(model)
    offers = plugins.backends_for(backend)
    sizes: list[tuple[Any, Any]] = [nearest_size(size)[:2]] if size else [(side, side) for side in SIDES]
    rows = [
        Row(width, height, each)
        for width, height in sizes
        for each in best(offers, models, hardware, {"width": width, "height": height}, here=here)[0]
    ]
    changes = dict(zip(("width", "height"), sizes[0], strict=True)) if size else {}
    compared, choice = best(offers, models, hardware, changes, here=here)
    if as_json:
        output.print_json(
            {
                "schema": "kleinctl.plan/1",
                "hardware": hardware.to_json(),
                "rows": [row.to_json() for row in rows],
                "choice": choice.to_json() if choice else None,
            }
        )
    else:
        none = "Nothing that could be checked would run." if any(row.of.unchecked for row in rows) else NOTHING
        show(plugins, hardware, rows, f"{choice.candidate.model}: {choice.why}" if choice else none)
        drawn = [each for each in compared if verbose or (choice and each == choice.candidate)]
        for each in drawn:
            show_stages(each, hardware, sizes[0] if size else None)
        say(f"\n{how_known(hardware)}")
        for sentence in hardware.remarks:
            say(sentence)
    return OK if choice else PROBLEMS


@dataclass(frozen=True)
class Row:
    """What a picture of one size would take of a candidate."""

    width: int
    height: int
    of: Candidate

    @property
    def size(self) -> str:
        """`1024x768`."""
        return f"{self.width}x{self.height}"

    @property
    def fits(self) -> str:
        """Whether it would run: yes, no, or that nobody knows."""
        return "?" if self.of.unchecked else "no" if self.of.why_not else "yes"

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in `kleinctl.plan/1`."""
        row = {"backend": self.of.backend, "model": self.of.model, "width": self.width, "height": self.height}
        return {**row, "fit": self.of.fit.to_json(), "why_not": self.of.why_not}


def elsewhere(gpu: str | None, ram: str | None) -> Hardware:
    """The hardware of a machine that is described; what is not said stays as it is here."""
    from kleinctl.hardware import imagine
    from kleinctl.units import parse_bytes

    amount = None if ram is None else parse_bytes(ram, "--ram")
    none = gpu is not None and gpu.lower() == "none"
    described = gpu is not None and ram is not None
    hardware = imagine(None if none else gpu, amount, None if described else options.this_machine())
    hardware = replace(hardware, gpus=()) if none else hardware
    return hardware


def show(plugins: Plugins, hardware: Hardware, rows: list[Row], why: str) -> None:
    """A table for each model: what each backend would take at each size. A model that wants a card has none without."""
    from kleinctl.units import gib

    card = hardware.gpu
    has = f"{card.name}, {gib(card.vram_free_bytes)} of VRAM free" if card else "no NVIDIA card"
    say(f"{has}, {gib(hardware.ram_available_bytes)} of RAM available")
    for model in dict.fromkeys(row.of.model for row in rows):
        own = [row for row in rows if row.of.model == model]
        layout = plugins.backends[own[0].of.backend].thing.layout
        head = f"\n{model}, {plugins.models[model].size_text(layout)} on disk"
        if card is None and "cpu" not in plugins.models[model].devices:
            say(f"{head}: nothing runs it without an NVIDIA card")
            continue
        say(f"{head}; VRAM and RAM in GiB")
        _show_table(own)
        for text in reasons(own):
            say(text)
    say(f"\n{why}")


def reasons(rows: list[Row]) -> list[str]:
    """Why rows of one model would not run, or are not known to: each reason once, with the sizes that it goes for."""
    sizes: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.of.why_not:
            sizes.setdefault((row.of.backend, row.fits, row.of.why_not), []).append(row.size)
    found = []
    for (backend, fits, reason), those in sizes.items():
        every = len(those) == sum(row.of.backend == backend for row in rows)
        at = "" if every else f" at {', '.join(those)}"
        found.append(f"{backend}{at}{' ' if fits == '?' else ', no: '}{reason.removeprefix(f'{backend} ')}")
    return found


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


def _show_table(rows: list[Row]) -> None:
    """What each backend would take at each size; where that is too wide, one table for each backend."""
    target, table = output.console(), _table(rows)
    if target.measure(table, options=target.options.update(width=ANY_WIDTH)).maximum <= target.width:
        target.print(table)
        return
    for backend in dict.fromkeys(row.of.backend for row in rows):
        say(f"\n{backend}")
        target.print(_narrow_table([row for row in rows if row.of.backend == backend]))


def _narrow_table(rows: list[Row]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("size", *TITLES):
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("fits", no_wrap=True)
    for row in rows:
        times = (f"{each:.{1 if each < 10 else 0}f} s" for each in _seconds(row))
        table.add_row(row.size, *_memory(row), *times, row.fits, style=_style(row))
    return table


def _table(rows: list[Row]) -> Table:
    from rich import box
    from rich.table import Table

    from kleinctl.units import seconds_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("backend", no_wrap=True)
    for title in ("size", *TITLES):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        times = map(seconds_text, _seconds(row))
        table.add_row(row.of.backend, row.size, *_memory(row), *times, row.fits, style=_style(row))
    return table


#: Columns that no table has: what is measured on them is as wide as it would like to be.
ANY_WIDTH = 1000
#: Columns of figures.
TITLES = ("VRAM", "RAM", "first", "next")


def _seconds(row: Row) -> tuple[float, float]:
    return row.of.fit.seconds_first, row.of.fit.seconds_next


def _memory(row: Row) -> list[str]:
    from kleinctl.units import GIB

    return [f"{each / GIB:.1f}" for each in (row.of.fit.vram_bytes, row.of.fit.ram_bytes)]


def _style(row: Row) -> str | None:
    return "dim" if row.of.why_not else None
