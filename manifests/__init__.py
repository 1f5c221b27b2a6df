"""The models we ship, one TOML file each: data, so that a reviewer can read the diff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kleinctl import hookimpl

kleinctl_api = 1


@hookimpl
def kleinctl_manifests() -> Sequence[Path]:
    """Every manifest beside this file."""
    return sorted(Path(__file__).parent.glob("*.toml"))
