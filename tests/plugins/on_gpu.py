"""A backend that takes VRAM and time on a card, as much as the prompt says: `2 GiB, 50 products`."""

from tests.plugins.echo import Echo, Session


class OnGpu(Echo):
    name, aliases = "on-gpu", ()

    def load(self, model, budget):
        return GpuSession(model.manifest.defaults.max_prompt_tokens, budget.device)


class GpuSession(Session):
    strategy = "resident"

    def __init__(self, max_tokens, device):
        super().__init__(max_tokens)
        self.device = device

    def generate(self, job, progress):
        import torch

        gib, _, products, _ = job.prompt.split()
        progress("encode", 0, 1)
        held = torch.empty(int(float(gib) * 2**30), dtype=torch.uint8, device=self.device)
        matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device=self.device)
        progress("denoise", 0, 1)
        for _ in range(int(products)):
            torch.mm(matrix, matrix)  # queued; the call returns at once
        picture = super().generate(job, progress)
        del held
        return picture


def kleinctl_backends():
    return [OnGpu()]
