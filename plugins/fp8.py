"""Weights held as fp8 (e4m3, one scale a row) at half their size, and expanded just before a block computes.

Only how weights are held changes: what computes is what computes without it, in the model's precision. So the picture
is a little another, which is why nobody gets it who did not ask. Rows are scaled so that their largest weight is the
largest that e4m3 has, 448 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kleinctl_plugins.layout import ALIGNMENT, Layout, Piece

#: The precision's name for who asks for it.
FP8 = "fp8"
LARGEST = 448.0
SCALE_BYTES = 4
#: Weights that are packed at once: in float32 they take four bytes each, twice.
AT_ONCE = 2**23


def packed_bytes(layout: Layout) -> int:
    """What a unit takes when it is held as fp8."""
    return max((end for *_, end in _places(layout)), default=0)


def pack(layout: Layout, plain: Any, packed: Any) -> None:
    """Write the unit in `plain`, laid out as `layout` says, to `packed`, `packed_bytes` long. Flat tensors of bytes."""
    import torch

    for piece, at, scales_at, end in _places(layout):
        source = plain[piece.at : piece.at + piece.held_bytes]
        if scales_at is None:
            packed[at:end].copy_(source)
            continue
        rows, columns = piece.shape
        every = source.view(getattr(torch, layout.dtype)).view(piece.shape)
        for first in range(0, rows, max(1, AT_ONCE // columns)):
            weights = every[first : first + max(1, AT_ONCE // columns)].float()
            scales = (weights.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
            small = (weights / scales).to(torch.float8_e4m3fn).view(torch.uint8).flatten()
            packed[at + first * columns :][: len(small)].copy_(small)
            scale_bytes = scales.flatten().view(torch.uint8)
            packed[scales_at + first * SCALE_BYTES :][: len(scale_bytes)].copy_(scale_bytes)


def expand(layout: Layout, packed: Any, plain: Any) -> None:
    """The way back: `plain` is then laid out as `layout` says."""
    import torch

    for piece, at, scales_at, end in _places(layout):
        target = plain[piece.at : piece.at + piece.held_bytes]
        if scales_at is None:
            target.copy_(packed[at:end])
            continue
        weights = target.view(getattr(torch, layout.dtype)).view(piece.shape)
        rows = packed[at : at + weights.numel()].view(torch.float8_e4m3fn).view(piece.shape)
        weights.copy_(rows)
        weights.mul_(packed[scales_at:end].view(torch.float32).view(-1, 1))


def _places(layout: Layout) -> Iterator[tuple[Piece, int, int | None, int]]:
    """Each piece with where it begins when packed, where its scales do (None: it is kept as it is), and its end."""
    at = 0
    for piece in layout.pieces:
        if len(piece.shape) == 2:
            rows, columns = piece.shape
            scales = _aligned(at + rows * columns)
            end = scales + rows * SCALE_BYTES
            yield piece, at, scales, end
        else:
            end = at + piece.held_bytes
            yield piece, at, None, end
        at = _aligned(end)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
