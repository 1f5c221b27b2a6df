"""Weights files with real headers and no weights: as long as the real ones, and almost nothing on disk (sparse)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from kleinctl.header import DTYPE_BITS, GGML_TYPES, BadHeader, read_safetensors
from kleinctl.identify import places

Shapes = Mapping[str, tuple[int, ...]]

KLEIN_4B = {"hidden": 3072, "text_width": 7680, "double": 5, "single": 20}
KLEIN_9B = {"hidden": 4096, "text_width": 12288, "double": 8, "single": 24}
FLUX2_DEV = {"hidden": 6144, "text_width": 15360, "double": 8, "single": 48}
QWEN3_4B = {"hidden": 2560, "mlp": 9728, "heads": 32}
QWEN3_8B = {"hidden": 4096, "mlp": 12288, "heads": 32}
QWEN3_06B = {"hidden": 1024, "mlp": 3072, "heads": 16, "layers": 28}


def header(shapes: Shapes, dtype: str = "BF16", metadata: Mapping[str, str] | None = None, **dtypes: str) -> bytes:
    """A safetensors header. `dtypes` gives other dtypes to names that end so: `_scale="F32"`."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, shape in shapes.items():
        own = next((other for end, other in dtypes.items() if name.endswith(end)), dtype)
        size = (math.prod(shape) * DTYPE_BITS[own] + 7) // 8
        entries[name] = {"dtype": own, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(
    path: Path,
    shapes: Shapes,
    dtype: str = "BF16",
    metadata: Mapping[str, str] | None = None,
    missing: int = 0,
    **dtypes: str,
) -> Path:
    """A sparse safetensors file of those tensors, `missing` bytes short; not zero where `identify` looks for zeros."""
    front = header(shapes, dtype, metadata, **dtypes)
    entries = json.loads(front[8:])
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(front)
        file.truncate(len(front) + end - missing)
    fill(path)
    return path


def fill(path: Path) -> None:
    """Put a byte into each place of a sparse file where `identify` looks for zeros."""
    size = path.stat().st_size
    with suppress(BadHeader), path.open("r+b") as file:  # some tests want headers that are none
        for place in places(read_safetensors(file, size)):
            if place < size:
                file.seek(place)
                file.write(b"\x3c")


def flux2(hidden: int, text_width: int, double: int, single: int) -> dict[str, tuple[int, ...]]:
    """The transformer under Black Forest Labs' names, as ComfyUI reads it."""
    h = hidden
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (h, 128),
        "txt_in.weight": (h, text_width),
        "time_in.in_layer.weight": (h, 256),
        "time_in.out_layer.weight": (h, h),
        "double_stream_modulation_img.lin.weight": (6 * h, h),
        "double_stream_modulation_txt.lin.weight": (6 * h, h),
        "single_stream_modulation.lin.weight": (3 * h, h),
    }
    for n in range(double):
        for stream in ("img", "txt"):
            at = f"double_blocks.{n}.{stream}"
            shapes |= {f"{at}_attn.norm.{which}_norm.scale": (128,) for which in ("query", "key")}
            shapes |= {f"{at}_attn.qkv.weight": (3 * h, h), f"{at}_attn.proj.weight": (h, h)}
            shapes |= {f"{at}_mlp.0.weight": (6 * h, h), f"{at}_mlp.2.weight": (h, 3 * h)}
    for n in range(single):
        at = f"single_blocks.{n}"
        shapes |= {f"{at}.norm.{which}_norm.scale": (128,) for which in ("query", "key")}
        shapes |= {f"{at}.linear1.weight": (9 * h, h), f"{at}.linear2.weight": (h, 4 * h)}
    return shapes | {"final_layer.linear.weight": (128, h), "final_layer.adaLN_modulation.1.weight": (2 * h, h)}


def flux2_diffusers(
    hidden: int, text_width: int, double: int, single: int, head: int = 128
) -> dict[str, tuple[int, ...]]:
    """The transformer as diffusers saves it: 169 tensors for klein 4B."""
    h = hidden
    shapes: dict[str, tuple[int, ...]] = {
        "time_guidance_embed.timestep_embedder.linear_1.weight": (h, 256),
        "time_guidance_embed.timestep_embedder.linear_2.weight": (h, h),
        "double_stream_modulation_img.linear.weight": (6 * h, h),
        "double_stream_modulation_txt.linear.weight": (6 * h, h),
        "single_stream_modulation.linear.weight": (3 * h, h),
        "x_embedder.weight": (h, 128),
        "context_embedder.weight": (h, text_width),
    }
    for n in range(double):
        at = f"transformer_blocks.{n}"
        square = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        shapes |= {f"{at}.attn.{name}.weight": (h, h) for name in square}
        shapes |= {f"{at}.attn.{name}.weight": (head,) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
        for ff in ("ff", "ff_context"):
            shapes |= {f"{at}.{ff}.linear_in.weight": (6 * h, h), f"{at}.{ff}.linear_out.weight": (h, 3 * h)}
    for n in range(single):
        at = f"single_transformer_blocks.{n}.attn"
        shapes |= {f"{at}.to_qkv_mlp_proj.weight": (9 * h, h), f"{at}.to_out.weight": (h, 4 * h)}
        shapes |= {f"{at}.norm_q.weight": (head,), f"{at}.norm_k.weight": (head,)}
    return shapes | {"norm_out.linear.weight": (2 * h, h), "proj_out.weight": (128, h)}


def flux1() -> dict[str, tuple[int, ...]]:
    """FLUX.1's tells under its own names, with all 19 + 38 blocks."""
    h = 3072
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (h, 64),
        "txt_in.weight": (h, 4096),
        "vector_in.in_layer.weight": (h, 768),
        "guidance_in.in_layer.weight": (h, 256),
    }
    for n in range(19):
        shapes |= {
            f"double_blocks.{n}.img_attn.qkv.weight": (3 * h, h),
            f"double_blocks.{n}.img_mod.lin.weight": (6 * h, h),
        }
    for n in range(38):
        shapes |= {f"single_blocks.{n}.linear1.weight": (7 * h, h), f"single_blocks.{n}.linear2.weight": (h, 5 * h)}
    return shapes


def flux1_diffusers() -> dict[str, tuple[int, ...]]:
    """FLUX.1's tells as diffusers saves them."""
    h = 3072
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (h, 64),
        "context_embedder.weight": (h, 4096),
        "time_text_embed.text_embedder.linear_1.weight": (h, 768),
    }
    for n in range(19):
        shapes[f"transformer_blocks.{n}.ff.net.0.proj.weight"] = (4 * h, h)
    for n in range(38):
        shapes[f"single_transformer_blocks.{n}.proj_mlp.weight"] = (4 * h, h)
    return shapes


def qwen3(
    hidden: int, mlp: int, heads: int, layers: int = 36, kv: int = 8, vocabulary: int = 151936, head: int = 128
) -> dict[str, tuple[int, ...]]:
    """A Qwen3 text encoder, its output tied to the vocabulary: 398 tensors for Qwen3 4B."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(layers):
        at = f"model.layers.{n}"
        shapes |= {f"{at}.input_layernorm.weight": (hidden,), f"{at}.post_attention_layernorm.weight": (hidden,)}
        shapes |= {f"{at}.self_attn.q_norm.weight": (head,), f"{at}.self_attn.k_norm.weight": (head,)}
        shapes |= {f"{at}.self_attn.q_proj.weight": (heads * head, hidden)}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (kv * head, hidden) for name in "kv"}
        shapes |= {f"{at}.self_attn.o_proj.weight": (hidden, heads * head)}
        shapes |= {f"{at}.mlp.gate_proj.weight": (mlp, hidden), f"{at}.mlp.up_proj.weight": (mlp, hidden)}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, mlp)}
    return shapes | {"model.norm.weight": (hidden,)}


def qwen3_vl() -> dict[str, tuple[int, ...]]:
    """Qwen3-VL 4B as ComfyUI's files have it: the text model of Qwen3 4B, and a vision tower."""
    return {**qwen3(**QWEN3_4B), "model.visual.patch_embed.proj.weight": (1024, 3, 2, 16, 16)}


def mistral() -> dict[str, tuple[int, ...]]:
    """Mistral Small 24B, FLUX.2 [dev]'s text encoder: no query norms."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (131072, 5120)}
    for n in range(40):
        at = f"model.layers.{n}"
        shapes |= {f"{at}.post_attention_layernorm.weight": (5120,), f"{at}.mlp.gate_proj.weight": (32768, 5120)}
    return shapes


def t5(vocabulary: int = 32128) -> dict[str, tuple[int, ...]]:
    """T5-XXL's encoder, or with a larger vocabulary UMT5-XXL's."""
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (vocabulary, 4096)}
    for n in range(24):
        shapes |= {f"encoder.block.{n}.layer.1.DenseReluDense.wi_{m}.weight": (10240, 4096) for m in (0, 1)}
    return shapes


def clip(width: int, mlp: int, layers: int) -> dict[str, tuple[int, ...]]:
    """A CLIP text model: CLIP-L (768, 3072, 12), CLIP-G (1280, 5120, 32)."""
    return {f"text_model.encoder.layers.{n}.mlp.fc1.weight": (mlp, width) for n in range(layers)}


def _layer(at: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{at}.weight": shape, f"{at}.bias": shape[:1]}


def _resnet(at: str, cin: int, cout: int, shortcut: str = "nin_shortcut") -> dict[str, tuple[int, ...]]:
    shapes = _layer(f"{at}.norm1", cin) | _layer(f"{at}.conv1", cout, cin, 3, 3)
    shapes |= _layer(f"{at}.norm2", cout) | _layer(f"{at}.conv2", cout, cout, 3, 3)
    return shapes | (_layer(f"{at}.{shortcut}", cout, cin, 1, 1) if cin != cout else {})


def _middle(at: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = _resnet(f"{at}.block_1", width, width) | _resnet(f"{at}.block_2", width, width)
    shapes |= _layer(f"{at}.attn_1.norm", width)
    for name in ("q", "k", "v", "proj_out"):
        shapes |= _layer(f"{at}.attn_1.{name}", width, width, 1, 1)
    return shapes


def vae(
    channels: int = 32, statistics: bool = True, encoder: bool = True, width: int = 128
) -> dict[str, tuple[int, ...]]:
    """An autoencoder under LDM names, as `ae.safetensors` has them; `width` is the decoder's, 96 in the small one."""
    shapes = _encoder(channels) if encoder else {}
    wide = 4 * width
    shapes |= _layer("decoder.post_quant_conv", channels, channels, 1, 1) if channels != 16 else {}
    shapes |= _layer("decoder.conv_in", wide, channels, 3, 3) | _middle("decoder.mid", wide)
    cin = wide
    for level, cout in ((3, wide), (2, wide), (1, 2 * width), (0, width)):
        for n in range(3):
            shapes |= _resnet(f"decoder.up.{level}.block.{n}", cin, cout)
            cin = cout
        shapes |= _layer(f"decoder.up.{level}.upsample.conv", cout, cout, 3, 3) if level else {}
    shapes |= _layer("decoder.norm_out", width) | _layer("decoder.conv_out", 3, width, 3, 3)
    return shapes | _statistics(channels, statistics)


def _encoder(channels: int) -> dict[str, tuple[int, ...]]:
    shapes = _layer("encoder.conv_in", 128, 3, 3, 3)
    cin = 128
    for level, cout in enumerate((128, 256, 512, 512)):
        for n in range(2):
            shapes |= _resnet(f"encoder.down.{level}.block.{n}", cin, cout)
            cin = cout
        shapes |= _layer(f"encoder.down.{level}.downsample.conv", cout, cout, 3, 3) if level < 3 else {}
    shapes |= _middle("encoder.mid", 512) | _layer("encoder.norm_out", 512)
    shapes |= _layer("encoder.conv_out", 2 * channels, 512, 3, 3)
    return shapes | (_layer("encoder.quant_conv", 2 * channels, 2 * channels, 1, 1) if channels != 16 else {})


def vae_diffusers(
    channels: int = 32, statistics: bool = True, width: int = 128, first: Iterable[int] = (3, 3)
) -> dict[str, tuple[int, ...]]:
    """An autoencoder's tells as diffusers saves it."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "decoder.conv_in.weight": (4 * width, channels, *first),
        "decoder.conv_out.weight": (3, width, 3, 3),
    }
    for n in range(2):
        shapes |= _resnet(f"decoder.mid_block.resnets.{n}", 4 * width, 4 * width, "conv_shortcut")
    return shapes | _statistics(channels, statistics)


def _statistics(channels: int, wanted: bool) -> dict[str, tuple[int, ...]]:
    if not wanted:
        return {}
    return {
        "bn.running_mean": (4 * channels,),
        "bn.running_var": (4 * channels,),
        "bn.num_batches_tracked": (),
    }


def lora(layers: Shapes, rank: int = 16, style: str = "peft") -> dict[str, tuple[int, ...]]:
    """An adapter of `layers` (their weights' names and shapes), as `peft` or `kohya` names its two factors."""
    down, up = ("lora_A", "lora_B") if style == "peft" else ("lora_down", "lora_up")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, inside) in layers.items():
        layer = name.removesuffix(".weight")
        layer = f"diffusion_model.{layer}" if style == "peft" else "lora_unet_" + layer.replace(".", "_")
        shapes |= {f"{layer}.{down}.weight": (rank, inside), f"{layer}.{up}.weight": (out, rank)}
        if style == "kohya":
            shapes[f"{layer}.alpha"] = ()
    return shapes


def matrices(shapes: Shapes, *words: str) -> dict[str, tuple[int, ...]]:
    """The 2-D tensors whose names hold one of `words`."""
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and any(word in name for word in words)}


def write_gguf(
    path: Path, shapes: Shapes, architecture: str = "", kind: int = 8, words: int = 0, missing: int = 0
) -> Path:
    """A sparse GGUF file of those tensors (shapes in torch's order), with a tokenizer of `words` words."""
    values = [_gguf_text("general.architecture") + _gguf_string(architecture)] if architecture else []
    if words:
        tokens = b"".join(_gguf_text(f"word{n}") for n in range(words))
        values.append(_gguf_text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, words) + tokens)
    front = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(values)) + b"".join(values)
    _, elements, nbytes = GGML_TYPES[kind]
    at = 0
    for name, shape in shapes.items():
        front += _gguf_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        front += struct.pack("<IQ", kind, at)
        at += -(-math.prod(shape) // elements * nbytes // 32) * 32
    start = -(-len(front) // 32) * 32
    with path.open("wb") as file:
        file.write(front)
        file.truncate(start + at - missing)
    return path


def _gguf_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _gguf_string(text: str) -> bytes:
    return struct.pack("<I", 8) + _gguf_text(text)


def unet(
    text_width: int, depths: tuple[int, ...] = (0, 2, 10), pooled: int | None = 2816
) -> dict[str, tuple[int, ...]]:
    """A UNet under LDM names: SDXL's has 1,680 tensors; of 1.5 `unet(768, (1, 1, 1, 0), None)` has 686."""
    shapes = _layer("time_embed.0", 1280, 320) | _layer("time_embed.2", 1280, 1280)
    if pooled:
        shapes |= _layer("label_emb.0.0", 1280, pooled) | _layer("label_emb.0.2", 1280, 1280)
    shapes |= _layer("input_blocks.0.0", 320, 4, 3, 3)
    widths = [320 * times for times in (1, 2, 4, 4)[: len(depths)]]
    skips, at, channels = [320], 1, 320
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for _ in range(2):
            shapes |= _unet_block(f"input_blocks.{at}", channels, width, depth, text_width)
            skips, at, channels = [*skips, width], at + 1, width
        if level < len(depths) - 1:
            shapes |= _layer(f"input_blocks.{at}.0.op", width, width, 3, 3)
            skips, at = [*skips, width], at + 1
    middle = max(depths[-1], 1)
    shapes |= _unet_block("middle_block", channels, channels, middle, text_width)
    shapes |= {
        name.replace("output_blocks.99.0", "middle_block.2"): shape
        for name, shape in _unet_block("output_blocks.99", channels, channels, 0, 0).items()
    }
    at = 0
    for level in reversed(range(len(depths))):
        for n in range(3):
            shapes |= _unet_block(
                f"output_blocks.{at}", channels + skips.pop(), widths[level], depths[level], text_width
            )
            channels = widths[level]
            if n == 2 and level:
                shapes |= _layer(f"output_blocks.{at}.{2 if depths[level] else 1}.conv", channels, channels, 3, 3)
            at += 1
    return shapes | _layer("out.0", 320) | _layer("out.2", 4, 320, 3, 3)


def _unet_block(at: str, cin: int, cout: int, depth: int, text_width: int) -> dict[str, tuple[int, ...]]:
    shapes = _layer(f"{at}.0.in_layers.0", cin) | _layer(f"{at}.0.in_layers.2", cout, cin, 3, 3)
    shapes |= _layer(f"{at}.0.emb_layers.1", cout, 1280)
    shapes |= _layer(f"{at}.0.out_layers.0", cout) | _layer(f"{at}.0.out_layers.3", cout, cout, 3, 3)
    shapes |= _layer(f"{at}.0.skip_connection", cout, cin, 1, 1) if cin != cout else {}
    if not depth:
        return shapes
    shapes |= (
        _layer(f"{at}.1.norm", cout) | _layer(f"{at}.1.proj_in", cout, cout) | _layer(f"{at}.1.proj_out", cout, cout)
    )
    for n in range(depth):
        block = f"{at}.1.transformer_blocks.{n}"
        for attention, inside in (("attn1", cout), ("attn2", text_width)):
            shapes |= {
                f"{block}.{attention}.to_q.weight": (cout, cout),
                f"{block}.{attention}.to_k.weight": (cout, inside),
            }
            shapes |= {f"{block}.{attention}.to_v.weight": (cout, inside)} | _layer(
                f"{block}.{attention}.to_out.0", cout, cout
            )
        shapes |= _layer(f"{block}.ff.net.0.proj", 8 * cout, cout) | _layer(f"{block}.ff.net.2", cout, 4 * cout)
        for norm in ("norm1", "norm2", "norm3"):
            shapes |= _layer(f"{block}.{norm}", cout)
    return shapes


def checkpoint(kind: str = "sdxl") -> dict[str, tuple[int, ...]]:
    """A whole checkpoint, UNet, VAE and text encoders in one: 2,500 tensors of `sdxl`, 1,100 of `sd15`."""
    shapes = unet(2048) if kind == "sdxl" else unet(768, (1, 1, 1, 0), None)
    whole = {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}
    whole |= {f"first_stage_model.{name}": shape for name, shape in vae(4, statistics=False).items()}
    at = "conditioner.embedders.0.transformer" if kind == "sdxl" else "cond_stage_model.transformer"
    whole |= {f"{at}.{name}": shape for name, shape in clip_whole(768, 12).items()}
    if kind == "sdxl":
        for n in range(32):
            block = f"conditioner.embedders.1.model.transformer.resblocks.{n}"
            whole |= {f"{block}.attn.in_proj_weight": (3840, 1280), f"{block}.attn.in_proj_bias": (3840,)}
            whole |= _layer(f"{block}.attn.out_proj", 1280, 1280) | _layer(f"{block}.ln_1", 1280)
            whole |= _layer(f"{block}.ln_2", 1280) | _layer(f"{block}.mlp.c_fc", 5120, 1280)
            whole |= _layer(f"{block}.mlp.c_proj", 1280, 5120)
    return whole


def clip_whole(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """A CLIP text model with all its tensors: 196 for CLIP-L."""
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for n in range(layers):
        at = f"text_model.encoder.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _layer(f"{at}.self_attn.{name}", width, width)
        shapes |= _layer(f"{at}.layer_norm1", width) | _layer(f"{at}.layer_norm2", width)
        shapes |= _layer(f"{at}.mlp.fc1", 4 * width, width) | _layer(f"{at}.mlp.fc2", width, 4 * width)
    return shapes | _layer("text_model.final_layer_norm", width)


def scaled(shapes: Shapes, scale: tuple[int, ...] = (), end: str = "weight_scale") -> dict[str, tuple[int, ...]]:
    """An fp8 file's tensors: beside each large matrix its scale, of that shape (`(0,)`: one for each row)."""
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        out[name] = shape
        if len(shape) == 2 and name.endswith(".weight") and min(shape) > 1000:
            out[name.removesuffix("weight") + end] = (shape[0], 1) if scale == (0,) else tuple(scale)
    return out


def esrgan() -> dict[str, tuple[int, ...]]:
    """An ESRGAN upscaler, 23 blocks: 702 tensors."""
    shapes = _layer("conv_first", 64, 3, 3, 3)
    for n in range(23):
        for dense in (1, 2, 3):
            for m in range(1, 6):
                shapes |= _layer(f"body.{n}.rdb{dense}.conv{m}", 64 if m == 5 else 32, 32 + 32 * m, 3, 3)
    for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
        shapes |= _layer(name, 64, 64, 3, 3)
    return shapes | _layer("conv_last", 3, 64, 3, 3)


#: A tokenizer of so many words and merges is in every GGUF file of a text encoder.
GGUF_WORDS = 300_000


def models_folder(root: Path) -> list[Path]:
    """A ComfyUI `models` folder of 200 files as people have them, no two with the same header: what `doctor` walks."""
    rank = 16
    attention = {name: shape for name, shape in unet(2048).items() if ".attn" in name and len(shape) == 2}
    klein, flux = matrices(flux2(**KLEIN_4B), "_blocks"), matrices(flux1(), "_blocks")
    tags = json.dumps({f"picture {n}": {f"tag {m}": m for m in range(8)} for n in range(60)})
    files = []
    for n in range(30):
        for kind, layers in (("sdxl", attention), ("klein", klein), ("flux", flux)):
            path = root / "loras" / f"{kind}-{n}.safetensors"
            shapes = lora(layers, rank + n, "peft" if n % 3 == 0 else "kohya")
            files.append(write(path, shapes, "F16", {"ss_tag_frequency": tags, "ss_network_dim": str(rank + n)}))
    for n in range(30):
        path = root / "checkpoints" / f"mix-{n}.safetensors"
        files.append(write(path, checkpoint("sd15" if n % 3 else "sdxl"), "F16", {"modelspec.title": f"mix {n}"}))
    transformers = [
        (flux2(**KLEIN_4B), "BF16"),
        (flux2(**KLEIN_9B), "BF16"),
        (scaled(flux2(**FLUX2_DEV)), "F8_E4M3"),
        ({f"model.diffusion_model.{name}": shape for name, shape in flux1().items()}, "BF16"),
        (flux2_diffusers(**KLEIN_4B), "BF16"),
    ]
    encoders = [
        (qwen3(**QWEN3_4B), "BF16"),
        (scaled(qwen3(**QWEN3_8B)), "F8_E4M3"),
        (qwen3_vl(), "BF16"),
        (t5(), "F16"),
        (clip_whole(768, 12), "F16"),
    ]
    autoencoders = [vae(), vae(16, False), vae(4, False), vae(encoder=False, width=96), vae_diffusers()]
    for n in range(25):
        made = {"made": f"by {n}"}
        shapes, dtype = transformers[n % 5]
        files.append(
            write(root / "diffusion_models" / f"model-{n}.safetensors", shapes, dtype, made, weight_scale="F32")
        )
        files.append(write(root / "vae" / f"vae-{n}.safetensors", autoencoders[n % 5], "F32", made))
        if n < 20:
            shapes, dtype = encoders[n % 5]
            files.append(write(root / "text_encoders" / f"te-{n}.safetensors", shapes, dtype, made, weight_scale="F32"))
    names = {f"blk.{n}.{end}.weight": shape for n in range(36) for end, shape in _GGUF_QWEN3_4B.items()}
    for n in range(2):
        path = root / "text_encoders" / f"Qwen3-4B-{n}.gguf"
        files.append(write_gguf(path, {"token_embd.weight": (151936, 2560), **names}, "qwen3", 12, GGUF_WORDS + n))
    for n in range(3):
        files.append(write_gguf(root / "diffusion_models" / f"klein-{n}.gguf", flux2(**KLEIN_4B), "flux", 8))
    for n in range(5):
        files.append(write(root / "upscale_models" / f"4x-{n}.safetensors", esrgan(), "F32", {"n": str(n)}))
    return files


_GGUF_QWEN3_4B = {
    "attn_norm": (2560,),
    "attn_q": (4096, 2560),
    "attn_k": (1024, 2560),
    "attn_v": (1024, 2560),
    "attn_q_norm": (128,),
    "attn_k_norm": (128,),
    "attn_output": (2560, 4096),
    "ffn_norm": (2560,),
    "ffn_gate": (9728, 2560),
    "ffn_up": (9728, 2560),
    "ffn_down": (2560, 9728),
}
