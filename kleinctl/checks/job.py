"""Does this job ask for something that cannot come out well?"""

from __future__ import annotations
