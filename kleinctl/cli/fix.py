"""`kleinctl doctor --fix`: what it asks, what it shows while it works, and what came of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import output
from kleinctl.cli.progress import Bars
from kleinctl.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from kleinctl.fixes import Key, Outcome, Plan
    from kleinctl.hardware import Hardware
    from kleinctl.plugins import Plugins
    from kleinctl.problem import Problem

COLOURS = {"fixed": "green", "still there": "red", "failed": "red", "planned": "cyan"}
NOBODY = "Nobody is there to be asked; --yes answers yes."


def run(
    plugins: Plugins,
    hardware: Hardware,
    problems: Sequence[Problem],
    again: Callable[[], set[Key]],
    *,
    yes: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
) -> tuple[dict[str, Any], list[Problem]]:
    """Fix what can be fixed, and show it. Returns `kleinctl.fix/1`, and the problems that are left.

    `again` runs the checks and says which problems there are now.
    """
    from kleinctl import fixes

    asked: list[Plan] = []

    def ask(plan: Plan) -> str:
        if yes:
            return ""
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return NOBODY
        asked.append(plan)
        show_plan(plan)
        return "" if click.confirm("Do this?", default=False, err=True) else "You said no."

    def do(plan: Plan) -> int:
        if plan not in asked:
            show_plan(plan)
        done.append(carry_out(plan))
        return done[-1]

    done: list[int] = []
    try:
        outcomes, left = fixes.fix(problems, plugins, hardware, ask=ask, again=again, do=do, dry_run=dry_run)
    except KeyboardInterrupt:
        if done:
            output.remark(f"done before: {', '.join(map(str, done))}; see kleinctl undo --list")
        raise
    if not as_json:
        show(outcomes)
    return fixes.document(outcomes, left, dry_run), left


def show_plan(plan: Plan) -> None:
    """What will change, what it costs, and whether it can be undone."""
    output.heading(plan.problem.what)
    for line in plan_lines(plan):
        output.remark(line)


def plan_lines(plan: Plan) -> list[str]:
    """A plan in lines: what changes, the same by hand, bytes and seconds."""
    cost = "nobody knows how much to fetch and to write"
    if plan.fetch_bytes is not None and plan.disk_bytes is not None:
        cost = f"{bytes_text(plan.fetch_bytes)} to fetch, {bytes_text(plan.disk_bytes)} to write"
    time = "nobody knows how long" if plan.seconds is None else f"about {seconds_text(plan.seconds)}"
    time = "at once" if plan.seconds is not None and plan.seconds < 1 else time
    undo = "`kleinctl undo` reverses it" if plan.undoable else f"cannot be undone: {plan.why_not_undoable}"
    return [
        *(f"  {sentence}" for sentence in plan.sentences),
        *(f"  $ {command}" for command in plan.commands),
        f"  {cost}; {time}; {undo}",
    ]


def carry_out(plan: Plan) -> int:
    """Carry the plan out, with bars for what takes long."""
    from kleinctl import fixes

    with Bars(in_bytes=True, rate=True) as bars:
        return fixes.carry_out(plan, shown(bars))


def shown(bars: Bars) -> Callable[[Any], None]:
    """Progress as bars: of a download, of an environment being built, or a line of pip's."""
    from kleinctl.environment import BuildEvent
    from kleinctl.fetch import Event

    told: set[str] = set()

    def show(event: Any) -> None:
        if isinstance(event, BuildEvent):
            title = f"{event.step}/{event.steps} {event.title}"
            if title not in told:
                told.add(title)
                bars.remark(f"  {title}")
            bars.show("now", event.detail or event.title, event.done, event.total or None)
        elif isinstance(event, Event) and event.stage != "wait":
            bars.show(event.part, event.part, event.done, event.total)
        else:
            text = event.note if isinstance(event, Event) else str(event)
            bars.show("now", text[:100], 0, None)

    return show


def show(outcomes: Sequence[Outcome]) -> None:
    """What came of each remedy: a line, and below it what else has to be known."""
    from rich.text import Text

    target = output.console()
    for outcome in outcomes:
        named = ", ".join(dict.fromkeys(each.name for each in outcome.problems))
        head = Text(f"{outcome.status:13} ", style=COLOURS.get(outcome.status, "yellow"))
        head.append(f"{named}: {output.clean(outcome.problems[0].what)}", style="default")
        target.print(head, soft_wrap=True)
        for line in lines(outcome):
            target.print(output.clean(line), markup=False, soft_wrap=True)
    if not outcomes:
        output.answer("nothing to fix")


def lines(outcome: Outcome) -> list[str]:
    """What stands below an outcome: what was planned, why it was not done, what to type."""
    if outcome.status == "fixed":
        return [f"  kleinctl undo {outcome.entry}   # reverses it"] if _can_undo(outcome) else []
    said = [outcome.why] if outcome.why else []
    said += [f"{outcome.trouble.what}: {outcome.trouble.why}"] if outcome.trouble else []
    planned = plan_lines(outcome.plan) if outcome.plan and outcome.status in ("planned", "skipped") else []
    hint = outcome.trouble or outcome.problems[0]
    fix = [] if outcome.status == "planned" else [f"  hint: {hint.fix}"]
    return [*(f"  {line}" for text in said for line in text.splitlines()), *planned, *fix]


def _can_undo(outcome: Outcome) -> bool:
    return outcome.entry is not None and outcome.plan is not None and outcome.plan.undoable
