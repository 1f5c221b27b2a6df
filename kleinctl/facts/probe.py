"""`doctor --deep`: import torch in a process of its own, and hear what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kleinctl.environment import Environment


@dataclass(frozen=True)
class Probe:
    """What torch said in one environment. `error` has the last lines where it died or could not use the card."""

    environment: str
    exit_status: int | None
    seconds: float
    torch: str | None = None
    cuda_available: bool | None = None
    architectures: tuple[str, ...] = ()
    device: str | None = None
    error: str = ""


def probe(environment: Environment) -> Probe:
    """Import torch with the Python of `environment`, in a process that may crash or hang."""
    raise NotImplementedError
