"""The model card's own lines, for `kleinctl bench --against diffusers`: plain diffusers, and nothing of kleinctl's.

It is a backend only so that the same worker times it and writes its pictures the same way.
"""

from __future__ import annotations

from typing import Any

from kleinctl.backends import Budget, InstalledModel, Job


def kleinctl_backends() -> list[ModelCard]:
    return [ModelCard("resident"), ModelCard("offload")]


class ModelCard:
    """`Flux2KleinPipeline` all on the card, or with `enable_model_cpu_offload()`."""

    aliases = ()
    requires = ()
    layout = "diffusers"

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self, model: InstalledModel, budget: Budget) -> Session:
        import torch
        from diffusers import Flux2KleinPipeline

        dtype = getattr(torch, model.manifest.dtype)
        pipe = Flux2KleinPipeline.from_pretrained(model.folder, torch_dtype=dtype, local_files_only=True)
        if budget.device == "cpu" or self.name == "resident":
            pipe.to(budget.device)
        else:
            pipe.enable_model_cpu_offload(device=budget.device)
        pipe.set_progress_bar_config(disable=True)
        return Session(pipe, budget.device, "cpu" if budget.device == "cpu" else self.name)


class Session:
    """A pipeline as the model card uses it."""

    def __init__(self, pipe: Any, device: str, strategy: str) -> None:
        self.pipe, self.device, self.strategy = pipe, device, strategy

    def generate(self, job: Job, progress: Any) -> Any:
        import torch
        from PIL import Image, ImageOps

        references = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in job.images]
        progress("denoise", 0, 1)
        return self.pipe(
            prompt=job.prompt,
            image=references or None,
            height=job.height,
            width=job.width,
            guidance_scale=job.guidance,
            num_inference_steps=job.steps,
            generator=torch.Generator(device=self.device).manual_seed(job.seed),
        ).images[0]

    def close(self) -> None:
        self.pipe = None
