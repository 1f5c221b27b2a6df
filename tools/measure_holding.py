"""Time, memory and bits of staged-decode within several budgets, beside raw diffusers with everything on the card.

    python tools/measure_holding.py --model klein-4b-random --budgets 14.5 10.9 7.3 5.4 3.7 [--size 1024]

Each line is a process of its own: seconds of new prompts with the PNG written (median of five, after two), of the same
prompt again, the card's memory by NVML, anonymous and pinned host memory, and whether the pixels are those of raw
diffusers. The budgets are GiB with the CUDA context in them, which torch is held to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from kleinctl.units import GIB

PROMPTS = [f"a picture number {number} of a cat" for number in range(7)]


def measure(name: str, size: int, budget: float) -> dict[str, Any]:
    """One line, in this process; a budget of 0 is raw diffusers."""
    import torch

    from kleinctl import Budget, InstalledModel, Job, memory, store
    from kleinctl.plugins import Plugins

    plugins = Plugins()
    model, backend = plugins.model(name), plugins.backend("staged-decode").thing
    folder = store.model_folder(name, backend.layout)
    peak = _watch_card()
    if budget:
        torch.zeros(1, device="cuda")
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((budget * GIB - memory.CONTEXT_BYTES) / total)
        session = backend.load(InstalledModel(model, folder), Budget(int(budget * GIB), 2**40, "cuda:0"))

        def draw(prompt: str, seed: int) -> Any:
            return session.generate(Job(prompt, size, size, seed, 4, 1.0), lambda *event: None)

    else:
        draw = _raw(folder, size)
    with tempfile.TemporaryDirectory() as place:
        seconds, hashes = [], []
        for seed, prompt in [*enumerate(PROMPTS), (len(PROMPTS) - 1, PROMPTS[-1])]:
            start = time.perf_counter()
            picture = draw(prompt, seed)
            picture.save(Path(place, "picture.png"), compress_level=1)
            seconds.append(time.perf_counter() - start)
            hashes.append(hashlib.sha256(picture.tobytes()).hexdigest()[:8])
    return {
        "way": session.strategy if budget else "raw diffusers",
        "first": seconds[0],
        "new": statistics.median(seconds[2:7]),
        "again": seconds[7],
        "vram": peak[0] / GIB,
        "host": _status("RssAnon") + _status("RssShmem"),
        "hashes": hashes,
    }


def _raw(folder: Path, size: int) -> Any:
    import torch
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    job = {"height": size, "width": size, "guidance_scale": 1.0, "num_inference_steps": 4}
    return lambda prompt, seed: pipe(prompt=prompt, generator=torch.Generator("cuda").manual_seed(seed), **job).images[
        0
    ]


def _watch_card() -> list[int]:
    """Most bytes of the card that were taken since now, kept up to date by a thread."""
    import pynvml

    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    before, peak = int(pynvml.nvmlDeviceGetMemoryInfo(card).used), [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], int(pynvml.nvmlDeviceGetMemoryInfo(card).used) - before)
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    return peak


def _status(key: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024 / GIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--budgets", nargs="+", type=float, default=[14.5, 10.9, 7.3, 5.4, 3.7])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.model, arguments.size, arguments.one)))
        return 0
    print("| budget, GiB | way | new prompt, s (of raw) | again, s | first, s | VRAM, GiB | host, GiB | same bits |")
    print("|---|---|---|---|---|---|---|---|")
    raw: dict[str, Any] = {}
    different = False
    for budget in (0.0, *arguments.budgets):
        command = [sys.executable, __file__, "--model", arguments.model, "--size", str(arguments.size)]
        environ = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run([*command, "--one", str(budget)], capture_output=True, text=True, env=environ)
        if done.returncode:
            print(f"| {budget} | {done.stderr.strip().splitlines()[-1][:80]} |")
            different = True
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        raw = raw or found
        same = found["hashes"] == raw["hashes"]
        different |= not same
        share = f"{found['new']:.2f} ({found['new'] / raw['new']:.2f})"
        times = f"{share} | {found['again']:.2f} | {found['first']:.1f}"
        sizes = f"{found['vram']:.2f} | {found['host']:.1f}"
        print(f"| {budget or '-'} | {found['way']} | {times} | {sizes} | {'yes' if same else 'NO'} |", flush=True)
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
