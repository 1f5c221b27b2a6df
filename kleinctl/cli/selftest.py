"""`kleinctl selftest`"""

from __future__ import annotations

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS


@click.command("selftest", short_help="Does kleinctl work where it is installed?")
@options.as_json
def command(as_json: bool) -> int:
    """Does kleinctl work where it is installed?

    Runs help, JSON against its schemas, exit codes, plugins and completion under the versions found here, each in a
    process of its own with an empty home. Takes a few seconds.
    """
    from kleinctl import selftest

    def tell(trial: selftest.Trial) -> None:
        if not as_json:
            output.answer(selftest.line(trial))  # plainly: rich may be what is broken

    trials = selftest.run(tell)
    failed = [trial for trial in trials if not trial.ok]
    if as_json:
        output.print_json(selftest.document(trials))
    else:
        output.answer(f"{len(trials) - len(failed)} passed, {len(failed)} failed")
        if failed:
            named = ", ".join(f"{name} {version}" for name, version in selftest.versions().items())
            output.answer(f"\nversions: {named}\nhint: pip install --force-reinstall kleinctl")
    return PROBLEMS if failed else OK
