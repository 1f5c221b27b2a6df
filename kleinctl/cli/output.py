"""How things look: answers on stdout, progress and remarks on stderr, problems in three lines."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kleinctl.problem import UNSHOWN, Problem

if TYPE_CHECKING:
    import click
    from rich.console import Console
    from rich.text import Text


#: Of more problems than this, warnings are told in one line each.
AT_A_GLANCE = 4


def prepare_streams() -> None:
    """A console whose code page lacks a character shows `?` for it, and nothing crashes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@functools.cache
def console() -> Console:
    """The console of answers (stdout)."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


@functools.cache
def err_console() -> Console:
    """The console of progress and remarks (stderr)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def json_wanted() -> bool:
    """Whether the command was asked for a JSON document, which is then all that stdout carries."""
    return "--json" in sys.argv


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    sys.stdout.write(_ACTED_ON.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


#: What JSON leaves as it is and a terminal acts on, or cannot show: controls, marks of direction, halves of letters.
_ACTED_ON = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def answer(text: str, end: str = "\n") -> None:
    """A line that is the command's answer, unadorned, on stdout."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def clean(text: str) -> str:
    """`text` without characters that a terminal would act on: it may come from a server, a log or a stranger's file."""
    return "".join(letter if letter.isprintable() or letter == "\n" else UNSHOWN for letter in text)


def _line(text: str) -> str:
    """`text` in one line, so that the name of a file is not taken for a hint of ours."""
    return clean(text).replace("\n", UNSHOWN)


def remark(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    err_console().print(clean(text), markup=False, soft_wrap=True)


def heading(text: str) -> None:
    """The start of a step, on stderr."""
    err_console().print(clean(text), style="bold", markup=False, soft_wrap=True)


def show_problem(problem: Problem, target: Console | None = None) -> None:
    """A problem in the three lines of STYLE: what, why, and the hint that can be pasted."""
    from rich.padding import Padding
    from rich.text import Text

    target = target or err_console()
    colour = "red" if problem.severity == "error" else "yellow"
    head = Text(problem.severity, style=f"bold {colour}")
    head.append(f"[{problem.name}]" if problem.name else "", style=colour)
    head.append(f": {_line(problem.what)}", style="bold")
    target.print(head, soft_wrap=not target.is_terminal)
    target.print()
    if target.is_terminal:
        target.print(Padding(Text(clean(problem.why)), (0, 0, 0, 2)))
    else:  # a log or a program: lines stay whole
        target.print(*(f"  {line}" for line in clean(problem.why).splitlines()), sep="\n", markup=False, soft_wrap=True)
    target.print()
    target.print(Text("hint: ", style="cyan").append(clean(problem.fix), style="default"), soft_wrap=True)


def show_at_a_glance(problems: Sequence[Problem], target: Console, *, verbose: bool = False) -> None:
    """Problems as doctor shows them: where there are many, warnings in one line each. Ends with an empty line."""
    errors = [problem for problem in problems if problem.severity == "error"]
    whole = problems if verbose or len(problems) <= AT_A_GLANCE else errors
    short = [problem for problem in problems if problem not in whole]
    show_problems(whole, target)
    if whole:
        target.print()
    for problem in short:
        show_problem_line(problem, target)
    if short:
        target.print("(kleinctl doctor -v tells more of these)\n", style="dim")


def show_problem_line(problem: Problem, target: Console) -> None:
    """A problem's first line alone."""
    from rich.text import Text

    colour = "red" if problem.severity == "error" else "yellow"
    head = Text(f"{problem.severity}[{problem.name}]", style=colour).append(f": {_line(problem.what)}", style="default")
    target.print(head, soft_wrap=not target.is_terminal)


def bar(name: str, used: int, limit: int, width: int = 24) -> Text:
    """`VRAM ██████████████░░░░ 14.0 of 15.2 GiB free (92 %)`, in characters that this console has."""
    from rich.text import Text

    from kleinctl.units import gib

    full, empty = ("█", "░") if can_show("█░") else ("#", ".")
    share = used / limit if limit else 1.0
    filled = min(width, round(share * width))
    colour = "red" if share > 1 else "yellow" if share > 0.9 else "green"
    text = Text(f"{'':10} {name:4} ").append(full * filled, style=colour).append(empty * (width - filled), style="dim")
    return text.append(f" {gib(used)} of {gib(limit)} free ({share:.0%})", style="default")


def can_show(characters: str) -> bool:
    """Whether stdout's encoding has these characters: a Windows console's code page may not."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def show_rows(rows: Iterable[tuple[str, str]], *, width: int, target: Console | None = None) -> None:
    """Lines with a head of `width` characters; the rest wraps below itself on a terminal, and stays whole elsewhere."""
    from rich.table import Table
    from rich.text import Text

    target = target or console()
    if not target.is_terminal:
        for head, text in rows:
            target.print(f"{head:{width}} {clean(text)}", markup=False, soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=width, no_wrap=True)
    grid.add_column(overflow="fold")
    for head, text in rows:
        grid.add_row(head, Text(clean(text)))
    target.print(grid)


def show_problems(problems: Iterable[Problem], target: Console | None = None) -> None:
    """Problems with an empty line between them."""
    for number, problem in enumerate(problems):
        if number:
            (target or err_console()).print()
        show_problem(problem, target)


def end_with_problem(problem: Problem) -> None:
    """The problem that ends a command: a JSON document if one was asked for, and the three lines."""
    if json_wanted():
        print_json({"schema": "kleinctl.error/1", "problem": problem.to_json()})
    show_problem(problem)


def misuse(error: click.ClickException) -> None:
    """What was typed wrongly, and how to see what can be typed."""
    import click

    from kleinctl.cli import COMMANDS

    ctx = getattr(error, "ctx", None)
    typed = next((word for word in sys.argv[1:] if word in COMMANDS), "")  # an option without its value has no context
    command = ctx.command_path if ctx else f"kleinctl {typed}".rstrip()
    what, why, fix = error.format_message().rstrip("."), "Nothing was run.", f"{command} --help"
    prompt, words = ctx.params.get("prompt") if ctx else None, re.search(r"extra arguments? \((.+)\)$", what)
    if prompt and words:
        why = "Nothing was run. A prompt of several words stands in quotes."
        fix = f'{command} "{prompt} {words[1]}"'
    if ctx and isinstance(error, click.BadParameter) and _is_setting(error):
        from kleinctl.home import config_file

        why, fix = f"It stands below [{ctx.info_name}] in {config_file()}. Nothing was run.", f"correct {config_file()}"
    end_with_problem(Problem(what, why, fix, name="usage"))


def _is_setting(error: click.BadParameter) -> bool:
    """Whether the value comes from config.toml."""
    from click.core import ParameterSource

    name = error.param.name if error.param else None
    return bool(error.ctx and name and error.ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP)


def our_bug(error: BaseException) -> None:
    """What escaped is our mistake: keep it in a file that can be pasted into an issue, and say where."""
    from kleinctl.home import logs_folder
    from kleinctl.report.redact import brief as redact

    text = redact("".join(traceback.format_exception(error)))
    try:
        logs_folder().mkdir(parents=True, exist_ok=True)
        path = logs_folder() / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        path.write_text(f"kleinctl {' '.join(sys.argv[1:2])}\n{text}", encoding="utf-8")
        where, fix = (
            f"The details are in {path}.",
            f"attach {path} to a report at https://github.com/kleinctl/kleinctl/issues",
        )
    except OSError:
        sys.stderr.write(text)
        where, fix = "The details stand above.", "report it at https://github.com/kleinctl/kleinctl/issues"
    last = redact(f"{type(error).__name__}: {error}").splitlines()[0][:300]
    end_with_problem(Problem("kleinctl made a mistake", f"{last}. {where}", fix, name="bug"))


def discard_stdout() -> None:
    """The reader went away (`kleinctl models | head`): let Python's last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
