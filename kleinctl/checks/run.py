"""Did a finished run go as it should?"""

from __future__ import annotations
