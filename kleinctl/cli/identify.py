"""`kleinctl identify`"""

from __future__ import annotations

from pathlib import Path

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, PROBLEMS

#: Formats that hold weights and were read whole.
GOOD = ("safetensors", "gguf")


@click.command("identify", short_help="What a weights file really is, from its header.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@options.as_json
def command(files: tuple[Path, ...], as_json: bool) -> int:
    """What each weights file really is, read from its header; the weights are left on disk.

    Exit code 1 where a file is broken or no weights file at all.
    """
    from kleinctl.identify import document, identify, title
    from kleinctl.plugins import Plugins
    from kleinctl.units import bytes_text

    plugins = Plugins()
    signatures = [offer.thing for offer in plugins.offers("kleinctl_signatures")]
    models = list(plugins.models.values())
    found = [identify(path, models=models, signatures=signatures) for path in files]
    if as_json:
        output.print_json(document(found))
    else:
        for each in found:
            named = title(each.family) if each.family != "unknown" else "unknown"
            role = f" {each.role.replace('-', ' ')}" if each.role not in ("unknown", "vae") else ""
            kind = each.kind if each.kind not in GOOD else f"{each.dtype or each.kind}, {each.layout or each.kind}"
            part = f", {each.part}" if each.part else ""
            said = f"{each.path}: {named}{role} ({kind}, {bytes_text(each.size_bytes)}{part})\n  {each.saw}"
            output.answer(output.clean(said))
    return OK if all(each.kind in GOOD for each in found) else PROBLEMS
