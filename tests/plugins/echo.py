"""A backend that paints from the seed, without torch and without pluggy: every command can be tried with it."""

import random

from kleinctl import Fit

kleinctl_api = 1


class Echo:
    name, aliases, requires, layout = "echo", ("parrot",), ("pillow",), "diffusers"

    def fit(self, model, hardware, job):
        return Fit(0, 2**26, 0, 0.5, 0.1, True, "echo")

    def health(self, hardware, environment):
        return None

    def load(self, model, budget):
        return Session(model.manifest.defaults.max_prompt_tokens)


class Session:
    strategy = "echo"

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens
        self.warnings = []

    def generate(self, job, progress):
        from PIL import Image

        progress("encode", 0, 1)
        if len(job.prompt.split()) > self.max_tokens:
            self.warnings.append(f"prompt is {len(job.prompt.split())} tokens, the model reads {self.max_tokens}")
        paint = random.Random(f"{job.prompt} {job.seed} {job.guidance}")
        for step in range(job.steps):
            progress("denoise", step, job.steps)
        progress("decode", 0, 1)
        return Image.frombytes("RGB", (job.width, job.height), paint.randbytes(job.width * job.height * 3))

    def close(self):
        pass


def kleinctl_backends():
    return [Echo()]
