"""Embeddings that were written once, where little can be written now, and where somebody else writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kleinctl import InstalledModel
from kleinctl.plugins import Plugins

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path: Path) -> InstalledModel:
    tiny = Plugins(frozenset()).models["klein-tiny"]
    return InstalledModel(tiny, tmp_path, {part.id: "0" * 64 for part in tiny.parts}, tmp_path)


def new(model: InstalledModel) -> Any:
    from kleinctl_plugins.embeddings import Embeddings

    return Embeddings(model, "cpu")


@pytest.fixture
def written(model: InstalledModel) -> Path:
    """The file of one prompt."""
    import torch

    remembered = new(model)
    remembered.put("a red circle", torch.arange(512 * 1024, dtype=torch.float32).view(1, 512, 1024))
    remembered.close()
    assert model.cache is not None
    [path] = (model.cache / "embeddings").glob("*.safetensors")
    return path


def test_a_folder_on_a_disk_for_reading_only_is_read(model, written, monkeypatch):
    def read_only(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(os, "utime", read_only)
    assert new(model).get("a red circle").sum() > 0


def test_a_file_that_is_cut_short_while_it_is_used_takes_no_worker_along(model, written):
    """What is mapped from a file that has become shorter ends the process with SIGBUS."""
    found = new(model).get("a red circle")
    if os.name != "nt":  # there, what is mapped could not be cut
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(written) not in maps.read_text()
    os.truncate(written, 100)
    assert found[0, 1, 0] == 1024
