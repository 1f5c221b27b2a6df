"""Draw one job within several budgets of VRAM, in one process, beside plain diffusers with everything on the card.

    python tools/measure_budgets.py --model klein-4b-random [--free 16 12 8 6 4] [--references 2] [--steps 25]

For long jobs, where `kleinctl bench` would spend most of its time on starting: the base model, edits. Another process
holds the rest of the card. Prints a line for each budget: how the weights were held, seconds of a picture and their
share of those of plain diffusers, the most VRAM with the CUDA context, the process's own host memory, and whether the
pixels are the same. Exit code 1 where they are not and the picture was not drawn in tiles.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from kleinctl import Budget, Gpu, InstalledModel, Job, Model, memory
from kleinctl.bench import Holder, own_bytes, used_bytes
from kleinctl.hardware import detect
from kleinctl.planner import default_job
from kleinctl.plugins import Plugins
from kleinctl.store import model_folder
from kleinctl.units import GIB

DEVICE = "cuda:0"
#: How the one reference picture differs from the other: degrees that the same fractal is turned by.
TURNED = 90


class Card:
    """The card as this process uses it."""

    def __init__(self) -> None:
        import torch

        found = detect().gpu
        if found is None:
            raise SystemExit("no NVIDIA card was found")
        self.gpu: Gpu = found
        self._before = used_bytes(found)
        torch.zeros(1, device=DEVICE)  # makes the context
        self.total = torch.cuda.get_device_properties(DEVICE).total_memory
        self.context = 0

    def _own(self) -> int:
        return used_bytes(self.gpu) - self._before

    def leave(self, free: int | None) -> Holder | None:
        """Have another process take the card until `free` bytes are left, those of this process among them."""
        gc.collect()
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.context = self._own() - torch.cuda.memory_reserved()
        if free is None:
            torch.cuda.set_per_process_memory_fraction(1.0)
            return None
        holder = Holder(Path(sys.executable), self.gpu)
        holder.leave(free - self._own())
        allowed = self.budget(free) - max(self.context, memory.CONTEXT_BYTES)
        torch.cuda.set_per_process_memory_fraction(allowed / self.total)
        return holder

    def budget(self, free: int) -> int:
        """What kleinctl plans with where so many bytes are free."""
        return memory.usable_vram(replace(self.gpu, vram_free_bytes=free))

    def peak(self) -> int:
        """Most that this process has held since `leave`."""
        import torch

        return int(torch.cuda.max_memory_reserved()) + self.context


def references(folder: Path, count: int) -> tuple[Path, ...]:
    """Pictures of a megapixel."""
    from PIL import Image

    paths = tuple(folder / f"reference-{number}.png" for number in range(count))
    for number, path in enumerate(paths):
        fractal = Image.effect_mandelbrot((1024, 1024), (-2, -1.5, 1, 1.5), 100)
        fractal.convert("RGB").rotate(TURNED * number).save(path)
    return paths


def drawn(draw: Callable[[Job], Any], jobs: list[Job]) -> tuple[float, list[str]]:
    """Seconds of the last picture, written as PNG, and the sha256 of every one's pixels."""
    hashes, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            start = time.perf_counter()
            image = draw(job)
            image.save(Path(folder, "picture.png"), compress_level=1)
            seconds = time.perf_counter() - start
            hashes.append(hashlib.sha256(image.tobytes()).hexdigest())
    return seconds, hashes


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody is told."""


def plain(model: Model, folder: Path, jobs: list[Job]) -> tuple[float, list[str]]:
    """The same by plain diffusers."""
    from kleinctl.worker.model_card import ModelCard

    session = ModelCard("resident").load(InstalledModel(model, folder), Budget(2**50, 2**50, DEVICE))
    try:
        return drawn(partial(session.generate, progress=silent), jobs)
    finally:
        session.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--free", type=float, nargs="+", default=[16, 12, 8, 6, 4], help="GiB")
    parser.add_argument("--size", type=int, default=1024, help="pixels of each side")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--references", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=2)
    asked = parser.parse_args()
    plugins = Plugins()
    model, backend = plugins.model(asked.model), plugins.backend("staged-decode").thing
    folder = model_folder(model.name, backend.layout)
    card, failed = Card(), False
    with tempfile.TemporaryDirectory() as made:
        changes = {"steps": asked.steps} if asked.steps else {}
        pictures = references(Path(made), asked.references)
        base = default_job(model, prompt="", width=asked.size, height=asked.size, images=pictures, **changes)
        jobs = [replace(base, prompt=f"a cat, number {number}", seed=number) for number in range(asked.pictures)]
        card.leave(None)
        seconds, wanted = plain(model, folder, jobs)
        print(f"| all | diffusers, resident | {seconds:.2f} | 1.00 | {card.peak() / GIB:.2f} | | |", flush=True)
        for free in asked.free:
            holder = card.leave(int(free * GIB))
            budget = Budget(card.budget(int(free * GIB)), psutil.virtual_memory().available, DEVICE, detect())
            session = backend.load(InstalledModel(model, folder), budget)
            took, hashes = drawn(partial(session.generate, progress=silent), jobs)
            tiled, same = session.tiling is not None, hashes == wanted
            gib = f"{card.peak() / GIB:.2f} | {own_bytes(os.getpid()) / GIB:.1f}"
            bits = "tiles" if tiled else "yes" if same else "NO"
            print(f"| {free:g} | {session.strategy} | {took:.2f} | {took / seconds:.2f} | {gib} | {bits} |", flush=True)
            for said in session.warnings:
                print(f"  {said}")
            failed = failed or not (same or tiled)
            session.close()
            del session
            if holder:
                holder.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
