"""Run every backend on one model with the same jobs, and print time, memory and whether the pictures are the same.

    python tools/measure_backends.py --model klein-4b-random --vram-limit 16GiB --size 1024x1024 [--out results.json]

Each backend makes two pictures (the first pays for loading) and an edit of the first, in processes of their own, by the
commands a user types. Exit code 1 when the pixels of two backends differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT = "a red circle on a blue background"
EDIT = "make the circle green"


def run(backend: str, arguments: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The document of one `kleinctl run`."""
    command = [sys.executable, "-m", "kleinctl", "run", "--json", "--backend", backend, "--model", arguments.model]
    command += ["--seed", "7", *(["--size", arguments.size] if arguments.size else [])]
    command += ["--vram-limit", arguments.vram_limit] if arguments.vram_limit else []
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def row(name: str, document: dict[str, Any]) -> str:
    """One line of the table; the seconds are those of the last picture."""
    stages = document["images"][-1]["seconds"]
    times = " / ".join(f"{stages[stage]:.2f}" for stage in ("load", "encode", "denoise", "decode"))
    memory = f"{document['peak_vram_bytes'] / 2**30:.2f} | {document['peak_rss_bytes'] / 2**30:.2f}"
    hashes = " ".join(image["pixels_sha256"][:12] for image in document["images"])
    return f"| {name} | {document['strategy']} | {times} | {document['seconds']['total']:.1f} | {memory} | {hashes} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--size")
    parser.add_argument("--vram-limit")
    parser.add_argument("--backends", nargs="+", default=["diffusers-offload", "staged-decode"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    print("| backend, job | strategy | last picture: load / encode / denoise / decode, s | whole command, s "
          "| peak VRAM, GiB | peak RSS, GiB | sha256 of pixels |\n|---|---|---|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for backend in arguments.backends:
            two = run(backend, arguments, PROMPT, "--count", "2", "-o", f"{folder}/{backend}")
            print(row(f"{backend}, two pictures", two), flush=True)
            reference = f"{folder}/{arguments.backends[0]}/klein-7.png"
            edit = run(backend, arguments, EDIT, "--image", reference, "-o", f"{folder}/{backend}-edit.png")
            print(row(f"{backend}, edit", edit), flush=True)
            results[backend] = {"two": two, "edit": edit}
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    pixels = {
        tuple(image["pixels_sha256"] for job in result.values() for image in job["images"])
        for result in results.values()
    }
    print(f"\nthe same pixels from every backend: {'yes' if len(pixels) == 1 else 'NO'}")
    return int(len(pixels) != 1)


if __name__ == "__main__":
    sys.exit(main())
