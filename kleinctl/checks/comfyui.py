"""Would this ComfyUI find and run its files?"""

from __future__ import annotations
