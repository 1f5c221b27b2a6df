"""Which names and shapes tell which weights: data, and the few lines that compare it with a header.

Numbers are the models' published configurations; the tells are those that ComfyUI (`comfy/sd.py`,
`comfy/model_detection.py`) and diffusers' converters go by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kleinctl.header import Tensor

Axis = int | str | None

ROLES = ("transformer", "text-encoder", "vae", "lora", "upscaler", "unknown")
LAYOUTS = ("single-file", "diffusers")

#: What people call the families, for messages.
TITLES = {
    "flux2-klein-4b": "FLUX.2 [klein] 4B",
    "flux2-klein-9b": "FLUX.2 [klein] 9B",
    "flux2-dev": "FLUX.2 [dev]",
    "flux2-other": "FLUX.2 of another size",
    "flux1": "FLUX.1",
    "chroma": "Chroma",
    "z-image": "Z-Image",
    "sdxl": "SDXL",
    "sd15": "Stable Diffusion 1.5",
    "qwen3-4b": "Qwen3 4B",
    "qwen3-8b": "Qwen3 8B",
    "qwen3-1.7b": "Qwen3 1.7B",
    "qwen3-0.6b": "Qwen3 0.6B",
    "qwen3-other": "Qwen3 of another size",
    "qwen3-vl": "Qwen3-VL",
    "qwen2.5-vl": "Qwen2.5-VL",
    "qwen2": "Qwen2",
    "gemma": "Gemma",
    "llama3-8b": "Llama 3 8B",
    "t5-xxl": "T5-XXL",
    "umt5-xxl": "UMT5-XXL",
    "clip-l": "CLIP-L",
    "clip-g": "CLIP-G",
    "mistral-small": "Mistral Small 24B",
    "ministral": "Ministral 3B",
    "flux2-vae": "the FLUX.2 VAE",
    "flux1-vae": "the FLUX.1 VAE (SD3 and Z-Image have its like)",
    "sd-vae": "a Stable Diffusion VAE (1.5 and SDXL look alike)",
    "wan-vae": "the Wan 2.1 or Qwen-Image VAE",
    "dc-ae": "a DC-AE autoencoder",
}


@dataclass(frozen=True)
class Signature:
    """One way to recognise a weights file. The first of the list whose every entry is found wins.

    `shapes` maps names to shapes: a number is wanted as it is, None is any number, and a word stands for a number
    that `saw` can show as `{word}` (the same word twice must be the same number). None in place of a shape asks for
    the name alone. In a name, `*` stands for any block number. A prefix common to the whole file, such as
    `model.diffusion_model.`, is taken off first. `layout` None: both layouts use these names, the file's name decides.
    """

    role: str
    family: str
    layout: str | None
    shapes: Mapping[str, tuple[Axis, ...] | None]
    saw: str

    def __post_init__(self) -> None:
        if self.role not in ROLES or self.layout not in (*LAYOUTS, None) or not self.shapes:
            raise ValueError(f"a signature needs shapes, one of the roles {ROLES}, and one of the layouts {LAYOUTS}")

    def match(self, names: Names) -> dict[str, int] | None:
        """The numbers found for the words in `shapes`, or None when this is something else."""
        found: dict[str, int] = {}
        for name, shape in self.shapes.items():
            for tensor in names.all(name):
                words = _compare(tensor.shape, shape, found)
                if words is not None:
                    found = words
                    break
            else:
                return None
        return found


def _compare(found: tuple[int, ...], wanted: tuple[Axis, ...] | None, known: dict[str, int]) -> dict[str, int] | None:
    """The numbers known of each word, with those that this shape adds, or None where it is not as wanted."""
    if wanted is None:
        return known
    if len(found) != len(wanted):
        return None
    words = dict(known)
    for size, axis in zip(found, wanted, strict=True):
        number = words.setdefault(axis, size) if isinstance(axis, str) else axis
        if number is not None and number != size:
            return None
    return words


_BLOCK = re.compile(r"(?<![^.])\d+(?![^.])")


class Names:
    """The tensors of a header, to be asked for by name, by pattern, and for the count of blocks."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.found: dict[str, list[Tensor]] = {}
        self.patterns: dict[str, list[str]] = {}
        for name in tensors:
            self.patterns.setdefault(_BLOCK.sub("*", name), []).append(name)

    def all(self, pattern: str) -> list[Tensor]:
        """The tensors of that name; `*` stands for any block number."""
        if pattern in self.tensors:
            return [self.tensors[pattern]]
        if "*" in pattern and pattern not in self.found:
            wanted = pattern.split(".")
            self.found[pattern] = [
                self.tensors[name]
                for name in self.patterns.get(_BLOCK.sub("*", pattern), ())
                if all(want in ("*", have) for want, have in zip(wanted, name.split("."), strict=True))
            ]
        return self.found.get(pattern, [])

    def axis(self, axis: int, *patterns: str) -> int | None:
        """One axis of the first of these tensors that is there and has axes."""
        shapes = (tensor.shape for pattern in patterns for tensor in self.all(pattern))
        return next((shape[axis] for shape in shapes if len(shape) > max(axis, 0)), None)

    def blocks(self, *prefixes: str) -> int:
        """How many block numbers follow a prefix such as `double_blocks.` (or another of these)."""
        after = (name[len(prefix) :] for prefix in prefixes for name in self.tensors if name.startswith(prefix))
        return sum(number.isdigit() for number in {rest.partition(".")[0] for rest in after})


class _Size(NamedTuple):
    family: str
    hidden: int
    text_width: int


# Hidden and context widths: diffusers' scripts/convert_flux2_to_diffusers.py. The context is three layers of the text
# encoder side by side: 3 x 2560, 3 x 4096, 3 x 5120.
_FLUX2 = (
    _Size("flux2-klein-4b", 3072, 7680),
    _Size("flux2-klein-9b", 4096, 12288),
    _Size("flux2-dev", 6144, 15360),
)

#: Width of the text input and channels of the latents, for shards that lack these tensors.
INPUTS = {**{size.family: (size.text_width, 128) for size in _FLUX2}, "flux1": (4096, 64)}


def _flux2(family: str, hidden: int, text_width: int) -> list[Signature]:
    # The text input alone decides, as it decides which text encoder fits; a cut-down model shows by its blocks' width.
    seen = f"text input {text_width} wide, blocks {{hidden}} wide: {TITLES[family]}"
    blocks = f"FLUX.2 blocks {hidden} wide: {TITLES[family]}"
    return [
        Signature("transformer", family, "single-file", {"txt_in.weight": ("hidden", text_width)}, seen),
        Signature("transformer", family, "diffusers", {"context_embedder.weight": ("hidden", text_width)}, seen),
        # A shard has blocks only. FLUX.2's single block is 9 x hidden (FLUX.1's is 7 x), its double MLP 6 x hidden.
        Signature(
            "transformer", family, "single-file", {"single_blocks.*.linear1.weight": (9 * hidden, hidden)}, blocks
        ),
        Signature(
            "transformer",
            family,
            "diffusers",
            {"single_transformer_blocks.*.attn.to_qkv_mlp_proj.weight": (9 * hidden, hidden)},
            blocks,
        ),
        Signature(
            "transformer",
            family,
            "diffusers",
            {"transformer_blocks.*.ff.linear_in.weight": (6 * hidden, hidden)},
            blocks,
        ),
    ]


def _text_encoder(family: str, hidden: int, mlp: int, vocabulary: int | None = 151936) -> list[Signature]:
    """A Qwen3 (it normalises queries) of known width; each shard of it has an MLP, and one has the vocabulary."""
    seen = f"{hidden} wide, query norm: {TITLES[family]}"
    norm = {"model.layers.*.self_attn.q_norm.weight": (128,)}
    return [
        Signature("text-encoder", family, None, {**norm, "model.layers.*.mlp.gate_proj.weight": (mlp, hidden)}, seen),
        Signature(
            "text-encoder", family, None, {**norm, "model.layers.*.post_attention_layernorm.weight": (hidden,)}, seen
        ),
        Signature(
            "text-encoder",
            family,
            None,
            {"model.embed_tokens.weight": (vocabulary, hidden)},
            f"{hidden} wide, Qwen's vocabulary: {TITLES[family]}",
        ),
        Signature(
            "text-encoder",
            family,
            None,
            {"lm_head.weight": (vocabulary, hidden)},
            f"{hidden} wide, Qwen's vocabulary: {TITLES[family]}",
        ),
    ]


def _vae(family: str, channels: Axis, extra: Mapping[str, tuple[Axis, ...] | None], seen: str) -> list[Signature]:
    """A 2-D autoencoder under LDM and under diffusers names; both have this first convolution of the decoder."""
    first = {"decoder.conv_in.weight": ("width", channels, 3, 3), **extra}
    return [
        Signature("vae", family, "diffusers", {**first, "decoder.mid_block.resnets.*.conv1.weight": None}, seen),
        Signature("vae", family, "single-file", first, seen),
    ]


_TRANSFORMERS = [
    *(signature for size in _FLUX2 for signature in _flux2(*size)),
    Signature(
        "transformer",
        "flux2-other",
        "single-file",
        {"txt_in.weight": ("hidden", "text_width"), "double_stream_modulation_img.lin.weight": (None, "hidden")},
        "text input {text_width} wide, blocks {hidden} wide, shared modulation: FLUX.2 of another size",
    ),
    Signature(
        "transformer",
        "flux2-other",
        "diffusers",
        {
            "context_embedder.weight": ("hidden", "text_width"),
            "double_stream_modulation_img.linear.weight": (None, "hidden"),
        },
        "text input {text_width} wide, blocks {hidden} wide, shared modulation: FLUX.2 of another size",
    ),
    Signature(
        "transformer",
        "chroma",
        "single-file",
        {"txt_in.weight": (3072, 4096), "distilled_guidance_layer.in_proj.weight": None},
        "text input 4096 wide, a layer for guidance: Chroma",
    ),
    Signature("transformer", "flux1", "single-file", {"txt_in.weight": (3072, 4096)}, "text input 4096 wide: FLUX.1"),
    Signature(
        "transformer",
        "flux1",
        "diffusers",
        {"context_embedder.weight": (3072, 4096), "time_text_embed.text_embedder.linear_1.weight": None},
        "text input 4096 wide, pooled CLIP input: FLUX.1",
    ),
    Signature(
        "transformer",
        "flux1",
        "single-file",
        {"single_blocks.*.linear1.weight": (21504, 3072)},
        "FLUX.1 blocks 3072 wide: FLUX.1",
    ),
    Signature(
        "transformer",
        "flux1",
        "diffusers",
        {"single_transformer_blocks.*.proj_mlp.weight": (12288, 3072)},
        "FLUX.1 blocks 3072 wide: FLUX.1",
    ),
    Signature(
        "transformer",
        "z-image",
        "diffusers",
        {"cap_embedder.1.weight": (3840, 2560), "all_x_embedder.2-1.weight": None},
        "text input 2560 wide (one layer of Qwen3 4B): Z-Image",
    ),
    Signature(
        "transformer",
        "z-image",
        "single-file",
        {"cap_embedder.1.weight": (3840, 2560)},
        "text input 2560 wide (one layer of Qwen3 4B): Z-Image",
    ),
    Signature(
        "unknown",
        "sdxl",
        "single-file",
        {"input_blocks.*.0.weight": None, "label_emb.0.0.weight": (1280, 2816)},
        "a UNet with SDXL's size conditioning: SDXL",
    ),
    Signature(
        "unknown",
        "sdxl",
        "diffusers",
        {"add_embedding.linear_1.weight": (1280, 2816)},
        "a UNet with SDXL's size conditioning: SDXL",
    ),
    Signature(
        "unknown",
        "sd15",
        "single-file",
        {"input_blocks.*.1.transformer_blocks.*.attn2.to_k.weight": (None, 768)},
        "a UNet with text input 768 wide: Stable Diffusion 1.5",
    ),
]

_TEXT_ENCODERS = [
    *(
        Signature("text-encoder", "qwen3-vl", None, shapes, "a vision tower and query norms: Qwen3-VL")
        for shapes in (
            {"model.visual.patch_embed.proj.weight": None, "model.layers.*.self_attn.q_norm.weight": None},
            {"visual.patch_embed.proj.weight": None, "model.layers.*.self_attn.q_norm.weight": None},
            {"model.language_model.layers.*.self_attn.q_norm.weight": None},
        )
    ),
    *(
        Signature("text-encoder", "qwen2.5-vl", None, shapes, "a vision tower and query biases: Qwen2.5-VL")
        for shapes in (
            {"model.visual.patch_embed.proj.weight": None},
            {"visual.patch_embed.proj.weight": None},
            {"model.language_model.layers.*.self_attn.q_proj.bias": None},
        )
    ),
    Signature(
        "text-encoder",
        "gemma",
        None,
        {"model.layers.*.pre_feedforward_layernorm.weight": None},
        "norms around the MLP: Gemma",
    ),
    Signature(
        "text-encoder",
        "qwen2",
        None,
        {"model.layers.*.self_attn.q_proj.bias": ("width",)},
        "{width} wide, query biases: Qwen2",
    ),
    *_text_encoder("qwen3-4b", 2560, 9728),
    *_text_encoder("qwen3-8b", 4096, 12288),
    *_text_encoder("qwen3-0.6b", 1024, 3072),
    *_text_encoder("qwen3-1.7b", 2048, 6144),
    Signature(
        "text-encoder",
        "qwen3-other",
        None,
        {
            "model.layers.*.self_attn.q_norm.weight": (None,),
            "model.layers.*.post_attention_layernorm.weight": ("width",),
        },
        "{width} wide, query norm: Qwen3 of another size",
    ),
    Signature(
        "text-encoder",
        "mistral-small",
        None,
        {"model.layers.*.post_attention_layernorm.weight": (5120,)},
        "5120 wide, no query norm: Mistral Small 24B",
    ),
    Signature(
        "text-encoder",
        "mistral-small",
        None,
        {"model.layers.*.mlp.gate_proj.weight": (32768, 5120)},
        "5120 wide, MLP 32768: Mistral Small 24B",
    ),
    Signature(
        "text-encoder",
        "ministral",
        None,
        {"model.layers.*.post_attention_layernorm.weight": (3072,)},
        "3072 wide, no query norm: Ministral 3B",
    ),
    Signature(
        "text-encoder",
        "llama3-8b",
        None,
        {"model.layers.*.mlp.gate_proj.weight": (14336, 4096)},
        "4096 wide, MLP 14336, no query norm: Llama 3 8B",
    ),
    *(
        Signature("text-encoder", "umt5-xxl", None, shapes, "T5 blocks 4096 wide, a vocabulary of 256,384: UMT5-XXL")
        for shapes in (
            {"shared.weight": (256384, 4096)},
            {"model.embed_tokens.weight": (256384, 4096)},
            {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (None, 64)},
        )
    ),
    *(
        Signature("text-encoder", "t5-xxl", None, shapes, "T5 blocks 4096 wide: T5-XXL")
        for shapes in (
            {"encoder.block.*.layer.1.DenseReluDense.wi_1.weight": (10240, 4096)},
            {"shared.weight": (32128, 4096)},
            {"model.embed_tokens.weight": (32128, 4096)},
        )
    ),
    Signature(
        "text-encoder",
        "clip-l",
        None,
        {"text_model.encoder.layers.*.mlp.fc1.weight": (3072, 768)},
        "CLIP blocks 768 wide: CLIP-L",
    ),
    Signature(
        "text-encoder",
        "clip-g",
        None,
        {"text_model.encoder.layers.*.mlp.fc1.weight": (5120, 1280)},
        "CLIP blocks 1280 wide: CLIP-G",
    ),
]

_VAES = [
    *_vae("flux2-vae", 32, {"bn.running_mean": (128,)}, "32 latent channels, batch-norm statistics: FLUX.2 VAE"),
    Signature(
        "vae",
        "dc-ae",
        "diffusers",
        {"decoder.conv_in.weight": (None, 32, 3, 3), "decoder.up_blocks.*.0.conv.weight": None},
        "32 latent channels, DC-AE blocks: a DC-AE autoencoder",
    ),
    *_vae("flux2-vae", 32, {}, "32 latent channels but no batch-norm statistics: an incomplete FLUX.2 VAE"),
    *_vae("flux1-vae", 16, {}, "16 latent channels: FLUX.1 VAE (SD3 and Z-Image have its like)"),
    *_vae("sd-vae", 4, {}, "4 latent channels: Stable Diffusion VAE (1.5 and SDXL look alike)"),
    *_vae("unknown", "channels", {}, "{channels} latent channels: a VAE, of which model is not known"),
    Signature(
        "vae",
        "wan-vae",
        "single-file",
        {"decoder.middle.0.residual.0.gamma": None, "decoder.conv1.weight": (None, 16, 3, 3, 3)},
        "16 latent channels, 3-D convolutions: Wan 2.1 or Qwen-Image VAE",
    ),
    Signature(
        "vae",
        "wan-vae",
        "diffusers",
        {"decoder.conv_in.weight": (None, 16, 3, 3, 3)},
        "16 latent channels, 3-D convolutions: Wan 2.1 or Qwen-Image VAE",
    ),
]

_UPSCALERS = [
    Signature("upscaler", family, "single-file", shapes, saw)
    for family, shapes, saw in (
        ("esrgan", {"body.*.rdb1.conv1.weight": None}, "dense residual blocks: ESRGAN upscaler"),
        ("esrgan", {"RRDB_trunk.*.RDB1.conv1.weight": None}, "dense residual blocks: ESRGAN upscaler"),
        ("esrgan", {"model.1.sub.*.RDB1.conv1.0.weight": None}, "dense residual blocks: ESRGAN upscaler"),
        (
            "swinir",
            {"layers.*.residual_group.blocks.*.attn.relative_position_bias_table": None},
            "shifted-window attention: SwinIR upscaler",
        ),
        (
            "realesr-compact",
            {"body.0.weight": (64, 3, 3, 3), "body.1.weight": (64,)},
            "plain convolutions: compact upscaler",
        ),
    )
]

#: Tried in this order, the particular before the general.
SIGNATURES: tuple[Signature, ...] = (*_TRANSFORMERS, *_TEXT_ENCODERS, *_VAES, *_UPSCALERS)
