"""`kleinctl models`"""

from __future__ import annotations

from typing import Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK

#: Columns of a terminal that has room for what a job is made with; names come first.
WIDE = 110


@click.command("models", short_help="The models kleinctl knows, and what of them is here.")
@options.as_json
def command(as_json: bool) -> int:
    """The models kleinctl knows, and what of them is here."""
    from rich import box
    from rich.table import Table

    from kleinctl import install, store
    from kleinctl.plugins import Plugins

    plugins = Plugins()
    rows: list[dict[str, Any]] = []
    sizes: list[str] = []
    for model in plugins.models.values():
        for layout in model.layouts:
            precision = install.here(model, layout)
            parts = model.parts_for(layout, precision)
            placed = sum(store.destination(model.name, layout, part).exists() for part in parts)
            sizes.append(model.size_text(layout, precision))
            rows.append(
                {
                    "model": model.name,
                    "title": model.title,
                    "layout": layout,
                    "licence": model.licence,
                    "gated": model.gated,
                    "bytes": model.bytes(layout, precision),
                    "parts": len(parts),
                    "parts_here": placed,
                    "steps": model.defaults.steps,
                    "guidance": model.defaults.guidance,
                }
            )
    if as_json:
        output.print_json({"schema": "kleinctl.models/1", "models": rows})
        return OK
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    wide = output.console().width >= WIDE
    for title in ("model", "files for", "size", "here", *(("steps", "guidance") if wide else ()), "licence"):
        table.add_column(title, no_wrap=title != "licence", overflow="fold")
    for row, size in zip(rows, sizes, strict=True):
        here = (
            "yes"
            if row["parts_here"] == row["parts"]
            else f"{row['parts_here']} of {row['parts']}"
            if row["parts_here"]
            else "no"
        )
        licence = f"{row['licence']}{', gated' if row['gated'] else ''}"
        job = (row["steps"], row["guidance"]) if wide else ()
        cells = (row["model"], row["layout"], size, here, *job, licence)
        table.add_row(*map(str, cells))
    output.console().print(table)
    output.show_problems(plugins.problems)
    return OK
