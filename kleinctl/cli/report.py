"""`kleinctl report`"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, KleinctlError, Problem

if TYPE_CHECKING:
    from kleinctl.facts import Facts
    from kleinctl.report.collect import Log


@click.command("report", short_help="One redacted file that lets support see what you see.")
@click.option("-o", "--output", "out", type=options.FILE, metavar="FILE", help="The zip to write; it must be new.")
@click.option("--show", is_flag=True, help="List what would be in it, and write nothing.")
@click.option("--case-id", "case", default="", metavar="TEXT", help="What support calls your case.")
@click.option("--note", default="", metavar="TEXT", help="What you did and what happened, in your words.")
@options.comfyui
@options.folders
@click.option("--workflow", type=options.FILE, metavar="FILE", help="Put in a ComfyUI workflow (JSON, or its PNG) too.")
@click.option("--log", "logs", multiple=True, type=options.FILE, metavar="FILE", help="A log to put in too.")
@click.option("--keep-prompts", is_flag=True, help="Leave prompts in.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout; a zip only with -o.")
def command(
    out: Path | None,
    show: bool,
    case: str,
    note: str,
    comfyui: Path | None,
    folders: tuple[Path, ...],
    workflow: Path | None,
    logs: tuple[Path, ...],
    keep_prompts: bool,
    as_json: bool,
) -> int:
    """One redacted file that lets support see what you see.

    Home folders, names of people and machines, tokens, addresses, file names and prompts become tokens such as USER_1.
    The finished file is searched for them once more; if one is left, nothing is written.
    """
    from kleinctl.facts import gather
    from kleinctl.plugins import Plugins
    from kleinctl.report import bundle, collect

    plugins = Plugins()
    places = [*([comfyui] if comfyui else []), *folders]
    options.looked_at(comfyui)
    facts = gather(plugins, options.this_machine(), folders=places, workflow_file=workflow)
    redactor = collect.redactor_for(plugins, facts, keep_prompts)
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    document = collect.document(plugins, facts, _logs(facts, logs), redactor, made=made, case=case, note=note)
    parts = bundle.members(document, redactor)
    data = bundle.checked(bundle.pack(parts), redactor)
    if as_json:
        output.print_json(document)
    elif show:
        _show(document, parts, len(data))
    if not show and (out or not as_json):
        path = out or bundle.free_name(Path(time.strftime("kleinctl-report-%Y%m%d-%H%M.zip")))
        bundle.write(path, data)
        if as_json:
            output.remark(f"the report is {path}")
        else:
            output.remark("look at it before you send it: kleinctl report --show, or open the zip")
            output.answer(str(path))
    return OK


def _logs(facts: Facts, given: Sequence[Path]) -> list[Log]:
    from kleinctl.report.collect import gather_logs

    try:
        return gather_logs(facts, given)
    except OSError as error:
        raise KleinctlError(
            Problem(
                f"{error.filename} cannot be read",
                f"{error.strerror}.",
                "kleinctl report --log FILE",
                name="log-unreadable",
            )
        ) from None


def _show(document: Mapping[str, Any], parts: Mapping[str, bytes], size: int) -> None:
    """What the zip would have: its members, what is told of the machine, what was hidden."""
    from kleinctl.units import bytes_text

    facts, findings = document["facts"], document["findings"]
    names = [problem["name"] for problem in (*findings["problems"], *findings["log"]["problems"])]
    cards = [gpu["name"] for gpu in facts["hardware"]["gpus"]]
    rows = [(f"{name}", bytes_text(len(content))) for name, content in parts.items()]
    output.show_rows(rows, width=48)
    hidden = ", ".join(f"{count} x {kind}" for kind, count in document["redaction"].items())
    told = [
        ("zip", bytes_text(size)),
        ("card", ", ".join(cards) or "none"),
        ("files", f"{len(facts['files'])} weights files: kind, size and digest of the header"),
        ("packages", f"of {len(facts['environments'])} Pythons"),
        ("problems", ", ".join(names) or "none"),
        ("hidden", hidden or "nothing"),
    ]
    output.console().print()
    output.show_rows(told, width=10)
