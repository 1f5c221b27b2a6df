"""Gathers facts of files as doctor does, and asks the checks of files about them, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kleinctl.checks import Check, downloads, files, pairing, run_checks
from kleinctl.facts import Facts, comfyui, hub_cache, weights
from kleinctl.facts.system import System
from kleinctl.hardware import Hardware
from kleinctl.plugins import Plugins
from kleinctl.problem import Problem

PLUGINS = Plugins(frozenset())
CHECKS = [each for module in (downloads, files, pairing) for each in vars(module).values() if isinstance(each, Check)]


def problems(
    *folders: Path,
    hardware: Hardware | None = None,
    system: System | None = None,
    environments: Sequence[Any] = (),
    model: str | None = None,
    deep: bool = False,
) -> list[Problem]:
    """What these checks find in the store, the hub's cache and `folders`, as facts that went through JSON and back."""
    read = {folder: comfyui.read(folder) for folder in folders}
    others = [folder for folder, each in read.items() if each is None]
    comfyuis = tuple(each for each in read.values() if each is not None)
    found = weights.gather(PLUGINS, comfyuis, others, deep=deep)
    facts = Facts(
        hardware=hardware or Hardware(),
        system=system or System(),
        environments=tuple(environments),
        files=found,
        comfyuis=comfyuis,
        diffusers_folders=weights.diffusers_folders(others, found),
        hub_cache=hub_cache.gather(PLUGINS),
    )
    facts = Facts.from_json(facts.to_json())
    scenes = [*facts.scenes()]
    if model:
        scenes.append({"model": PLUGINS.models[model]})
    results = run_checks(CHECKS, facts.once(), scenes)
    crashed = [each.why for each in results if "crashed" in each.why]
    assert not crashed, crashed
    return [problem for each in results for problem in each.problems]


def by_name(*folders: Path, **more: Any) -> dict[str, Problem]:
    """The same by name."""
    return {each.name: each for each in problems(*folders, **more)}
