"""`kleinctl triage`"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS, Misuse, Problem

if TYPE_CHECKING:
    from kleinctl.report.triage import Difference, Group, Judged, Replayed

#: Of two machines so many differences are shown; `--json` has them all.
SHOWN = 40


@click.command("triage", short_help="Diagnose machines from their reports.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(exists=True, path_type=Path))
@click.option("--diff", is_flag=True, help="What differs between two machines, what matters most first.")
@click.option("--replay", is_flag=True, help="Which verdicts of old reports today's rules change.")
@click.option("--html", type=options.FILE, metavar="FILE", help="Write one page to read or print.")
@click.option("--verbose", "-v", is_flag=True, help="Show every check, and every difference.")
@options.as_json
def command(files: tuple[Path, ...], diff: bool, replay: bool, html: Path | None, verbose: bool, as_json: bool) -> int:
    """Diagnose machines from their reports: zips of `kleinctl report`, or what `doctor --json` printed.

    One report shows what doctor would say there. Several, or a folder, show which problems they have, the one whose
    fix would help the most people first. Nothing of this machine is looked at.
    """
    from kleinctl.plugins import Plugins
    from kleinctl.report import triage

    paths = list(triage.files_in(files))
    _check(paths, diff, replay)
    found, unreadable = triage.read_all(Plugins(), paths)
    document = triage.document(found, unreadable)
    bad = bool(unreadable)
    if diff and not unreadable:
        different = triage.differences(found[0].report.facts, found[1].report.facts)
        document["diff"] = [vars(each) for each in different]
    if replay:
        told = [triage.replayed(each) for each in found]
        document["replay"] = [{**vars(each), "same": each.same} for each in told]
        bad = bad or not all(each.same for each in told)
    elif not diff:
        bad = bad or any(problem.severity == "error" for each in found for problem in each.problems)
    if html is not None:
        _write_page(html, document, found, alone=len(paths) == 1 and not replay)
    if as_json:
        output.print_json(document)
    elif diff and not unreadable:
        _show_diff(found, different, verbose)
    elif replay:
        _show_replay(told)
    elif len(paths) == 1 and found:
        _show_one(found[0], verbose)
    elif found:
        _show_many(found, triage.grouped(found))
    if not as_json:
        _show_unreadable(unreadable, alone=len(paths) == 1)
    return PROBLEMS if bad else OK


def _check(paths: Sequence[Path], diff: bool, replay: bool) -> None:
    if diff and (replay or len(paths) != 2):
        what = "--diff and --replay do not go together" if replay else f"--diff takes two reports, not {len(paths)}"
        raise Misuse(Problem(what, "Nothing was read.", "kleinctl triage --diff A.zip B.zip", name="usage"))
    if not paths:
        why = "No file in it ends in .zip or .json."
        raise Misuse(Problem("there is no report in this folder", why, "kleinctl triage FOLDER", name="usage"))


def _show_one(each: Judged, verbose: bool) -> None:
    """Doctor's view, between who sent it and what its logs say."""
    from kleinctl.cli import doctor

    output.show_rows([(head, text) for head, text in each.report.remarks if text], width=7)
    doctor.show(each.survey, verbose=verbose)
    logs = each.problems[len(each.survey.problems) :]
    if logs:
        output.console().print("\nfrom its logs", style="bold")
        doctor.show_log(logs)
    if each.only_there:
        names = ", ".join(each.only_there)
        told = f"\ntold on the machine, and not to be judged from here: {names}"
        output.console().print(output.clean(told), markup=False, soft_wrap=True)


def _write_page(path: Path, document: Mapping[str, Any], found: Sequence[Judged], *, alone: bool) -> None:
    """Doctor's page for one report, else that of many."""
    from kleinctl.report import page

    if alone and found:
        (each,) = found
        logs = [problem.to_json() for problem in each.problems[len(each.survey.problems) :]]
        told = {"log": {"problems": logs}} if each.report.logs else {}
        text = page.doctor({**each.survey.to_json(), **told}, each.report.remarks)
    else:
        text = page.triage(document)
    page.write(path, text, "kleinctl triage REPORT --html PAGE.html")
    output.remark(f"the page is {path}")


def _show_unreadable(problems: Sequence[Problem], *, alone: bool) -> None:
    if alone:
        output.show_problems(problems)
    else:
        for problem in problems:
            output.remark(f"error[{problem.name}]: {problem.what}: {problem.why}")


def _show_many(found: Sequence[Judged], groups: Sequence[Group]) -> None:
    """Problems of many machines as a table, and how many are well."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("reports", justify="right")
    table.add_column("problem", no_wrap=True)
    table.add_column("where, and what to do", overflow="fold")
    for group in groups:
        colour = "red" if group.severity == "error" else "yellow"
        where = f"{_first(group.machines)}: {_first(group.labels)}"
        table.add_row(
            str(len(group.labels)),
            Text(f"{group.severity}[{group.name}]", style=colour),
            Text(output.clean(f"{where}\n{group.fix}")),
        )
    target = output.console()
    target.print(table)
    well = sum(not each.problems for each in found)
    errors = sum(any(problem.severity == "error" for problem in each.problems) for each in found)
    target.print(f"\n{_reports(found)}: {errors} with errors, {well} without a problem")


def _reports(these: Sequence[object]) -> str:
    return f"{len(these)} report{'' if len(these) == 1 else 's'}"


def _first(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 12 more`."""
    counts = names if isinstance(names, Mapping) else {}
    listed = [f"{counts[name]} x {name}" if counts.get(name, 1) > 1 else name for name in names]
    return ("; " if counts else ", ").join(listed[:most]) + (
        f" and {len(listed) - most} more" if len(listed) > most else ""
    )


def _show_diff(found: Sequence[Judged], different: Sequence[Difference], verbose: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    target = output.console()
    left, right = found
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("", left.report.label, right.report.label):
        table.add_column(Text(output.clean(title)), overflow="fold", no_wrap=not title)
    shown = different if verbose else different[:SHOWN]
    for each in shown:
        table.add_row(*(Text(output.clean(cell)) for cell in (each.name, each.left, each.right)))
    target.print(table if shown else "both show the same machine")
    if len(shown) < len(different):
        target.print(f"and {len(different) - len(shown)} more: --verbose")
    names = [dict.fromkeys(problem.name for problem in each.problems) for each in found]
    if set(names[0]) == set(names[1]):
        told = f"the same problems: {', '.join(names[0])}" if names[0] else "no problem"
        target.print(Text(output.clean(f"\nboth have {told}")))
        return
    for one, own, theirs in zip(found, names, reversed(names), strict=True):
        only = ", ".join(name for name in own if name not in theirs) or "no problem"
        target.print(Text(output.clean(f"\nonly in {one.report.label}: {only}")))


def _show_replay(told: Sequence[Replayed]) -> None:
    target = output.console()
    for each in told:
        if each.same:
            continue
        target.print(f"{output.clean(each.label)} (kleinctl {output.clean(each.kleinctl)})", style="bold", markup=False)
        for head, names in (("new", each.new), ("gone", each.gone), ("changed", each.changed)):
            if names:
                target.print(f"  {head:8} {output.clean(', '.join(names))}", markup=False, soft_wrap=True)
    same = sum(each.same for each in told)
    target.print(f"{_reports(told)}: {len(told) - same} judged differently now, {same} as they were")
