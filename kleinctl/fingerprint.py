"""A digest of a few tensors, by which weights are known again when other names, prefixes or metadata surround them.

Where a file was only repacked, the bytes of its tensors are the same. A handful of them, read by their offsets, tell
what no header can: base from distilled. Digests change with the dtype, so an fp8 copy has another fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from kleinctl.header import Header, read_safetensors
from kleinctl.signatures import Names, plain_names

#: Bytes read of the front of a tensor. A fused tensor (q, k and v in one) begins as the first of its pieces does.
FRONT = 4096

#: Of each role the tensors that are read, by a name of ours: their names in each layout. `*` is the first and the last
#: block of a kind. Norms are untouched by quantizing, large matrices change with any training.
PROBES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "transformer": {
        "text input": ("txt_in.weight", "context_embedder.weight"),
        "image input": ("img_in.weight", "x_embedder.weight"),
        "double norm": ("double_blocks.*.img_attn.norm.query_norm.scale", "transformer_blocks.*.attn.norm_q.weight"),
        "double attention": ("double_blocks.*.img_attn.qkv.weight", "transformer_blocks.*.attn.to_q.weight"),
        "double mlp": ("double_blocks.*.img_mlp.2.weight", "transformer_blocks.*.ff.linear_out.weight"),
        "single norm": ("single_blocks.*.norm.key_norm.scale", "single_transformer_blocks.*.attn.norm_k.weight"),
        "single in": ("single_blocks.*.linear1.weight", "single_transformer_blocks.*.attn.to_qkv_mlp_proj.weight"),
        "single out": ("single_blocks.*.linear2.weight", "single_transformer_blocks.*.attn.to_out.weight"),
    },
    "text-encoder": {
        "norm": ("model.layers.*.post_attention_layernorm.weight",),
        "query norm": ("model.layers.*.self_attn.q_norm.weight",),
        "query": ("model.layers.*.self_attn.q_proj.weight",),
        "mlp": ("model.layers.*.mlp.down_proj.weight",),
    },
    "vae": {
        "statistics": ("bn.running_mean",),
        "first": ("decoder.conv_in.weight",),
        "last": ("decoder.conv_out.weight",),
        "last norm": ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
        "encoder": ("encoder.conv_in.weight",),
    },
}


def fingerprint(role: str, names: Names, header: Header, file: BinaryIO) -> str | None:
    """The digest (64 hex digits) of the weights in a whole safetensors `file`; None where none of `PROBES` is there.

    Reads at most `FRONT` bytes of each of some ten tensors, well under 1 MB in all.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    order = {name: place for place, name in enumerate(header.tensors)} if header.starts else {}
    found = False
    for probe, name in _probes(role, names):
        if name in order:
            tensor = header.tensors[name]
            file.seek(header.data + header.starts[order[name]])
            front = file.read(min(FRONT, tensor.nbytes or 0))
            digest.update(f"{probe} {tensor.dtype} {len(front)} ".encode() + front)
            found = True
    return digest.hexdigest() if found else None


def _probes(role: str, names: Names) -> Iterator[tuple[str, str]]:
    """Our name and the file's name of each tensor to read, in an order that no layout changes."""
    for probe, patterns in PROBES.get(role, {}).items():
        for pattern in patterns:
            before, star, after = pattern.partition("*")
            blocks = names.numbers(before) if star else ()
            ends = dict.fromkeys((blocks[0], blocks[-1])) if blocks else {}
            for name in [f"{before}{block}{after}" for block in ends] if star else [pattern]:
                if name in names:
                    yield probe, names.prefix + name


def of_file(path: Path, role: str) -> str | None:
    """The fingerprint of a safetensors file that is a whole part of that role.

    Raises:
        OSError: the file cannot be read.
        BadHeader: its header contradicts the format.
    """
    with path.open("rb") as file:
        header = read_safetensors(file, path.stat().st_size)
        return fingerprint(role, plain_names(header)[0], header, file)
