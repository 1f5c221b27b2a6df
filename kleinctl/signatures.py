"""Which names and shapes tell which weights: data, and the few lines that compare it with a header.

Numbers are the models' published configurations; the tells are those that ComfyUI (`comfy/sd.py`,
`comfy/model_detection.py`) and diffusers' converters go by.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from kleinctl.header import Header, Tensor

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
    "sd2": "Stable Diffusion 2",
    "sd3": "Stable Diffusion 3",
    "qwen-image": "Qwen-Image",
    "wan": "Wan",
    "hunyuan-video": "HunyuanVideo",
    "ltx-video": "LTX-Video",
    "lumina2": "Lumina 2",
    "controlnet": "a ControlNet",
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
    "wan22-vae": "the Wan 2.2 VAE",
    "flux2-tiny-vae": "a tiny autoencoder for FLUX.2 (TAEF2)",
    "tiny-vae": "a tiny autoencoder (TAESD)",
    "clip-vision": "CLIP's vision tower",
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


#: Block numbers looked at after one prefix; the deepest published models have about a hundred.
MAX_BLOCKS = 512


class Names:
    """The tensors of a header, to be asked for by name, by pattern, and for the numbers of their blocks.

    `prefix` is what stands before every name of interest. Names are kept sorted, so that what begins in some way is
    found without looking at the rest.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self.tensors = tensors
        self.prefix = prefix
        self._found: dict[str, list[Tensor]] = {}
        self._numbers: dict[str, tuple[int, ...]] = {}

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.tensors)

    def under(self, prefix: str) -> Names:
        """The same tensors, asked for by what follows `prefix`."""
        inside = Names(self.tensors, prefix)
        inside.__dict__["_sorted"] = self._sorted
        return inside

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def all(self, pattern: str) -> list[Tensor]:
        """The tensors of that name; `*` stands for any block number."""
        if "*" not in pattern:
            tensor = self.tensors.get(self.prefix + pattern)
            return [] if tensor is None else [tensor]
        if pattern not in self._found:
            before, _, after = pattern.partition("*")
            numbers = self.numbers(before)
            self._found[pattern] = [tensor for n in numbers for tensor in self.all(f"{before}{n}{after}")]
        return self._found[pattern]

    def starting(self, start: str) -> bool:
        """Whether any name starts so."""
        start = self.prefix + start
        at = bisect_left(self._sorted, start)
        return at < len(self._sorted) and self._sorted[at].startswith(start)

    def all_start(self, start: str) -> bool:
        """Whether every name in the file starts so."""
        return bool(self._sorted) and self._sorted[0].startswith(start) and self._sorted[-1].startswith(start)

    def numbers(self, start: str) -> tuple[int, ...]:
        """The block numbers that follow a start such as `double_blocks.`"""
        if start not in self._numbers:
            self._numbers[start] = tuple(sorted(islice(self._blocks(self.prefix + start), MAX_BLOCKS)))
        return self._numbers[start]

    def _blocks(self, start: str) -> Iterator[int]:
        names = self._sorted
        at = bisect_left(names, start)
        while at < len(names) and names[at].startswith(start):
            number = names[at][len(start) :].partition(".")[0]
            if number.isascii() and number.isdigit() and len(number) < 5 and str(int(number)) == number:
                yield int(number)
            at = bisect_left(names, f"{start}{number}/", at)  # "/" comes right after "."

    def axis(self, axis: int, *patterns: str) -> int | None:
        """One axis of the first of these tensors that is there and has axes."""
        shapes = (tensor.shape for pattern in patterns for tensor in self.all(pattern))
        return next((shape[axis] for shape in shapes if len(shape) > max(axis, 0)), None)

    def blocks(self, *starts: str) -> tuple[int, ...]:
        """The block numbers after the first of these starts that has any."""
        return next(filter(None, map(self.numbers, starts)), ())


_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "first_stage_model.")
_WHOLE_PREFIX = re.compile(r"(?:vae|net|module|params(?:_ema)?|transformer|text_encoders?\.[\w.]+?\.transformer)\.")
_GGUF_NAMES = {
    "token_embd.": "model.embed_tokens.",
    "enc.blk.": "encoder.block.",
    ".ffn_up.": ".layer.1.DenseReluDense.wi_1.",
    "blk.": "model.layers.",
    "output.weight": "lm_head.weight",
    ".attn_q.": ".self_attn.q_proj.",
    ".attn_q_norm.": ".self_attn.q_norm.",
    ".ffn_gate.": ".mlp.gate_proj.",
    ".ffn_norm.": ".post_attention_layernorm.",
}


def plain_names(header: Header) -> tuple[Names, bool]:
    """The tensors under the names that signatures use, and whether the file holds more than these."""
    names = Names(_packed_shapes(header))
    for prefix in _PREFIXES:
        if names.starting(prefix):
            return names.under(prefix), not names.all_start(prefix)
    common = _WHOLE_PREFIX.match(next(iter(names.tensors), ""))
    if common and names.all_start(common[0]):
        return names.under(common[0]), False
    if "token_embd.weight" in names:
        vision = "vl" in str(header.metadata.get("general.architecture"))
        return Names({_llama_cpp_name(name, vision): tensor for name, tensor in names.tensors.items()}), False
    return names, False


def _packed_shapes(header: Header) -> Mapping[str, Tensor]:
    """Shapes as the layers have them: 4-bit weights lie two to a byte."""
    if not any(tensor.dtype == "U8" and tensor.shape for tensor in header.census):
        return header.tensors
    return {
        name: tensor._replace(shape=(*tensor.shape[:-1], 2 * tensor.shape[-1]))
        if tensor.dtype == "U8" and tensor.shape and f"{name}_scale" in header.tensors
        else tensor
        for name, tensor in header.tensors.items()
    }


def _llama_cpp_name(name: str, vision: bool) -> str:
    """llama.cpp's tensor names as transformers has them (its `gguf-py/gguf/tensor_mapping.py`)."""
    for short, long in _GGUF_NAMES.items():
        if short == ".ffn_up." and not name.startswith("encoder."):
            continue
        if name.startswith(short) or (short.startswith(".") and short in name):
            name = name.replace(short, long, 1)
    return name.replace("model.layers.", "model.language_model.layers.", 1) if vision else name


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

#: Blocks of a whole model: of two kinds in a transformer (double, single), of one in a text encoder, where several
#: numbers are right: ComfyUI's Mistral stops after the 30 layers that FLUX.2 reads.
BLOCKS: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "flux2-klein-4b": ((5,), (20,)),
    "flux2-klein-9b": ((8,), (24,)),
    "flux2-dev": ((8,), (48,)),
    "flux1": ((19,), (38,)),
    "chroma": ((19,), (38,)),
    "qwen3-0.6b": ((28,),),
    "qwen3-1.7b": ((28,),),
    "qwen3-4b": ((36,),),
    "qwen3-8b": ((36,),),
    "mistral-small": ((40, 30),),
    "llama3-8b": ((32,),),
    "t5-xxl": ((24,),),
    "umt5-xxl": ((24,),),
    "clip-l": ((12,),),
    "clip-g": ((32,),),
}


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


def _with_vision(what: str, shape: tuple[Axis, ...] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The ways a text encoder that also sees is laid out: where its text model is, and the names that tell."""
    towers = ("model.visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight")
    beside = [("model.", {tower: None, f"model.layers.*.{what}": shape}) for tower in towers]
    return [*beside, ("model.language_model.", {f"model.language_model.layers.*.{what}": shape})]


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
    Signature(
        "transformer",
        "chroma",
        "diffusers",
        {"context_embedder.weight": (3072, 4096), "distilled_guidance_layer.in_proj.weight": None},
        "text input 4096 wide, a layer for guidance: Chroma",
    ),
    *(
        Signature(
            "transformer",
            "flux1",
            "single-file",
            {"img_in.weight": (3072, channels), "txt_in.weight": (3072, 4096), **more},
            f"text input 4096 wide, {seen}",
        )
        for channels, more, seen in (
            (384, {}, "image input 384: FLUX.1 Fill"),
            (128, {}, "image input 128: FLUX.1 Depth or Canny"),
            (64, {"guidance_in.in_layer.weight": None}, "a guidance input: FLUX.1 dev or its kin"),
            (64, {"vector_in.in_layer.weight": None}, "no guidance input: FLUX.1 schnell or its kin"),
        )
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
        "qwen-image",
        None,
        {"txt_norm.weight": (3584,), "txt_in.weight": ("hidden", 3584)},
        "text input 3584 wide (Qwen2.5-VL 7B), blocks {hidden} wide: Qwen-Image",
    ),
    Signature(
        "transformer",
        "qwen-image",
        None,
        {"transformer_blocks.*.img_mod.1.weight": (18432, 3072), "transformer_blocks.*.attn.add_q_proj.weight": None},
        "double blocks 3072 wide with a modulation each: Qwen-Image",
    ),
    *(
        Signature(
            "transformer",
            "wan",
            "single-file",
            {"head.modulation": (1, 2, hidden), "patch_embedding.weight": (None, channels, 1, 2, 2)},
            f"{seen}, blocks {hidden} wide, image input {channels}: {name}",
        )
        for hidden, channels, seen, name in (
            (3072, 48, "video blocks", "Wan 2.2 5B"),
            (1536, 16, "video blocks", "Wan 2.1 1.3B"),
            (5120, 16, "video blocks", "Wan 14B, text to video"),
            (5120, 36, "video blocks", "Wan 14B, image to video"),
        )
    ),
    Signature(
        "transformer",
        "wan",
        "single-file",
        {"head.modulation": (1, 2, "hidden"), "blocks.*.cross_attn.k.weight": None},
        "video blocks {hidden} wide: Wan",
    ),
    Signature(
        "transformer",
        "wan",
        "diffusers",
        {"condition_embedder.text_embedder.linear_1.weight": ("hidden", 4096), "blocks.*.attn2.to_k.weight": None},
        "video blocks {hidden} wide, text input 4096 wide: Wan",
    ),
    Signature(
        "transformer",
        "sd3",
        "single-file",
        {"joint_blocks.*.x_block.attn.qkv.weight": (None, "hidden")},
        "joint blocks {hidden} wide: Stable Diffusion 3",
    ),
    Signature(
        "transformer",
        "sd3",
        "diffusers",
        {"context_embedder.weight": ("hidden", 4096), "pos_embed.pos_embed": None},
        "joint blocks {hidden} wide, text input 4096 wide: Stable Diffusion 3",
    ),
    Signature(
        "transformer",
        "hunyuan-video",
        "single-file",
        {"txt_in.input_embedder.weight": ("hidden", "text_width"), "double_blocks.*.img_attn_qkv.weight": None},
        "text input {text_width} wide, refined token by token, blocks {hidden} wide: HunyuanVideo",
    ),
    Signature(
        "transformer",
        "ltx-video",
        None,
        {
            "adaln_single.emb.timestep_embedder.linear_1.weight": ("hidden", None),
            "transformer_blocks.*.attn2.to_k.weight": None,
            "patchify_proj.weight": None,
        },
        "blocks {hidden} wide, one modulation for all: LTX-Video",
    ),
    Signature(
        "transformer",
        "lumina2",
        None,
        {"cap_embedder.1.weight": (2304, "text_width")},
        "text input {text_width} wide, blocks 2304 wide: Lumina 2",
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
    *(
        Signature("unknown", "controlnet", layout, shapes, "a ControlNet: it steers a model and is none")
        for layout, shapes in (
            ("single-file", {"input_hint_block.0.weight": None}),
            ("diffusers", {"controlnet_cond_embedding.conv_in.weight": None}),
            ("diffusers", {"controlnet_blocks.*.weight": None}),
        )
    ),
    *(
        Signature("unknown", "sdxl", layout, shapes, "a UNet with SDXL's size conditioning: SDXL")
        for layout, shapes in (
            ("single-file", {"input_blocks.*.0.weight": None, "label_emb.0.0.weight": (1280, 2816)}),
            ("diffusers", {"add_embedding.linear_1.weight": (1280, 2816)}),
        )
    ),
    *(
        Signature(
            "unknown", family, layout, {name: (None, width)}, f"a UNet with text input {width} wide: {TITLES[family]}"
        )
        for family, width in (("sd15", 768), ("sd2", 1024))
        for layout, name in (
            ("single-file", "input_blocks.*.1.transformer_blocks.*.attn2.to_k.weight"),
            ("diffusers", "down_blocks.*.attentions.*.transformer_blocks.*.attn2.to_k.weight"),
        )
    ),
]

_TEXT_ENCODERS = [
    *(
        Signature("text-encoder", "qwen3-vl", None, {**shapes, **width}, f"a vision tower and query norms{seen}")
        for hidden, seen in ((2560, ", 2560 wide: Qwen3-VL 4B"), (4096, ", 4096 wide: Qwen3-VL 8B"), (0, ": Qwen3-VL"))
        for model, shapes in _with_vision("self_attn.q_norm.weight")
        for width in [{f"{model}layers.*.post_attention_layernorm.weight": (hidden,)} if hidden else {}]
    ),
    *(
        Signature("text-encoder", "qwen2.5-vl", None, shapes, f"a vision tower and query biases{seen}")
        for bias, seen in (
            ((3584,), ", 3584 wide: Qwen2.5-VL 7B"),
            ((2048,), ", 2048 wide: Qwen2.5-VL 3B"),
            (None, ": Qwen2.5-VL"),
        )
        for _, shapes in _with_vision("self_attn.q_proj.bias", bias)
    ),
    *(
        Signature("text-encoder", family, None, {tower: (None, 3, 2, patch, patch)}, f"a vision tower, {seen}")
        for family, patch, seen in (
            ("qwen2.5-vl", 14, "patches of 14: Qwen2.5-VL"),
            ("qwen3-vl", 16, "patches of 16: Qwen3-VL"),
        )
        for tower in ("model.visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight")
    ),
    *(
        Signature("text-encoder", "gemma", None, {"model.layers.*.pre_feedforward_layernorm.weight": shape}, seen)
        for shape, seen in (
            ((2304,), "2304 wide, norms around the MLP: Gemma 2 2B"),
            ((2560,), "2560 wide, norms around the MLP: Gemma 3 4B"),
            ((3840,), "3840 wide, norms around the MLP: Gemma 3 12B"),
            (None, "norms around the MLP: Gemma"),
        )
    ),
    *(
        Signature("text-encoder", "qwen2", None, {"model.layers.*.self_attn.q_proj.bias": shape}, seen)
        for shape, seen in (
            ((2048,), "2048 wide, query biases: Qwen2.5 3B"),
            ((3584,), "3584 wide, query biases: Qwen2.5 7B"),
            (("width",), "{width} wide, query biases: Qwen2"),
        )
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
    *(
        Signature("unknown", "clip-vision", None, {name: None}, "a CLIP that sees: a vision tower, no text encoder")
        for name in ("vision_model.encoder.layers.*.mlp.fc1.weight", "visual_projection.weight")
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
    *(
        Signature("vae", family, layout, {name: (None, channels, 3, 3, 3), **more}, seen)
        for family, channels, seen in (
            ("wan-vae", 16, "16 latent channels, 3-D convolutions: Wan 2.1 or Qwen-Image VAE"),
            ("wan22-vae", 48, "48 latent channels, 3-D convolutions: Wan 2.2 VAE"),
        )
        for layout, name, more in (
            ("single-file", "decoder.conv1.weight", {"decoder.middle.0.residual.0.gamma": None}),
            ("diffusers", "decoder.conv_in.weight", {}),
        )
    ),
    *(
        Signature("vae", "unknown", None, {name: (None, "channels", 3, 3, 3)}, seen)
        for name, seen in (
            (
                "decoder.conv_in.conv.weight",
                "{channels} latent channels, causal 3-D convolutions: a video VAE, not known",
            ),
            ("decoder.conv_in.weight", "{channels} latent channels, 3-D convolutions: a video VAE, not known"),
        )
    ),
    *(
        Signature("vae", family, layout, {name: (64, channels, 3, 3), **more}, seen)
        for family, channels, seen in (
            ("flux2-tiny-vae", 32, "32 latent channels, convolutions 64 wide: TAEF2, a tiny autoencoder for FLUX.2"),
            ("tiny-vae", 16, "16 latent channels, convolutions 64 wide: TAESD for FLUX.1 or SD3, a tiny autoencoder"),
            ("tiny-vae", 4, "4 latent channels, convolutions 64 wide: TAESD, a tiny autoencoder"),
        )
        for layout, name, more in (
            ("diffusers", "decoder.layers.0.weight", {"decoder.layers.2.conv.0.weight": None}),
            ("single-file", "taesd_decoder.1.weight", {}),
            ("single-file", "decoder.1.weight", {"decoder.3.conv.0.weight": None}),
            ("single-file", "1.weight", {"3.conv.0.weight": None}),
        )
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
