"""`kleinctl explain`"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS

if TYPE_CHECKING:
    from kleinctl.explain import Page


@click.command("explain", short_help="One problem: symptom, cause, how it is found, fix, sources.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--search", metavar="WORDS", help='Find problems by their symptoms, as in "washed out".')
@options.as_json
def command(names: tuple[str, ...], search: str | None, as_json: bool) -> int:
    """One problem: symptom, cause, how it is found, fix, sources.

    NAME is what stands in brackets after error or warning. A pasted error message works too; without a name, all
    problems are listed.
    """
    from kleinctl import explain
    from kleinctl.plugins import Plugins

    plugins = Plugins()
    theirs: list[Path] = [offer.thing for offer in plugins.offers("kleinctl_problem_pages")]
    if search is not None:
        found = explain.search(search, explain.pages(theirs))
    elif not names:
        found = explain.pages(theirs)
    else:
        found = [page for name in names for page in _meant(name, theirs)]
    if as_json:
        output.print_json({"schema": explain.SCHEMA, "pages": [page.to_json() for page in found]})
    elif search is not None or not names:
        _show_titles(found)
    else:
        for number, page in enumerate(found):
            output.answer("\n" if number else "", end="")
            _show(page)
    return OK if found else PROBLEMS


def _meant(name: str, theirs: Sequence[Path]) -> list[Page]:
    """The page of that name; for a pasted error message, the pages of what it shows."""
    from kleinctl import explain, logs

    if re.fullmatch(r"[\w-]+", name):
        return [explain.page(name, theirs)]
    known = explain.files(theirs)
    told = dict.fromkeys(match.problem.name for match in logs.explain(name) if match.problem.name in known)
    return [explain.page(each, theirs) for each in told] or [explain.page(name, theirs)]


def _show_titles(pages: Sequence[Page]) -> None:
    if not pages:
        output.remark("no page has those words; try fewer or other ones")
        return
    output.show_rows([(page.name, page.title) for page in pages], width=max(len(page.name) for page in pages) + 1)
    output.remark("\nread one with: kleinctl explain NAME")


def _show(page: Page) -> None:
    """A page as people read it in a terminal."""
    from rich.markdown import Markdown
    from rich.padding import Padding
    from rich.text import Text

    target = output.console()
    entries = f"  ({', '.join(page.refs)})" if page.refs else ""
    target.print(Text(page.name, style="bold").append(f": {page.title}{entries}", style="default"), soft_wrap=True)
    for title, text in page.sections.items():
        target.print(Text(f"\n{title.lower()}", style="cyan"))
        if target.is_terminal:
            target.print(Padding(Markdown(output.clean(text)), (0, 2)))
        else:
            target.print(*(f"  {line}" for line in text.splitlines()), sep="\n", markup=False, soft_wrap=True)
