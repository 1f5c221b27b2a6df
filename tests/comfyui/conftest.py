"""A repository that stands in for ComfyUI's, and environments that are made without pip."""

from __future__ import annotations

from pathlib import Path

import pytest

from kleinctl.comfyui import checkout, find
from kleinctl.environment_build import Builder
from tests.comfyui import fake


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on the machine that tests are run on is no matter of theirs."""
    monkeypatch.setattr(find, "running", list)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI 0.28.0 and 0.29.0, of which kleinctl knows the commits."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    folder = tmp_path / "upstream"
    commits = {f"v{version}": fake.commit(folder, version, tag=f"v{version}") for version in ("0.28.0", "0.29.0")}
    sizes = dict.fromkeys(("checkout_bytes", "download_bytes", "disk_bytes"), 1000)
    known = {"address": str(folder), "release": "v0.29.0", "oldest": "0.9.2", "commits": commits, **sizes}
    monkeypatch.setattr(checkout, "releases", lambda: known)
    for name in ("install", "adopt", "packages"):
        monkeypatch.setattr(f"kleinctl.comfyui.{name}.releases", lambda: known, raising=False)
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builds of environments leave what was asked for, at once; the list has what each was asked for."""
    asked: list[str] = []

    def run(builder: Builder) -> None:
        asked.append(f"{builder.plan.name}: {' '.join((*builder.plan.extras, *builder.plan.companions))}")
        for number in range(1, len(builder.plan.steps) + 1):
            builder.step = number
            builder.say()
        names = [each.replace(">=", "==").partition(";")[0].partition("==") for each in builder.plan.extras]
        more = dict(each.split("==") for each in builder.plan.companions)
        fake.built(
            builder.beside, {"torch": "2.13.0+cpu", **more, **{name: version or "1" for name, _, version in names}}
        )

    monkeypatch.setattr(Builder, "run", run)
    return asked
