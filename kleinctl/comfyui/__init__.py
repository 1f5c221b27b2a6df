"""The ComfyUI that kleinctl uses: one that it installed, or one of the user's that it was told of."""

from kleinctl.comfyui.record import Checkout, known, paths_file, trouble

__all__ = ["Checkout", "known", "paths_file", "trouble"]
