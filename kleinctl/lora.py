"""Adapters (LoRA and its kin): which model one was made for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kleinctl.header import Tensor
from kleinctl.signatures import TITLES

#: What names of adapters' tensors have in them, by peft, kohya's scripts, diffusers of old, and LyCORIS.
LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".lokr_w", ".hada_w")


@dataclass(frozen=True)
class Lora:
    """An adapter. `hidden` is the width of the blocks it was made for; the last block numbers are None if untouched."""

    path: Path
    family: str
    layout: str
    dtype: str
    rank: int | None
    hidden: int | None
    last_double: int | None
    last_single: int | None

    @property
    def saw(self) -> str:
        """What the verdict rests on: `3072 wide, double blocks up to 4: LoRA of rank 16 for FLUX.2 [klein] 4B`."""
        about = f"LoRA of rank {self.rank}" if self.rank else "LoRA"
        if self.family != "unknown":
            about += f" for {TITLES.get(self.family, self.family)}"
        elif self.hidden == 3072:
            about += " for FLUX.1 or FLUX.2 [klein] 4B (the layers it changes are as wide in both)"
        else:
            about += " for a model that is not known here"
        reach = [f"{self.hidden} wide"] if self.hidden else []
        reach += [f"double blocks up to {self.last_double}"] if self.last_double is not None else []
        reach += [f"single blocks up to {self.last_single}"] if self.last_single is not None else []
        return f"{', '.join(reach)}: {about}" if reach else about


# The end of a tensor's name: `.lora_A.weight`, `.lora_A.default.weight`, `.lora_down.weight`, `.lokr_w2_a`.
_END = re.compile(
    r"\.(lora_A|lora_down|lora\.down|lora_B|lora_up|lora\.up|lokr_w[12](?:_[ab])?|hada_w[12]_[ab])(?:\.\w{1,30})?(?:\.weight)?$"
)
_BLOCK = re.compile(r"(single_)?(?:double_)?(?:transformer_)?blocks[._](\d{1,4})[._]")
# Layers whose width, in hidden widths, differs between FLUX.1 and FLUX.2 (no biases, shared modulation, gated MLP of
# ratio 3): end of the layer's name, 0 for its outputs or 1 for its inputs, and what each ratio means.
_TELLS: tuple[tuple[str, int, dict[int, str]], ...] = (
    ("single_blocks_linear1", 0, {9: "flux2", 7: "flux1"}),
    ("single_blocks_linear2", 1, {4: "flux2", 5: "flux1"}),
    ("mlp_0", 0, {6: "flux2", 4: "flux1"}),
    ("mlp_2", 1, {3: "flux2", 4: "flux1"}),
    ("to_qkv_mlp_proj", 0, {9: "flux2"}),
    ("linear_in", 0, {6: "flux2"}),
    ("linear_out", 1, {3: "flux2"}),
    ("net_0_proj", 0, {4: "flux1"}),
    ("proj_mlp", 0, {4: "flux1"}),
)
_FLUX2_BY_WIDTH = {3072: "flux2-klein-4b", 4096: "flux2-klein-9b", 6144: "flux2-dev"}
_UNET_WORDS = ("down_blocks", "up_blocks", "input_blocks", "output_blocks")
_KLEIN_4B_LAST = (4, 19)  # its highest double and single block; FLUX.1, as wide, has 18 and 37


def identify_lora(path: Path, tensors: Mapping[str, Tensor], dtype: str) -> Lora:
    """What an adapter was made for, by the widths and numbers of the blocks it changes."""
    layers, rank = _layers(tensors)
    blocks = {name: found for name in layers if (found := _BLOCK.search(name + "."))}
    if any(word in name for name in layers for word in _UNET_WORDS):
        blocks = {}
    last_double = max((int(found[2]) for found in blocks.values() if not found[1]), default=None)
    last_single = max((int(found[2]) for found in blocks.values() if found[1]), default=None)
    hidden = min((min(layers[name]) for name in blocks), default=None)
    family = _family(layers, hidden, last_double, last_single)
    layout = "diffusers" if any("transformer_blocks" in name for name in layers) else "single-file"
    return Lora(path, family, layout, dtype, rank, hidden, last_double, last_single)


def _layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[int, int]], int | None]:
    """Outputs and inputs of each adapted layer, and the usual rank. A LoKr's are products of its two factors."""
    pieces: dict[str, dict[str, tuple[int, ...]]] = {}
    ranks: Counter[int] = Counter()
    for name, tensor in tensors.items():
        found = _END.search(name)
        if found and len(tensor.shape) >= 2:
            kind = found[1].replace("lora.", "lora_").replace("_A", "_down").replace("_B", "_up")
            pieces.setdefault(name[: found.start()], {})[kind] = tensor.shape
            if kind == "lora_down":
                ranks[tensor.shape[0]] += 1
    layers = {}
    for layer, shapes in pieces.items():
        one, two = _factor(shapes, "lokr_w1"), _factor(shapes, "lokr_w2")
        if "lora_down" in shapes and "lora_up" in shapes:
            layers[layer] = (shapes["lora_up"][0], shapes["lora_down"][1])
        elif one and two:
            layers[layer] = (one[0] * two[0], one[1] * two[1])
        elif "hada_w1_a" in shapes and "hada_w1_b" in shapes:
            layers[layer] = (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])
    return layers, ranks.most_common(1)[0][0] if ranks else None


def _factor(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int] | None:
    whole, a, b = shapes.get(name), shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
    return (whole[0], whole[1]) if whole else (a[0], b[1]) if a and b else None


def _family(
    layers: Mapping[str, tuple[int, int]], hidden: int | None, last_double: int | None, last_single: int | None
) -> str:
    if not hidden:
        return "unknown"
    for name, shape in layers.items():
        flat = re.sub(r"[._]\d+(?=[._](?:linear|proj))", "", name).replace(".", "_")
        for end, axis, meaning in _TELLS:
            if flat.endswith(end) and shape[axis] % hidden == 0 and (kin := meaning.get(shape[axis] // hidden)):
                return "flux1" if kin == "flux1" else _FLUX2_BY_WIDTH.get(hidden, "flux2-other")
    if hidden in (4096, 6144):
        return _FLUX2_BY_WIDTH[hidden]
    if hidden == 3072:
        last = (last_double if last_double is not None else -1, last_single if last_single is not None else -1)
        if last[0] > _KLEIN_4B_LAST[0] or last[1] > _KLEIN_4B_LAST[1]:
            return "flux1"
        if last[0] == _KLEIN_4B_LAST[0] or last[1] == _KLEIN_4B_LAST[1]:
            return "flux2-klein-4b"
    return "unknown"
