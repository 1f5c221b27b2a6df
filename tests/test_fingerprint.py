"""Weights that were repacked under other names are known again; weights that were trained further are not."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from kleinctl.fingerprint import PROBES, fingerprint, of_file
from kleinctl.header import read_safetensors
from kleinctl.identify import identify
from kleinctl.manifest import Model, load
from kleinctl.problem import KleinctlError
from kleinctl.signatures import plain_names
from tests import weights
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "manifests" / "klein-tiny"
PARTS = {
    "transformer": TINY / "transformer" / "diffusion_pytorch_model.safetensors",
    "text-encoder": TINY / "text_encoder" / "model.safetensors",
    "vae": TINY / "vae" / "diffusion_pytorch_model.safetensors",
}
DTYPES = {4: "F32", 2: "F16"}


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load(REPOSITORY / "manifests" / "klein-tiny.toml")


def contents(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor."""
    with path.open("rb") as file:
        header = read_safetensors(file, path.stat().st_size)
        found = {}
        for (name, tensor), start in zip(header.tensors.items(), header.starts, strict=True):
            file.seek(header.data + start)
            found[name] = (tensor.dtype, tensor.shape, file.read(tensor.nbytes or 0))
    return found


def save(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], metadata: dict[str, str]) -> Path:
    dtypes = {name: dtype for name, (dtype, _, _) in tensors.items()}
    front = weights.header({name: shape for name, (_, shape, _) in tensors.items()}, "F32", metadata, **dtypes)
    path.write_bytes(front + b"".join(data for _, _, data in tensors.values()))
    return path


def repacked(path: Path, role: str, rename: Callable[[str], str]) -> Path:
    tensors = {rename(name): tensor for name, tensor in sorted(contents(PARTS[role]).items(), reverse=True)}
    return save(path, tensors, {"made by": "another program", "title": "my favourite"})


@pytest.mark.parametrize(("role", "prefix"), [("transformer", "model.diffusion_model."), ("vae", "vae.")])
def test_a_part_repacked_under_another_name_prefix_and_metadata_is_still_named(tmp_path, tiny, role, prefix):
    path = repacked(tmp_path / "renamed.safetensors", role, lambda name: prefix + name)
    found = identify(path, [tiny])
    assert (found.part, found.sure) == (f"klein-tiny/{role}", "fingerprint")
    assert found.saw.endswith(f"; its fingerprint is that of klein-tiny/{role}")
    assert found.to_json()["sure"] == "fingerprint"


def test_a_text_encoder_with_other_metadata_is_still_named(tmp_path, tiny):
    path = repacked(tmp_path / "encoder.safetensors", "text-encoder", str)
    assert identify(path, [tiny]).part == "klein-tiny/text-encoder"


def as_comfyui_has_it(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> dict[str, tuple[str, tuple, bytes]]:
    """The transformer under Black Forest Labs' names: q, k and v in one tensor, the rest renamed."""
    names = {
        "context_embedder.": "txt_in.",
        "x_embedder.": "img_in.",
        "double_stream_modulation_img.linear.": "double_stream_modulation_img.lin.",
        ".attn.to_qkv_mlp_proj.": ".linear1.",
        ".attn.to_out.weight": ".linear2.weight",
        ".attn.norm_q.weight": ".norm.query_norm.scale",
        ".attn.norm_k.weight": ".norm.key_norm.scale",
        ".ff.linear_out.": ".img_mlp.2.",
        "single_transformer_blocks.": "single_blocks.",
    }
    out = {}
    for name, (dtype, shape, data) in tensors.items():
        new = name
        for old, short in names.items():
            new = new.replace(old, short)
        new = new.replace("transformer_blocks.", "double_blocks.")
        if new.startswith("double_blocks."):
            new = new.replace(".norm.", ".img_attn.norm.")
        if name.endswith(".attn.to_q.weight"):
            fused = [tensors[name.replace("to_q", piece)][2] for piece in ("to_q", "to_k", "to_v")]
            out[new.replace(".attn.to_q.", ".img_attn.qkv.")] = (dtype, (3 * shape[0], shape[1]), b"".join(fused))
        elif not name.endswith((".attn.to_k.weight", ".attn.to_v.weight")):
            out[new] = (dtype, shape, data)
    return out


def test_a_transformer_converted_to_the_other_layout_is_still_named(tmp_path, tiny):
    path = save(tmp_path / "tiny.safetensors", as_comfyui_has_it(contents(PARTS["transformer"])), {})
    found = identify(path, [tiny])
    assert (found.layout, found.part, found.sure) == ("single-file", "klein-tiny/transformer", "fingerprint")


@pytest.mark.parametrize("role", PARTS)
def test_weights_that_were_trained_further_are_not_called_the_original(tmp_path, tiny, role):
    tensors = contents(PARTS[role])
    for name, (dtype, shape, data) in tensors.items():
        tensors[name] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:] if data else data)
    found = identify(save(tmp_path / "finetune.safetensors", tensors, {}), [tiny])
    assert (found.part, found.sure) == (None, "header")


def test_other_weights_of_the_same_name_and_length_are_not_called_the_original(tmp_path, tiny):
    whole = bytearray(PARTS["vae"].read_bytes())
    tensors, changed = contents(PARTS["vae"]), "decoder.conv_in.weight"
    at = bytes(whole).index(tensors[changed][2])
    whole[at] ^= 1
    path = tmp_path / PARTS["vae"].name
    path.write_bytes(whole)
    found = identify(path, [tiny])
    assert (found.part, found.sure) == (None, "header")
    assert found.saw.endswith("; as long as klein-tiny/vae, but with other weights")


def test_a_sha256_says_more_than_a_fingerprint(tiny):
    part = tiny.part("vae")
    found = identify(PARTS["vae"], [tiny], part.sha256)
    assert (found.part, found.sure) == ("klein-tiny/vae", "sha256")
    assert identify(PARTS["vae"], [tiny], "0" * 64).part is None


def test_the_manifest_has_the_fingerprints_of_the_shipped_weights(tiny):
    assert {role: tiny.part(role).fingerprint for role in PARTS} == {r: of_file(path, r) for r, path in PARTS.items()}


def test_a_cut_file_has_no_fingerprint(tmp_path, tiny):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(PARTS["vae"].read_bytes()[:-10])
    found = identify(path, [tiny])
    assert (found.kind, found.family, found.part, found.sure) == ("truncated", "flux2-vae", None, "header")


def test_little_of_the_file_is_read(tmp_path):
    path = weights.write(tmp_path / "klein.safetensors", weights.flux2(**weights.KLEIN_9B))

    class Counting(io.FileIO):
        read_bytes = 0

        def read(self, size=-1):
            data = super().read(size)
            self.read_bytes += len(data)
            return data

    with path.open("rb") as file:
        header = read_safetensors(file, path.stat().st_size)
    with Counting(path) as counting:
        assert fingerprint("transformer", plain_names(header)[0], header, counting)
        assert 0 < counting.read_bytes < 100_000


def test_layouts_agree_on_what_is_read():
    shapes = weights.flux2(**weights.KLEIN_4B), weights.flux2_diffusers(**weights.KLEIN_4B)
    for names in PROBES["transformer"].values():
        single, diffusers = (name.replace("*", "0") for name in names)
        one, other = shapes[0][single], shapes[1][diffusers]
        assert one[1:] == other[1:] and one[0] in (other[0], 3 * other[0])


def test_a_fingerprint_that_is_none_is_refused_in_a_manifest(tmp_path):
    text = (REPOSITORY / "manifests" / "klein-tiny.toml").read_text(encoding="utf-8")
    path = tmp_path / "m.toml"
    path.write_text(text.replace('fingerprint = "', 'fingerprint = "x', 1), encoding="utf-8")
    with pytest.raises(KleinctlError, match=r"fingerprint: .*64 lower-case hex digits"):
        load(path)


def test_the_tool_prints_the_manifests_line(tmp_path, tiny):
    tool = REPOSITORY / "tools" / "fingerprint.py"
    path = tmp_path / "no.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    command = [sys.executable, tool, PARTS["vae"], path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env={"PYTHONPATH": "."}, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        "# diffusion_pytorch_model.safetensors: 32 latent channels, batch-norm statistics: FLUX.2 VAE",
        f'fingerprint = "{tiny.part("vae").fingerprint}"',
        "# no.safetensors: no tensors",
        "# no fingerprint",
    ]
