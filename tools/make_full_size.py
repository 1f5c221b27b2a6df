"""Make a full-size FLUX.2 [klein] 4B with random weights, in the diffusers layout, as an installed model.

    python tools/make_full_size.py [--name klein-4b-random] [--device cuda]

Sizes, dtypes, file layout and memory behaviour are those of the real model; the pictures are noise. Weights are scaled
so that the prompt, the seed and a reference picture all change the picture: two backends that agree on it agree for a
reason. The files go to KLEINCTL_HOME/models/NAME/diffusers/ with a manifest in KLEINCTL_HOME/manifests/, so that
`kleinctl run --model NAME` takes the road that the real model takes, sha256 included. Needs 16 GB of disk.

The tokenizer is klein-tiny's: the real one cannot be made, and what it splits does not matter to random weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
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


def scale_linears(module: Any, gain: float) -> None:
    """Redraw every matrix with standard deviation gain / sqrt(fan in), so that signals keep their size."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, gain / parameter[0].numel() ** 0.5)


def make(folder: Path, device: str, seed: int, tokenizer: Path) -> None:
    """Build the three networks with the real classes and write them as the hub has them."""
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = Flux2Transformer2DModel(**TRANSFORMER)
        scale_linears(transformer, 1.0)
        transformer.save_pretrained(folder / "transformer", max_shard_size="10GB")
        del transformer
        text_encoder = Qwen3ForCausalLM(Qwen3Config(**TEXT_ENCODER, rope_theta=1000000.0))
        scale_linears(text_encoder.model, 1.0)
        text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="5GB")
        del text_encoder
        vae = AutoencoderKLFlux2()
        vae.bn.running_mean.normal_(0, 0.05)
        vae.bn.running_var.uniform_(2, 4)
        vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    shutil.copytree(tokenizer, folder / "tokenizer")
    index = {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": "0.37.0.dev0",
        "is_distilled": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def manifest_text(name: str, folder: Path) -> str:
    """klein-4b's manifest with this model's name, and its files' real sizes and sha256."""
    from kleinctl.verify import hash_file

    original = (REPOSITORY / "manifests" / "klein-4b.toml").read_text(encoding="utf-8")
    head = original[: original.index("[[part]]")]
    lines = [
        f'name = "{name}"' if line.startswith("name =") else line
        for line in head.splitlines()
        if not line.startswith(("automatic =", "title ="))
    ]
    lines.insert(1, 'title = "FLUX.2 [klein] 4B, random weights"')
    roles = {"transformer": "transformer", "text_encoder": "text-encoder", "vae": "vae", "tokenizer": "tokenizer"}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(hash_file, files))
    for path, sha256 in zip(files, hashes, strict=True):
        inside = path.relative_to(folder).as_posix()
        role = roles.get(inside.split("/")[0], "config") if path.suffix == ".safetensors" else "config"
        lines += [
            "",
            "[[part]]",
            f'id = "{inside.replace("/", "-").replace(".", "-").replace("_", "-").lower()}"',
            f'role = "{role}"',
            f'name = "{path.name}"',
            f"size = {path.stat().st_size}",
            f'sha256 = "{sha256}"',
            f'to = {{ diffusers = "{inside}" }}',
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    from kleinctl.home import home, models_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="klein-4b-random")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=TINY / "tokenizer")
    arguments = parser.parse_args()
    folder = models_folder() / arguments.name / "diffusers"
    start = time.monotonic()
    make(folder, arguments.device, arguments.seed, arguments.tokenizer)
    print(f"weights written in {time.monotonic() - start:.0f} s: {folder}")
    start = time.monotonic()
    (home() / "manifests").mkdir(exist_ok=True)
    (home() / "manifests" / f"{arguments.name}.toml").write_text(
        manifest_text(arguments.name, folder), encoding="utf-8"
    )
    print(f"hashed in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
