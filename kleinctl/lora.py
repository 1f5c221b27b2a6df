"""Adapters (LoRA and its kin): which model one was made for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kleinctl.header import Tensor
from kleinctl.signatures import TITLES

#: What names of adapters' tensors have in them, by peft, kohya's scripts, diffusers of old, XLabs, and LyCORIS.
LORA_MARKS = (
    ".lora_A.",
    ".lora_B.",
    ".lora_down.",
    ".lora_up.",
    ".lora.down.",
    ".lora.up.",
    "_lora1.down.",
    "_lora2.down.",
    ".lokr_w",
    ".hada_w",
)


@dataclass(frozen=True)
class Lora:
    """An adapter. `hidden` is the width of the blocks it was made for; the last block numbers are None if untouched.

    `format` says who wrote it: `peft`, `kohya`, `diffusers` (of old), `xlabs`, or of which kind it is: `lokr`, `loha`.
    `dora`: it has magnitudes besides (DoRA). `candidates` are the families it may be for, where several are left.
    """

    path: Path
    family: str
    layout: str
    dtype: str
    rank: int | None
    hidden: int | None
    last_double: int | None
    last_single: int | None
    format: str = ""
    dora: bool = False
    candidates: tuple[str, ...] = ()

    @property
    def saw(self) -> str:
        """What the verdict rests on: `3072 wide, double blocks up to 4: LoRA of rank 16 for FLUX.2 [klein] 4B`."""
        kind = {"lokr": "LoKr", "loha": "LoHa"}.get(self.format, "DoRA" if self.dora else "LoRA")
        about = f"{kind} of rank {self.rank}" if self.rank else kind
        if self.family != "unknown":
            about += f" for {TITLES.get(self.family, self.family)}"
        elif self.candidates:
            either = " or ".join(TITLES.get(each, each) for each in self.candidates)
            about += f" for {either} (the layers it changes are as wide in both)"
        else:
            about += " for a model that is not known here"
        reach = [f"{self.hidden} wide"] if self.hidden else []
        reach += [f"double blocks up to {self.last_double}"] if self.last_double is not None else []
        reach += [f"single blocks up to {self.last_single}"] if self.last_single is not None else []
        said = f"{', '.join(reach)}: {about}" if reach else about
        if self.family == "flux1" and self.hidden == 3072:
            said += "; some of its layers are as wide in FLUX.2 [klein] 4B, where it would partly fit"
        return said


#: How the two factors of a layer are called, the smaller first.
_FACTORS = (
    ("lora_down", "lora_up"),
    ("lora_A", "lora_B"),
    ("lora.down", "lora.up"),
    ("lora1.down", "lora1.up"),
    ("lora2.down", "lora2.up"),
)
#: The end of a LyCORIS tensor's name: `.lokr_w2_a`, `.hada_w1_b`.
_LYCORIS = re.compile(r"(.*)\.(lokr_w[12](?:_[ab])?|hada_w[12]_[ab])")
_BLOCK = re.compile(r"(single_)?(?:double_)?(?:transformer_)?blocks[._](\d{1,4})[._]")
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")
MAX_WIDTH = 2**31

# Layers whose width, in hidden widths, differs between FLUX.1 and FLUX.2 (no biases, shared modulation, gated MLP of
# ratio 3): end of the layer's name ("_" for ".", "*" for a block's number, "$" for the end), 0 for its outputs or 1 for
# its inputs, and what each ratio means.
_TELLS: tuple[tuple[str, int, dict[int, str]], ...] = (
    ("single_blocks_*_linear1$", 0, {9: "flux2", 7: "flux1"}),
    ("single_blocks_*_linear2$", 1, {4: "flux2", 5: "flux1"}),
    ("mlp_0$", 0, {6: "flux2", 4: "flux1"}),
    ("mlp_2$", 1, {3: "flux2", 4: "flux1"}),
    ("to_qkv_mlp_proj$", 0, {9: "flux2"}),
    ("linear_in$", 0, {6: "flux2"}),
    ("linear_out$", 1, {3: "flux2"}),
    ("proj_mlp$", 0, {4: "flux1"}),
)
# Layers that only one family has, by parts of such names. The first one found decides.
_LAYERS: tuple[tuple[str, str], ...] = (
    ("double_blocks_*_img_mlp_fc", "hunyuan-video"),
    ("transformer_blocks_*_img_mlp_net", "qwen-image"),
    ("transformer_blocks_*_img_mod", "qwen-image"),
    ("joint_blocks_*_x_block", "sd3"),
    ("blocks_*_attn1_", "unknown"),
    ("blocks_*_attn2_", "unknown"),
    ("blocks_*_cross_attn_", "wan"),
    ("double_blocks_*_img_mod_", "flux1"),
    ("single_blocks_*_modulation_", "flux1"),
    ("single_transformer_blocks_*_norm_linear", "flux1"),
    ("single_transformer_blocks_*_attn_to_q$", "flux1"),
)
# Where none of these is, layers that FLUX.1 and FLUX.2 have: only then does their width say more.
_FLUX_LAYERS = ("double_blocks_*_", "single_blocks_*_", "transformer_blocks_*_attn_", "transformer_blocks_*_ff_")
_EITHER = ("flux1", "flux2-klein-4b")
_FLUX2_BY_WIDTH = {3072: "flux2-klein-4b", 4096: "flux2-klein-9b", 6144: "flux2-dev"}
#: Highest double and single block. FLUX.1 is as wide as klein 4B.
_KLEIN_4B_LAST = (4, 19)
_FLUX1_LAST = (18, 37)
#: UNets by the width of the text that their cross attention reads.
_UNET_BY_TEXT = {2048: "sdxl", 768: "sd15", 1024: "sd2"}
_UNET_WORDS = ("down_blocks", "up_blocks", "input_blocks", "output_blocks", "mid_block", "middle_block")

Shape = tuple[int, int]  # outputs and inputs of a layer


def is_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are an adapter's: every sixteenth or so is looked at, then all."""
    names = list(tensors)
    some = "\n".join(names[:: max(1, len(names) // 16)])
    if not any(word in some for word in ("lora", "lokr", "hada", "alpha", "dora")):
        return False
    listing = "\n".join(names)
    return any(mark in listing for mark in LORA_MARKS)


def identify_lora(path: Path, tensors: Mapping[str, Tensor], dtype: str) -> Lora:
    """What an adapter was made for, by the widths and numbers of the blocks it changes."""
    listing = "\n".join(tensors)
    layers, rank = _layers(tensors, listing)
    unet = any(word in listing for word in _UNET_WORDS)
    blocks = {} if unet else {name: found for name in layers if (found := _BLOCK.search(name + "."))}
    last_double = max((int(found[2]) for found in blocks.values() if not found[1]), default=None)
    last_single = max((int(found[2]) for found in blocks.values() if found[1]), default=None)
    hidden = min((min(layers[name]) for name in blocks), default=None)
    family = _unet_family(layers) if unet else _family(layers, hidden, last_double, last_single)
    family, candidates = (family, ()) if family != "either" else ("unknown", _EITHER)
    layout = "diffusers" if any("transformer_blocks" in name for name in blocks) else "single-file"
    format = next((name for mark, name in _FORMATS if mark in listing), "")
    dora = ".dora_scale" in listing or ".lora_magnitude_vector" in listing
    return Lora(path, family, layout, dtype, rank, hidden, last_double, last_single, format, dora, candidates)


_FORMATS = (
    (".lokr_w", "lokr"),
    (".hada_w", "loha"),
    ("_lora1.down.", "xlabs"),
    (".lora_A.", "peft"),
    (".lora.down.", "diffusers"),
    (".lora_down.", "kohya"),
)


def _layers(tensors: Mapping[str, Tensor], listing: str) -> tuple[dict[str, Shape], int | None]:
    """Outputs and inputs of each adapted layer, and the usual rank. A LoKr's are products of its two factors."""
    layers: dict[str, Shape] = {}
    ranks: Counter[int] = Counter()
    for down, up in _FACTORS:
        for name in [name for name in tensors if down in name] if down in listing else ():
            small, large = tensors[name].shape, tensors.get(name.replace(down, up))
            if large and len(small) >= 2 and len(large.shape) >= 2:
                layers[name[: name.rindex(down)].rstrip("._")] = (large.shape[0], small[1])
                ranks[small[0]] += 1
    if ".lokr_w" in listing or ".hada_w" in listing:
        layers |= _lycoris(tensors, ranks)
    layers = {layer: shape for layer, shape in layers.items() if max(shape) <= MAX_WIDTH}
    return layers, ranks.most_common(1)[0][0] if ranks else None


def _lycoris(tensors: Mapping[str, Tensor], ranks: Counter[int]) -> dict[str, Shape]:
    pieces: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        found = _LYCORIS.fullmatch(name) if len(tensor.shape) >= 2 else None
        if found:
            pieces.setdefault(found[1], {})[found[2]] = tensor.shape
    layers = {}
    for layer, shapes in pieces.items():
        one, two = _factor(shapes, "lokr_w1"), _factor(shapes, "lokr_w2")
        if one and two:
            layers[layer] = (one[0] * two[0], one[1] * two[1])
        elif "hada_w1_a" in shapes and "hada_w1_b" in shapes:
            layers[layer] = (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])
            ranks[shapes["hada_w1_b"][0]] += 1
    return layers


def _factor(shapes: Mapping[str, tuple[int, ...]], name: str) -> Shape | None:
    whole, a, b = shapes.get(name), shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
    return (whole[0], whole[1]) if whole else (a[0], b[1]) if a and b else None


def _family(layers: Mapping[str, Shape], hidden: int | None, last_double: int | None, last_single: int | None) -> str:
    """The family, or `either` of FLUX.1 and FLUX.2 [klein] 4B."""
    if not hidden:
        return "unknown"
    flattened = _NUMBER.sub("*", "\n".join(layers)).replace(".", "_").replace("\n", "$\n") + "$"
    flat = dict(zip(flattened.split("\n"), layers, strict=False))
    for part, family in _LAYERS:
        if any(part in name for name in flat):
            return family
    for name, layer in flat.items():
        for end, axis, meaning in _TELLS:
            times, over = divmod(layers[layer][axis], hidden)
            if name.endswith(end) and not over and times in meaning:
                return "flux1" if meaning[times] == "flux1" else _FLUX2_BY_WIDTH.get(hidden, "flux2-other")
    if not any(part in name for name in flat for part in _FLUX_LAYERS):
        return "unknown"
    if hidden in (4096, 6144):
        return _FLUX2_BY_WIDTH[hidden]
    return _by_last_block(last_double, last_single) if hidden == 3072 else "unknown"


def _by_last_block(double: int | None, single: int | None) -> str:
    """FLUX.1 or klein 4B, which are equally wide, by the number of their blocks."""
    last = (-1 if double is None else double, -1 if single is None else single)
    if last[0] > _FLUX1_LAST[0] or last[1] > _FLUX1_LAST[1]:
        return "unknown"
    if last[0] > _KLEIN_4B_LAST[0] or last[1] > _KLEIN_4B_LAST[1]:
        return "flux1"
    return "flux2-klein-4b" if last[0] == _KLEIN_4B_LAST[0] or last[1] == _KLEIN_4B_LAST[1] else "either"


def _unet_family(layers: Mapping[str, Shape]) -> str:
    widths = {shape[1] for name, shape in layers.items() if name.replace(".", "_").endswith("attn2_to_k")}
    return next((_UNET_BY_TEXT[width] for width in widths if width in _UNET_BY_TEXT), "unknown")
