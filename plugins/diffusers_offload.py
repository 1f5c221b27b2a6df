"""Generate as the model card does: diffusers, whole components moved to the card and back."""

from __future__ import annotations

from typing import Any

from kleinctl_plugins.pipeline import OWN_PRECISION, REQUIRES, generator, open_references, unoffered

from kleinctl import Budget, Environment, Fit, Hardware, InstalledModel, Job, Model, Problem, Stage, hookimpl, memory

kleinctl_api = 1

#: Bytes per second of moving components through pageable memory, both ways: 2 x 15.97 GB in 13.5 s on an H100.
OFFLOAD_RATE = 2.4e9


@hookimpl
def kleinctl_backends() -> list[DiffusersOffload]:
    return [DiffusersOffload()]


class DiffusersOffload:
    """`Flux2KleinPipeline` with `enable_model_cpu_offload()`, the recipe of the model card, unchanged."""

    name = "diffusers-offload"
    aliases = ("diffusers",)
    requires = REQUIRES
    layout = "diffusers"
    precisions = tuple(OWN_PRECISION.values())

    def health(self, hardware: Hardware, environment: Environment | None) -> Problem | None:
        return None

    def fit(self, model: Model, hardware: Hardware, job: Job) -> Fit:
        """The largest component with its activations is the peak; every picture moves all weights in and out."""
        on_card = hardware.gpu is not None and "cuda" in model.devices
        stages, weights = _stages(model, hardware, job, on_card=on_card), memory.weight_bytes(model)
        working = 0 if on_card else max(memory.denoise_bytes(model, job), memory.decode_bytes(model, job))
        ram = weights + memory.PROCESS_BYTES + working
        vram = max(stage.vram_bytes for stage in stages)
        why_not = unoffered(model, job) or memory.lacking(model, hardware, vram_bytes=vram, ram_bytes=ram)
        following = sum(stage.seconds for stage in stages)
        loading = memory.start_seconds(hardware) + memory.read_seconds(weights, hardware, warm=False)
        return Fit(
            vram_bytes=vram,
            ram_bytes=ram,
            disk_bytes=model.bytes(self.layout),
            seconds_first=loading + following,
            seconds_next=following,
            fits=why_not is None,
            strategy="offload" if on_card else "cpu",
            why_not=why_not,
            stages=stages,
        )

    def load(self, model: InstalledModel, budget: Budget) -> Session:
        import torch
        from diffusers import Flux2KleinPipeline

        dtype = getattr(torch, model.manifest.dtype)
        pipe = Flux2KleinPipeline.from_pretrained(model.folder, torch_dtype=dtype, local_files_only=True)
        if budget.device != "cpu":
            pipe.enable_model_cpu_offload(device=budget.device)
        pipe.set_progress_bar_config(disable=True)
        return Session(pipe, model.manifest, budget.device)


def _stages(model: Model, hardware: Hardware, job: Job, *, on_card: bool) -> tuple[Stage, ...]:
    """Each component alone on the card, moved there before its stage and back after it. All layers of the text encoder
    are run; writing the picture counts as decoding."""
    shape, rates = model.shape, memory.rates_of(model, hardware)
    encode, forward, decode = memory.stage_seconds(model, hardware, job)
    encode *= shape.text_layers / shape.text_layers_read
    byte = 0.0  # seconds of moving one, both ways
    if on_card:
        byte = 1 / rates.pageable + 1 / rates.back if rates.pageable and rates.back else 2 / OFFLOAD_RATE

    def stage(name: str, weights: int, activations: int, seconds: float) -> Stage:
        if not on_card:
            return Stage(name, 0, 0, seconds)
        return Stage(name, weights + activations + memory.CONTEXT_BYTES, weights, seconds + weights * byte)

    decode += memory.save_seconds(hardware, job)
    return (
        stage("encode", shape.text_encoder_bytes, memory.encode_bytes(model), encode),
        stage(
            "denoise",
            shape.transformer_bytes,
            memory.denoise_bytes(model, job),
            forward * memory.forwards(model, job),
        ),
        stage("decode", shape.vae_bytes, memory.decode_bytes(model, job), decode),
    )


class Session:
    """A pipeline with all its parts in host memory."""

    def __init__(self, pipe: Any, model: Model, device: str) -> None:
        self.pipe, self.model, self.device = pipe, model, device
        self.strategy = "cpu" if device == "cpu" else "offload"
        self.tokenizer = pipe.tokenizer

    def generate(self, job: Job, progress: Any) -> Any:
        references = open_references(job.images)
        progress("encode", 0, 1)
        marks = [
            self.pipe.transformer.register_forward_pre_hook(_once(progress, "denoise", job.steps)),
            self.pipe.vae.decoder.register_forward_pre_hook(_once(progress, "decode", 1)),
        ]
        try:
            picture = self.pipe(
                prompt=job.prompt,
                image=references,
                height=job.height,
                width=job.width,
                guidance_scale=job.guidance,
                num_inference_steps=job.steps,
                max_sequence_length=self.model.defaults.max_prompt_tokens,
                generator=generator(job.seed, self.device),
                callback_on_step_end=_step(progress, job.steps),
            ).images[0]
        finally:
            for mark in marks:
                mark.remove()
        progress("decode", 1, 1)
        return picture

    def close(self) -> None:
        self.pipe = None


def _once(progress: Any, stage: str, total: int) -> Any:
    """A forward hook that tells the start of `stage`; later calls within it say nothing."""
    told: list[bool] = []

    def hook(module: Any, args: Any) -> None:
        if not told:
            told.append(True)
            progress(stage, 0, total)

    return hook


def _step(progress: Any, total: int) -> Any:
    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress("denoise", step + 1, total)
        return tensors

    return after
