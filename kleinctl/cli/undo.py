"""`kleinctl undo`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from kleinctl.cli import options, output
from kleinctl.cli.fix import shown
from kleinctl.cli.progress import Bars
from kleinctl.problem import OK

#: How many entries are shown.
SHOWN = 20


@click.command("undo", short_help="Reverse what `doctor --fix` did.")
@click.argument("number", type=click.IntRange(1), required=False, metavar="[NUMBER]")
@click.option("--list", "only_list", is_flag=True, help="Show what can be undone, and nothing else.")
@click.option("--dry-run", is_flag=True, help="Show what would be changed back, and check that it can be.")
@options.together(options.yes, options.as_json)
def command(number: int | None, only_list: bool, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Reverse what `doctor --fix` did: the entry NUMBER, or the newest that can be undone.

    Nothing is undone where a file or package was changed since.
    """
    from kleinctl import journal

    known = journal.entries()[:SHOWN]
    document: dict[str, Any] = {"schema": "kleinctl.undo/1", "entries": [each.to_json() for each in known]}
    if only_list:
        return _answer({**document, "undone": None, "dry_run": True}, list_lines(known), as_json)
    if number is None and not as_json:
        choice = [each for each in known if isinstance(each, journal.Entry) and each.can_be_undone]
        for line in list_lines(choice) if len(choice) > 1 else ():
            output.remark(line)
    entry = journal.find(number)
    back = [step.back for step in reversed(entry.steps)]
    if not as_json:
        output.heading(f"undo {entry.number} ({entry.problem})")
        for line in back:
            output.remark(f"  {line}")
    journal.check(entry)
    if dry_run:
        told = [f"entry {entry.number} can be undone; nothing was changed"]
        return _answer({**document, "undone": None, "dry_run": True, "would_undo": entry.to_json()}, told, as_json)
    _ask(entry.number, yes)
    with journal.locked(output.remark), Bars(in_bytes=True) as bars:
        entry = journal.undo(journal.find(entry.number), shown(bars))
    return _answer({**document, "undone": entry.to_json(), "dry_run": False}, [f"entry {entry.number} undone"], as_json)


def _ask(number: int, yes: bool) -> None:
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise options.nobody_there("Undoing wants a yes.", f"kleinctl undo {number} --yes")
    click.confirm("Undo it?", default=True, abort=True, err=True)


def _answer(document: dict[str, Any], lines: Sequence[str], as_json: bool) -> int:
    if as_json:
        output.print_json(document)
    else:
        for line in lines:
            output.answer(output.clean(line))
    return OK


def list_lines(known: Sequence[Any]) -> list[str]:
    """The entries, the newest first, each with what it did."""
    from kleinctl.journal import Entry

    lines = []
    for each in known:
        if not isinstance(each, Entry):
            lines.append(f"{each.number:4}  damaged    {each.why}")
            continue
        when = each.time.replace("T", " ").rstrip("Z")
        lines.append(f"{each.number:4}  {each.state:9}  {when}  {each.problem}")
        lines += [f"      {sentence}" for sentence in each.sentences]
    return lines or ["nothing was fixed here yet"]
