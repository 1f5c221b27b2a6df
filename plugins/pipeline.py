"""What both diffusers backends need of a `Flux2KleinPipeline`: reference pictures and the source of noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kleinctl import Job, KleinctlError, Model, Problem

#: Ranges that were tried; the pipeline came with diffusers 0.37, reliable editing with 0.38.
REQUIRES = (
    "torch>=2.8",
    "diffusers>=0.40,<0.43",
    "transformers>=5.0,<6",
    "accelerate>=1.10,<2",
    "safetensors>=0.6",
    "pillow>=11",
)
#: What people call a model's own precision, in which both backends compute, asked for or not.
OWN_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def unoffered(model: Model, job: Job, *more: str) -> str | None:
    """Why the job's precision cannot be had of a backend that offers the model's own and `more`; None where it can."""
    offered = OWN_PRECISION.get(model.dtype, model.dtype), *more
    if not job.precision or job.precision in offered:
        return None
    return f"{model.name} runs in {' or '.join(offered)} here; {job.precision} was asked for."


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
        except Exception as error:  # Pillow lets IndexError, struct.error and more out of damaged files
            why = f"Pillow says: {error}."
            raise KleinctlError(
                Problem(f"{path} is no picture that can be read", why, "save it again as PNG", name="bad-reference")
            ) from None
    return pictures or None


def generator(seed: int, device: str) -> Any:
    """The noise source the model card uses: a generator on the device that denoises."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)
