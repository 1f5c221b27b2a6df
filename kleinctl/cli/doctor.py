"""`kleinctl doctor`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS, KleinctlError, Misuse, Problem, shell

if TYPE_CHECKING:
    from rich.text import Text

    from kleinctl.facts import Facts
    from kleinctl.hardware import Hardware
    from kleinctl.logs import Match
    from kleinctl.planner import Candidate
    from kleinctl.plugins import Plugins
    from kleinctl.report.bundle import Report
    from kleinctl.survey import Survey


@click.command("doctor", short_help="What is this machine, what is wrong, what would run and why.")
@options.together(options.model, options.backend, options.comfyui, options.vram_limit, options.ram_limit)
@options.folders
@click.option("--workflow", type=options.FILE, metavar="FILE", help="Judge a ComfyUI workflow (JSON, or its PNG).")
@click.option("--log", type=options.FILE, metavar="FILE", help="Explain a log or a pasted error too; - is stdin.")
@click.option("--from", "report", type=options.FILE, metavar="FILE", help="Judge a report instead of this machine.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="What if: vram_free=6GiB, driver=550.")
@click.option("--deep", is_flag=True, help="Hash every file, and import torch in a process of its own.")
@click.option("--fix", is_flag=True, help="Fix what can be fixed; asks before changing what is yours.")
@click.option("--dry-run", is_flag=True, help="With --fix: show commands, bytes and seconds, and change nothing.")
@options.yes
@click.option("--html", type=options.FILE, metavar="FILE", help="Write one page to read or print.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@click.option("--verbose", "-v", is_flag=True, help="Show every check.")
@options.as_json
def command(
    model: str | None,
    backend: str | None,
    comfyui: Path | None,
    vram_limit: str | None,
    ram_limit: str | None,
    folders: tuple[Path, ...],
    workflow: Path | None,
    log: Path | None,
    report: Path | None,
    settings: tuple[str, ...],
    deep: bool,
    fix: bool,
    dry_run: bool,
    yes: bool,
    html: Path | None,
    strict: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """What is this machine, what is wrong, which backend would run and why.

    Reads headers and versions, loads nothing, and changes nothing without --fix.
    """
    from kleinctl import whatif
    from kleinctl.facts import gather
    from kleinctl.plugins import Plugins
    from kleinctl.survey import judge, survey

    if report and (comfyui or folders or workflow or deep):
        raise Misuse(
            Problem(
                "--from takes the place of this machine",
                "--comfyui, --folder, --workflow and --deep look at this machine; the report has its own facts.",
                "kleinctl doctor --from FILE",
                name="usage",
            )
        )
    if fix and (report or settings):
        raise Misuse(
            Problem(
                "--fix works on this machine only",
                "With --from or --set, the facts are those of another machine or made up.",
                "kleinctl doctor --fix   # on the machine in question",
                name="usage",
            )
        )
    plugins = Plugins()
    sent = _report(report) if report else None
    places = [*([comfyui] if comfyui else []), *folders]
    options.looked_at(None if report else comfyui)

    def look() -> Survey:
        facts = (
            sent.facts
            if sent
            else gather(plugins, options.this_machine(), folders=places, workflow_file=workflow, deep=deep)
        )
        facts = whatif.changed(facts, settings) if settings else facts
        limit = options.limited(facts.hardware, vram_limit, ram_limit)
        return (judge if report else survey)(plugins, facts, model=model, backend=backend, plan_for=limit)

    found = look()
    told = _logs(log, sent, plugins, found.facts)
    document = found.to_json()
    if told is not None:
        document["log"] = {"problems": [problem.to_json() for problem in told]}
    if html is not None:
        from kleinctl.report import page

        page.write(html, page.doctor(document, sent.remarks if sent else ()), "kleinctl doctor --html PAGE.html")
        output.remark(f"the page is {html}")
    problems = [*found.problems, *(told or ())]
    if not as_json:
        if sent is not None:
            output.show_rows([(head, text) for head, text in sent.remarks if text], width=7)
        show(found, verbose=verbose)
        if told is not None:
            show_log(told)
    if fix:
        document["fixes"], problems = _fixed(plugins, problems, look, yes=yes, dry_run=dry_run, as_json=as_json)
    elif not as_json:
        seen = {"--comfyui": [comfyui], "--folder": folders, "--workflow": [workflow], "--log": [log]}
        again = [word for name, paths in seen.items() for path in paths if path for word in (name, str(path))]
        again += ["--deep"] if deep else []
        _point_at_fixes(problems, again, remote=bool(report or settings))
    if as_json:
        output.print_json(document)
    errors = [problem for problem in problems if problem.severity == "error"]
    return PROBLEMS if errors or (strict and problems) else OK


def _report(path: Path) -> Report:
    from kleinctl.report import bundle

    return bundle.read(path)


def _logs(log: Path | None, sent: Report | None, plugins: Plugins, facts: Facts) -> list[Problem] | None:
    """What the log that was named shows, and the logs in a report; None where there is none."""
    told = [match.problem for match in explained(log, plugins, facts)] if log is not None else []
    if sent is not None and sent.logs:
        from kleinctl.report import collect

        told += collect.log_problems(plugins, sent.logs, facts)
    return told if log is not None or (sent is not None and sent.logs) else None


def _fixed(
    plugins: Plugins, problems: Sequence[Problem], look: Any, *, yes: bool, dry_run: bool, as_json: bool
) -> tuple[dict[str, Any], list[Problem]]:
    from kleinctl import fixes
    from kleinctl.cli import fix

    def again() -> set[fixes.Key]:
        return set(map(fixes.key, look().problems))

    return fix.run(plugins, options.this_machine(), problems, again, yes=yes, dry_run=dry_run, as_json=as_json)


def explained(log: Path, plugins: Plugins, facts: Facts) -> list[Match]:
    """What a log (`-`: stdin) shows, best match first."""
    import sys

    from kleinctl.log_patterns import PATTERNS
    from kleinctl.logs import MAX_CHARACTERS, explain
    from kleinctl.report.collect import decoded

    try:
        stream = sys.stdin.buffer if str(log) == "-" else log.open("rb")
        with stream:
            start = b""
            if stream.seekable():
                start = stream.read(2)
                stream.seek(max(0, stream.seek(0, 2) - 4 * MAX_CHARACTERS) // 2 * 2)
            text = stream.read(4 * MAX_CHARACTERS)
    except OSError as error:
        raise KleinctlError(
            Problem(f"{log} cannot be read", f"{error.strerror}.", "kleinctl doctor --log FILE", name="log-unreadable")
        ) from None
    theirs = [offer.thing for offer in plugins.offers("kleinctl_log_patterns")]
    return explain(decoded(text, start or text[:2]), (*theirs, *PATTERNS), facts)


def show_log(told: Sequence[Problem]) -> None:
    """What a log shows, each problem with the line that proves it."""
    target = output.console()
    for problem in told:
        target.print()
        output.show_problem(problem, target)
        for line in problem.evidence[:1]:
            shown = output.clean(f"{line.looked_at}: {line.found}")
            target.print(shown, style="dim", markup=False, soft_wrap=True)
    if not told:
        output.answer("\nthe log shows no failure that kleinctl knows")


def show(found: Survey, *, verbose: bool = False) -> None:
    """The survey as one screen: the machine, the problems, what would run."""
    target = output.console()
    output.show_rows(machine_rows(found.hardware), width=7)
    target.print()
    if verbose:
        show_checks(found)
    output.show_at_a_glance(found.problems, target, verbose=verbose)
    show_choice(found)


def _point_at_fixes(problems: Sequence[Problem], again: Sequence[str], *, remote: bool) -> None:
    """One line about what --fix could do; `again` are the options that showed it what is wrong."""
    count = sum(problem.auto for problem in problems)
    if count and not remote:
        line = shell("kleinctl", "doctor", *again, "--fix", "--dry-run")
        output.remark(f"\n{count} of {len(problems)} can be fixed by: {line}")


def machine_rows(hardware: Hardware) -> list[tuple[str, str]]:
    """The machine in three lines, each with its head: cards, memory and disk, system."""
    from kleinctl.units import bytes_text, gib

    cards = [
        f"{gpu.name} ({gpu.arch}), {gib(gpu.vram_free_bytes)} of {gib(gpu.vram_bytes)} VRAM free, "
        f"driver {gpu.driver or 'unknown'}"
        for gpu in hardware.gpus
    ] or [f"no NVIDIA card{''.join(f', {gpu.name}' for gpu in hardware.other_gpus)}"]
    ram = f"{gib(hardware.ram_available_bytes)} of {gib(hardware.ram_bytes)} RAM available"
    disk = f"{bytes_text(hardware.disk_free_bytes)} of disk free" if hardware.disk_free_bytes is not None else ""
    torch = hardware.packages.get("torch")
    build = f", torch {torch.version}" if torch else ""
    python = f", Python {hardware.python.version}" if hardware.python else ""
    where = f" in WSL {hardware.wsl}" if hardware.wsl else f" in {hardware.container}" if hardware.container else ""
    return [
        ("card", cards[0]),
        *(("", card) for card in cards[1:]),
        ("memory", ", ".join(filter(None, (ram, disk)))),
        ("system", f"{hardware.os}{where}, {hardware.cpu_count} cores{python}{build}"),
    ]


def show_checks(found: Survey) -> None:
    """Every check in a line."""
    words = {"skipped": "could not check"}
    rows = [(f"{words.get(result.status, result.status):15} {result.name}", result.why) for result in found.results]
    output.show_rows(rows, width=46)
    output.console().print()


def show_choice(found: Survey) -> None:
    """What would run, how close that is to the limit, and why each other would not."""
    from rich.text import Text

    target = output.console()
    chosen = found.choice.candidate if found.choice else None
    if found.choice is None or chosen is None:
        target.print("nothing would run here", style="bold red")
    else:
        target.print(Text("would run  ").append(f"{chosen.model} with {chosen.backend}", style="bold green"))
        output.show_rows([("", found.choice.why)], width=10)
        for line in _limits(found):
            target.print(line, soft_wrap=True)
    others = [each for each in found.candidates if each != chosen]
    output.show_rows([_other(each) for each in others], width=10)


def _other(each: Candidate) -> tuple[str, str]:
    """What was not chosen: a head, and why; what could not be checked may yet run."""
    head = "perhaps" if each.unchecked else "not" if each.why_not else "or"
    return head, f"{each.model} with {each.backend}: {each.why_not or 'It runs too.'}"


def _limits(found: Survey) -> list[Text]:
    """A bar each for VRAM and RAM: what the choice takes of what there is."""
    assert found.choice is not None
    fit, hardware = found.choice.candidate.fit, found.hardware
    bars = []
    if hardware.gpu is not None and fit.vram_bytes:
        bars.append(output.bar("VRAM", fit.vram_bytes, hardware.gpu.vram_free_bytes))
    if hardware.ram_available_bytes:
        bars.append(output.bar("RAM", fit.ram_bytes, hardware.ram_available_bytes))
    return bars
