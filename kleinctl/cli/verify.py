"""`kleinctl verify`"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.cli.progress import Bars
from kleinctl.problem import OK, PROBLEMS, KleinctlError, Problem

if TYPE_CHECKING:
    from kleinctl.manifest import Part
    from kleinctl.plugins import Plugins


@click.command("verify", short_help="Check the sha256 of everything installed.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@options.as_json
def command(models: tuple[str, ...], as_json: bool) -> int:
    """Check size and sha256 of every part of the installed models, or of MODEL. Reads every byte."""
    from kleinctl import store
    from kleinctl.plugins import Plugins
    from kleinctl.verify import summary, verify_parts

    plugins = Plugins()
    items = installed(plugins, models)
    if not items and models:
        raise KleinctlError(
            Problem(
                f"nothing of {', '.join(models)} is installed",
                "There is no file to check.",
                f"kleinctl install --model {models[0]}",
                name="model-not-installed",
            )
        )
    total, done, lock = sum(path.stat().st_size for path, _ in items if path.exists()), {}, threading.Lock()
    with Bars(in_bytes=True, rate=True) as bars:

        def show(part: Part, count: int, size: int) -> None:
            with lock:  # called from a thread for each file
                done[part.ref, part.name] = count
                bars.show("all", "verifying", sum(done.values()), total)

        verdicts = verify_parts(items, show, list(plugins.models.values()))
    stamps = store.Stamps()
    for verdict in verdicts:
        if not verdict.ok:
            stamps.drop(verdict.path)  # so that the next install looks again, even where size and time are the same
    problems = [verdict.problem for verdict in verdicts if verdict.problem]
    if as_json:
        document: dict[str, Any] = {"schema": "kleinctl.verify/1", "parts": [verdict.to_json() for verdict in verdicts]}
        output.print_json({**document, "problems": [problem.to_json() for problem in problems]})
    else:
        output.show_problems(problems, output.console())
        output.answer(summary(verdicts))
    return OK if all(verdict.ok for verdict in verdicts) else PROBLEMS


def installed(plugins: Plugins, names: tuple[str, ...]) -> list[tuple[Path, Part]]:
    """The parts of every model and layout of which something is here: where each should be, and the one that is right.

    Where several published files are right in one place, it is the one whose size the file there has.
    """
    from kleinctl import store

    models = [plugins.model(name) for name in names] if names else list(plugins.models.values())
    items: list[tuple[Path, Part]] = []
    for model in models:
        for layout in model.layouts:
            parts = [(store.destination(model.name, layout, part), part) for part in model.parts_for(layout)]
            if any(path.exists() for path, _ in parts):
                items += [(path, _matching(path, model.accepted(part, layout))) for path, part in parts]
    return items


def _matching(path: Path, accepted: tuple[Part, ...]) -> Part:
    size = path.stat().st_size if path.is_file() else None
    return next((part for part in accepted if part.size == size), accepted[0])
