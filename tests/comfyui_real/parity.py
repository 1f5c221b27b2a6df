"""One tiny klein in both layouts: a pipeline of diffusers, and the same weights as single files for ComfyUI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, VOCABULARY = 2560, 36, 151936
#: klein's chat template without thinking, as one expression: of a template its own last newline would be dropped.
TEMPLATE = (
    "{{ '<|im_start|>user\\n' + messages[0]['content'] + "
    "'<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
)
#: Names of diffusers and of the single file, as regular expressions.
TRANSFORMER = (
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^((?:double_stream_modulation_(?:img|txt)|single_stream_modulation)\.)linear", r"\1lin"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight", r"single_blocks.\1.norm.\2.scale"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight", r"double_blocks.\1.img_attn.norm.\2.scale"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.weight", r"double_blocks.\1.txt_attn.norm.\2.scale"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"norm\.q\.scale$", "norm.query_norm.scale"),
    (r"norm\.k\.scale$", "norm.key_norm.scale"),
)
#: Stacked into one matrix: where the first of the three lies, and what it becomes.
STACKED = (("to_q", "to_k", "to_v", "img"), ("add_q_proj", "add_k_proj", "add_v_proj", "txt"))


def pipeline(tokenizer: Path) -> Any:
    """A pipeline whose pictures depend on prompt and reference: full gain, sharp attention, loud text.

    With the weights that diffusers begins with, prompt and reference move a picture by a third of one of 255 levels,
    and a comparison could not fail.
    """
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=3 * HIDDEN,
        mlp_ratio=3.0,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(decoder_block_out_channels=(32, 64, 128, 128))
    vae.bn.running_mean.normal_(0, 0.05)
    vae.bn.running_var.uniform_(2, 4)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    )
    encoder = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, values in transformer.named_parameters():
            if values.ndim == 1:
                values.copy_(2.0 + 0.3 * torch.randn_like(values))
            else:
                gain = 2.0 if name.startswith("context_embedder") else 1.3
                values.normal_(0, gain / values.shape[1] ** 0.5)
        for name, values in encoder.named_parameters():
            if values.ndim == 1:
                values.add_(torch.randn_like(values) * 0.1)
            elif "layers" in name:
                values.normal_(0, values.shape[1] ** -0.5)
    words = Qwen2Tokenizer.from_pretrained(tokenizer)
    words.chat_template = TEMPLATE
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    pipe = Flux2KleinPipeline(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=words,
        transformer=transformer.eval(),
        is_distilled=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: Any, transformer: Path, text_encoder: Path, vae: Path) -> None:
    """The pipeline's weights as ComfyUI's single files. Those of the VAE keep their names: ComfyUI takes both."""
    from safetensors.torch import save_file

    for path in (transformer, text_encoder, vae):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_transformer(pipe, transformer)
    words = {name: values for name, values in pipe.text_encoder.state_dict().items() if "lm_head" not in name}
    save_file({name: values.contiguous() for name, values in words.items()}, text_encoder)
    save_file({name: values.contiguous() for name, values in pipe.vae.state_dict().items()}, vae)


def save_transformer(pipe: Any, path: Path, *, swapped: bool = True) -> None:
    """The transformer; without `swapped` the halves of its last modulation stay as diffusers has them: a wrong file."""
    import torch
    from safetensors.torch import save_file

    found, single = pipe.transformer.state_dict(), {}
    for name, values in found.items():
        block = re.match(r"(transformer_blocks\.(\d+)\.attn\.)(to_q|add_q_proj)\.weight$", name)
        if block:
            *names, side = next(each for each in STACKED if each[0] == block[3])
            stacked = [found[f"{block[1]}{each}.weight"] for each in names]
            single[f"double_blocks.{block[2]}.{side}_attn.qkv.weight"] = torch.cat(stacked)
        elif not re.search(r"attn\.(?:to_[kv]|add_[kv]_proj)\.weight$", name):
            if name.startswith("norm_out") and swapped:
                scale, shift = values.chunk(2)
                values = torch.cat([shift, scale])
            single[_renamed(name)] = values
    save_file({name: values.contiguous() for name, values in single.items()}, path)


def _renamed(name: str) -> str:
    for pattern, replacement in TRANSFORMER:
        name = re.sub(pattern, replacement, name)
    return name


def picture(pipe: Any, prompt: str, seed: int, steps: int, guidance: float, images: list[Any]) -> bytes:
    """What diffusers draws at 128 x 96, cut to 8 bits as ComfyUI cuts and not rounded."""
    import torch

    noise = torch.randn((1, 128, 6, 8), generator=torch.Generator().manual_seed(seed))
    drawn = pipe(
        prompt=prompt,
        image=images or None,
        width=128,
        height=96,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="np",
    ).images[0]
    return (255.0 * drawn).clip(0, 255).astype("uint8").tobytes()
