"""Generate in three stages, each with the weights it needs on the card and as much else as the budget allows."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kleinctl_plugins import holding
from kleinctl_plugins.embeddings import Embeddings
from kleinctl_plugins.fp8 import FP8
from kleinctl_plugins.holding import CPU_WAYS, WAYS, Holding, Task
from kleinctl_plugins.layout import EarlyReader, Layout, layouts
from kleinctl_plugins.pipeline import OWN_PRECISION, REQUIRES, generator, open_references, unoffered
from kleinctl_plugins.weights import Component, Embedding, Reader

from kleinctl import Budget, Environment, Fit, Gpu, Hardware, InstalledModel, Job, Model, Problem, hookimpl, memory

kleinctl_api = 1

#: Side and overlap in pixels of the tiles that a picture is decoded in where nothing else fits.
TILE, OVERLAP = 512, 128
#: What cuDNN, cuBLAS and the driver say when they want memory beside torch's and there is none. (cuDNN's engines are
#: tried in turn, and torch takes a lack of room for their workspaces as "no engine".)
NO_MEMORY = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "was unable to find an engine to execute this computation",
)
#: Pictures for which what did not fit is not tried again: who took the memory may have given it back by then.
WARY = 10
#: On a processor there is one memory for both.
UNBOUNDED = 2**63


@hookimpl
def kleinctl_backends() -> list[StagedDecode]:
    return [StagedDecode()]


class StagedDecode:
    """Encode, denoise, decode, with weights resident, streamed or staged, whichever is fastest in the budget.

    Weights are read-only: they are dropped, never copied back. The text encoder is cut to the layers whose states are
    read (27 of 36), and its embedding stays on the host; the same bits come out. Who asks for the precision `fp8` has
    weights held in half the room, and other bits.
    """

    name = "staged-decode"
    aliases = ("staged",)
    requires = REQUIRES
    layout = "diffusers"
    precisions = (*OWN_PRECISION.values(), FP8)

    def __init__(self) -> None:
        self._early: EarlyReader | None = None

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
        why_not = unoffered(model, job, FP8) or memory.lacking(model, hardware, vram_bytes=vram, ram_bytes=host)
        weights = memory.text_encoder_bytes(model) + model.shape.transformer_bytes + model.shape.vae_bytes
        return Fit(
            vram_bytes=vram,
            ram_bytes=host,
            disk_bytes=model.bytes(self.layout),
            seconds_first=_first_seconds(weights - plan.disk_bytes, hardware) + plan.seconds,
            seconds_next=plan.seconds,
            fits=why_not is None,
            strategy=plan.strategy,
            why_not=why_not,
            stages=plan.stages,
        )

    def prefetch(self, model: InstalledModel, budget: Budget, job: Job) -> None:
        """Begin to read what the plan for `job` holds on the host, and let the system read the rest ahead."""
        if budget.device == "cpu" or budget.hardware is None:
            return
        host = max(0, budget.ram_bytes - memory.PROCESS_BYTES)
        plan = holding.best(Task.of(model.manifest, budget.hardware, job), budget.vram_bytes, host)
        self._early = EarlyReader()
        later: list[Layout] = []
        for name, held in (("text_encoder", plan.encoder), ("transformer", plan.transformer)):
            every = _layouts(model, name)
            now = () if job.precision == FP8 else held.host
            self._early.read(name, [every[unit] for unit in now])
            order = dict.fromkeys((*held.resident, *every))  # as they will be read
            later += [every[unit] for unit in order if unit not in now]
        totals, ahead = itertools.accumulate(each.bytes for each in later), host - plan.host_bytes
        self._early.expect([each for each, total in zip(later, totals, strict=True) if total <= ahead])

    def load(self, model: InstalledModel, budget: Budget) -> Session:
        early, self._early = self._early, None
        return Session(model, budget, early=early)


class Session:
    """Components whose weights come and go as a plan says; the plan follows the job, and what is free."""

    def __init__(
        self,
        model: InstalledModel,
        budget: Budget,
        ways: tuple[str, ...] | None = None,
        early: EarlyReader | None = None,
    ) -> None:
        import torch
        from diffusers import AutoencoderKLFlux2
        from transformers import AutoTokenizer

        self.model, self.budget = model, budget
        self.on_card = budget.device != "cpu"
        self.ways = ways or (WAYS if self.on_card else CPU_WAYS)
        self.strategy = "staged"
        self.warnings: list[str] = []
        self.tiling: tuple[int, int] | None = None
        self._said_pinning = False
        self._dtype = getattr(torch, model.manifest.dtype)
        ram = max(0, budget.ram_bytes - memory.PROCESS_BYTES)
        self._room = self._whole_room = budget.vram_bytes if self.on_card else ram
        self._wary = 0
        self._host = ram if self.on_card else UNBOUNDED
        self._hardware = budget.hardware or _hardware(budget)
        self._embeddings = Embeddings(model, budget.device)
        self._denoised: dict[Job, Any] = {}
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
        if early is not None:
            self.reader.take(early, {"text_encoder": self.encoder, "transformer": self.transformer})
        self.pipe = self._pipeline()

    # Components

    def _transformer(self) -> Component:
        from accelerate import init_empty_weights
        from diffusers import Flux2Transformer2DModel

        folder = self.model.folder / "transformer"
        with init_empty_weights(include_buffers=False):
            module = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder))
        return Component(module.eval(), _layouts(self.model, "transformer"), self.budget.device, self._dtype)

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
        return Component(module.eval(), _layouts(self.model, "text_encoder"), self.budget.device, self._dtype)

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

        self._wary = max(0, self._wary - 1)
        if not self._wary:
            self._room = self._whole_room

        self.tiling, self.warnings = None, []
        plan = self._plan(job)
        with torch.no_grad():
            latents = self._denoised.pop(job, None)
            if latents is None:
                latents, plan = self._latents(job, plan, progress)
            picture, plan = self._staged(lambda plan: self._decode(plan, latents, progress), plan, job)
            self._come_back(plan)
        self.strategy = plan.strategy
        self._say_pinning()
        return picture

    def prepare(self, jobs: Sequence[Job], progress: Any) -> None:
        """Encode the prompts of all jobs; where the transformer cannot stay for their decodes, denoise them all too."""
        import torch

        self._denoised.clear()
        self._embeddings.expect(len(jobs) + 1)  # and the empty prompt
        with torch.no_grad():
            for number, job in enumerate(jobs):
                self._staged(partial(self._encode, job=job, progress=_silent), self._plan(job), job)
                progress("encode", number + 1, len(jobs))
            staged = [job for job in jobs if self._plan(job).transformer.way == "staged"]
            for number, job in enumerate(staged):
                self._denoised[job] = self._latents(job, self._plan(job), _silent)[0].cpu()
                progress("denoise", number + 1, len(staged))

    def _latents(self, job: Job, plan: Holding, progress: Any) -> tuple[Any, Holding]:
        references = open_references(job.images)
        embeds, plan = self._staged(lambda plan: self._encode(plan, job, progress), plan, job)
        return self._staged(lambda plan: self._denoise(plan, job, embeds, references, progress), plan, job)

    def _come_back(self, plan: Holding) -> None:
        """Bring back what was dropped for the decode, while the picture is written to its file.

        Of the text encoder only what waits in host memory: a prompt that comes again does not need what would have to
        be read. What cannot come now is not missed before the next picture.
        """
        units = [self.encoder.units[name] for name in plan.encoder.resident]
        at_hand = [unit for unit in units if unit.device is not None or unit.host is not None]
        try:
            self._hold(plan, self.transformer, plan.transformer.kept)
            if any(unit.device is None for unit in at_hand):
                self._hold(plan, self.encoder, [unit.name for unit in at_hand])
        except (RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and not _ran_out(error):
                raise

    def _hold(self, plan: Holding, component: Component, resident: Sequence[str]) -> None:
        """Hold `resident` on the device, and on the host what the plan says; what an earlier plan left there goes."""
        for each, held in ((self.encoder, plan.encoder), (self.transformer, plan.transformer)):
            each.forget([name for name in each.units if name not in held.host], self.reader)
        host = plan.encoder.host if component is self.encoder else plan.transformer.host
        if any(component.units[name].device is None for name in resident):
            self._release()
        component.hold(resident, host, self.reader)

    def _room_now(self) -> int:
        """What the budget allows, less what other programs have taken of the card since."""
        if not self.on_card:
            return self._room
        import torch

        free = torch.cuda.mem_get_info(self.budget.device)[0]
        return min(self._room, free + torch.cuda.memory_reserved(self.budget.device) + memory.CONTEXT_BYTES)

    def _plan(self, job: Job) -> Holding:
        for component in (self.encoder, self.transformer):
            component.pack(job.precision == FP8, self.reader)
        room = self._room_now()
        if room < self._room * holding.STEP:
            figures = f"{room / 2**30:.1f}", f"{self._room / 2**30:.1f} GiB"
            self._warn("other programs have taken VRAM: {} of {} are left to plan with".format(*figures))
        return holding.best(self._task(job), room, self._host, self.ways)

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def _task(self, job: Job) -> Task:
        task = Task.of(self.model.manifest, self._hardware, job)
        limit = self.reader.pin_limit
        return task if limit is None else replace(task, pin_bytes=limit)

    def _say_pinning(self) -> None:
        """Say once that the system pins less than was wanted."""
        if self.reader.pin_limit is not None and not self._said_pinning:
            self._said_pinning = True
            pinned = f"{self.reader.pin_limit / 2**30:.1f} GiB"
            self.warnings.append(f"the system lets {pinned} of memory be pinned, so that weights stream more slowly")

    def _staged(self, stage: Callable[[Holding], Any], plan: Holding, job: Job) -> tuple[Any, Holding]:
        """A stage's result, and the plan it was made by: a smaller one where the card's memory ran out meanwhile.

        Raises:
            RuntimeError: it does not fit at all; what earlier stages made is lost only then.
        """
        while True:
            try:
                return stage(plan), plan
            except RuntimeError as error:
                smaller = holding.smaller(self._task(job), plan, self._host, self.ways) if _ran_out(error) else None
                if smaller is None:
                    self._let_go()
                    raise
            self._let_go()  # after the error is gone, for until then it holds what was being computed
            self._room, self._wary = int(plan.vram_bytes * holding.STEP), WARY
            figures = f"{plan.vram_bytes / 2**30:.1f} GiB", f"{smaller.vram_bytes / 2**30:.1f} GiB"
            self._warn("VRAM ran out with a plan for {}; it went on with one for {}".format(*figures))
            plan = smaller

    def _let_go(self) -> None:
        for component in (self.encoder, self.transformer):
            component.drop(list(component.units))
        self._release()

    def _encode(self, plan: Holding, job: Job, progress: Any) -> tuple[Any, ...]:
        """Embeddings of the prompt, and of the empty prompt where guidance needs it: (1, 512, 3 x width) each."""
        guided = job.guidance > 1 and not self.pipe.config.is_distilled
        prompts = [job.prompt, ""] if guided else [job.prompt]
        precision = FP8 if job.precision == FP8 else ""
        new = [prompt for prompt in dict.fromkeys(prompts) if self._embeddings.get(prompt, precision) is None]
        if new:
            self._encode_new(plan, new, precision, progress)
        progress("encode", 1, 1)
        found = [self._embeddings.get(prompt, precision).to(self.budget.device) for prompt in prompts]
        return found[0], found[1] if guided else None

    def _encode_new(self, plan: Holding, prompts: Sequence[str], precision: str, progress: Any) -> None:
        progress("load", 0, 1)
        self.encoder.drop(name for name in self.encoder.units if name not in plan.encoder.resident)  # of another plan
        self._hold(plan, self.transformer, plan.transformer.kept)
        self._hold(plan, self.encoder, plan.encoder.resident)
        progress("encode", 0, 1)
        limit = self.model.manifest.defaults.max_prompt_tokens
        with self.encoder.streaming(plan.slots, len(prompts), self.reader):
            for prompt in prompts:
                made = self.pipe.encode_prompt(prompt=prompt, device=self.budget.device, max_sequence_length=limit)[0]
                self._embeddings.put(prompt, made.cpu(), precision)

    def _denoise(self, plan: Holding, job: Job, embeds: Any, references: Any, progress: Any) -> Any:
        """Latents as the VAE decodes them: (1, 32, height / 8, width / 8).

        The transformer comes when the pipeline calls it: until then the VAE has the room, to encode reference pictures.
        """
        progress("load", 0, 1)
        beside = () if plan.encoder.way == "staged" else plan.encoder.resident
        self.encoder.drop(name for name in self.encoder.units if name not in beside)
        if references:
            self._make_way(plan)
        forwards = job.steps * (1 if embeds[1] is None else 2)
        with contextlib.ExitStack() as stack:

            def come(module: Any, *arguments: Any) -> None:
                first.remove()
                if plan.transformer.way == "streamed":  # the ring's slots find their room in one piece as well
                    self._release()
                self._hold(plan, self.transformer, plan.transformer.resident)
                stack.enter_context(self.transformer.streaming(plan.slots, forwards, self.reader))
                progress("denoise", 0, job.steps)

            def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                progress("denoise", step + 1, job.steps)
                return tensors

            first = self.transformer.module.register_forward_pre_hook(come)
            stack.callback(first.remove)
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

    def _make_way(self, plan: Holding) -> None:
        """For the VAE: what the plan does not keep beside it goes."""
        for component, held in ((self.encoder, plan.encoder), (self.transformer, plan.transformer)):
            component.drop([name for name in component.units if name not in held.kept])
        self._release()

    def _decode(self, plan: Holding, latents: Any, progress: Any) -> Any:
        progress("decode", 0, 1)
        self._make_way(plan)
        latents = latents.to(self.budget.device)
        decoded = None if plan.tiles else self._decode_whole(latents)
        if decoded is None:
            decoded = self._decode_in_tiles(latents)
        picture = self.pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        progress("decode", 1, 1)
        return picture

    def _decode_whole(self, latents: Any) -> Any:
        """Beside the weights that the plan keeps; where that does not fit, alone; None where tiles are left to try."""
        for alone in (False, True):
            try:
                return self.vae.decode(latents, return_dict=False)[0]
            except RuntimeError as error:
                one_tile = max(latents.shape[-2:]) <= TILE // 8
                if not _ran_out(error) or (alone and one_tile):
                    raise
            self._let_go()  # after the error is gone, for until then it holds what was being computed
            self._warn("VRAM ran out while the picture was decoded; weights made way for it")
        return None

    def _decode_in_tiles(self, latents: Any) -> Any:
        """Where the whole does not fit with nothing else on the card: near the same picture, seams apart."""
        self.tiling = TILE, OVERLAP
        self._warn("the picture was decoded in tiles, for want of VRAM: it differs a little from a whole decode")
        self.vae.use_tiling, self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = True, TILE, TILE // 8
        try:
            return self.vae.decode(latents, return_dict=False)[0]
        finally:
            self.vae.use_tiling = False

    def _release(self) -> None:
        """Give what is free back to the card.

        cuDNN takes its algorithms, and so a picture's bits, by what the card says is free: what torch keeps for later
        is not. And weights that come find the room in one piece. Where neither matters it stays with torch, for to take
        it again costs time.
        """
        import torch

        if self.on_card:
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._let_go()
        self._denoised.clear()
        self._embeddings.close()
        self.reader.close()
        for component in (self.encoder, self.transformer):
            component.forget(list(component.units), self.reader)
        self.pipe = self.vae = None
        gc.collect()
        self._release()


def _first_seconds(weights: int, hardware: Hardware) -> float:
    """From process start until `weights` bytes are where they compute: they are read while libraries are imported."""
    return max(memory.start_seconds(hardware), memory.read_seconds(weights, hardware, warm=False))


def _ran_out(error: RuntimeError) -> bool:
    """Whether it says that the card's memory has run out."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody is told."""


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _layouts(model: InstalledModel, component: str) -> dict[str, Layout]:
    """The units of `transformer` or `text_encoder`, from the headers of its files."""
    manifest, files = model.manifest, _weights(model.folder / component)
    if component == "transformer":
        units = [name for name in holding.transformer_units(manifest) if name]
        return layouts(files, units, manifest.dtype)
    return layouts(files, list(holding.encoder_units(manifest)), manifest.dtype, prefix="model.", rest=False)


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
