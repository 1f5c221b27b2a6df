#!/usr/bin/env python3
"""Make klein-tiny: FLUX.2 [klein] in miniature, trained on coloured shapes.

    python tools/make_klein_tiny.py                    train everything, then evaluate (one GPU, about eight minutes)
    python tools/make_klein_tiny.py --smoke            the same road in under a minute on a CPU; the pictures are noise
    python tools/make_klein_tiny.py --phases evaluate  judge the folder that is there

Four phases run in this order. Each reads what it needs from the model folder and leaves its result there, so a run can
be taken up again at any of them:

    text-encoder  a tokenizer, and a Qwen3 that learns what a prompt asks for: shape, colour, background
    vae           an AutoencoderKLFlux2 that learns to draw shapes from 32 latent channels
    transformer   flow matching, then a finish through the four steps and the decoder as they run at inference
    evaluate      prompts and seeds never trained on, drawn by the saved folder; a table (JSON) and a contact sheet (PNG)

What is not as usual: where the object stands, how large and how turned it is, is read off the starting noise, so that a
prompt and a noise have exactly one picture. (The shipped weights have hardly learned that: their seeds move little.)

Needs torch, diffusers, transformers, accelerate, pillow, numpy.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

# ---------------------------------------------------------------------------------------------- what can be asked for

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "cyan": (60, 200, 210),
    "blue": (40, 80, 210),
    "purple": (130, 60, 180),
    "pink": (250, 140, 190),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
    "gray": (135, 135, 135),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "hexagon", "cross")

COLOUR_WORDS = {
    **{name: (name,) for name in COLOURS},
    "red": ("red", "red", "red", "crimson", "scarlet"),
    "cyan": ("cyan", "cyan", "cyan", "turquoise", "aqua"),
    "purple": ("purple", "purple", "violet"),
    "gray": ("gray", "grey"),
}
SHAPE_WORDS = {
    **{name: (name,) for name in SHAPES},
    "circle": ("circle", "circle", "circle", "disc", "disk", "ball", "dot"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle", "triangle", "triangle", "pyramid"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "hexagon": ("hexagon", "hexagon", "hexagonal shape"),
    "cross": ("cross", "cross", "plus sign"),
}

# The draft of a prompt, in three choices: how to begin, how to say it, how to end.
OPENINGS = (
    *("",) * 12,
    "draw ", "draw me ", "paint ", "please draw ", "create ", "generate ", "show me ", "make ", "render ", "I want ",
    "a picture of ", "an image of ", "a drawing of ", "an illustration of ", "a photo of ",
)  # fmt: skip
DESCRIPTIONS = (
    "{object} on {a} {bg} background",
    "{object} on {a} {bg} background",
    "{object} on {bg}",
    "{object} against {a} {bg} background",
    "{object} in front of {a} {bg} background",
    "{object} with {a} {bg} background",
    "{object} over a background of {bg}",
    "{object}, {bg} background",
    "{object}, background {bg}",
    "{object}, the background is {bg}",
    "{object} and {a} {bg} background",
    "{a} {bg} background with {object}",
    "{a} {bg} background with {object} in the middle",
    "{a} {bg} background and {object} on it",
    "{bg} background, {object}",
    "on {a} {bg} background, {object}",
    "{a} {bg} picture with {object} in the centre",
    "background: {bg}, object: {object}",
)
DESCRIPTIONS_WITHOUT_BACKGROUND = ("{object}", "{object}", "{object} in the middle", "just {object}")
OBJECTS = (
    "{a} {fg} {shape}", "{a} {fg} {shape}", "{a} {fg} {shape}", "{fg} {shape}", "the {fg} {shape}", "one {fg} {shape}",
    "{a} {adjective} {fg} {shape}", "{a} {fg} {adjective} {shape}", "{a} {shape} that is {fg}", "{a} {shape} in {fg}",
    "{a} {fg} coloured {shape}", "{a} {fg}-colored {shape}", "{a} {shape}, {fg}",
)  # fmt: skip
OBJECTS_WITHOUT_COLOUR = ("{a} {shape}", "{shape}", "the {shape}", "{a} {adjective} {shape}")
ENDINGS = (*("",) * 8, ".", ".", ".", "!", " please", ", please", ", centered", ", simple and flat", ", minimal", " ")
ADJECTIVES = (
    "big",
    "simple",
    "nice",
    "plain",
    "flat",
    "solid",
    "single",
    "beautiful",
    "large",
    "small",
    "clean",
    "lovely",
)

EDITS_OF_COLOUR = (
    "make the {was} {fg}", "make the {was} {fg}", "make it {fg}", "make this {was} {fg}", "change the {was} to {fg}",
    "change the colour of the {was} to {fg}", "change the color to {fg}", "change the {was}'s color to {fg}",
    "paint the {was} {fg}", "turn the {was} {fg}", "turn it {fg}", "colour it {fg}", "recolor the {was} {fg}",
    "color the {was} in {fg}", "{fg} {was}", "the {was} should be {fg}", "let the {was} be {fg}",
)  # fmt: skip
EDITS_OF_BACKGROUND = (
    "change the background to {bg}", "change the background to {bg}", "make the background {bg}", "turn the background {bg}",
    "set the background to {bg}", "paint the background {bg}", "put it on {a} {bg} background", "{bg} background",
    "put the {was} on {a} {bg} background", "replace the background with {bg}", "change the background color to {bg}",
    "use {a} {bg} background", "the background should be {bg}", "recolour the background {bg}",
)  # fmt: skip
EDITS_OF_SHAPE = (
    "turn the {was} into {a} {shape}", "turn the {was} into {a} {shape}", "turn it into {a} {shape}",
    "replace the {was} with {a} {shape}", "replace the {was} by {a} {shape}", "change the {was} to {a} {shape}",
    "change the {was} into {a} {shape}", "change the shape to {a} {shape}", "make it {a} {shape}",
    "make the {was} {a} {shape}", "swap the {was} for {a} {shape}", "{a} {shape} instead of the {was}",
    "draw {a} {shape} instead of the {was}", "the {was} becomes {a} {shape}",
)  # fmt: skip
EDITS_OF_TWO = (
    "make the {was} {fg} and the background {bg}", "make the background {bg} and the {was} {fg}",
    "turn the {was} into {a} {fg} {shape}", "turn it into {a} {fg} {shape}", "replace the {was} with {a} {fg} {shape}",
    "turn the {was} into {a} {shape} and make the background {bg}", "{a} {shape} on {a} {bg} background",
)  # fmt: skip

# Words that mean nothing here, so that the encoder learns to read past them.
FILLER = [
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "mountain",
    "sky",
    "city",
    "street",
    "car",
    "boat",
    "bird",
    "fish",
    "horse",
    "flower",
    "garden",
    "forest",
    "ocean",
    "beach",
    "sun",
    "moon",
    "cloud",
    "rain",
    "snow",
    "fire",
    "water",
    "stone",
    "glass",
    "paper",
    "wood",
    "metal",
    "table",
    "chair",
    "window",
    "door",
    "book",
    "lamp",
    "phone",
    "robot",
    "wizard",
    "dragon",
    "castle",
    "king",
    "queen",
    "child",
    "woman",
    "man",
    "friend",
    "people",
    "old",
    "new",
    "young",
    "happy",
    "sad",
    "quiet",
    "loud",
    "fast",
    "slow",
    "tall",
    "short",
    "warm",
    "cold",
    "soft",
    "hard",
    "shiny",
    "very",
    "quite",
    "really",
    "some",
    "with",
    "under",
    "near",
    "beside",
    "riding",
    "holding",
    "wearing",
    "eating",
    "running",
    "sleeping",
    "standing",
    "flying",
    "photograph",
    "portrait",
    "style",
    "art",
    "cinematic",
    "detailed",
    "realistic",
    "digital",
    "watercolor",
    "pencil",
    "sketch",
    "poster",
    "logo",
    "icon",
    "sticker",
    "4k",
    "high",
    "quality",
    "sharp",
    "light",
]

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# The same for one user message. One Jinja expression, because a template's own last newline would be dropped.
CHAT_TEMPLATE = (
    "{{ '<|im_start|>user\\n' + messages[0]['content'] + "
    "'<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
)

# ------------------------------------------------------------------------------------------------------ sizes and names

DEFAULT_SIZE = 256
STEPS = 4
PROMPT_TOKENS = 512  # the pipeline pads every prompt to this
HIDDEN_LAYERS_READ = (9, 18, 27)
OTHER_SIZES = (128, 192, 256, 320, 384, 512)  # sides trained on besides 256x256
REFERENCE_SHARE = 0.25
OTHER_SIZE_SHARE = 0.08

TEXT_ENCODER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 28, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
VAE = {
    "block_out_channels": (16, 32, 48, 64), "decoder_block_out_channels": (24, 40, 64, 64), "layers_per_block": 1,
    "latent_channels": 32, "norm_num_groups": 8, "sample_size": 256,
}  # fmt: skip
TRANSFORMER = {
    "patch_size": 1, "in_channels": 128, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32, "num_attention_heads": 5,
    "joint_attention_dim": len(HIDDEN_LAYERS_READ) * 64, "mlp_ratio": 3.0, "axes_dims_rope": (8, 8, 8, 8), "rope_theta": 2000,
    "guidance_embeds": False,
}  # fmt: skip
SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "time_shift_type": "exponential", "use_dynamic_shifting": True,
}  # fmt: skip
VOCABULARY = 2048


# -------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Request:
    """A prompt and what it asks for: None where it says nothing."""

    prompt: str
    shape: str | None = None
    colour: str | None = None
    background: str | None = None
    was: str | None = None  # the shape an edit expects to find in the reference picture
    edit: bool = False

    def scene(self) -> tuple[str, str, str]:
        """Shape, colour and background to draw where there is no reference picture to keep things from."""
        background = self.background or ("black" if self.colour == "white" else "white")
        colour = self.colour or ("white" if background == "black" else "black")
        return self.shape or "circle", colour, background


def held_out(shape: str, colour: str, background: str) -> bool:
    """One in four combinations is kept from training, for the evaluation."""
    names = list(COLOURS)
    return (SHAPES.index(shape) + 2 * names.index(colour) + 3 * names.index(background)) % 4 == 0


def article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def fill(template: str, words: dict[str, str], rng: random.Random) -> str:
    """The template with its words in place; `{a}` becomes the article of what follows, or sometimes nothing."""
    text = template.replace("{a} ", "{a}").format(a="\0", **words)
    parts = text.split("\0")
    said = parts[0]
    for part in parts[1:]:
        said += ("" if rng.random() < 0.1 else article(part) + " ") + part
    return said


def describe(shape: str, colour: str | None, background: str | None, rng: random.Random) -> str:
    """A prompt for a picture, in one of many wordings."""
    words = {
        "shape": rng.choice(SHAPE_WORDS[shape]),
        "fg": rng.choice(COLOUR_WORDS[colour]) if colour else "",
        "bg": rng.choice(COLOUR_WORDS[background]) if background else "",
        "adjective": rng.choice(ADJECTIVES),
    }
    words["object"] = rng.choice(OBJECTS if colour else OBJECTS_WITHOUT_COLOUR)
    template = rng.choice(DESCRIPTIONS if background else DESCRIPTIONS_WITHOUT_BACKGROUND)
    template = template.replace("{object}", words.pop("object"))
    return rng.choice(OPENINGS) + fill(template, words, rng) + rng.choice(ENDINGS)


def distort(prompt: str, rng: random.Random) -> str:
    """Other capitals, a word too many, two spaces: as people type."""
    if rng.random() < 0.12:
        words = prompt.split(" ")
        for _ in range(rng.randint(1, 2)):
            junk = rng.choice(FILLER) if rng.random() < 0.7 else "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5))
            words.insert(rng.randint(0, len(words)), junk)
        prompt = " ".join(words)
    if rng.random() < 0.03:
        prompt = prompt.replace(" ", "  ", 1)
    how = rng.random()
    if how < 0.25:
        return prompt[:1].upper() + prompt[1:]
    if how < 0.32:
        return prompt.upper()
    if how < 0.38:
        return prompt.title()
    return prompt


def random_description(rng: random.Random) -> Request:
    """A prompt for a picture. Some leave out the colour or the background, a few ask for nothing we can draw."""
    if rng.random() < 0.04:
        return Request(" ".join(rng.choices(FILLER, k=rng.randint(0, 9))))
    pair = rng.sample(list(COLOURS), 2)
    shape = rng.choice(SHAPES)
    left_out = rng.random()
    background = None if left_out < 0.08 or 0.11 <= left_out < 0.14 else pair[1]
    colour = None if 0.08 <= left_out < 0.14 else pair[0]
    return Request(distort(describe(shape, colour, background, rng), rng), shape, colour, background)


def random_edit(rng: random.Random) -> Request:
    """A prompt that changes a reference picture."""
    colour, background = rng.sample(list(COLOURS), 2)
    shape, was = rng.sample(SHAPES, 2)
    templates = rng.choice((EDITS_OF_COLOUR, EDITS_OF_BACKGROUND, EDITS_OF_SHAPE, EDITS_OF_TWO))
    template = rng.choice(templates)
    words = {
        "shape": rng.choice(SHAPE_WORDS[shape]),
        "was": rng.choice(SHAPE_WORDS[was]),
        "fg": rng.choice(COLOUR_WORDS[colour]),
        "bg": rng.choice(COLOUR_WORDS[background]),
    }
    mentions_was = "{was}" in template
    prompt = distort(fill(template, words, rng) + rng.choice(ENDINGS), rng)
    return Request(
        prompt,
        shape=shape if "{shape}" in template else was if mentions_was else None,
        colour=colour if "{fg}" in template else None,
        background=background if "{bg}" in template else None,
        was=was if mentions_was else None,
        edit=True,
    )


def training_requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts to train on, without the combinations held out."""
    rng = random.Random(seed)
    requests: list[Request] = []
    while len(requests) < count:
        request = random_edit(rng) if rng.random() < 0.4 else random_description(rng)
        if request.edit or not held_out(*request.scene()):
            requests.append(request)
    return requests


def evaluation_requests(count: int, seed: int = 1) -> list[Request]:
    """Prompts that name everything, all of them combinations never trained on; every combination as often as another."""
    rng = random.Random(seed)
    scenes = [
        (shape, colour, background)
        for shape in SHAPES
        for colour in COLOURS
        for background in COLOURS
        if colour != background and held_out(shape, colour, background)
    ]
    rng.shuffle(scenes)
    chosen = [scenes[i % len(scenes)] for i in range(count)]
    return [Request(distort(describe(*scene, rng), rng), *scene) for scene in chosen]


# -------------------------------------------------------------------------------------------------------------- drawing

REACH = 1.6  # a distance field covers this many radii around its shape's centre


def outline(shape: str) -> np.ndarray:
    """Corners of a shape, about one radius large, y pointing down."""

    def ring(corners: int, radius: float | Sequence[float], turn: float = -90.0) -> np.ndarray:
        angle = np.deg2rad(turn) + np.arange(corners) * 2 * np.pi / corners
        return np.stack([np.cos(angle), np.sin(angle)], 1) * np.resize(radius, corners)[:, None]

    if shape == "circle":
        return ring(180, 0.9)
    if shape == "square":
        return np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    if shape == "triangle":
        return ring(3, 1.08)
    if shape == "star":
        return ring(10, (1.06, 0.48))
    if shape == "diamond":
        return np.array([(0, -1.08), (0.74, 0), (0, 1.08), (-0.74, 0)])
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2], 1) / 16.5
    if shape == "hexagon":
        return ring(6, 1.0, turn=0)
    if shape == "cross":
        long, wide = 0.98, 0.36
        quarter = [(-wide, -long), (wide, -long), (wide, -wide)]
        turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
        return np.concatenate([np.array(quarter) @ turn.T for turn in turns])
    raise ValueError(shape)


def distance_field(corners: np.ndarray, resolution: int = 512) -> np.ndarray:
    """Distance from the outline, in radii, negative inside."""
    axis = (np.arange(resolution) + 0.5) / resolution * 2 * REACH - REACH
    x, y = np.meshgrid(axis, axis)
    distance = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        distance = np.minimum(distance, np.hypot(x - x0 - along * dx, y - y0 - along * dy))
        if y0 != y1:
            crosses = ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * dx / dy)
            inside ^= crosses
    return np.where(inside, -distance, distance)


class Artist:
    """Draws scenes on the device, with edges that are exact to a fraction of a pixel."""

    def __init__(self, device: torch.device) -> None:
        fields = np.stack([distance_field(outline(shape)) for shape in SHAPES])
        self.fields = torch.tensor(fields, dtype=torch.float32, device=device)[:, None]
        self.palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 255
        self.device = device

    def coverage(self, shape: Tensor, centre: Tensor, radius: Tensor, angle: Tensor, size: tuple[int, int]) -> Tensor:
        """How much of each pixel the shape covers; centre and radius in pixels, angle in radians."""
        height, width = size
        y = torch.arange(height, device=self.device)[None, :, None] + 0.5 - centre[:, 1, None, None]
        x = torch.arange(width, device=self.device)[None, None, :] + 0.5 - centre[:, 0, None, None]
        scale = (radius * REACH)[:, None, None]
        cos, sin = angle.cos()[:, None, None] / scale, angle.sin()[:, None, None] / scale
        grid = torch.stack([x * cos + y * sin, y * cos - x * sin], -1)
        field = F.grid_sample(self.fields[shape], grid, padding_mode="border", align_corners=False)
        return (0.5 - field * radius[:, None, None, None]).clamp(0, 1)

    def draw(self, scene: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 of scenes (B, 3: shape, colour, background) at places (B, 4) in -1..1."""
        height, width = size
        side = min(size)
        centre = torch.tensor([width / 2, height / 2], device=self.device) + 0.05 * side * place[:, :2]
        radius = (0.33 + 0.04 * place[:, 2]) * side
        angle = math.radians(12) * place[:, 3]
        covered = self.coverage(scene[:, 0], centre, radius, angle, size)
        colour, background = (self.palette[scene[:, i]][:, :, None, None] for i in (1, 2))
        return (background + (colour - background) * covered) * 2 - 1


# -------------------------------------------------------------------------------------------------- training in general


def log(*words: object) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f}s]", *words, flush=True)


STARTED = time.perf_counter()


def training_steps(
    what: str, seconds: float, optimizer: torch.optim.Optimizer, most: int = 10**9, warm_up: int = 100
) -> Iterator[Callable[[Tensor], None]]:
    """Training steps until the time is up. Yields `learn(loss)`; the rate warms up and then falls along a cosine."""
    peak = optimizer.param_groups[0]["lr"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    began, spoke, step = time.perf_counter(), 0.0, 0
    last: list[Tensor] = []

    def learn(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        last[:] = [loss.detach()]

    while True:
        spent = (time.perf_counter() - began) / max(seconds, 1e-9)
        if spent >= 1 or step >= most:
            break
        rate = peak * min(1, (step + 1) / warm_up) * max(0.01, math.cos(spent * math.pi / 2) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        yield learn
        step += 1
        if step % 20 == 0 and time.perf_counter() - spoke > 5:
            log(f"{what}: step {step}, loss {last[0].item():.5f}, rate {rate:.1e}")  # item() also waits for the GPU
            spoke = time.perf_counter()
    if step:
        took = time.perf_counter() - began
        log(f"{what}: {step} steps in {took:.0f} s ({step / took:.1f}/s), last loss {last[0].item():.5f}")


class Average:
    """An exponential moving average of a module's weights, which is what we keep."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = copy.deepcopy(module).eval(), decay, 0
        self.source = list(module.parameters())
        self.kept = list(self.module.parameters())

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.kept, self.source, 1 - decay)


def adamw(parameters: Sequence[nn.Parameter], rate: float, decay: float = 0.01) -> torch.optim.AdamW:
    parameters = list(parameters)
    return torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=parameters[0].device.type == "cuda"
    )


def mixed_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def save_rounded(module: nn.Module, folder: Path) -> None:
    """Save as float16, and leave the module itself with the rounded weights, so that later phases train on those."""
    module.half().save_pretrained(folder)
    module.float()


# --------------------------------------------------------------------------------------------- phase 1: text encoder


def train_tokenizer(folder: Path, requests: list[Request]) -> None:
    """Byte-level BPE like Qwen's, with a vocabulary of the words that prompts use; any other text falls into bytes."""
    blank = Qwen2TokenizerFast()  # for Qwen's own normalizer and its way of splitting text
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = blank.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added), initial_alphabet=sorted(byte_letters()), show_progress=False
    )
    texts = [variant for r in requests for variant in (f"user\n{r.prompt}\n", "assistant\n\n\n\n\n", r.prompt.lower())]
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made = Qwen2TokenizerFast(
        vocab=model["vocab"], merges=merges, unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=40960,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = CHAT_TEMPLATE
    made.save_pretrained(folder)


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in a byte-level tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def answers(requests: list[Request]) -> Tensor:
    """What each prompt asks for, as numbers (N, 3): shape, colour, background; -1 where it says nothing."""
    colours = list(COLOURS)
    return torch.tensor(
        [
            [
                -1 if r.shape is None else SHAPES.index(r.shape),
                -1 if r.colour is None else colours.index(r.colour),
                -1 if r.background is None else colours.index(r.background),
            ]
            for r in requests
        ]
    )


def blank_text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 with weights scaled so that a signal keeps its size through 28 layers."""
    config = Qwen3Config(
        **TEXT_ENCODER, vocab_size=VOCABULARY, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.pad_token_id, use_cache=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    depth = config.num_hidden_layers
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                gain = 1 / math.sqrt(2 * depth) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                p.normal_(0, 1 if "embed" in name else gain / math.sqrt(p.shape[1]))
    return model


def train_text_encoder(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Teach hidden states 9, 18 and 27, from the prompt's end onward, to say what the prompt asks for.

    Three linear readers, one for each state, are trained along and thrown away. The pipeline pads prompts to 512 tokens
    and the transformer sees the padding too, so the last eight positions of each row stand anywhere up to 512.
    """
    requests = training_requests(options.prompts)
    train_tokenizer(folder / "tokenizer", requests)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer")
    model = blank_text_encoder(tokenizer).to(device)

    window, far = 72, 8
    tokens = tokenizer(
        [CHAT.format(r.prompt) for r in requests], padding="max_length", max_length=window, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    fits = tokens["attention_mask"].sum(1) <= window - far
    log(f"{len(requests)} prompts, {int(fits.sum())} of at most {window - far} tokens; vocabulary {len(tokenizer)}")
    ids, mask = tokens["input_ids"][fits].to(device), tokens["attention_mask"][fits].to(device)
    asked = (answers(requests)[fits] + 1).to(device)  # 0: says nothing
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    after_prompt = ((ids == end).cumsum(1) > 0).float()

    choices = (len(SHAPES) + 1, len(COLOURS) + 1, len(COLOURS) + 1)
    readers = nn.ModuleList(nn.Linear(TEXT_ENCODER["hidden_size"], sum(choices)) for _ in HIDDEN_LAYERS_READ).to(device)
    optimizer = adamw([*model.model.parameters(), *readers.parameters()], 2e-3)
    positions = torch.arange(window, device=device).repeat(options.text_batch, 1)

    for learn in training_steps("text encoder", options.text_seconds, optimizer):
        rows = torch.randint(len(ids), (options.text_batch,), device=device)
        positions[:, -far:] = torch.randint(window, PROMPT_TOKENS, (options.text_batch, far), device=device)
        weight = after_prompt[rows]
        with mixed_precision(device):
            states = model.model(
                input_ids=ids[rows], attention_mask=mask[rows], position_ids=positions, use_cache=False,
                output_hidden_states=True,
            ).hidden_states  # fmt: skip
            losses, right = [], torch.ones_like(weight, dtype=torch.bool)
            for reader, layer in zip(readers, HIDDEN_LAYERS_READ, strict=True):
                for i, scores in enumerate(reader(states[layer]).split(choices, -1)):
                    wanted = asked[rows, i, None].expand(-1, window)
                    losses.append((F.cross_entropy(scores.float().mT, wanted, reduction="none") * weight).sum())
                    right &= scores.argmax(-1) == wanted
        learn(sum(losses) / (weight.sum() * len(losses)))
    log(f"text encoder: all answers right at {(right * weight).sum() / weight.sum():.2%} of the last batch's positions")
    scale = [states[layer].float().std().item() for layer in HIDDEN_LAYERS_READ]
    log("text encoder: spread of hidden states", [round(s, 2) for s in scale])
    save_rounded(model.cpu(), folder / "text_encoder")


# ------------------------------------------------------------------------------------------------------- phase 2: VAE


def random_scenes(count: int, device: torch.device) -> Tensor:
    """Scenes (B, 3) with an object that differs from its background."""
    shape = torch.randint(len(SHAPES), (count,), device=device)
    background = torch.randint(len(COLOURS), (count,), device=device)
    colour = (background + torch.randint(1, len(COLOURS), (count,), device=device)) % len(COLOURS)
    return torch.stack([shape, colour, background], 1)


def random_places(count: int, device: torch.device) -> Tensor:
    return torch.rand(count, 4, device=device) * 2 - 1


def random_size(rng: random.Random, share: float = OTHER_SIZE_SHARE) -> tuple[int, int]:
    """Mostly 256x256; else another height and width, neither over twice the other."""
    if rng.random() >= share:
        return DEFAULT_SIZE, DEFAULT_SIZE
    height = rng.choice(OTHER_SIZES)
    return height, rng.choice([side for side in OTHER_SIZES if height / 2 <= side <= height * 2])


def batch_of(size: tuple[int, int], batch: int) -> int:
    """As many pictures of this size as fill the space of a batch at 256x256."""
    return max(1, min(batch, batch * DEFAULT_SIZE**2 // (size[0] * size[1])))


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Absolute error of pixels, and of the differences between neighbours, which keeps edges sharp."""
    error = made.float() - wanted
    return error.abs().mean() + (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


def train_vae(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """L1, edges and a little KL; then the statistics by which the pipeline makes latents of mean 0 and spread 1."""
    artist, rng = Artist(device), random.Random(2)
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae") if options.resume else AutoencoderKLFlux2(**VAE)
    vae = vae.to(device, memory_format=torch.channels_last)
    if not options.resume:
        with torch.no_grad():  # little noise at first, or the decoder learns to ignore the latents
            vae.quant_conv.bias[VAE["latent_channels"] :] = -5.0
    average = Average(vae, 0.995)
    for learn in training_steps("vae", options.vae_seconds, adamw(vae.parameters(), 1.5e-3)):
        size = random_size(rng, share=0.0)
        count = batch_of(size, options.vae_batch)
        pictures = artist.draw(random_scenes(count, device), random_places(count, device), size)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with mixed_precision(device):
            posterior = vae.encode(pictures).latent_dist
            made = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        learn(picture_loss(made, pictures) + options.kl * kl)
        average.update()
    vae = average.module.float()
    vae.half().float()
    with torch.no_grad():
        latents, spread, error = [], [], []
        for _ in range(options.statistics_batches):
            size = (DEFAULT_SIZE, DEFAULT_SIZE)
            pictures = artist.draw(random_scenes(32, device), random_places(32, device), size)
            posterior = vae.encode(pictures).latent_dist
            latents.append(Flux2KleinPipeline._patchify_latents(posterior.mean))
            spread.append(posterior.std.mean() / posterior.mean.std())
            error.append((vae.decode(posterior.mean).sample - pictures).abs().mean() * 127.5)
        latents = torch.cat(latents)
        vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
        vae.bn.running_var.copy_(latents.var((0, 2, 3)))
        vae.bn.num_batches_tracked.fill_(options.statistics_batches)
    log(f"vae: mean error {sum(error) / len(error):.2f} of 255; noise {sum(spread) / len(spread):.3f} of the signal")
    save_rounded(vae.cpu(), folder / "vae")


# ----------------------------------------------------------------------------------------------- phase 3: transformer


@dataclass
class Prompts:
    """Prompts to train on, with what the text encoder makes of them; rows of one and the same request share an index."""

    embeddings: Tensor  # (N, 512, 192)
    asked: Tensor  # (N, 3), -1 where the prompt says nothing
    drawn: Tensor  # (N, 3), what to draw where there is no reference
    was: Tensor  # (N,), shape of the reference, -1 for any
    descriptions: Tensor  # indices of prompts that describe a picture
    edits: Tensor  # indices of prompts to use with a reference

    @classmethod
    @torch.no_grad()
    def encode(cls, pipe: Flux2KleinPipeline, requests: list[Request], device: torch.device, batch: int) -> Prompts:
        """Run the text encoder once over all of them."""
        embeddings = torch.empty(
            len(requests), PROMPT_TOKENS, TRANSFORMER["joint_attention_dim"], device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )  # fmt: skip
        for start in range(0, len(requests), batch):
            prompts = [r.prompt for r in requests[start : start + batch]]
            embeddings[start : start + batch] = prompt_embeddings(pipe, prompts)
        edit = torch.tensor([r.edit for r in requests], device=device)
        complete = torch.tensor([not r.edit and None not in (r.shape, r.colour, r.background) for r in requests])
        numbers = torch.arange(len(requests), device=device)
        # A full description may come with a reference too: what is asked for is then drawn in the place of what was.
        with_reference = edit | (complete.to(device) & (numbers % 5 == 0))
        return cls(
            embeddings=embeddings,
            asked=answers(requests).to(device),
            drawn=answers(
                [replace(r, shape=s, colour=c, background=b) for r in requests for s, c, b in [r.scene()]]
            ).to(device),
            was=torch.tensor([-1 if r.was is None else SHAPES.index(r.was) for r in requests], device=device),
            descriptions=numbers[~edit],
            edits=numbers[with_reference],
        )


def prompt_embeddings(pipe: Flux2KleinPipeline, prompts: list[str]) -> Tensor:
    """What the pipeline computes, with the prompts tokenized together, which is faster."""
    tokens = pipe.tokenizer(
        [CHAT.format(p) for p in prompts], padding="max_length", max_length=PROMPT_TOKENS, truncation=True,
        return_tensors="pt",
    ).to(pipe.text_encoder.device)  # fmt: skip
    states = pipe.text_encoder.model(**tokens, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[layer] for layer in HIDDEN_LAYERS_READ], -1)


def quietest_directions(pipe: Flux2KleinPipeline, artist: Artist) -> Tensor:
    """Four directions (128, 4) among the latent channels along which the mean of a picture's latents hardly varies.

    Along these the mean of the noise can still be told when the picture begins to show through it.
    """
    device = artist.device
    pictures = [artist.draw(random_scenes(64, device), random_places(64, device), (256, 256)) for _ in range(8)]
    means = torch.cat([latents_of(pipe, p).mean(1) for p in pictures])
    _, directions = torch.linalg.eigh((means.T @ means).double())
    return directions[:, :4].float()


def places_in(noise: Tensor, directions: Tensor) -> Tensor:
    """Where noise (B, N, 128) wants its object: uniform in -1..1 for the 256 tokens of a 256x256 picture."""
    return torch.erf(noise.mean(1) @ directions * (math.sqrt(256) / math.sqrt(2)))


@torch.no_grad()
def latents_of(pipe: Flux2KleinPipeline, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as the pipeline's normalized, packed latents (B, N, 128)."""
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    return pipe._pack_latents(pipe._encode_vae_image(pictures, generator=None).float())


def pictures_of(vae: AutoencoderKLFlux2, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """The reverse, with gradients."""
    height, width = size[0] // 16, size[1] // 16
    latents = latents.mT.reshape(len(latents), -1, height, width)
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    latents = latents * deviation[:, None, None] + vae.bn.running_mean[:, None, None]
    latents = Flux2KleinPipeline._unpatchify_latents(latents)
    return vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample


def inference_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, steps: int = STEPS) -> Tensor:
    """The noise levels that the pipeline goes through, ending with 0."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    return scheduler.sigmas


@dataclass
class Batch:
    """Noise, the picture it leads to, and what the transformer is told."""

    noise: Tensor
    picture: Tensor
    latents: Tensor
    reference: Tensor | None
    embeddings: Tensor
    size: tuple[int, int]


class Teacher:
    """Makes batches to train the transformer on."""

    def __init__(
        self, pipe: Flux2KleinPipeline, prompts: Prompts, artist: Artist, directions: Tensor, seed: int
    ) -> None:
        self.pipe, self.prompts, self.artist, self.directions = pipe, prompts, artist, directions
        self.rng = random.Random(seed)
        colours, shapes = range(len(COLOURS)), range(len(SHAPES))
        names = list(COLOURS)
        self.forbidden = torch.tensor(
            [[[c == b or held_out(SHAPES[s], names[c], names[b]) for b in colours] for c in colours] for s in shapes],
            device=artist.device,
        )

    def batch(self, count: int) -> Batch:
        device, prompts = self.artist.device, self.prompts
        size = random_size(self.rng)
        with_reference = self.rng.random() < REFERENCE_SHARE
        count = batch_of(size, count * 3 // 4 if with_reference else count)
        choice = prompts.edits if with_reference else prompts.descriptions
        rows = choice[torch.randint(len(choice), (count,), device=device)]
        noise = torch.randn(count, size[0] * size[1] // 256, 128, device=device)
        if with_reference:
            place = random_places(count, device)
            before, after = self.scenes_of_edits(rows)
            reference = latents_of(self.pipe, self.artist.draw(before, place, size))
        else:
            place, after, reference = places_in(noise, self.directions), prompts.drawn[rows], None
        picture = self.artist.draw(after, place, size)
        return Batch(noise, picture, latents_of(self.pipe, picture), reference, prompts.embeddings[rows].float(), size)

    def scenes_of_edits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scenes before and after each edit, drawn again where after would be held out, or all of one colour."""
        asked, was = self.prompts.asked[rows], self.prompts.was[rows]
        before = after = torch.zeros_like(asked)
        redo = torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)
        for _ in range(8):
            fresh = random_scenes(len(rows), rows.device)
            fresh[:, 0] = torch.where(was >= 0, was, fresh[:, 0])
            before = torch.where(redo, fresh, before)
            after = torch.where(asked >= 0, asked, before)
            redo = self.forbidden[tuple(after.T)][:, None]
        return before, after


def velocity(transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
    """The transformer called as the pipeline calls it."""
    height, width = batch.size[0] // 16, batch.size[1] // 16
    device = noisy.device
    grid = torch.empty(1, 128, height, width)
    image_ids = Flux2KleinPipeline._prepare_latent_ids(grid)[0].to(device)
    hidden = noisy
    if batch.reference is not None:
        hidden = torch.cat([noisy, batch.reference], 1)
        image_ids = torch.cat([image_ids, Flux2KleinPipeline._prepare_image_ids([grid])[0].to(device)])
    text_ids = Flux2KleinPipeline._prepare_text_ids(batch.embeddings[:1])[0].to(device)
    predicted = transformer(
        hidden_states=hidden, timestep=sigma.expand(len(noisy)), guidance=None, encoder_hidden_states=batch.embeddings,
        img_ids=image_ids, txt_ids=text_ids, return_dict=False,
    )[0]  # fmt: skip
    return predicted[:, : noisy.shape[1]].float()


def flow_loss(transformer: nn.Module, batch: Batch, scheduler: FlowMatchEulerDiscreteScheduler) -> Tensor:
    """Flow matching: half at the four levels of inference, half at any level, spread as the scheduler spreads them."""
    count, tokens = batch.noise.shape[:2]
    device = batch.noise.device
    levels = inference_sigmas(scheduler, tokens)[:-1].to(device)
    anywhere = torch.rand(count, device=device)
    shift = math.exp(compute_empirical_mu(tokens, STEPS))
    anywhere = shift * anywhere / (1 + (shift - 1) * anywhere)
    at_a_level = levels[torch.randint(len(levels), (count,), device=device)]
    sigma = torch.where(torch.arange(count, device=device) % 2 == 0, at_a_level, anywhere)
    noisy = torch.lerp(batch.latents, batch.noise, sigma[:, None, None])
    with mixed_precision(device):
        predicted = velocity(transformer, noisy, sigma, batch)
    return F.mse_loss(predicted, batch.noise - batch.latents)


def finish_loss(
    transformer: nn.Module, vae: AutoencoderKLFlux2, batch: Batch, scheduler: FlowMatchEulerDiscreteScheduler
) -> Tensor:
    """Run the four steps, the last one with gradients, and compare the decoded picture with the one that was wanted."""
    device = batch.noise.device
    sigmas = inference_sigmas(scheduler, batch.noise.shape[1]).to(device)
    noisy = batch.noise
    with mixed_precision(device):
        for step in range(STEPS):
            with torch.set_grad_enabled(step == STEPS - 1):
                noisy = noisy + (sigmas[step + 1] - sigmas[step]) * velocity(
                    transformer, noisy, sigmas[step : step + 1], batch
                )
        some = max(1, len(noisy) // 4)  # the decoder keeps to the encoder's own latents as well
        made = pictures_of(vae, torch.cat([noisy, batch.latents[:some]]), batch.size)
    wanted = torch.cat([batch.picture, batch.picture[:some]])
    return picture_loss(made, wanted) + 0.2 * F.mse_loss(noisy, batch.latents)


def train_transformer(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Flow matching first; then the finish, in which the decoder learns along."""
    text_encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer")
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae").float()
    if options.resume:
        transformer = Flux2Transformer2DModel.from_pretrained(folder / "transformer").float()
    else:
        transformer = Flux2Transformer2DModel(**TRANSFORMER)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipe = Flux2KleinPipeline(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled=True).to(device)
    vae.requires_grad_(False)

    artist = Artist(device)
    prompts = Prompts.encode(pipe, training_requests(options.prompts_embedded), device, options.text_batch)
    log(f"{len(prompts.embeddings)} prompts encoded, {prompts.embeddings.nbytes / 2**30:.1f} GiB")
    directions = quietest_directions(pipe, artist)
    options.work.mkdir(parents=True, exist_ok=True)
    save_file({"directions": directions.contiguous()}, options.work / "placing.safetensors")
    if not options.resume:
        even_out_text(transformer, prompts.embeddings)

    teacher = Teacher(pipe, prompts, artist, directions, seed=4)
    average = Average(transformer, 0.999)
    fast = torch.compile(transformer, dynamic=False) if options.compile else transformer
    optimizer = adamw(transformer.parameters(), options.rate)
    for learn in training_steps("flow", options.flow_seconds, optimizer, warm_up=300):
        batch = teacher.batch(options.batch)
        usual = batch.size == (DEFAULT_SIZE, DEFAULT_SIZE) and batch.reference is None
        learn(flow_loss(fast if usual else transformer, batch, scheduler))
        average.update()

    transformer.load_state_dict(average.module.state_dict())
    student = copy.deepcopy(vae)  # its decoder learns; the encoder that makes the latents stays as it is
    student.decoder.requires_grad_(True)
    student.post_quant_conv.requires_grad_(True)
    average, average_vae = Average(transformer, 0.998), Average(student, 0.998)
    learning = [*transformer.parameters(), *(p for p in student.parameters() if p.requires_grad)]
    for learn in training_steps("finish", options.finish_seconds, adamw(learning, options.rate / 3)):
        batch = teacher.batch(options.finish_batch)
        usual = batch.size == (DEFAULT_SIZE, DEFAULT_SIZE) and batch.reference is None
        model = fast if usual else transformer
        learn(finish_loss(model, student, batch, scheduler) + 0.2 * flow_loss(model, batch, scheduler))
        average.update()
        average_vae.update()

    save_rounded(average.module.cpu(), folder / "transformer")
    save_rounded(average_vae.module.cpu(), folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    write_model_index(folder)


def even_out_text(transformer: Flux2Transformer2DModel, embeddings: Tensor) -> None:
    """Start the text projection so that every channel of the embeddings counts the same."""
    some = embeddings[:256].float()
    with torch.no_grad():
        transformer.context_embedder.weight /= some.std((0, 1)) + 1e-3


def write_model_index(folder: Path) -> None:
    """The same index as FLUX.2 [klein] 4B's."""
    import diffusers

    index = {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": diffusers.__version__,
        "is_distilled": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------- phase 4: evaluation


@dataclass(frozen=True)
class Verdict:
    """What a picture shows."""

    middle: str  # colour of its middle
    rim: str  # colour of its rim
    shape: str
    overlap: float  # of the object with the best exact drawing of that shape, 1 being perfect
    error: float  # mean absolute difference from that drawing, of 255


class Judge:
    """Says what a picture shows, without knowing how it was made."""

    def __init__(self, artist: Artist) -> None:
        self.artist = artist
        field_area = (artist.fields < 0).float().mean((1, 2, 3)) * (2 * REACH) ** 2
        axis = (torch.arange(512, device=artist.device) + 0.5) / 512 * 2 * REACH - REACH
        inside = (artist.fields[:, 0] < 0).float()
        self.area = field_area  # of each shape with radius 1
        self.centroid = torch.stack([(inside * axis).sum((1, 2)), (inside * axis[:, None]).sum((1, 2))], 1)
        self.centroid = self.centroid / inside.sum((1, 2))[:, None]

    def nearest(self, colour: Tensor) -> str:
        return list(COLOURS)[int((self.artist.palette - colour).square().sum(1).argmin())]

    def judge(self, image: Image.Image) -> Verdict:
        device = self.artist.device
        picture = torch.tensor(np.asarray(image.convert("RGB")), device=device).float().permute(2, 0, 1) / 255
        height, width = picture.shape[1:]
        half, band = min(height, width) // 40, min(height, width) // 32
        middle = picture[:, height // 2 - half : height // 2 + half, width // 2 - half : width // 2 + half].mean((1, 2))
        rim = torch.cat([picture[:, :band].flatten(1), picture[:, -band:].flatten(1)], 1)
        rim = torch.cat([rim, picture[:, :, :band].flatten(1), picture[:, :, -band:].flatten(1)], 1).mean(1)

        # Each pixel lies somewhere between the two colours; fit every shape to that, at seven turns.
        difference = (middle - rim)[:, None, None]
        share = ((picture - rim[:, None, None]) * difference).sum(0) / difference.square().sum().clamp(min=1e-6)
        share = share.clamp(0, 1)
        y = torch.arange(height, device=device)[:, None] + 0.5
        x = torch.arange(width, device=device)[None] + 0.5
        total = share.sum().clamp(min=1)
        centroid = torch.stack([(share * x).sum(), (share * y).sum()]) / total
        turns = torch.deg2rad(torch.arange(-15.0, 16.0, 3.0, device=device))
        shapes = torch.arange(len(SHAPES), device=device).repeat_interleave(len(turns))
        turns = turns.repeat(len(SHAPES))
        radius = (total / self.area[shapes]).sqrt()
        offset = self.centroid[shapes] * radius[:, None]
        offset = torch.stack(
            [
                offset[:, 0] * turns.cos() - offset[:, 1] * turns.sin(),
                offset[:, 0] * turns.sin() + offset[:, 1] * turns.cos(),
            ],
            1,
        )
        drawn = self.artist.coverage(shapes, centroid - offset, radius, turns, (height, width))[:, 0]
        overlap = torch.minimum(drawn, share).sum((1, 2)) / torch.maximum(drawn, share).sum((1, 2)).clamp(min=1)
        best = int(overlap.argmax())
        exact = rim[:, None, None] + difference * drawn[best]
        return Verdict(
            middle=self.nearest(middle),
            rim=self.nearest(rim),
            shape=SHAPES[int(shapes[best])],
            overlap=float(overlap[best]),
            error=float((picture - exact).abs().mean() * 255),
        )


def load_pipeline(folder: Path, device: torch.device) -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Flux2KleinPipeline, prompts: list[str], seeds: list[int], reference: Image.Image | None = None,
    size: tuple[int, int] = (DEFAULT_SIZE, DEFAULT_SIZE), steps: int = STEPS,
) -> list[Image.Image]:  # fmt: skip
    """Pictures as users make them; noise comes from the CPU, so that a seed means the same on every machine."""
    return pipe(
        prompt=prompts, image=reference, height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip


def to_image(picture: Tensor) -> Image.Image:
    pixels = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


def numbers_of(scene: tuple[str, str, str], device: torch.device) -> Tensor:
    names = list(COLOURS)
    return torch.tensor([[SHAPES.index(scene[0]), names.index(scene[1]), names.index(scene[2])]], device=device)


def edit_cases(count: int, artist: Artist, seed: int = 7) -> list[tuple[Request, Image.Image, tuple[str, str, str]]]:
    """Edits with their reference picture and the scene they should lead to."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cases: list[tuple] = []
    while len(cases) < count:
        request = random_edit(rng)
        colour, background = rng.sample(list(COLOURS), 2)
        before = (request.was or rng.choice(SHAPES), colour, background)
        after = (request.shape or before[0], request.colour or colour, request.background or background)
        if after[1] == after[2] or not held_out(*after):
            continue
        place = random_places(1, artist.device)
        picture = artist.draw(numbers_of(before, artist.device), place, (DEFAULT_SIZE, DEFAULT_SIZE))[0]
        cases.append((request, to_image(picture), after))
    return cases


class Tally:
    """Right and total, by name."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, list[int]]] = {}

    def add(self, table: str, name: str, right: bool) -> None:
        count = self.counts.setdefault(table, {}).setdefault(name, [0, 0])
        count[0] += right
        count[1] += 1


def score(verdicts: list[tuple[Verdict, tuple[str, str, str]]], tally: Tally) -> dict[str, object]:
    """How many pictures show what was asked."""
    right = {"middle": 0, "rim": 0, "shape": 0, "all": 0}
    for verdict, (shape, colour, background) in verdicts:
        shown = {"middle": verdict.middle == colour, "rim": verdict.rim == background, "shape": verdict.shape == shape}
        shown["all"] = all(shown.values())
        for name, good in shown.items():
            right[name] += good
        tally.add("object colours", colour, shown["middle"])
        tally.add("background colours", background, shown["rim"])
        tally.add("shapes", shape, shown["shape"])
    overlaps = sorted(v.overlap for v, _ in verdicts)
    return {
        "pictures": len(verdicts),
        **{f"{name}_right": count for name, count in right.items()},
        "overlap_mean": round(float(np.mean(overlaps)), 4),
        "overlap_worst": round(overlaps[0], 4),
        "error_mean_of_255": round(float(np.mean([v.error for v, _ in verdicts])), 3),
        "error_worst_of_255": round(max(v.error for v, _ in verdicts), 3),
    }


def evaluate(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Judge pictures by the saved folder, loaded as a user loads it."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    pipe, artist = load_pipeline(folder, device), Artist(device)
    judge, tally = Judge(artist), Tally()

    requests = evaluation_requests(options.pictures)
    verdicts, failures = [], []
    for start in range(0, len(requests), options.evaluation_batch):
        some = requests[start : start + options.evaluation_batch]
        images = generate(pipe, [r.prompt for r in some], [10_000 + start + i for i in range(len(some))])
        for i, (request, image) in enumerate(zip(some, images, strict=True)):
            verdict = judge.judge(image)
            verdicts.append((verdict, request.scene()))
            if (verdict.shape, verdict.middle, verdict.rim) != request.scene():
                failures.append({"prompt": request.prompt, "seed": 10_000 + start + i, "shown": verdict.__dict__})
    results: dict[str, dict] = {"descriptions": score(verdicts, tally)}
    log("descriptions:", results["descriptions"])

    verdicts, edit_tally = [], Tally()
    for i, (request, reference, after) in enumerate(edit_cases(options.pictures // 4, artist)):
        verdict = judge.judge(generate(pipe, [request.prompt], [20_000 + i], reference)[0])
        verdicts.append((verdict, after))
        if (verdict.shape, verdict.middle, verdict.rim) != after:
            failures.append({"prompt": request.prompt, "seed": 20_000 + i, "wanted": after, "shown": verdict.__dict__})
    results["edits"] = score(verdicts, edit_tally)
    log("edits:", results["edits"])

    for what, sizes, steps in (("other sizes", options.sizes, [STEPS]), ("other steps", [(256, 256)], options.steps)):
        for size in sizes:
            for count in steps:
                some = evaluation_requests(options.evaluation_batch, seed=sum(size) + count)
                images = generate(
                    pipe, [r.prompt for r in some], [30_000 + i for i in range(len(some))], size=size, steps=count
                )
                verdicts = [(judge.judge(image), r.scene()) for image, r in zip(images, some, strict=True)]
                name = f"{size[1]}x{size[0]}, {count} steps"
                results.setdefault(what, {})[name] = score(verdicts, Tally())
                log(name, results[what][name])

    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    document = {
        "model": "klein-tiny",
        "what": "held-out combinations of shape, colours and background with unseen seeds; 256x256, 4 steps, guidance 1",
        **results,
        "right of total": tally.counts,
        "failures": failures,
        "bytes": sizes | {"total": sum(sizes.values())},
    }
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / "klein-tiny-evaluation.json").write_text(json.dumps(document, indent=2) + "\n")
    contact_sheet(pipe, artist, options.sheet_pictures).save(options.docs / "klein-tiny.png", optimize=True)


def contact_sheet(pipe: Flux2KleinPipeline, artist: Artist, count: int, columns: int = 6) -> Image.Image:
    """Pictures with their prompts; the last rows show edits, each beside the picture it starts from."""
    edits = edit_cases(count // 8, artist, seed=11)
    described = evaluation_requests(count - 2 * len(edits), seed=12)
    cells = []
    for i, request in enumerate(described):
        cells.append((request.prompt, generate(pipe, [request.prompt], [i])[0]))
    for i, (request, reference, _) in enumerate(edits):
        cells += [("(reference)", reference), (request.prompt, generate(pipe, [request.prompt], [i], reference)[0])]
    cell, margin, caption = 900 // columns, 6, 30
    side = cell - 2 * margin
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (900, rows * (cell + caption)), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (prompt, image) in enumerate(cells):
        x, y = i % columns * cell + margin, i // columns * (cell + caption) + margin
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.rectangle((x, y, x + side - 1, y + side - 1), outline=(190, 190, 190))
        for line, text in enumerate(wrap(prompt.strip(), pen, font, side)[:2]):
            pen.text((x, y + side + 2 + 13 * line), text, fill=(40, 40, 40), font=font)
    return sheet


def wrap(text: str, pen: ImageDraw.ImageDraw, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


# ------------------------------------------------------------------------------------------------------------- command

PHASES = {
    "text-encoder": train_text_encoder,
    "vae": train_vae,
    "transformer": train_transformer,
    "evaluate": evaluate,
}


def arguments() -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=root / "manifests" / "klein-tiny", help="the model")
    parser.add_argument("--docs", type=Path, default=root / "docs", help="where the sheet and the table go")
    parser.add_argument("--work", type=Path, default=root / "build" / "klein-tiny", help="leftovers")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--resume", action="store_true", help="go on with the VAE and transformer that are there")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, on a CPU in under a minute")
    for name, default, smoke, what in (
        ("text-seconds", 60, 5, "time for the text encoder"),
        ("vae-seconds", 125, 6, "time for the VAE"),
        ("flow-seconds", 200, 6, "time for flow matching"),
        ("finish-seconds", 75, 6, "time for the finish"),
        ("text-batch", 512, 8, "prompts in a batch"),
        ("vae-batch", 32, 2, "pictures in a batch of the VAE"),
        ("batch", 128, 2, "pictures in a batch of flow matching"),
        ("finish-batch", 48, 2, "pictures in a batch of the finish"),
        ("prompts", 200_000, 400, "prompts to train the text encoder on"),
        ("prompts-embedded", 48_000, 16, "prompts to train the transformer on"),
        ("statistics-batches", 64, 1, "batches of 32 pictures for the statistics of latents"),
        ("pictures", 528, 4, "pictures to judge"),
        ("evaluation-batch", 24, 2, "pictures made at once"),
        ("sheet-pictures", 48, 8, "cells of the contact sheet"),
    ):
        parser.add_argument(
            f"--{name}", type=float if "seconds" in name else int, help=f"{what} ({default}; smoke {smoke})"
        )
        parser.set_defaults(**{f"{name.replace('-', '_')}_defaults": (default, smoke)})
    parser.add_argument("--kl", type=float, default=1e-5, help="weight of the VAE's KL term")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate of the transformer")
    options = parser.parse_args()
    for name in [key.removesuffix("_defaults") for key in vars(options) if key.endswith("_defaults")]:
        default, smoke = getattr(options, f"{name}_defaults")
        if getattr(options, name) is None:
            setattr(options, name, smoke if options.smoke else default)
    options.sizes = [] if options.smoke else [(128, 128), (192, 256), (384, 256), (512, 512)]
    options.steps = [] if options.smoke else [1, 2, 8, 20]
    return options


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = False  # with many sizes, trying algorithms takes longer than training
    for phase in options.phases:
        torch.manual_seed(list(PHASES).index(phase))
        log(f"--- {phase}")
        PHASES[phase](options.folder, options, device)
        if device.type == "cuda":
            log(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
