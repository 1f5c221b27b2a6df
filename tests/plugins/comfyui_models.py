"""A model for ComfyUI whose files are headers alone, and the folders in which kleinctl keeps it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from kleinctl import comfyui, store
from kleinctl.backends import Budget, InstalledModel
from kleinctl.comfyui import Checkout, record
from kleinctl.manifest import Model, Part, Shape, Source
from tests import weights
from tests.models import tiny_model

NAMES = {
    "transformer": "diffusion_models/klein-test-fp8.safetensors",
    "text-encoder": "text_encoders/qwen-test.safetensors",
    "vae": "vae/vae-test.safetensors",
}
FILES = {
    "UNETLoader": {"unet_name": ["klein-test-fp8.safetensors"]},
    "CLIPLoader": {"clip_name": ["other.safetensors", "qwen-test.safetensors"]},
    "VAELoader": {"vae_name": ["vae-test.safetensors", "pixel_space"]},
}
CPU = Budget(0, 2**33, "cpu")


def model(variant: str = "distilled") -> Model:
    """A small klein in ComfyUI's layout alone."""
    parts = tuple(
        Part(
            id=role,
            role=role,
            name=Path(to).name,
            to={"comfyui": to},
            sources=(Source("a", "o/r", "main"),),
            size=1000,
            sha256="0" * 64,
            model="klein-test",
            dtype="float8_e4m3fn" if role == "transformer" else "bfloat16",
            precision="fp8" if role == "transformer" else None,
        )
        for role, to in NAMES.items()
    )
    shape = Shape(*[4096] * 14)
    return replace(tiny_model(), variant=variant, parts=parts, shape=shape, dtype="bfloat16")


def transformer(path: Path, **more: object) -> Path:
    """klein 4B's header, in fp8 with scales that are marked."""
    shapes = weights.flux2(**weights.KLEIN_4B)
    metadata = {"_quantization_metadata": '{"format_version": "1.0", "layers": {}}'}
    return weights.write(path, shapes, **{"metadata": metadata, **more})


def installed(variant: str = "distilled") -> InstalledModel:
    """The model in kleinctl's store, whole and right."""
    folder = store.model_folder("klein-test", "comfyui")
    transformer(folder / NAMES["transformer"])
    weights.write(folder / NAMES["text-encoder"], weights.qwen3(**weights.QWEN3_4B))
    weights.write(folder / NAMES["vae"], weights.vae(32))
    return InstalledModel(model(variant), folder)


def use(checkout: Path, **more: object) -> Checkout:
    """Make this the ComfyUI that kleinctl knows."""
    known = Checkout(checkout, Path(sys.executable), owned=True, **more)  # type: ignore[arg-type]
    record.remember(known)
    assert comfyui.known() == known
    return known
