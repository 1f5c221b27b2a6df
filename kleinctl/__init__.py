"""Set up, diagnose and run FLUX.2 [klein] on your own NVIDIA card. What stands here is what a plugin may import."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "API_VERSION",
    "Budget",
    "Check",
    "CouldNotCheck",
    "Device",
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
    "StageUse",
    "WatchedDevice",
    "check",
    "comfyui",
    "exits",
    "hookimpl",
    "identify",
    "logs",
    "logs_folder",
    "memory",
    "misfits",
    "pictures",
]

if TYPE_CHECKING:
    from kleinctl import comfyui, exits, identify, logs, memory, pictures
    from kleinctl.backends import API_VERSION, Budget, Fit, InstalledModel, Job, Stage
    from kleinctl.checks import Check, CouldNotCheck, check
    from kleinctl.checks.pairing import misfits
    from kleinctl.environment import Environment
    from kleinctl.hardware import Gpu, Hardware
    from kleinctl.home import logs_folder
    from kleinctl.identify import Signature
    from kleinctl.logs import LogPattern, Sighting
    from kleinctl.manifest import Model, Part
    from kleinctl.plugins import hookimpl
    from kleinctl.problem import Evidence, KleinctlError, Problem, Remedy
    from kleinctl.worker.device import Device
    from kleinctl.worker.protocol import StageUse
    from kleinctl.worker.watched import WatchedDevice

#: Modules that are public as they are, and the module of every other name.
_MODULES = ("comfyui", "exits", "identify", "logs", "memory", "pictures")
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
    "misfits": "checks.pairing",
    "Environment": "environment",
    "Gpu": "hardware",
    "Hardware": "hardware",
    "logs_folder": "home",
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
    "Device": "worker.device",
    "StageUse": "worker.protocol",
    "WatchedDevice": "worker.watched",
}


def __getattr__(name: str) -> Any:
    """Load public names when they are first used (PEP 562), so that `kleinctl --help` starts in a blink."""
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"kleinctl.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(f"kleinctl.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'kleinctl' has no attribute {name!r}")
