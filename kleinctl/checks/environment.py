"""Is there a Python environment that can run it, and room for what is to come?"""

from __future__ import annotations

from kleinctl.checks import check
from kleinctl.facts.system import System
from kleinctl.hardware import Hardware
from kleinctl.problem import Problem


@check("torch-cuda")
def torch_cuda(hardware: Hardware) -> Problem | None:
    """A torch beside kleinctl that cannot use the card is noticed."""
    torch = hardware.packages.get("torch")
    if not hardware.gpus or torch is None or torch.cuda:
        return None
    return Problem(
        f"the torch {torch.version} beside kleinctl cannot use {hardware.gpus[0].name}",
        "It is a build without CUDA; kleinctl makes an environment of its own with one that can.",
        "kleinctl install",
        severity="warning",
        ref="A02",
    )


@check("home-writable")
def home_writable(system: System) -> Problem | None:
    """kleinctl's folder can be written to."""
    if not system.home_error:
        return None
    return Problem(
        f"{system.home} cannot be written to",
        f"{system.home_error}.",
        "set KLEINCTL_HOME to a folder of yours",
        path=system.home,
    )
