"""Python and its packages, read from file names and one small text file: torch is never imported to ask about it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kleinctl.hardware.facts import Package, Python, text_of

#: What matters to pictures: the worker's packages, and those whose wrong version breaks them.
NAMED = (
    "torch",
    "torchvision",
    "torchaudio",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "numpy",
    "pillow",
    "xformers",
    "triton",
    "nvidia-ml-py",
)


def python_facts() -> dict[str, Any]:
    """The interpreter and its packages, by the names `Hardware` gives them."""
    version = "{}.{}.{}".format(*sys.version_info[:3])
    in_venv = sys.prefix != sys.base_prefix
    python = Python(version, sys.executable or "unknown", 64 if sys.maxsize > 2**32 else 32, in_venv)
    return {"python": python, "packages": packages_in(sys.path)}


def packages_in(path: Iterable[str]) -> dict[str, Package]:
    """The packages of `NAMED` that are installed in the folders of `path` (a `sys.path`), the first found winning.

    The version is in the name of the folder an installer writes: `torch-2.13.0+cu130.dist-info`.
    """
    found: dict[str, Package] = {}
    for folder in map(Path, dict.fromkeys(path)):
        for name, version in _installed(folder):
            if name in NAMED:
                found.setdefault(name, Package(version, str(folder)))
        if "torch" not in found and (folder / "torch" / "lib").is_dir():
            found["torch"] = Package(None, str(folder))  # remains, or a copy that no installer made
    if "torch" in found:
        found["torch"] = _torch(found["torch"])
    return {name: found[name] for name in NAMED if name in found}


def _installed(folder: Path) -> list[tuple[str, str]]:
    try:
        entries = [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
    matches = (re.fullmatch(r"([A-Za-z0-9_.]+)-([^-]+)(?:-py[\d.]+)?\.(?:dist|egg)-info", entry) for entry in entries)
    return sorted((re.sub(r"[_.]+", "-", match[1]).lower(), match[2]) for match in matches if match)


def _torch(package: Package) -> Package:
    """torch as its version.py has it (`2.13.0+cu130`, built for CUDA 13.0), which is what would be imported."""
    text = text_of(Path(package.location or "") / "torch" / "version.py")[:10_000]
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?:: [^=]+)? = (?:None|'([\d.]+)')", text, re.MULTILINE)
    return Package(version[1] if version else package.version, package.location, cuda[1] if cuda else "unknown")
