"""`kleinctl verify`"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kleinctl.cli import options, output
from kleinctl.cli.progress import Bars
from kleinctl.problem import OK, PROBLEMS, KleinctlError, Problem, shell

if TYPE_CHECKING:
    from kleinctl.manifest import Model, Part
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
    total, done, lock = sum(each.path.stat().st_size for each in items if each.path.exists()), {}, threading.Lock()
    with Bars(in_bytes=True, rate=True) as bars:

        def show(part: Part, count: int, size: int) -> None:
            with lock:  # called from a thread for each file
                done[part.ref, part.name] = count
                bars.show("all", "verifying", sum(done.values()), total)

        verdicts = verify_parts([(each.path, each.part) for each in items], show, list(plugins.models.values()))
    stamps = store.Stamps()
    for verdict in verdicts:
        if not verdict.ok:
            stamps.drop(verdict.path)  # so that the next install looks again, even where size and time are the same
    told = ((verdict.problem, each.fix) for verdict, each in zip(verdicts, items, strict=True))
    problems = [replace(problem, fix=fix) for problem, fix in told if problem]
    if as_json:
        document: dict[str, Any] = {"schema": "kleinctl.verify/1", "parts": [verdict.to_json() for verdict in verdicts]}
        output.print_json({**document, "problems": [problem.to_json() for problem in problems]})
    else:
        output.show_problems(problems, output.console())
        output.answer(summary(verdicts))
    return OK if all(verdict.ok for verdict in verdicts) else PROBLEMS


class Item(NamedTuple):
    """A part that should be at `path`, and the command that puts it there."""

    path: Path
    part: Part
    fix: str


def installed(plugins: Plugins, names: tuple[str, ...]) -> list[Item]:
    """The parts of every model and layout of which something is here: where each should be, and the one that is right.

    Where several published files are right in one place, it is the one whose size the file there has.
    """
    from kleinctl import store

    models = [plugins.model(name) for name in names] if names else list(plugins.models.values())
    items: dict[Path, Item] = {}
    for model in models:
        for layout in model.layouts:
            for precision in _precisions(model, layout):
                parts = [(store.destination(model.name, layout, p), p) for p in model.parts_for(layout, precision)]
                fix = _install(plugins, model, layout, precision)
                if any(path.exists() for path, _ in parts):
                    for path, part in parts:
                        items.setdefault(path, Item(path, _matching(path, model.accepted(part, layout)), fix))
    return list(items.values())


def _precisions(model: Model, layout: str) -> list[str | None]:
    """Those of which weights are here; where none are, the one that an install would bring."""
    from kleinctl import store

    own = [part for part in model.parts if layout in part.to and part.precision]
    here = {part.precision for part in own if store.destination(model.name, layout, part).exists()}
    return [each for each in model.precisions(layout) if each in here] or [None]


def _install(plugins: Plugins, model: Model, layout: str, precision: str | None) -> str:
    """The command that puts the files of this layout and precision there, and no others."""
    backend = next((name for name, offer in plugins.backends.items() if offer.thing.layout == layout), None)
    named = ["--backend", backend] if backend and len(model.layouts) > 1 else []
    chosen = ["--precision", precision] if precision and precision != model.precisions(layout)[0] else []
    return shell("kleinctl", "install", "--model", model.name, *named, *chosen)


def _matching(path: Path, accepted: tuple[Part, ...]) -> Part:
    size = path.stat().st_size if path.is_file() else None
    return next((part for part in accepted if part.size == size), accepted[0])
