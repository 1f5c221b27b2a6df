"""ComfyUI's workflows in `kleinctl run`: a job written as one, and a user's own run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import atomic
from kleinctl.problem import KleinctlError, Misuse, Problem

if TYPE_CHECKING:
    from kleinctl.backends import Job
    from kleinctl.manifest import Model
    from kleinctl.plugins import Plugins


def runner(plugins: Plugins, backend: str | None) -> Any:
    """The backend that knows workflows: the one that was named, or the first.

    Raises:
        Misuse: it knows none.
    """
    offers = plugins.backends_for(backend)
    found = next((offer.thing for offer in offers if hasattr(offer.thing, "check_workflow")), None)
    if found is None:
        named = f"{offers[0].thing.name} runs" if backend else "no backend here runs"
        why = "A workflow is ComfyUI's own; other backends draw a job by themselves."
        raise Misuse(Problem(f"{named} no workflows", why, "--backend comfyui-fp8", name="workflow-not-run"))
    return found


def write(plugins: Plugins, backend: str | None, model: Model, job: Job, path: Path) -> None:
    """Write `job` to `path`, as ComfyUI's own page opens it; whole, or what was there stays.

    Raises:
        KleinctlError: it cannot be written.
    """
    workflow = runner(plugins, backend).workflow(model, job)
    text = json.dumps(workflow, indent=1) + "\n"
    try:
        atomic.write_text(path, text)
    except OSError as error:
        what, fix = f"{path} cannot be written to", "--write-workflow another.json"
        raise KleinctlError(
            Problem(what, f"{error.strerror}.", fix, name="output-unwritable", path=str(path))
        ) from None


def in_record(record: dict[str, Any], given: Path | None) -> None:
    """Whether the picture that is repeated was made by the workflow that is `given`, or by none.

    Raises:
        Misuse: it was made by another, or one that is not given.
    """
    from kleinctl.verify import hash_file

    was = record.get("workflow")
    if not was or (given is not None and hash_file(given) == was.get("sha256")):
        return
    why = f"Its record holds the name and the sha256 of {was.get('name')}, not the workflow itself."
    fix = f"--workflow {was.get('name')}"
    raise Misuse(Problem("the picture was made by a workflow", why, fix, name="workflow-missing"))
