"""Would this ComfyUI workflow run?"""

from __future__ import annotations
