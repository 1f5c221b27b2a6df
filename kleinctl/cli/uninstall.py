"""`kleinctl uninstall`"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kleinctl.cli import options, output
from kleinctl.problem import OK, Misuse, Problem

if TYPE_CHECKING:
    from kleinctl.comfyui.record import Checkout

#: What `--all` takes of KLEINCTL_HOME beside models, environments and ComfyUI.
FOLDERS = ("downloads", "quarantine", "logs", "journal", "pythons", "cache", "batches")
FILES = (
    *("verified.json", "licences.json", "calibration.json", "disabled-plugins.txt"),
    "serve.lock",
)
LOCK = "install.lock"


@click.command("uninstall", short_help="Take away a model, or everything kleinctl made.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--environments", is_flag=True, help="Take away the managed Python environments.")
@click.option("--comfyui", is_flag=True, help="Take away the ComfyUI that kleinctl installed; use yours no more.")
@click.option("--all", "everything", is_flag=True, help="Take away all models, environments, ComfyUI, logs, downloads.")
@options.together(options.yes, options.as_json)
def command(
    models: tuple[str, ...], environments: bool, comfyui: bool, everything: bool, yes: bool, as_json: bool
) -> int:
    """Take away the files of MODEL, the managed environments, ComfyUI, or everything kleinctl made.

    Only what kleinctl put there goes: files that Hugging Face's cache or ComfyUI also have stay there, and so do
    pictures, settings and custom nodes of the ComfyUI that kleinctl installed.
    """
    from kleinctl import environment, install, store
    from kleinctl.comfyui import checkout
    from kleinctl.comfyui import install as comfy
    from kleinctl.comfyui.record import known
    from kleinctl.home import home
    from kleinctl.plugins import Plugins
    from kleinctl.units import bytes_text

    plugins = Plugins()
    chosen = [plugins.model(name) for name in models] if not everything else list(plugins.models.values())
    if not (chosen or environments or comfyui or everything):
        why = "A model, --environments, --comfyui or --all is wanted."
        raise Misuse(Problem("nothing was named", why, "kleinctl models", name="usage"))
    if not yes and not sys.stdin.isatty():
        raise options.nobody_there("Taking files away wants a yes.")
    if not yes:
        has_comfyui = known() is not None or bool(checkout.programs())
        also = {
            "environments": environments or everything,
            _told(known()): comfyui or (everything and has_comfyui),
        }
        what = ", ".join([*(model.name for model in chosen), *(name for name, goes in also.items() if goes)])
        click.confirm(f"Take away {what}?", default=False, abort=True, err=True)
    used = known()
    # ComfyUI first: one that runs may keep it from going
    gone_comfyui = comfy.uninstall(output.remark) if comfyui or everything else None
    removed = [install.uninstall(model, lambda event: output.remark(event.note)) for model in chosen]
    gone = environment.names() if environments or everything else []
    for name in gone:
        environment.remove(name)
    if everything:  # settings and manifests of the user's own stay
        with store.locked(output.remark):  # an install that began meanwhile keeps what it has fetched till it is done
            for name in FOLDERS:
                shutil.rmtree(home() / name, ignore_errors=True)
            for name in FILES:
                (home() / name).unlink(missing_ok=True)
        (home() / LOCK).unlink(missing_ok=True)
    document: dict[str, Any] = {
        "schema": "kleinctl.uninstall/1",
        "files": [str(path) for each in removed for path in each.files],
        "freed_bytes": sum(each.freed_bytes for each in removed),
        "left": [str(path) for each in removed for path in each.left],
        "environments": gone,
    }
    if gone_comfyui is not None:
        document["files"] += map(str, gone_comfyui.programs)
        document["freed_bytes"] += gone_comfyui.freed_bytes
        document["left"] += map(str, (*gone_comfyui.left, *gone_comfyui.changed))
        document["environments"] = [*gone_comfyui.environments, *gone]
        document["comfyui"] = {"path": str(used.path), "owned": used.owned} if used else None
    if as_json:
        output.print_json(document)
    else:
        programs = len(gone_comfyui.programs) if gone_comfyui else 0
        counts = {
            "file": len(document["files"]) - programs, "ComfyUI": programs, "environment": len(document["environments"])
        }  # fmt: skip
        what = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items() if n or name == "file")
        output.answer(f"{what} taken away, {bytes_text(document['freed_bytes'])} of files freed")
        if gone_comfyui is not None and used is not None and not used.owned:
            output.remark(f"the ComfyUI in {used.path} is no longer used, and is as it was")
        changed = [str(path) for path in gone_comfyui.changed] if gone_comfyui else []
        for path in document["left"]:
            why = "files of it were changed" if path in changed else _why_left(path)
            output.remark(f"left, for {why}: {path}")
    return OK


def _why_left(path: str) -> str:
    from kleinctl.home import home
    from kleinctl.store import inside

    return "kleinctl did not put it there" if inside(Path(path).parent, home()) else "it lies behind a link of yours"


def _told(used: Checkout | None) -> str:
    """What becomes of ComfyUI, in words."""
    from kleinctl.comfyui import checkout

    if used is None or used.owned:
        return "ComfyUI and its environment"
    own = ", ComfyUI and environment of kleinctl's own" if checkout.programs() else ""
    return f"the record of {used.path} (it stays as it is){own}"
