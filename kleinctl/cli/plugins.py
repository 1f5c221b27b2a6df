"""`kleinctl plugins`"""

from __future__ import annotations

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS, Misuse, Problem, did_you_mean


@click.command("plugins", short_help="Who offers what; switch plugins off and on.")
@click.option("--disable", metavar="PLUGIN", help="Leave this plugin out from now on.")
@click.option("--enable", metavar="PLUGIN", help="Use this plugin again.")
@options.as_json
def command(disable: str | None, enable: str | None, as_json: bool) -> int:
    """Who offers what; switch plugins off and on."""
    from kleinctl.plugins import Plugins, switch, switched_off

    for name, on in ((disable, False), (enable, True)):
        if name:
            known = [plugin.name for plugin in Plugins().overview()]
            if name not in known and not (on and name in switched_off()):  # it may be gone, and still be off
                why = f"Installed are {', '.join(known)}.{did_you_mean(name, known)}"
                raise Misuse(Problem(f"there is no plugin {name!r}", why, "kleinctl plugins", name="unknown-plugin"))
            switch(name, on)
    plugins = Plugins()
    found = plugins.overview()
    if as_json:
        rows = [
            {
                "name": each.name,
                "module": each.module,
                "distribution": each.distribution,
                "version": each.version,
                "disabled": each.disabled,
                "offers": each.offers,
                "problem": each.problem.to_json() if each.problem else None,
            }
            for each in found
        ]
        output.print_json({"schema": "kleinctl.plugins/1", "plugins": rows})
    else:
        _show(found)
        output.show_problems(plugins.problems)
    return PROBLEMS if any(each.problem for each in found) else OK


def _show(found: list) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for title in ("plugin", "from", "state", "offers"):
        table.add_column(title, no_wrap=title != "offers", overflow="fold")
    for each in found:
        state = "disabled" if each.disabled else "failed" if each.problem else "ok"
        offers = "; ".join(
            f"{hook.removeprefix('kleinctl_').replace('_', ' ')}: {', '.join(names)}"
            for hook, names in each.offers.items()
            if names
        )
        table.add_row(each.name, f"{each.distribution} {each.version}", state, offers)
    output.console().print(table)
