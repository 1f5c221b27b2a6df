"""What `doctor --fix` does about problems: plan each remedy, ask where that is wanted, carry it out, and look again.

A remedy names an action of the table below. Its arguments are checked before anything else (`request`), what it changes
goes into the journal (`kleinctl.journal`), and a file that has to go is moved to quarantine, never deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kleinctl import journal
from kleinctl.fixes import comfyui, files, packages, snapshots, texts, variables, windows
from kleinctl.fixes.request import Plan, Request, for_all
from kleinctl.journal import Progress, silent
from kleinctl.problem import KleinctlError, Problem, did_you_mean

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware
    from kleinctl.plugins import Plugins

__all__ = ["ACTIONS", "Outcome", "Plan", "carry_out", "document", "fix", "plan"]

#: Every action, in the order in which they are done: environments and settings, room on the disk, files, workflows.
ACTIONS: dict[str, Callable[[Request], Plan]] = {
    "install-vc-runtime": windows.install_vc_runtime,
    "rebuild-environment": packages.rebuild_environment,
    "build-environment": packages.build_environment,
    "install-packages": packages.install_packages,
    "update-comfyui": comfyui.update_comfyui,
    "install-node": comfyui.install_node,
    "update-node": comfyui.update_node,
    "switch-node": comfyui.switch_node,
    "edit-start-script": comfyui.edit_start_script,
    "free-comfyui": comfyui.free_comfyui,
    "uninstall-packages": packages.uninstall_packages,
    "set-variable": variables.set_variable,
    "install-model": files.install_model,
    "set-config": texts.set_config,
    "write-text": texts.write_text,
    "remove-partial-downloads": files.remove_partial_downloads,
    "quarantine-file": files.quarantine_file,
    "move-file": files.move_file,
    "replace-file": files.replace_file,
    "fetch-part": files.replace_file,
    "complete-snapshot": snapshots.complete_snapshot,
    "share-file": files.share_file,
    "edit-workflow": texts.edit_workflow,
}

Status = Literal["fixed", "still there", "failed", "skipped", "for you to do", "planned"]
#: A problem's name, path and first line: what tells it from others when doctor looks again.
Key = tuple[str, str | None, str]


@dataclass(frozen=True)
class Outcome:
    """How it went with the problems of one remedy. `trouble` says why not, `entry` is what `kleinctl undo` takes."""

    problems: tuple[Problem, ...]
    status: Status
    plan: Plan | None = None
    entry: int | None = None
    why: str = ""
    trouble: Problem | None = None

    def to_json(self) -> dict[str, Any]:
        """The outcome as it stands in `doctor --fix --json`."""
        named = [{"name": each.name, **({"path": each.path} if each.path else {})} for each in self.problems]
        known = {"plan": self.plan.to_json() if self.plan else None, "undo": self.entry, "why": self.why or None}
        known["trouble"] = self.trouble.to_json() if self.trouble else None
        told = {key: value for key, value in known.items() if value is not None}
        return {"problems": named, "outcome": self.status, "what": self.problems[0].what, **told}


def plan(problem: Problem, plugins: Plugins, hardware: Hardware) -> Plan:
    """What would be done about `problem`. Writes nothing.

    Raises:
        KleinctlError: its remedy is of no known action, an argument is refused, or something stands in the way
            (no network, no room, a licence).
    """
    request = Request(problem, plugins, hardware)
    action = problem.remedy.action if problem.remedy else ""
    if action not in ACTIONS:
        raise request.refuse(f"there is no action {action[:80]!r}.{did_you_mean(action[:80], ACTIONS)}".rstrip("."))
    try:
        return ACTIONS[action](request)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise request.refuse(f"{error.filename} cannot be looked at ({error.strerror})") from None


def carry_out(plan: Plan, progress: Progress = silent) -> int:
    """Do what `plan` says, one fix at a time on this machine. Returns the number of its entry in the journal.

    Raises:
        KleinctlError: it failed. What was there before is there still, or can be brought back by `kleinctl undo`.
    """
    with journal.locked(progress):
        record = journal.Record(plan.problem.name, plan.sentences, plan.why_not_undoable)
        try:
            plan.work(record, progress)
        except KleinctlError:
            record.abandon()
            raise
        return record.finish()


def fix(
    problems: Sequence[Problem],
    plugins: Plugins,
    hardware: Hardware,
    *,
    ask: Callable[[Plan], str],
    again: Callable[[], set[Key]],
    do: Callable[[Plan], int] = carry_out,
    dry_run: bool = False,
) -> tuple[list[Outcome], list[Problem]]:
    """Do what can be done about `problems`, one remedy after the other; those that people have to do come last.

    `ask` says why a plan that wants consent is not to be carried out, or an empty string. `again` runs the checks
    and says which problems there are now; one that no check finds (a log's) is gone when its remedy was carried out.
    Returns the outcomes, and the problems that are left.
    """
    groups, outcomes = remedies(problems), []
    first = now = again() if groups and not dry_run else set(map(key, problems))
    for group in groups:
        if all(key(each) in first - now for each in group):
            outcomes.append(Outcome(group, "fixed", why="It went with an earlier one."))
            continue
        outcome = _one(group, plugins, hardware, ask, do, dry_run)
        if outcome.status == "fixed":
            now = again()
            outcome = _still(outcome) if any(key(each) in now for each in group) else outcome
        outcomes.append(outcome)
    done = {key(each) for outcome in outcomes if outcome.status == "fixed" for each in outcome.problems}
    outcomes += [Outcome((each,), "for you to do") for each in problems if each.remedy is None]
    return outcomes, [each for each in problems if key(each) in now or key(each) not in first | done]


def remedies(problems: Iterable[Problem]) -> list[tuple[Problem, ...]]:
    """The problems that kleinctl can do something about: those with one remedy together, in the order to do them."""
    groups: dict[Any, list[Problem]] = {}
    for each in problems:
        if each.remedy is not None:
            action = "replace-file" if each.remedy.action == "fetch-part" else each.remedy.action  # they do the same
            groups.setdefault((action, *sorted(each.remedy.arguments.items())), []).append(each)
    order = list(ACTIONS)
    turns = sorted(groups.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order))
    return [tuple(group) for _, group in turns]


def _one(
    group: tuple[Problem, ...],
    plugins: Plugins,
    hardware: Hardware,
    ask: Callable[[Plan], str],
    do: Callable[[Plan], int],
    dry_run: bool,
) -> Outcome:
    """Plan, ask and do."""
    strictest = next((each for each in group if each.remedy and each.remedy.consent == "ask"), group[0])
    try:
        planned = for_all(plan(strictest, plugins, hardware), group)
    except KleinctlError as error:
        return Outcome(group, "for you to do", trouble=error.problem)
    if dry_run:
        return Outcome(group, "planned", planned)
    refusal = ask(planned) if planned.consent == "ask" else ""
    if refusal:
        return Outcome(group, "skipped", planned, why=refusal)
    try:
        return Outcome(group, "fixed", planned, do(planned))
    except KleinctlError as error:
        return Outcome(group, "failed", planned, trouble=error.problem)


def _still(outcome: Outcome) -> Outcome:
    why = "It was done, and the check finds the problem again."
    return Outcome(outcome.problems, "still there", outcome.plan, outcome.entry, why)


def key(problem: Problem) -> Key:
    """What tells a problem from others: several may be of one file. One that says another number is the same."""
    return problem.name, problem.path, re.sub(r"\d+", "0", problem.what)


def document(outcomes: Sequence[Outcome], remaining: Sequence[Problem], dry_run: bool) -> dict[str, Any]:
    """`kleinctl.fix/1`."""
    from kleinctl import __version__

    return {
        "schema": "kleinctl.fix/1",
        "kleinctl": __version__,
        "dry_run": dry_run,
        "fixes": [outcome.to_json() for outcome in outcomes],
        "remaining": [problem.to_json() for problem in remaining],
    }
