"""How long doctor takes on a store with klein-4b and a ComfyUI folder with 200 model files (headers, no weights).

python tools/measure_doctor.py [--runs 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import weights  # noqa: E402

#: Files of a ComfyUI that has been in use for a while, by folder: 200 in all.
LORAS, CHECKPOINTS = 110, 30


def fill_store(home: Path) -> None:
    """klein-4b in the places of the diffusers layout, as sparse files of the real shapes and sizes."""
    folder = home / "models" / "klein-4b" / "diffusers"
    weights.write(
        folder / "transformer/diffusion_pytorch_model.safetensors", weights.flux2_diffusers(**weights.KLEIN_4B)
    )
    encoder = weights.qwen3(**weights.QWEN3_4B)
    names = list(encoder)
    for number, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        weights.write(
            folder / f"text_encoder/model-0000{number}-of-00002.safetensors", {name: encoder[name] for name in half}
        )
    weights.write(folder / "vae/diffusion_pytorch_model.safetensors", weights.vae_diffusers())


def fill_comfyui(models: Path) -> int:
    """200 model files as people have them; returns how many there are."""
    klein, flux1 = weights.flux2(**weights.KLEIN_4B), weights.flux1()
    loras = weights.lora(weights.matrices(flux1, "blocks")), weights.lora(weights.matrices(klein, "blocks"))
    checkpoint = {f"model.diffusion_model.{name}": shape for name, shape in _unet().items()}
    for number in range(LORAS):
        weights.write(models / "loras" / f"style-{number}.safetensors", loras[number % 2])
    for number in range(CHECKPOINTS):
        weights.write(models / "checkpoints" / f"sdxl-{number}.safetensors", checkpoint)
    for number in range(15):
        weights.write(models / "diffusion_models" / f"flux-{number}.safetensors", klein if number % 2 else flux1)
        weights.write(models / "text_encoders" / f"encoder-{number}.safetensors", _encoder(number))
        weights.write(models / "vae" / f"vae-{number}.safetensors", weights.vae(channels=(4, 16, 32)[number % 3]))
        weights.write_gguf(models / "diffusion_models" / f"quant-{number}.gguf", klein, "flux")
    return sum(path.is_file() for path in models.rglob("*"))


def _encoder(number: int) -> dict[str, tuple[int, ...]]:
    return (weights.qwen3(**weights.QWEN3_4B), weights.t5(), weights.clip(768, 3072, 12))[number % 3]


def _unet() -> dict[str, tuple[int, ...]]:
    """As many tensors as SDXL's UNet has (1,680), with its tells."""
    shapes: dict[str, tuple[int, ...]] = {
        "label_emb.0.0.weight": (1280, 2816),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
    }
    for block in range(9):
        for layer in range(10):
            for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v"):
                at = f"input_blocks.{block}.1.transformer_blocks.{layer}.{part}"
                shapes |= {f"{at}.weight": (1280, 1280), f"{at}.bias": (1280,), f"{at}.norm": (1280,)}
    return shapes


def seconds(home: Path, *words: str) -> float:
    """How long one command takes, from process start to its end."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "kleinctl", *words],
        env={**os.environ, "KLEINCTL_HOME": str(home)},
        cwd=ROOT,
        capture_output=True,
    )
    took = time.perf_counter() - start
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr.decode())
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        home, comfyui = Path(name) / "kleinctl", Path(name) / "ComfyUI"
        fill_store(home)
        count = fill_comfyui(comfyui / "models")
        print(f"klein-4b in the store, {count} files in ComfyUI; median (least) of {runs} runs")
        looks = {
            "doctor": ("doctor",),
            "doctor --comfyui DIR": ("doctor", "--comfyui", str(comfyui)),
            "doctor --comfyui DIR --json": ("doctor", "--comfyui", str(comfyui), "--json"),
        }
        for title, words in looks.items():
            taken = [seconds(home, *words) for _ in range(runs)]
            print(f"{title:30} {statistics.median(taken):.2f} s ({min(taken):.2f} s)")


if __name__ == "__main__":
    main()
