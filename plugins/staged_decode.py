"""Generate in three stages, each with the weights it needs on the card and as much else as the budget allows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kleinctl_plugins import holding
from kleinctl_plugins.holding import CPU_WAYS, WAYS, Holding, Task
from kleinctl_plugins.pipeline import REQUIRES, generator, open_references
from kleinctl_plugins.weights import Component, Embedding, Reader

from kleinctl import Budget, Environment, Fit, Gpu, Hardware, InstalledModel, Job, Model, Problem, hookimpl, memory

kleinctl_api = 1

#: Side and overlap in pixels of the tiles that a picture is decoded in where nothing else fits.
TILE, OVERLAP = 512, 128
#: On a processor there is one memory for both.
UNBOUNDED = 2**63
#: Prompts whose embeddings are remembered while the session lasts (7.9 MB each).
REMEMBERED = 16


@hookimpl
def kleinctl_backends() -> list[StagedDecode]:
    return [StagedDecode()]


class StagedDecode:
    """Encode, denoise, decode, with weights resident, streamed or staged, whichever is fastest in the budget.

    Weights are read-only: they are dropped, never copied back. The text encoder is cut to the layers whose states are
    read (27 of 36), and its embedding stays on the host; the same bits come out.
    """

    name = "staged-decode"
    aliases = ("staged",)
    requires = REQUIRES
    layout = "diffusers"

    def health(self, hardware: Hardware, environment: Environment | None) -> Problem | None:
        return None

    def fit(self, model: Model, hardware: Hardware, job: Job) -> Fit:
        """The fastest plan within what is free; where none is, the one that takes the least, and what it lacks."""
        on_card = hardware.gpu is not None and "cuda" in model.devices
        task, ram = Task.of(model, hardware, job), hardware.ram_available_bytes - memory.PROCESS_BYTES
        if hardware.gpu is not None and on_card:
            plan = holding.best(task, memory.usable_vram(hardware.gpu), ram)
            vram, host = plan.vram_bytes, plan.host_bytes + memory.PROCESS_BYTES
        else:
            plan = holding.best(task, ram, UNBOUNDED, CPU_WAYS)
            vram, host = 0, plan.vram_bytes + memory.PROCESS_BYTES
            if "cpu" not in model.devices:  # it would be streamed to a card, if there were one
                vram = memory.CONTEXT_BYTES + plan.vram_bytes
        why_not = memory.lacking(model, hardware, vram_bytes=vram, ram_bytes=host)
        compute = memory.compute_seconds(model, hardware, job)
        weights = memory.text_encoder_bytes(model) + model.shape.transformer_bytes + model.shape.vae_bytes
        return Fit(
            vram_bytes=vram,
            ram_bytes=host,
            disk_bytes=model.bytes(self.layout),
            seconds_first=memory.IMPORT_SECONDS + memory.read_seconds(weights, hardware, warm=False) + compute,
            seconds_next=plan.seconds,
            fits=why_not is None,
            strategy=plan.strategy,
            why_not=why_not,
        )

    def load(self, model: InstalledModel, budget: Budget) -> Session:
        return Session(model, budget)


class Session:
    """Components whose weights come and go as a plan says; the plan follows the job, and what is free."""

    def __init__(self, model: InstalledModel, budget: Budget, ways: tuple[str, ...] | None = None) -> None:
        import torch
        from diffusers import AutoencoderKLFlux2
        from transformers import AutoTokenizer

        self.model, self.budget = model, budget
        self.on_card = budget.device != "cpu"
        self.ways = ways or (WAYS if self.on_card else CPU_WAYS)
        self.strategy = "staged"
        self.warnings: list[str] = []
        self.tiling: tuple[int, int] | None = None
        self._dtype = getattr(torch, model.manifest.dtype)
        self._room = budget.vram_bytes if self.on_card else budget.ram_bytes
        self._host = max(0, budget.ram_bytes - memory.PROCESS_BYTES) if self.on_card else UNBOUNDED
        self._hardware = _hardware(budget)
        self._remembered: dict[tuple[str, bool], tuple[Any, ...]] = {}
        self.tokenizer = AutoTokenizer.from_pretrained(model.folder / "tokenizer", local_files_only=True)
        self.reader = Reader(budget.device)
        self.vae = AutoencoderKLFlux2.from_pretrained(
            model.folder,
            subfolder="vae",
            torch_dtype=self._dtype,
            device_map={"": budget.device},
            local_files_only=True,
        )
        self.encoder, self.transformer = self._encoder(), self._transformer()
        self.pipe = self._pipeline()

    # Components

    def _transformer(self) -> Component:
        from accelerate import init_empty_weights
        from diffusers import Flux2Transformer2DModel

        folder = self.model.folder / "transformer"
        with init_empty_weights(include_buffers=False):
            module = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder))
        names = [name for name in holding.transformer_units(self.model.manifest) if name]
        return Component(module.eval(), _weights(folder), names, self.budget.device, self._dtype)

    def _encoder(self) -> Component:
        """The text encoder without the layers whose states nobody reads, and with its embedding on the host.

        The last state that transformers hands out is the normed one, and after the cut that is a state that is read; so
        the norm goes too. (Newer versions have `config.tie_last_hidden_states` for it, older ones ignore that.)
        """
        from accelerate import init_empty_weights
        from torch import nn
        from transformers import AutoConfig, Qwen3Model

        folder = self.model.folder / "text_encoder"
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.num_hidden_layers = self.model.manifest.shape.text_layers_read
        if config.layer_types:
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        with init_empty_weights(include_buffers=False):
            module = Qwen3Model._from_config(config, dtype=self._dtype)
        module.norm = nn.Identity()
        module.embed_tokens = Embedding(_weights(folder), "model.embed_tokens.weight", self.budget.device, self._dtype)
        for part in module.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer if buffer is None else buffer.to(self.budget.device)
        names = list(holding.encoder_units(self.model.manifest))
        return Component(module.eval(), _weights(folder), names, self.budget.device, self._dtype, prefix="model.")

    def _pipeline(self) -> Any:
        from diffusers import Flux2KleinPipeline

        pipe = Flux2KleinPipeline.from_pretrained(
            self.model.folder,
            text_encoder=self.encoder.module,
            tokenizer=self.tokenizer,
            transformer=self.transformer.module,
            vae=self.vae,
            local_files_only=True,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    # One picture

    def generate(self, job: Job, progress: Any) -> Any:
        import torch

        references = open_references(job.images)
        self.tiling, self.warnings = None, []
        plan = self._plan(job)
        with torch.no_grad():
            embeds, plan = self._staged(lambda plan: self._encode(plan, job, progress), plan, job)
            latents, plan = self._staged(lambda plan: self._denoise(plan, job, embeds, references, progress), plan, job)
            picture, plan = self._staged(lambda plan: self._decode(plan, latents, progress), plan, job)
            self._come_back(plan)
        self.strategy = plan.strategy
        return picture

    def _come_back(self, plan: Holding) -> None:
        """Bring back what was dropped for the decode, while the picture is written to its file."""
        self._release()
        self.transformer.hold(plan.transformer.kept, plan.transformer.host, self.reader)
        if plan.encoder.way == "resident":
            self.encoder.hold(plan.encoder.resident, plan.encoder.host, self.reader)

    def _plan(self, job: Job) -> Holding:
        return holding.best(self._task(job), self._room, self._host, self.ways)

    def _task(self, job: Job) -> Task:
        return Task.of(self.model.manifest, self._hardware, job)

    def _staged(self, stage: Callable[[Holding], Any], plan: Holding, job: Job) -> tuple[Any, Holding]:
        """A stage's result, and the plan it was made by: a smaller one where the card's memory ran out meanwhile.

        Raises:
            torch.OutOfMemoryError: it does not fit at all; what earlier stages made is lost only then.
        """
        import torch

        while True:
            try:
                return stage(plan), plan
            except torch.OutOfMemoryError:
                self._let_go()
                smaller = holding.smaller(self._task(job), plan, self._host, self.ways)
                if smaller is None:
                    raise
                self._room = int(plan.vram_bytes * holding.STEP)  # what did not fit once is not tried again
                figures = f"{plan.vram_bytes / 2**30:.1f} GiB", f"{smaller.vram_bytes / 2**30:.1f} GiB"
                self.warnings.append("VRAM ran out with a plan for {}; it went on with one for {}".format(*figures))
                plan = smaller

    def _let_go(self) -> None:
        for component in (self.encoder, self.transformer):
            component.drop(list(component.units))
        self._release()

    def _encode(self, plan: Holding, job: Job, progress: Any) -> tuple[Any, ...]:
        """Embeddings of the prompt, and of the empty prompt where guidance needs it: (1, 512, 3 x width) each."""
        guided = job.guidance > 1 and not self.pipe.config.is_distilled
        key = (job.prompt, guided)
        if key in self._remembered:
            progress("encode", 1, 1)
            return tuple(each if each is None else each.to(self.budget.device) for each in self._remembered[key])
        progress("load", 0, 1)
        self.transformer.hold(plan.transformer.kept, plan.transformer.host, self.reader)
        self.encoder.hold(plan.encoder.resident, plan.encoder.host, self.reader)
        progress("encode", 0, 1)
        limit = self.model.manifest.defaults.max_prompt_tokens

        def encode(prompt: str) -> Any:
            return self.pipe.encode_prompt(prompt=prompt, device=self.budget.device, max_sequence_length=limit)[0]

        with self.encoder.streaming(holding.SLOTS):
            result = encode(job.prompt), encode("") if guided else None
        self._remembered[key] = tuple(each if each is None else each.cpu() for each in result)
        while len(self._remembered) > REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        progress("encode", 1, 1)
        return result

    def _denoise(self, plan: Holding, job: Job, embeds: Any, references: Any, progress: Any) -> Any:
        """Latents as the VAE decodes them: (1, 32, height / 8, width / 8)."""
        progress("load", 0, 1)
        if plan.encoder.way == "staged":
            self.encoder.drop(plan.encoder.resident)
            self._release()
        self.transformer.hold(plan.transformer.resident, plan.transformer.host, self.reader)
        progress("denoise", 0, job.steps)

        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress("denoise", step + 1, job.steps)
            return tensors

        with self.transformer.streaming(holding.SLOTS):
            return self.pipe(
                prompt_embeds=embeds[0],
                negative_prompt_embeds=embeds[1],
                image=references,
                height=job.height,
                width=job.width,
                guidance_scale=job.guidance,
                num_inference_steps=job.steps,
                generator=generator(job.seed, self.budget.device),
                callback_on_step_end=after,
                output_type="latent",
            ).images

    def _decode(self, plan: Holding, latents: Any, progress: Any) -> Any:
        import torch

        progress("decode", 0, 1)
        for component, held in ((self.encoder, plan.encoder), (self.transformer, plan.transformer)):
            component.drop([name for name in component.units if name not in held.kept])
        self._release()
        try:
            decoded = self.vae.decode(latents, return_dict=False)[0]
        except torch.OutOfMemoryError:
            self._let_go()
            decoded = self._decode_in_tiles(latents)
        picture = self.pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        progress("decode", 1, 1)
        return picture

    def _decode_in_tiles(self, latents: Any) -> Any:
        """Where the whole does not fit with nothing else on the card: near the same picture, seams apart."""
        self.tiling = TILE, OVERLAP
        self.warnings.append(
            "the picture was decoded in tiles, for VRAM ran out: it differs a little from a whole decode"
        )
        self.vae.use_tiling, self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = True, TILE, TILE // 8
        try:
            return self.vae.decode(latents, return_dict=False)[0]
        finally:
            self.vae.use_tiling = False

    def _release(self) -> None:
        """Give what is free back to the card, so that the next stage finds it in one piece."""
        import torch

        if self.on_card:
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._let_go()
        self.reader.close()
        self.pipe = self.vae = None
        gc.collect()
        self._release()


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _hardware(budget: Budget) -> Hardware:
    """The machine as the worker sees it: for a plan, the card's rates are what matters."""
    if budget.device == "cpu":
        return Hardware()
    import torch

    properties = torch.cuda.get_device_properties(budget.device)
    capability = f"{properties.major}.{properties.minor}"
    named = Gpu(properties.name, capability, properties.total_memory, budget.vram_bytes)
    rates = named.performance
    card = Gpu(
        properties.name,
        capability,
        properties.total_memory,
        budget.vram_bytes,
        pcie_generation=rates.pcie_generation,
        pcie_width=rates.pcie_width,
    )
    return Hardware(gpus=(card,), ram_available_bytes=budget.ram_bytes)
