"""Generate in three stages, each with only its own weights on the card: encode, denoise, decode."""

from __future__ import annotations

import gc
from typing import Any

from kleinctl_plugins.pipeline import REQUIRES, generator, open_references

from kleinctl import Budget, Environment, Fit, Hardware, InstalledModel, Job, Model, Problem, hookimpl, memory

kleinctl_api = 1


@hookimpl
def kleinctl_backends() -> list[StagedDecode]:
    return [StagedDecode()]


def kept(model: Model, job: Job, room: int) -> tuple[bool, bool]:
    """Whether the transformer, and the text encoder too, can stay in `room` bytes between pictures.

    The VAE (0.16 GiB) stays in any case. A transformer that stays must leave room for the encoder of a new prompt.
    """
    encoder = memory.text_encoder_bytes(model)
    base = memory.CONTEXT_BYTES + model.shape.vae_bytes + model.shape.transformer_bytes
    drawing = max(memory.denoise_bytes(model, job), memory.decode_bytes(model, job))
    keep_transformer = base + max(drawing, encoder + memory.ENCODE_BYTES) <= room
    return keep_transformer, base + encoder + max(drawing, memory.ENCODE_BYTES) <= room


class StagedDecode:
    """Encode and drop the text encoder, denoise and drop the transformer, decode.

    Weights are read straight to the card and dropped, never copied back, so host memory stays small. The text encoder
    is cut to the layers whose states are read (27 of 36); the same bits come out.
    """

    name = "staged-decode"
    aliases = ("staged",)
    requires = REQUIRES
    layout = "diffusers"

    def health(self, hardware: Hardware, environment: Environment | None) -> Problem | None:
        return None

    def fit(self, model: Model, hardware: Hardware, job: Job) -> Fit:
        """The largest stage is the peak; what cannot stay is read again for each picture."""
        shape, encoder = model.shape, memory.text_encoder_bytes(model)
        on_card = hardware.gpu is not None and "cuda" in model.devices
        usable = memory.usable_vram(hardware.gpu) if hardware.gpu is not None else hardware.ram_available_bytes
        keep_transformer, keep_encoder = kept(model, job, usable)
        denoise = shape.transformer_bytes + shape.vae_bytes + memory.denoise_bytes(model, job)
        decode = shape.vae_bytes + memory.decode_bytes(model, job)
        encode = encoder + memory.ENCODE_BYTES + shape.vae_bytes
        if keep_transformer:
            encode, decode = encode + shape.transformer_bytes, decode + shape.transformer_bytes
        if keep_encoder:
            denoise, decode = denoise + encoder, decode + encoder
        peak = max(encode, denoise, decode) + memory.CONTEXT_BYTES
        again = (0 if keep_encoder else encoder) + (0 if keep_transformer else shape.transformer_bytes)
        compute = memory.compute_seconds(model, hardware, job)
        vram, ram = (peak, memory.PROCESS_BYTES) if on_card else (0, peak + memory.PROCESS_BYTES)
        why_not = memory.lacking(model, hardware, vram_bytes=vram, ram_bytes=ram)
        everything = encoder + shape.transformer_bytes + shape.vae_bytes
        return Fit(
            vram_bytes=vram,
            ram_bytes=ram,
            disk_bytes=model.bytes(self.layout),
            seconds_first=memory.IMPORT_SECONDS + memory.read_seconds(everything, hardware, warm=False) + compute,
            seconds_next=memory.read_seconds(again, hardware, warm=True) + compute,
            fits=why_not is None,
            strategy=_strategy(keep_transformer, keep_encoder),
            why_not=why_not,
        )

    def load(self, model: InstalledModel, budget: Budget) -> Session:
        return Session(model, budget)


def _strategy(keep_transformer: bool, keep_encoder: bool) -> str:
    return "resident" if keep_encoder else "transformer resident" if keep_transformer else "staged"


class Session:
    """Components come and go; what the budget allows stays for the next picture."""

    strategy = "staged"

    def __init__(self, model: InstalledModel, budget: Budget) -> None:
        import torch
        from transformers import AutoTokenizer

        self.model, self.budget = model, budget
        self._dtype = getattr(torch, model.manifest.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model.folder / "tokenizer", local_files_only=True)
        self.encoder: Any = None
        self.transformer: Any = None
        self.vae: Any = None

    def generate(self, job: Job, progress: Any) -> Any:
        import torch

        references = open_references(job.images)
        limit = self.model.manifest.defaults.max_prompt_tokens
        on_card = self.budget.device != "cpu"
        keep_transformer, keep_encoder = kept(
            self.model.manifest, job, self.budget.vram_bytes if on_card else self.budget.ram_bytes
        )
        self.strategy = _strategy(keep_transformer, keep_encoder)
        with torch.no_grad():
            if not keep_transformer:
                self._drop("transformer")
            embeds, negative = self._encode(job, limit, progress)
            if not keep_encoder:
                self._drop("encoder")
            pipe, latents = self._denoise(job, embeds, negative, references, progress)
            if not keep_transformer:
                pipe.register_modules(transformer=None)
                self._drop("transformer")
            return self._decode(pipe, latents, progress)

    def _encode(self, job: Job, limit: int, progress: Any) -> tuple[Any, Any]:
        """Embeddings of the prompt, and of the empty prompt where guidance needs it: (1, 512, 3 x width) each."""
        from diffusers import Flux2KleinPipeline

        if self.encoder is None:
            progress("load", 0, 1)
            self.encoder = self._load_encoder()
        progress("encode", 0, 1)
        pipe = Flux2KleinPipeline.from_pretrained(
            self.model.folder,
            text_encoder=self.encoder,
            tokenizer=self.tokenizer,
            transformer=None,
            vae=None,
            local_files_only=True,
        )

        def encode(prompt: str) -> Any:
            return pipe.encode_prompt(prompt=prompt, device=self.budget.device, max_sequence_length=limit)[0]

        guided = job.guidance > 1 and not pipe.config.is_distilled
        result = encode(job.prompt), encode("") if guided else None
        progress("encode", 1, 1)
        return result

    def _load_encoder(self) -> Any:
        """The text encoder without the layers whose states nobody reads.

        The last state that transformers hands out is the normed one, and after the cut that is a state that is read; so
        the norm goes too. (Newer versions have `config.tie_last_hidden_states` for it, older ones ignore that.)
        """
        from torch import nn
        from transformers import AutoConfig, Qwen3Model

        folder = self.model.folder / "text_encoder"
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.num_hidden_layers = self.model.manifest.shape.text_layers_read
        if config.layer_types:
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        encoder = Qwen3Model.from_pretrained(
            folder, config=config, dtype=self._dtype, device_map={"": self.budget.device}, local_files_only=True
        )
        encoder.norm = nn.Identity()
        return encoder

    def _denoise(self, job: Job, embeds: Any, negative: Any, references: Any, progress: Any) -> tuple[Any, Any]:
        """Latents as the VAE decodes them, (1, 32, height / 8, width / 8), and the pipeline that made them."""
        from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

        progress("load", 0, 1)
        self.vae = self.vae or self._component(AutoencoderKLFlux2, "vae")
        self.transformer = self.transformer or self._component(Flux2Transformer2DModel, "transformer")
        pipe = Flux2KleinPipeline.from_pretrained(
            self.model.folder,
            text_encoder=None,
            tokenizer=None,
            transformer=self.transformer,
            vae=self.vae,
            local_files_only=True,
        )
        pipe.set_progress_bar_config(disable=True)
        progress("denoise", 0, job.steps)

        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress("denoise", step + 1, job.steps)
            return tensors

        latents = pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            image=references,
            height=job.height,
            width=job.width,
            guidance_scale=job.guidance,
            num_inference_steps=job.steps,
            generator=generator(job.seed, self.budget.device),
            callback_on_step_end=after,
            output_type="latent",
        ).images
        return pipe, latents

    def _decode(self, pipe: Any, latents: Any, progress: Any) -> Any:
        progress("decode", 0, 1)
        decoded = self.vae.decode(latents, return_dict=False)[0]
        picture = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        progress("decode", 1, 1)
        return picture

    def _component(self, kind: Any, name: str) -> Any:
        return kind.from_pretrained(
            self.model.folder,
            subfolder=name,
            torch_dtype=self._dtype,
            device_map={"": self.budget.device},
            local_files_only=True,
        )

    def _drop(self, name: str) -> None:
        """Let a component go. Its weights are read-only, so nothing is copied back."""
        import torch

        setattr(self, name, None)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def close(self) -> None:
        for name in ("encoder", "transformer", "vae"):
            self._drop(name)
