"""A saved ComfyUI workflow, as nodes with their values and links."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Node:
    """A node: its type, its plain values as text, and its links by input as (node id, slot)."""

    id: str
    type: str
    values: Mapping[str, str] = field(default_factory=dict, hash=False)
    links: Mapping[str, str] = field(default_factory=dict, hash=False)
    muted: bool = False


@dataclass(frozen=True)
class Workflow:
    """A workflow file. `format` is `api` (what the server takes) or `ui` (what the page saves)."""

    path: str
    format: Literal["api", "ui", "unknown"]
    nodes: tuple[Node, ...] = ()
    error: str = ""


def read(path: Path) -> Workflow:
    """The workflow in a JSON file, or what is wrong with it."""
    raise NotImplementedError
