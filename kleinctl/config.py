"""The user's settings, `config.toml`: a table for each command, with defaults for its options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kleinctl.problem import KleinctlError, Problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Tables of `config.toml` that are no command's.
NO_COMMANDS = ("hub",)


def load_config(path: Path) -> dict[str, Any]:
    """The settings in `path`; none where there is no file.

    Raises:
        KleinctlError: the file cannot be read or is no TOML.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, table in settings.items():
            if not isinstance(table, dict):
                raise KleinctlError(
                    Problem(
                        f"{path} has a setting that belongs to no command",
                        f"{name} is no table; options stand below their command's name, as in [run].",
                        f"correct {path}",
                        name="config-broken",
                    )
                )
        return settings
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise KleinctlError(
            Problem(f"{path} cannot be read", str(error.strerror), f"check who owns {path}", name="config-unreadable")
        ) from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise KleinctlError(
            Problem(f"{path} is no valid TOML", f"{error}.", f"mend or remove {path}", name="config-broken")
        ) from None
