"""A ComfyUI folder, read without importing it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExtraPath:
    """A line of `extra_model_paths.yaml`: the kind of folder it names, where that is, and whether it is there."""

    file: str
    line: int
    kind: str
    path: str
    exists: bool


@dataclass(frozen=True)
class CustomNode:
    """A folder in `custom_nodes`. `version` as its pyproject.toml has it."""

    name: str
    version: str | None = None


@dataclass(frozen=True)
class ComfyUI:
    """A ComfyUI folder. `name` tells several apart and is the `place` of its files.

    `version` as `comfyui_version.py` has it. `roots` are the folders of models it reads, by kind ("vae" ...),
    `extra_paths` what `extra_model_paths.yaml` adds, with `yaml_error` where that cannot be read. `arguments` are
    those of the script that starts it, or of the running server. `nodes` are node types it is known to have (empty:
    not known). `environment` names its Python among the environments. `log` is its newest log's path.
    """

    name: str
    path: str
    version: str | None = None
    layout: str = "checkout"
    extra_paths: tuple[ExtraPath, ...] = ()
    yaml_error: str = ""
    custom_nodes: tuple[CustomNode, ...] = ()
    arguments: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    environment: str | None = None
    log: str | None = None


def read(folder: Path) -> ComfyUI | None:
    """The ComfyUI in `folder` (a checkout, a portable's or the folder of its models); None where there is none."""
    models = folder / "models"
    return ComfyUI(name=folder.name, path=str(folder)) if models.is_dir() else None
