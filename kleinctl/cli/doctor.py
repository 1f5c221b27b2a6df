"""`kleinctl doctor`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS, KleinctlError, Problem

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware
    from kleinctl.plugins import Plugins
    from kleinctl.survey import Survey


@click.command("doctor", short_help="What is this machine, what is wrong, what would run and why.")
@options.together(options.model, options.backend, options.comfyui, options.vram_limit)
@click.option("--log", type=click.Path(path_type=Path), metavar="FILE", help="Explain a log too; - is stdin.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@click.option("--verbose", "-v", is_flag=True, help="Show every check.")
@options.as_json
def command(
    model: str | None,
    backend: str | None,
    comfyui: Path | None,
    vram_limit: str | None,
    log: Path | None,
    strict: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """What is this machine, what is wrong, which backend would run and why.

    Reads headers and versions, loads nothing, and changes nothing.
    """
    from kleinctl.facts import gather
    from kleinctl.plugins import Plugins
    from kleinctl.survey import survey

    plugins, hardware = Plugins(), options.this_machine()
    limit = options.limited(hardware, vram_limit)
    facts = gather(plugins, hardware, folders=[comfyui] if comfyui else [])
    found = survey(plugins, facts, model=model, backend=backend, plan_for=limit)
    told = explained(log, plugins) if log is not None else []
    if as_json:
        document = found.to_json()
        output.print_json(document if log is None else {**document, "log": {"problems": [p.to_json() for p in told]}})
    else:
        show(found, verbose=verbose)
        if log is not None:
            output.console().print()
            output.show_problems(told, output.console())
            output.answer("" if told else "the log shows no failure that kleinctl knows")
    problems = [*found.problems, *told]
    errors = [problem for problem in problems if problem.severity == "error"]
    return PROBLEMS if errors or (strict and problems) else OK


def explained(log: Path, plugins: Plugins) -> list[Problem]:
    """What a log (`-`: stdin) shows, best match first, each with the line that proves it."""
    import sys
    from dataclasses import replace

    from kleinctl.logs import MAX_CHARACTERS, PATTERNS, explain

    try:
        stream = sys.stdin.buffer if str(log) == "-" else log.open("rb")
        with stream:
            if stream.seekable():
                stream.seek(max(0, stream.seek(0, 2) - 4 * MAX_CHARACTERS))
            text = stream.read(4 * MAX_CHARACTERS).decode("utf-8", "replace")
    except OSError as error:
        raise KleinctlError(
            Problem(f"{log} cannot be read", f"{error.strerror}.", "kleinctl doctor --log FILE", name="log-unreadable")
        ) from None
    theirs = [offer.thing for offer in plugins.offers("kleinctl_log_patterns")]
    found = explain(text, (*theirs, *PATTERNS))
    return [replace(each.problem, why=f"{each.problem.why} Line {each.number}: {each.line}") for each in found]


def show(found: Survey, *, verbose: bool = False) -> None:
    """The survey as one screen: the machine, the problems, what would run."""
    target = output.console()
    for line in machine_lines(found.hardware):
        target.print(line, markup=False, soft_wrap=True)
    target.print()
    if verbose:
        show_checks(found)
    output.show_problems(found.problems, target)
    if found.problems:
        target.print()
    show_choice(found)


def machine_lines(hardware: Hardware) -> list[str]:
    """The machine in three lines: cards, memory and disk, system."""
    from kleinctl.units import bytes_text, gib

    cards = [
        f"{gpu.name} ({gpu.arch}), {gib(gpu.vram_free_bytes)} of {gib(gpu.vram_bytes)} VRAM free, driver {gpu.driver}"
        for gpu in hardware.gpus
    ] or [f"no NVIDIA card{''.join(f', {gpu.name}' for gpu in hardware.other_gpus)}"]
    ram = f"{gib(hardware.ram_available_bytes)} of {gib(hardware.ram_bytes)} RAM available"
    disk = f"{bytes_text(hardware.disk_free_bytes)} of disk free" if hardware.disk_free_bytes is not None else ""
    torch = hardware.packages.get("torch")
    build = f", torch {torch.version}" if torch else ""
    python = f", Python {hardware.python.version}" if hardware.python else ""
    where = f" in WSL {hardware.wsl}" if hardware.wsl else f" in {hardware.container}" if hardware.container else ""
    return [
        f"card    {cards[0]}",
        *(f"        {card}" for card in cards[1:]),
        f"memory  {', '.join(filter(None, (ram, disk)))}",
        f"system  {hardware.os}{where}, {hardware.cpu_count} cores{python}{build}",
    ]


def show_checks(found: Survey) -> None:
    """Every check in a line."""
    rows = [(f"{result.status:8} {result.name}", result.why) for result in found.results]
    output.show_rows(rows, width=28)
    output.console().print()


def show_choice(found: Survey) -> None:
    """What would run and why, and why each other would not."""
    from rich.text import Text

    target = output.console()
    chosen = found.choice.candidate if found.choice else None
    if found.choice is None or chosen is None:
        target.print("nothing would run here", style="bold red")
    else:
        target.print(Text("would run  ").append(f"{chosen.model} with {chosen.backend}", style="bold green"))
        output.show_rows([("", found.choice.why)], width=10)
    others = [each for each in found.candidates if each != chosen]
    named = [("not" if each.why_not else "or", each, each.why_not or "It runs too.") for each in others]
    output.show_rows([(head, f"{each.model} with {each.backend}: {why}") for head, each, why in named], width=10)
