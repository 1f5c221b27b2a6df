"""Weights that come and go: what is copied, and what is left when a read fails on its way to a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def blocks(tmp_path: Path) -> Any:
    """Five blocks in host memory that stream to the processor, and what they are when they are all there."""
    import torch
    from kleinctl_plugins.layout import layouts
    from kleinctl_plugins.weights import Component, Reader
    from safetensors.torch import save_file
    from torch import nn

    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).requires_grad_(False)
    save_file(plain.state_dict(), tmp_path / "blocks.safetensors")
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    names = [str(number) for number in range(5)]
    component = Component(module, layouts([tmp_path / "blocks.safetensors"], names, "float32"), "cpu", torch.float32)
    component.hold(["", "2"], ["0", "1", "3", "4"], Reader("cpu"))
    return component, plain


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_no_block_is_copied_that_no_forward_uses(blocks, slots, monkeypatch):
    """After the last forward the copies for another would be waited for."""
    import torch
    from kleinctl_plugins.weights import Reader, Ring

    component, plain = blocks
    given, copied, fetch = torch.randn(2, 8), [], Ring._fetch

    def noted(ring: Ring) -> None:
        copied.append(ring._coming[0].name)
        fetch(ring)

    monkeypatch.setattr(Ring, "_fetch", noted)
    with component.streaming(slots, 3, Reader("cpu")):
        for _ in range(3):
            assert torch.equal(component.module(given), plain(given))
    assert copied == ["0", "1", "3", "4"] * 3
    with component.streaming(slots, 1, Reader("cpu")):  # a pipeline that does more steps than it was asked for
        for _ in range(2):
            assert torch.equal(component.module(given), plain(given))


def test_blocks_that_ram_has_no_room_for_come_from_their_file(blocks):
    import torch
    from kleinctl_plugins.weights import Reader

    component, plain = blocks
    given, reader = torch.randn(2, 8), Reader("cpu")
    component.hold(["", "2"], ["3"], reader)
    component.forget(["0", "1", "4"], reader)
    with component.streaming(2, 2, reader):
        for _ in range(2):
            assert torch.equal(component.module(given), plain(given))


def test_blocks_that_cannot_come_leave_no_hooks(blocks, tmp_path):
    from kleinctl_plugins.weights import Reader

    component, _ = blocks
    component.units["1"].host = None
    (tmp_path / "blocks.safetensors").unlink()
    with pytest.raises(FileNotFoundError), component.streaming(2, 1, Reader("cpu")):
        pass
    assert not any(unit.module._forward_pre_hooks for name, unit in component.units.items() if name)


def test_a_read_that_fails_on_its_way_to_a_card_waits_for_what_was_sent(tmp_path, monkeypatch):
    """Else the card writes on into memory that has been given to something else."""
    import torch
    from kleinctl_plugins import weights
    from kleinctl_plugins.weights import Reader

    events: list[str] = []

    class Queue:
        """A stream and an event of a card that is not there."""

        def __init__(self, *given: Any) -> None: ...
        def __enter__(self) -> Queue:
            return self

        def __exit__(self, *given: Any) -> None: ...
        def wait_event(self, event: Any) -> None: ...
        def record(self) -> None:
            events.append("sent")

        def synchronize(self) -> None:
            events.append("waited")

    stream, event = Queue(), Queue()
    monkeypatch.setattr(event, "synchronize", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *given: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda given: given)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *given: stream)
    monkeypatch.setattr(weights, "SLOT_BYTES", 64)
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(100)))
    reader = Reader("cpu")
    reader._slots.append((torch.empty(64, dtype=torch.uint8), event))
    with pytest.raises(OSError, match="ends at 100 bytes"):
        reader._through_slots(path, 0, torch.empty(200, dtype=torch.uint8), event)
    assert events == ["sent", "waited"] and len(reader._slots) == 1


def test_a_block_that_cannot_be_read_whole_is_waited_for_before_its_slot_goes(blocks):
    """Else its other reads go on beside the picture that is tried next, and hold a slot that no plan knows of."""
    from concurrent.futures import Future
    from threading import Timer

    import torch
    from kleinctl_plugins.weights import Reader

    class Parted(Reader):
        """Reads a block in two parts: one fails, the other takes its time."""

        def begin(self, *given: Any) -> list[Future[None]]:
            failed, slow = Future[None](), Future[None]()
            failed.set_exception(OSError(5, "Input/output error"))
            Timer(0.1, slow.set_result, [None]).start()
            begun.append(slow)
            return [failed, slow]

    component, _ = blocks
    begun: list[Future[None]] = []
    component.forget(list(component.units), Reader("cpu"))
    with pytest.raises(OSError, match="Input/output error"), component.streaming(1, 1, Parted("cpu")):
        component.module(torch.randn(2, 8))
    assert [each.done() for each in begun] == [True]
