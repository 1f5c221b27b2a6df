"""Is what was downloaded whole, and is there room and a way for what is to come?"""

from __future__ import annotations
