"""A card whose memory is gone at moments when nothing large is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kleinctl import Budget, InstalledModel, Job
from kleinctl.plugins import Plugins
from kleinctl.units import GIB
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

JOB = Job("a red circle", 64, 64, seed=1, steps=1, guidance=1.0)


def nothing(*event: Any) -> None: ...


@pytest.fixture
def session() -> Iterator[Any]:
    from kleinctl_plugins.staged_decode import Session

    tiny = InstalledModel(Plugins(frozenset()).models["klein-tiny"], REPOSITORY / "manifests" / "klein-tiny")
    session = Session(tiny, Budget(0, 64 * GIB, "cpu"), ("resident", "staged"))
    yield session
    session.close()


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_a_picture_that_was_denoised_ahead_outlives_a_full_card(session, words):
    wanted = session.generate(JOB, nothing)
    plan = session._plan(JOB)
    latents, _ = session._latents(JOB, plan, nothing)

    class Ahead:
        """Latents that do not find the room at the first time."""

        tried = 0

        def to(self, device: str) -> Any:
            self.tried += 1
            if self.tried == 1:
                raise RuntimeError(words)
            return latents

    session._denoised[JOB] = Ahead()
    steps: list[str] = []
    again = session.generate(JOB, lambda stage, done, total: steps.append(stage))
    assert again.tobytes() == wanted.tobytes() and "denoise" not in steps
    assert session.warnings[0].startswith("VRAM ran out")


def test_a_card_that_is_full_when_the_weights_come_back_costs_no_picture(session, monkeypatch):
    session.ways, session._whole_room = ("resident",), 0  # whatever the decode does not need makes way for it
    wanted = session.generate(JOB, nothing)
    assert all(unit.device is not None for name, unit in session.encoder.units.items() if name)

    def gone(*given: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    def after(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("decode", 1):
            monkeypatch.setattr(session, "_hold", gone)

    assert session.generate(JOB, after).tobytes() == wanted.tobytes()
    monkeypatch.undo()
