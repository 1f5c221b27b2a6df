"""Which ComfyUI is used: a record in `KLEINCTL_HOME/comfyui.json`, and the list of models that is handed to it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kleinctl import atomic, documents, store
from kleinctl.home import home, models_folder
from kleinctl.problem import KleinctlError, Problem

SCHEMA = "kleinctl.comfyui/1"
#: Bytes; a record has a few hundred.
MAX_BYTES = 2**16
#: A server on this machine.
LOCAL = re.compile(r"http://(?:127\.0\.0\.1|localhost|\[::1\]):\d{1,5}")
#: The folders that parts lie in, which are also what ComfyUI calls their kinds.
KINDS = ("diffusion_models", "text_encoders", "vae")


@dataclass(frozen=True)
class Checkout:
    """A ComfyUI: `path` has its main.py, `python` runs it; `owned` is whether kleinctl installed it.

    `version` as its comfyui_version.py says. `base` is its `--base-directory` where that is not `path`, `arguments` are
    flags of its own start script that matter, `url` is where it answers while its user runs it: it is used then.
    """

    path: Path
    python: Path
    owned: bool
    version: str | None = None
    commit: str | None = None
    base: Path | None = None
    arguments: tuple[str, ...] = ()
    url: str | None = None


def folder() -> Path:
    """What kleinctl keeps of ComfyUI: its programs, and their data."""
    return home() / "comfyui"


def data_folder() -> Path:
    """The base directory of a ComfyUI that kleinctl installed: pictures, settings, custom nodes, the user's models."""
    return folder() / "data"


def run_folder() -> Path:
    """Where a server that kleinctl starts writes: its settings, temporary files, and what users' workflows save."""
    return folder() / "run"


def list_file() -> Path:
    """Where the list of the store's models is; see `paths_file`."""
    return folder() / "extra_model_paths.yaml"


def record_file() -> Path:
    """Where the record is."""
    return home() / "comfyui.json"


def known() -> Checkout | None:
    """The ComfyUI that pictures are made with; None where there is none, or its record is damaged."""
    try:
        with record_file().open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        document = json.loads(raw) if len(raw) <= MAX_BYTES else None
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            return None
        found = documents.read(Checkout, document, record_file().name)
    except (OSError, ValueError, RecursionError, KleinctlError):
        return None
    if not all(path.is_absolute() for path in (found.path, found.python, found.base or found.path)):
        return None
    return found if found.url is None or LOCAL.fullmatch(found.url) else replace(found, url=None)


def trouble(used: Checkout) -> Problem | None:
    """What keeps the ComfyUI in use from being started: it or its Python is gone."""
    lost = next((path for path in (used.path / "main.py", used.python) if not path.exists()), None)
    if lost is None:
        return None
    again = "" if used.owned else f' --comfyui "{used.path}"'
    return Problem(
        f"the ComfyUI in {used.path} cannot be started",
        f"Wanted is {lost}; it is gone.",
        f"kleinctl install --backend comfy{again}",
        name="comfyui-gone",
        path=str(used.path),
    )


def remember(checkout: Checkout) -> None:
    """Use this ComfyUI from now on.

    Raises:
        KleinctlError: `KLEINCTL_HOME` cannot be written.
    """
    store.write_json(record_file(), {"schema": SCHEMA, **documents.plain(checkout)})


def forget() -> None:
    """Use none any more.

    Raises:
        KleinctlError: the record cannot be removed.
    """
    with store.writing(record_file()):
        record_file().unlink(missing_ok=True)


def paths_file() -> Path:
    """The file for `--extra-model-paths-config`: it lists the models of kleinctl's store, those that are there now.

    Raises:
        KleinctlError: it cannot be written.
    """
    file = list_file()
    text = "\n".join(_sections()) or "{}"  # of an empty file ComfyUI says nothing and stops
    with contextlib.suppress(OSError, ValueError):
        if file.read_text(encoding="utf-8") == f"{text}\n":
            return file
    store.make_folder(file.parent)
    with store.writing(file):
        atomic.write_text(file, f"{text}\n")
    return file


def places() -> list[Path]:
    """The folders of the store's models in ComfyUI's layout: in each is one for each of the KINDS that it has."""
    return sorted(models_folder().glob("*/comfyui"))


def _sections() -> Iterator[str]:
    """A section for each model that is here. Paths are whole, because ComfyUI expands `$` and `~` in a `base_path`."""
    for place in places():
        kinds = [kind for kind in KINDS if (place / kind).is_dir()]
        if kinds:
            yield f"kleinctl_{place.parent.name}:"
            yield "  is_default: true"  # searched first: what was verified is what is loaded
        for kind in kinds:
            yield f"  {kind}: '{str(place / kind).replace(chr(39), chr(39) * 2)}'"
