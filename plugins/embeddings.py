"""Prompts' embeddings, kept in memory and on disk: a prompt that comes again needs no text encoder.

The key is everything that decides the result: the prompt, the encoder's and the tokenizer's files by sha256, how much
is read, the precision, the device, and the versions of what computes. What is read back has the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kleinctl import InstalledModel

#: Embeddings that a session remembers, and bytes of them that the folder may take (7.9 MB each).
REMEMBERED, FOLDER_BYTES = 32, 512 * 2**20
#: Roles of parts that have no say in what a prompt becomes.
OTHER_ROLES = ("licence", "scheduler", "transformer", "vae")


class Embeddings:
    """The embeddings of prompts: (1, tokens, width) each, on the host."""

    def __init__(self, model: InstalledModel, device: str) -> None:
        self._remembered: OrderedDict[str, Any] = OrderedDict()
        self._folder = model.cache / "embeddings" if model.cache and model.parts else None
        self._decides = _decides(model, device)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="embeddings")

    def get(self, prompt: str, precision: str = "") -> Any:
        """The embedding of `prompt` on the host; None where it is not known."""
        key = self._key(prompt, precision)
        if key not in self._remembered:
            found = self._read(key)
            if found is None:
                return None
            self._remember(key, found)
        self._remembered.move_to_end(key)
        return self._remembered[key]

    def put(self, prompt: str, embedding: Any, precision: str = "") -> None:
        """Keep `embedding`, a tensor on the host; it is written to the folder meanwhile."""
        key = self._key(prompt, precision)
        self._remember(key, embedding)
        if self._folder is not None:
            self._writer.submit(self._write, key, embedding)

    def close(self) -> None:
        """Wait until all is written."""
        self._writer.shutdown()

    def _key(self, prompt: str, precision: str) -> str:
        return hashlib.sha256(json.dumps([self._decides, precision, prompt]).encode()).hexdigest()

    def _remember(self, key: str, embedding: Any) -> None:
        self._remembered[key] = embedding
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)

    def _read(self, key: str) -> Any:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self._folder is None:
            return None
        path = self._folder / f"{key}.safetensors"
        try:
            found = load_file(path)["embedding"]
            os.utime(path)
        except (OSError, SafetensorError, KeyError):
            return None
        return found

    def _write(self, key: str, embedding: Any) -> None:
        """Write a file that is whole or not there, and let those go that were not used for the longest time."""
        from safetensors.torch import save_file

        assert self._folder is not None
        partial = self._folder / f".{key}.{os.getpid()}.partial"
        with contextlib.suppress(OSError):  # a cache that cannot be written is no cache
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            save_file({"embedding": embedding.contiguous()}, partial)
            partial.replace(self._folder / f"{key}.safetensors")
            _trim(self._folder)


def _trim(folder: Path) -> None:
    files = sorted(((path.stat(), path) for path in folder.glob("*.safetensors")), key=lambda each: -each[0].st_mtime)
    total = 0
    for status, path in files:
        total += status.st_size
        if total > FOLDER_BYTES:
            path.unlink(missing_ok=True)


def _decides(model: InstalledModel, device: str) -> Mapping[str, Any]:
    import torch
    import transformers

    on_card = device != "cpu"
    manifest = model.manifest
    parts = {part.id: model.parts.get(part.id) for part in manifest.parts if part.role not in OTHER_ROLES}
    return {
        "parts": parts,
        "layers": manifest.shape.text_layers_read,
        "tokens": manifest.defaults.max_prompt_tokens,
        "dtype": manifest.dtype,
        "device": torch.cuda.get_device_name(device) if on_card else f"cpu, {torch.get_num_threads()} threads",
        "torch": str(torch.__version__),
        "libraries": [torch.version.cuda, torch.backends.cudnn.version() if on_card else None],
        "transformers": transformers.__version__,
    }
