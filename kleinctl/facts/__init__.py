"""Everything doctor goes by: gathered once and frozen, and the same whether from this machine or from a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import documents, environment
from kleinctl.environment import Environment
from kleinctl.facts import comfyui, hub_cache, probe, system, weights, workflow
from kleinctl.facts.comfyui import ComfyUI
from kleinctl.facts.hub_cache import HubCache
from kleinctl.facts.probe import Probe
from kleinctl.facts.system import System
from kleinctl.facts.weights import DiffusersFolder, FoundFile
from kleinctl.facts.workflow import Workflow
from kleinctl.hardware import Hardware
from kleinctl.problem import KleinctlError

if TYPE_CHECKING:
    from kleinctl.plugins import Plugins

__all__ = ["ComfyUI", "Environment", "Facts", "FoundFile", "HubCache", "Probe", "System", "Workflow", "gather"]


@dataclass(frozen=True)
class Facts:
    """A machine and what is on it. `seconds` says how long each family of facts took to gather."""

    hardware: Hardware
    system: System = field(default_factory=System)
    environments: tuple[Environment, ...] = ()
    files: tuple[FoundFile, ...] = ()
    comfyuis: tuple[ComfyUI, ...] = ()
    diffusers_folders: tuple[DiffusersFolder, ...] = ()
    hub_cache: HubCache | None = None
    workflow: Workflow | None = None
    probes: tuple[Probe, ...] = ()
    remarks: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict, hash=False)

    def once(self) -> dict[str, Any]:
        """The facts that exist once, by the names that checks ask for them with."""
        return {name: getattr(self, name) for name in ("hardware", "system", "hub_cache", "files", "environments")}

    def scenes(self) -> Iterator[Mapping[str, Any]]:
        """The facts that come several times, each with what belongs to it. A check runs for each scene it can read."""
        yield from ({"environment": each} for each in self.environments)
        yield from ({"found_file": each} for each in self.files)
        yield from ({"probe": each} for each in self.probes)
        yield from ({"diffusers_folder": each} for each in self.diffusers_folders)
        for each in self.comfyuis:
            own = tuple(file for file in self.files if file.place == each.name)
            python = next((found for found in self.environments if found.name == each.environment), None)
            yield {"comfyui": each, "comfyui_files": own, "comfyui_environment": python}
        if self.workflow is not None:
            checkout = self.comfyuis[0] if self.comfyuis else None
            yield {"workflow": self.workflow, "workflow_comfyui": checkout, "workflow_files": self.files}
        for name in dict.fromkeys(each.set_name for each in self.files if each.set_name):
            yield self._together(name)

    def _together(self, set_name: str) -> Mapping[str, Any]:
        """The parts of one model that would be loaded together; of shards the first, which has what tells."""
        found: dict[str, Any] = {}
        for each in self.files:
            if each.set_name == set_name and each.identity.facts is not None:
                found.setdefault(each.role.replace("-", "_"), each.identity.facts)
        return found

    def to_json(self) -> dict[str, Any]:
        """The facts as a report carries them."""
        return {key: documents.plain(value) for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, document: object) -> Facts:
        """Read what `to_json` wrote, perhaps by another version of kleinctl. Unknown keys are ignored.

        Raises:
            KleinctlError: a value is missing, has the wrong type or is out of bounds.
        """
        given = documents.sized(document, dict, "facts")
        hardware = Hardware.from_json(given.get("hardware"))
        return documents.read(cls, {**given, "hardware": documents.plain(hardware)}, "facts")


def gather(
    plugins: Plugins,
    hardware: Hardware,
    *,
    folders: Sequence[Path] = (),
    workflow_file: Path | None = None,
    deep: bool = False,
    progress: weights.Progress | None = None,
) -> Facts:
    """Everything about this machine. `folders` are ComfyUI's or diffusers' that the user named; where no ComfyUI is
    among them, the one that pictures are made with is looked at.

    With `deep`, files are hashed (`progress` hears of each), and torch is imported in a process of its own in each
    environment that has it.
    """
    seconds: dict[str, float] = {}

    def timed(family: str, ask: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        answer = ask()
        seconds[family] = round(time.perf_counter() - start, 4)
        return answer

    read = workflow.read(workflow_file) if workflow_file else None
    found = {folder: timed(f"ComfyUI {number}", partial(comfyui.read, folder)) for number, folder in enumerate(folders)}
    named = [each for each in found.values() if each is not None]
    used = None if named else timed("ComfyUI in use", _comfyui_in_use)
    comfyuis = _named_apart([*named, *([used] if used else [])])
    if read is not None:
        comfyuis = tuple(comfyui.provided(each, (node.type for node in read.nodes)) for each in comfyuis)
    others = [folder for folder, each in found.items() if each is None]
    known = timed("environments", environment.known)
    theirs = tuple(each for one in comfyuis for each in comfyui.environments(one))
    files = timed("files", lambda: weights.gather(plugins, comfyuis, others, deep=deep, progress=progress))
    gpu = hardware.gpu.cuda_id if hardware.gpu else None
    asked = [each for each in (*known, *theirs) if "torch" in each.packages] if deep else []
    return Facts(
        hardware=hardware,
        system=timed("system", system.gather),
        environments=(*known, *theirs),
        files=files,
        comfyuis=comfyuis,
        diffusers_folders=weights.diffusers_folders(others, files),
        hub_cache=timed("hub_cache", lambda: hub_cache.gather(plugins)),
        workflow=read,
        probes=tuple(timed(f"torch of {each.name}", partial(probe.probe, each, gpu)) for each in asked),
        seconds=seconds,
    )


def _comfyui_in_use() -> ComfyUI | None:
    """The ComfyUI that kleinctl uses; None where there is none, or it cannot be read."""
    from kleinctl.comfyui import adopt, record

    checkout = record.known()
    try:
        return adopt.facts_of(checkout) if checkout else None
    except KleinctlError:
        return None


def _named_apart(comfyuis: Iterable[ComfyUI]) -> tuple[ComfyUI, ...]:
    """Each with a name of its own: a second "ComfyUI" is "ComfyUI (2)"."""
    named: dict[str, ComfyUI] = {}
    for each in comfyuis:
        name, number = each.name, 1
        while name in named:
            number += 1
            name = f"{each.name} ({number})"
        environment = name if each.environment == each.name else each.environment
        named[name] = replace(each, name=name, environment=environment)
    return tuple(named.values())
