"""Make a full-size FLUX.2 [klein] 4B with random weights, in the diffusers layout, as an installed model.

    python tools/make_full_size.py [--base] [--device cuda] [--comfyui DIR]

Sizes, dtypes, file layout and memory behaviour are those of the real model; the pictures are noise. Weights are scaled
so that the prompt, the seed and a reference picture all change the picture: two backends that agree on it agree for a
reason. The files go to KLEINCTL_HOME/models/NAME/diffusers/ with a manifest in KLEINCTL_HOME/manifests/, so that
`kleinctl run --model NAME` takes the road that the real model takes, sha256 included. Needs 16 GB of disk.

The tokenizer is klein-tiny's: the real one cannot be made, and what it splits does not matter to random weights.

With the folder of a ComfyUI, the same weights are also written as single files to KLEINCTL_HOME/models/NAME/comfyui/,
the transformer in bf16 and in fp8; 20 GB more. Both layouts then have that ComfyUI's tokenizer and split words alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.comfyui_real import parity  # noqa: E402

TINY = REPOSITORY / "manifests" / "klein-tiny"

# The config files of black-forest-labs/FLUX.2-klein-4B.
TRANSFORMER = {
    "attention_head_dim": 128,
    "axes_dims_rope": (32, 32, 32, 32),
    "eps": 1e-6,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
TEXT_ENCODER = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
#: ComfyUI's single files: role, place, and what else the manifest says of them. The VAE is published as float32.
SINGLE_FILES = (
    ("transformer", "diffusion_models/{}-bf16.safetensors", {"precision": "bf16", "dtype": "bfloat16"}),
    ("transformer", "diffusion_models/{}-fp8.safetensors", {"precision": "fp8", "dtype": "float8_e4m3fn"}),
    ("text-encoder", "text_encoders/{}-qwen3.safetensors", {"dtype": "bfloat16", "family": "qwen3-4b"}),
    ("vae", "vae/{}-vae.safetensors", {"dtype": "float32", "family": "flux2-vae"}),
)
#: What the published fp8 file has as fp8: the matrices of all blocks. The largest number of float8_e4m3fn.
FP8_BLOCKS, FP8_LARGEST = ("double_blocks.", "single_blocks."), 448.0


def scale_linears(module: Any, gain: float) -> None:
    """Redraw every matrix with standard deviation gain / sqrt(fan in), so that signals keep their size."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, gain / parameter[0].numel() ** 0.5)


def sharpen(transformer: Any) -> None:
    """Let attention choose: with norms of 1 it takes the mean of everything, and a prompt moves a picture less than
    bfloat16 does (1.6 and 2.5 of 255 levels at 128 x 96 and a width of 256; so it is 11.5 and 3.2)."""
    import torch

    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 1:
                parameter.normal_(2.0, 0.3)


def make(
    folder: Path, device: str, seed: int, tokenizer: Path, singles: Sequence[Path] = (), *, distilled: bool = True
) -> None:
    """Build the three networks with the real classes and write them as the hub has them, and as `singles`."""
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = Flux2Transformer2DModel(**TRANSFORMER)
        scale_linears(transformer, 1.0)
        sharpen(transformer)
        transformer.save_pretrained(folder / "transformer", max_shard_size="10GB")
        text_encoder = Qwen3ForCausalLM(Qwen3Config(**TEXT_ENCODER, rope_theta=1000000.0))
        scale_linears(text_encoder.model, 1.0)
        text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="5GB")
        vae = AutoencoderKLFlux2()
        vae.bn.running_mean.normal_(0, 0.05)
        vae.bn.running_var.uniform_(2, 4)
        vae.save_pretrained(folder / "vae")
    if singles:
        bf16, fp8, *others = singles
        networks = SimpleNamespace(transformer=transformer, text_encoder=text_encoder, vae=vae.float())
        parity.save(networks, bf16, *others)
        save_fp8(bf16, fp8, device)
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    shutil.copytree(tokenizer, folder / "tokenizer")
    if singles:
        (folder / "tokenizer" / "chat_template.jinja").write_text(parity.TEMPLATE, encoding="utf-8")
    index = {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": "0.37.0.dev0",
        "is_distilled": distilled,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_fp8(bf16: Path, path: Path, device: str) -> None:
    """The single file with the matrices of its blocks as fp8, each with its scale and a mark that ComfyUI looks for.

    Of activations nothing is known, so they are scaled as they come: the published file has `input_scale` too.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors, layers = load_file(bf16, device=device), {}
    for name, values in list(tensors.items()):
        if name.startswith(FP8_BLOCKS) and values.dim() == 2:
            layer = name.removesuffix(".weight")
            scale = values.abs().max().float() / FP8_LARGEST
            tensors[name] = (values.float() / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
            tensors[f"{layer}.weight_scale"] = scale
            layers[layer] = {"format": "float8_e4m3fn"}
    marks = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, path, metadata={"_quantization_metadata": marks})


def manifest_text(like: str, name: str, folder: Path, singles: Sequence[Path] = ()) -> str:
    """The manifest of `like` with this model's name, and its files' real sizes and sha256."""
    from kleinctl.verify import hash_file

    original = (REPOSITORY / "manifests" / f"{like}.toml").read_text(encoding="utf-8")
    head = original[: original.index("[[part]]")]
    lines = [
        f'name = "{name}"' if line.startswith("name =") else line
        for line in head.splitlines()
        if not line.startswith(("automatic =", "title ="))
    ]
    lines.insert(1, f'title = "{like}, random weights"')
    roles = {"transformer": "transformer", "text_encoder": "text-encoder", "vae": "vae", "tokenizer": "tokenizer"}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:
        hashes = dict(zip([*files, *singles], pool.map(hash_file, [*files, *singles]), strict=True))
    for path in files:
        inside = path.relative_to(folder).as_posix()
        role = roles.get(inside.split("/")[0], "config") if path.suffix == ".safetensors" else "config"
        lines += part_lines(path, inside, role, "diffusers", {"sha256": hashes[path]})
    for path, (role, inside, facts) in zip(singles, SINGLE_FILES, strict=False):
        lines += part_lines(path, inside.format(name), role, "comfyui", {"sha256": hashes[path], **facts})
    return "\n".join(lines) + "\n"


def part_lines(path: Path, inside: str, role: str, layout: str, facts: dict[str, str]) -> list[str]:
    """A part of the manifest: the file, and where the layout has it."""
    return [
        "",
        "[[part]]",
        f'id = "{inside.replace("/", "-").replace(".", "-").replace("_", "-").lower()}"',
        f'role = "{role}"',
        f'name = "{path.name}"',
        f"size = {path.stat().st_size}",
        *(f'{key} = "{value}"' for key, value in facts.items()),
        f'to = {{ {layout} = "{inside}" }}',
    ]


def main() -> None:
    from kleinctl.home import home, models_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="store_true", help="as the base model has it: 25 steps with guidance")
    parser.add_argument("--name", help="klein-4b-random, or klein-base-4b-random")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=TINY / "tokenizer")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="write ComfyUI's single files too")
    arguments = parser.parse_args()
    like = "klein-base-4b" if arguments.base else "klein-4b"
    name = arguments.name or f"{like}-random"
    folder = models_folder() / name / "diffusers"
    tokenizer, singles = arguments.tokenizer, []
    if arguments.comfyui:
        tokenizer = arguments.comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer"
        singles = [folder.parent / "comfyui" / inside.format(name) for _, inside, _ in SINGLE_FILES]
    start = time.monotonic()
    make(folder, arguments.device, arguments.seed, tokenizer, singles, distilled=not arguments.base)
    print(f"weights written in {time.monotonic() - start:.0f} s: {folder}")
    start = time.monotonic()
    (home() / "manifests").mkdir(exist_ok=True)
    (home() / "manifests" / f"{name}.toml").write_text(manifest_text(like, name, folder, singles), encoding="utf-8")
    print(f"hashed in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
