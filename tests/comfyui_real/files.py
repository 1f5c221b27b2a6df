"""Files that a real ComfyUI loads and a processor computes in seconds: klein's architecture, as small as it allows.

Widths are fixed where ComfyUI fixes them; what stays zero is a hole in the file. The text encoder has one head and a
small MLP, which ComfyUI takes only with a node that tells it so.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

from tests import weights

#: hidden 2560 and 36 layers stay: ComfyUI knows the encoder by them, and reads its layers 9, 18 and 27.
SLIM = {"mlp": 64, "heads": 1, "kv": 1}
NODE = f'''"""For tests: Qwen3 with one head and a small MLP."""
import comfy.text_encoders.llama as llama


def slim(name):
    make = getattr(llama, name)
    own = {{"intermediate_size": {SLIM["mlp"]}, "num_attention_heads": 1, "num_key_value_heads": 1}}
    setattr(llama, name, lambda **given: make(**{{**own, **given}}))


slim("Qwen3_4BConfig")
slim("Qwen3_8BConfig")
NODE_CLASS_MAPPINGS = {{}}
'''


def write(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A bf16 file: matrices are noise of unit gain, norms one, biases zero; of a vocabulary the first 16384 words."""
    import torch

    head = weights.header(shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        for name, entry in json.loads(head[8:]).items():
            shape = entry["shape"]
            file.seek(len(head) + entry["data_offsets"][0])
            file.write(_values(torch, name, shape))
        file.truncate(len(head) + entry["data_offsets"][1])
    return path


def _values(torch, name: str, shape: list[int]) -> bytes:
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if "embed_tokens" in name:
        shape = [min(shape[0], 16384), *shape[1:]]
        values = torch.randn(shape, generator=random)
    elif len(shape) > 1:
        values = torch.randn(shape, generator=random) / math.sqrt(math.prod(shape[1:]))
    elif name.startswith("bn."):
        values = torch.full(shape, 3.0) if name.endswith("var") else torch.randn(shape, generator=random) * 0.05
    else:
        values = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    return values.to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes()


def transformer(path: Path, text_width: int = 7680) -> Path:
    """klein with one block of each kind, 128 wide."""
    return write(path, weights.flux2(hidden=128, text_width=text_width, double=1, single=1))


def text_encoder(path: Path, hidden: int = 2560) -> Path:
    """Qwen3 4B, or 8B with 4096, slim."""
    return write(path, weights.qwen3(hidden=hidden, **SLIM))


def vae(path: Path, channels: int = 32) -> Path:
    """FLUX.2's VAE, or with 16 channels FLUX.1's."""
    return write(path, weights.vae(channels, statistics=channels == 32, width=32))


def base_directory(folder: Path) -> Path:
    """A base directory with the node for the slim encoder."""
    node = folder / "custom_nodes" / "slim_qwen3" / "__init__.py"
    node.parent.mkdir(parents=True)
    node.write_text(NODE, encoding="utf-8")
    return folder
