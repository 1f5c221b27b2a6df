"""A backend for cards with room to spare: the whole pipeline stays on the card."""

from kleinctl import Fit, hookimpl, memory

kleinctl_api = 1


@hookimpl
def kleinctl_backends():
    return [Resident()]


class Resident:
    name = "resident"
    aliases = ()
    requires = ("torch>=2.8", "diffusers>=0.40,<0.43", "transformers>=5.0,<6", "accelerate>=1.10", "pillow>=11")
    layout = "diffusers"

    def health(self, hardware, environment):
        return None

    def fit(self, model, hardware, job):
        weights, compute = memory.weight_bytes(model), memory.compute_seconds(model, hardware, job)
        peak = weights + max(memory.denoise_bytes(model, job), memory.decode_bytes(model, job)) + memory.CONTEXT_BYTES
        on_card = hardware.gpu is not None and "cuda" in model.devices
        vram, ram = (peak, memory.PROCESS_BYTES) if on_card else (0, peak + memory.PROCESS_BYTES)
        why_not = memory.lacking(model, hardware, vram_bytes=vram, ram_bytes=ram)
        first = memory.IMPORT_SECONDS + memory.read_seconds(weights, hardware, warm=False) + compute
        return Fit(vram, ram, model.bytes(self.layout), first, compute, why_not is None, "resident", why_not)

    def load(self, model, budget):
        import torch
        from diffusers import Flux2KleinPipeline

        dtype = getattr(torch, model.manifest.dtype)
        pipe = Flux2KleinPipeline.from_pretrained(model.folder, torch_dtype=dtype, local_files_only=True)
        return Session(pipe.to(budget.device), budget.device)


class Session:
    strategy = "resident"

    def __init__(self, pipe, device):
        self.pipe, self.device = pipe, device

    def generate(self, job, progress):
        import torch

        progress("denoise", 0, job.steps)
        size = {"width": job.width, "height": job.height}
        seed = torch.Generator(self.device).manual_seed(job.seed)
        calls = {"num_inference_steps": job.steps, "guidance_scale": job.guidance, "generator": seed}
        return self.pipe(prompt=job.prompt, **size, **calls).images[0]

    def close(self):
        self.pipe = None
