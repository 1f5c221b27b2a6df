"""The ComfyUI that kleinctl uses: one that it installed, or one of the user's that it was told of.

And what is known of any: `read` gathers the facts of a folder, `catalogue` has the nodes, `workflow` reads workflows.
"""

from typing import TYPE_CHECKING, Any

from kleinctl.comfyui.record import Checkout, folder, known, paths_file, places, trouble

if TYPE_CHECKING:
    from kleinctl.facts import workflow
    from kleinctl.facts.comfyui import catalogue, read

__all__ = ["Checkout", "catalogue", "folder", "known", "paths_file", "places", "read", "trouble", "workflow"]


def __getattr__(name: str) -> Any:
    """What belongs to the facts is loaded when it is first used (PEP 562)."""
    import importlib

    if name == "workflow":
        return importlib.import_module("kleinctl.facts.workflow")
    if name in ("catalogue", "read"):
        return getattr(importlib.import_module("kleinctl.facts.comfyui"), name)
    raise AttributeError(f"module 'kleinctl.comfyui' has no attribute {name!r}")
