"""What both diffusers backends need of a `Flux2KleinPipeline`: reference pictures and the source of noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kleinctl import KleinctlError, Problem

#: Ranges that were tried; the pipeline came with diffusers 0.37, reliable editing with 0.38.
REQUIRES = (
    "torch>=2.8",
    "diffusers>=0.40,<0.43",
    "transformers>=5.0,<6",
    "accelerate>=1.10,<2",
    "safetensors>=0.6",
    "pillow>=11",
)


def open_references(paths: Sequence[Path]) -> list[Any] | None:
    """The reference pictures as RGB, the right way up, or None for text to image.

    Raises:
        KleinctlError: one cannot be decoded.
    """
    from PIL import Image, ImageOps

    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = f"Pillow says: {error}."
            raise KleinctlError(
                Problem(f"{path} is no picture that can be read", why, "save it again as PNG", name="bad-reference")
            ) from None
    return pictures or None


def generator(seed: int, device: str) -> Any:
    """The noise source the model card uses: a generator on the device that denoises."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)
