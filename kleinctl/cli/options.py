"""Options that several commands share, and what they are turned into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kleinctl.cli import output
from kleinctl.problem import Misuse, Problem, shell

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware
    from kleinctl.manifest import Model
    from kleinctl.plugins import Plugins
    from kleinctl.road import Way

Function = TypeVar("Function", bound=Callable[..., Any])

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
#: One that is looked at: it has to be there.
EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)

out = click.option("-o", "--output", "out", metavar="FILE", help="The PNG to write; a folder where there are several.")
model = click.option("--model", metavar="NAME", help="The model; see `kleinctl models`.")
backend = click.option("--backend", metavar="NAME", help="The backend; see `kleinctl plugins`.")
size = click.option("--size", metavar="WxH", help="Width and height in pixels; the nearest multiples of 16.")
steps = click.option("--steps", type=click.IntRange(1, 200), help="Denoising steps.")
guidance = click.option("--guidance", type=click.FloatRange(0, 30), help="Guidance scale (base models).")
precision = click.option("--precision", metavar="NAME", help="Hold weights so, as in fp8, where the backend can.")
vram_limit = click.option("--vram-limit", metavar="BYTES", help="Use no more VRAM than this, as in 12GiB, or 12.")
ram_limit = click.option("--ram-limit", metavar="BYTES", help="Use no more RAM than this, as in 16GiB, or 16.")
yes = click.option("--yes", "-y", is_flag=True, help="Answer every question with yes.")
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
comfyui = click.option(
    "--comfyui",
    type=EXISTING,
    metavar="DIR",
    help="A ComfyUI folder to look at too.",
)
folders = click.option(
    *("--folder", "folders"),
    multiple=True,
    type=EXISTING,
    metavar="DIR",
    help="A folder of models to look at too.",
)
unverified = click.option("--allow-unverified", is_flag=True, help="Install parts whose sha256 is not known.")
accept = click.option("--accept-licence", is_flag=True, help="Accept the model's licence without being asked.")


def together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def looked_at(folder: Path | None) -> None:
    """Say where what was named as a ComfyUI's folder is none: its files are looked at all the same."""
    from kleinctl.facts import comfyui as facts

    if folder is not None and facts.read(folder) is None:
        output.remark(f"warning: {folder} is no ComfyUI: its main.py is not there; it counts as --folder")


def nobody_there(why: str, fix: str = "") -> Misuse:
    """The problem of a question that nobody can answer; without a `fix` of its own it is what was typed, with a yes."""
    return Misuse(Problem("nobody is there to be asked", why, fix or shell(*typed(), "--yes"), name="usage"))


def typed() -> list[str]:
    """The command with its arguments and options, as they were typed."""
    from click.core import ParameterSource

    ctx = click.get_current_context()
    words = ["kleinctl", ctx.command.name or ""]
    for each in ctx.command.params:
        if each.name and ctx.get_parameter_source(each.name) is ParameterSource.COMMANDLINE:
            value = ctx.params[each.name]
            if isinstance(each, click.Argument):
                words += value if isinstance(value, tuple) else [str(value)]
            else:
                words += [each.opts[0]] if getattr(each, "is_flag", False) else [each.opts[0], str(value)]
    return words


def parsed_size(text: str | None, option: str = "--size") -> tuple[int | None, int | None]:
    """`option` as width and height, or nothing."""
    from kleinctl.units import parse_size

    return parse_size(text, option) if text else (None, None)


def this_machine() -> Hardware:
    """This machine's hardware, as it is now."""
    from kleinctl.hardware import detect
    from kleinctl.home import home

    return detect(home())


def limited(hardware: Hardware, vram_limit: str | None, ram_limit: str | None = None) -> Hardware:
    """The machine to plan for: with no more VRAM free, and RAM available, than the limits allow.

    Raises:
        Misuse: a limit is no amount of memory.
    """
    from dataclasses import replace

    from kleinctl.units import parse_bytes

    if vram_limit is not None:
        most = parse_bytes(vram_limit, "--vram-limit")
        cards = (replace(gpu, vram_free_bytes=min(gpu.vram_free_bytes, most)) for gpu in hardware.gpus)
        hardware = replace(hardware, gpus=tuple(cards))
    if ram_limit is not None:
        available = min(hardware.ram_available_bytes, parse_bytes(ram_limit, "--ram-limit"))
        hardware = replace(hardware, ram_available_bytes=available)
    return hardware


def way(
    plugins: Plugins,
    hardware: Hardware,
    model: str | None,
    backend: str | None,
    changes: dict[str, Any] | None = None,
    *,
    variant: str | None = None,
    installed: bool = False,
    must_fit: bool = True,
) -> Way:
    """The model and backend that were named, or the ones to choose here; with `installed` rather one that is here.

    Without `must_fit` a model that was named may be one that does not run here, or not now.

    Raises:
        Misuse: there is no such model or backend.
        KleinctlError: it does not fit this machine.
    """
    from kleinctl import road

    models = plugins.models_for(model)
    if variant:
        models = [with_variant(plugins, each, variant) for each in models[:1]]
    found = road.ways(plugins, models, backend, hardware, changes or {}, must_fit=must_fit)
    if not found:
        closest = road.nearest(plugins, models, backend, hardware, changes or {})
        raise road.no_way(plugins, closest, backend, hardware, changes or {})
    return next((each for each in found if installed and road.files(each).in_place), found[0])


def with_variant(plugins: Plugins, model: Model, variant: str) -> Model:
    """The model of the same family in another variant.

    Raises:
        Misuse: there is none.
    """
    from kleinctl.problem import Misuse, Problem

    for each in plugins.models.values():
        if each.family == model.family and each.variant == variant:
            return each
    why = f"{model.name} is {model.variant}; no other model of its family is known."
    raise Misuse(Problem(f"{model.name} has no {variant} variant", why, "kleinctl models", name="no-variant"))
