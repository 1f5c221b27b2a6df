"""Where kleinctl keeps its things: one folder, `KLEINCTL_HOME`."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of all state: `KLEINCTL_HOME`, else the platform's user data folder. Not created here."""
    given = os.environ.get("KLEINCTL_HOME")
    if given:
        return Path(given).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("kleinctl", appauthor=False))


def models_folder() -> Path:
    """One folder a model and layout: `models/klein-4b/diffusers/`."""
    return home() / "models"


def manifests_folder() -> Path:
    """Manifests of a user's own models."""
    return home() / "manifests"


def envs_folder() -> Path:
    """Managed Python environments."""
    return home() / "envs"


def downloads_folder() -> Path:
    """Partial downloads, named by their sha256, so that a restart finds them."""
    return home() / "downloads"


def quarantine_folder() -> Path:
    """Files that were not what they should be, each with the reason beside it."""
    return home() / "quarantine"


def logs_folder() -> Path:
    """Logs of installs and workers."""
    return home() / "logs"


def config_file() -> Path:
    """The optional settings of a user."""
    return home() / "config.toml"


def disabled_file() -> Path:
    """Names of plugins that are switched off, one a line."""
    return home() / "disabled-plugins.txt"


def offline() -> bool:
    """Whether `KLEINCTL_OFFLINE` (or the hub's own `HF_HUB_OFFLINE`) forbids the network."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("KLEINCTL_OFFLINE", "HF_HUB_OFFLINE")
    )


def server_file() -> Path:
    """Where a running `kleinctl serve` says how it is reached."""
    return home() / "serve.json"
