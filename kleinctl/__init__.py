"""Set up, diagnose and run FLUX.2 [klein] on your own NVIDIA card. What stands here is what a plugin may import."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "API_VERSION",
    "Budget",
    "Check",
    "CouldNotCheck",
    "Environment",
    "Evidence",
    "Fit",
    "Gpu",
    "Hardware",
    "InstalledModel",
    "Job",
    "KleinctlError",
    "LogPattern",
    "Model",
    "Part",
    "Problem",
    "Remedy",
    "Sighting",
    "Signature",
    "Stage",
    "check",
    "comfyui",
    "hookimpl",
    "memory",
]

if TYPE_CHECKING:
    from kleinctl import comfyui, memory
    from kleinctl.backends import API_VERSION, Budget, Fit, InstalledModel, Job, Stage
    from kleinctl.checks import Check, CouldNotCheck, check
    from kleinctl.environment import Environment
    from kleinctl.hardware import Gpu, Hardware
    from kleinctl.identify import Signature
    from kleinctl.logs import LogPattern, Sighting
    from kleinctl.manifest import Model, Part
    from kleinctl.plugins import hookimpl
    from kleinctl.problem import Evidence, KleinctlError, Problem, Remedy

_WHERE = {
    "API_VERSION": "backends",
    "Budget": "backends",
    "Fit": "backends",
    "InstalledModel": "backends",
    "Job": "backends",
    "Stage": "backends",
    "Check": "checks",
    "CouldNotCheck": "checks",
    "check": "checks",
    "Environment": "environment",
    "Gpu": "hardware",
    "Hardware": "hardware",
    "Signature": "identify",
    "LogPattern": "logs",
    "Sighting": "logs",
    "Model": "manifest",
    "Part": "manifest",
    "hookimpl": "plugins",
    "KleinctlError": "problem",
    "Problem": "problem",
    "Evidence": "problem",
    "Remedy": "problem",
}


def __getattr__(name: str) -> Any:
    """Load public names when they are first used (PEP 562), so that `kleinctl --help` starts in a blink."""
    import importlib

    if name in ("comfyui", "memory"):
        return importlib.import_module(f"kleinctl.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(f"kleinctl.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'kleinctl' has no attribute {name!r}")
