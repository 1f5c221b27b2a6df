"""The weights files on this machine: where they are, what was wanted there, what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kleinctl.identify import Identity, identify

if TYPE_CHECKING:
    from kleinctl.facts.comfyui import ComfyUI
    from kleinctl.manifest import Model
    from kleinctl.plugins import Plugins

#: The roles that are weights.
ROLES = ("transformer", "text-encoder", "vae")


@dataclass(frozen=True)
class FoundFile:
    """A weights file, what its header says it is, and what was wanted in its place.

    `place` is where it lies: "store" (kleinctl's), "hub-cache", "diffusers-folder", or the name of a ComfyUI.
    `folder` is the kind of folder in a ComfyUI ("vae", "diffusion_models" ...) or the part's folder in a diffusers one.
    Where the place says what belongs there, `model`, `part`, `role`, `family` and `size_bytes` do too; else the role
    and family are empty. `set_name` is shared by files that would be loaded together. `sha256` is known where the
    file has been hashed. `fix` puts the right file there.
    """

    path: Path
    identity: Identity
    place: str
    folder: str = ""
    model: str = ""
    part: str = ""
    role: str = ""
    family: str = ""
    size_bytes: int | None = None
    sha256: str | None = None
    set_name: str = ""
    fix: str = ""


def gather(plugins: Plugins, comfyuis: Sequence[ComfyUI] = (), folders: Sequence[Path] = ()) -> tuple[FoundFile, ...]:
    """Every weights file of kleinctl's store, of the ComfyUI folders, and of other `folders` that were named."""
    return (*_of_the_store(plugins), *(each for comfyui in comfyuis for each in _of_comfyui(plugins, comfyui)))


def _of_the_store(plugins: Plugins) -> Iterator[FoundFile]:
    from kleinctl import store

    for model in plugins.models.values():
        for layout in model.layouts:
            yield from _expected(plugins, model, layout, store.model_folder(model.name, layout), "store")


def _of_comfyui(plugins: Plugins, comfyui: ComfyUI) -> Iterator[FoundFile]:
    for model in plugins.models.values():
        if "comfyui" in model.layouts:
            yield from _expected(plugins, model, "comfyui", Path(comfyui.path, "models"), comfyui.name)


def _expected(plugins: Plugins, model: Model, layout: str, root: Path, place: str) -> Iterator[FoundFile]:
    """The files in the places that a manifest gives its parts."""
    for part in model.parts_for(layout):
        path = root / part.to[layout]  # confined by the manifest; people link the folders of their ComfyUI elsewhere
        if part.role in ROLES and path.suffix in (".safetensors", ".gguf") and path.exists():
            yield FoundFile(
                path=path,
                identity=_identify(path, plugins),
                place=place,
                folder=Path(part.to[layout]).parent.name,
                model=model.name,
                part=part.id,
                role=part.role,
                family=part.family,
                size_bytes=part.size,
                set_name=f"{place}/{model.name}/{layout}",
                fix=f"kleinctl install --model {model.name}",
            )


def _identify(path: Path, plugins: Plugins) -> Identity:
    return identify(path, signatures=[offer.thing for offer in plugins.offers("kleinctl_signatures")])
