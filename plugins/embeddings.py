"""Prompts' embeddings, kept in memory and on disk: a prompt that comes again needs no text encoder.

The key is everything that decides the result: the prompt, the encoder's and the tokenizer's files by sha256, how much
is read, the precision, the device, and the versions of what computes. What is read back has the same bits: a file has
its tensor's sha256, and one that was damaged is encoded anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kleinctl import InstalledModel

#: Embeddings that a session remembers where it is told of no jobs ahead, and bytes of them that the folder may take
#: (7.9 MB each).
REMEMBERED, FOLDER_BYTES = 8, 512 * 2**20
#: After so many seconds nobody writes a partial file any more.
PARTIAL_SECONDS = 3600
#: Roles of parts that have no say in what a prompt becomes.
OTHER_ROLES = ("licence", "scheduler", "transformer", "vae")
#: In place of the sha256 of a part that was not hashed: nothing that comes of it outlives the session.
UNKNOWN = "unknown"


class Embeddings:
    """The embeddings of prompts: (1, tokens, width) each, on the host."""

    def __init__(self, model: InstalledModel, device: str) -> None:
        self._remembered: OrderedDict[str, Any] = OrderedDict()
        self._most = REMEMBERED
        self._decides = _decides(model, device)
        known = bool(model.parts) and UNKNOWN not in self._decides["parts"].values()
        self._folder = model.cache / "embeddings" if model.cache and known else None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="embeddings")

    def expect(self, prompts: int) -> None:
        """Remember so many from now on, if that is more than usual."""
        self._most = max(REMEMBERED, prompts)

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
        while len(self._remembered) > self._most:
            self._remembered.popitem(last=False)

    def _read(self, key: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if self._folder is None:
            return None
        path = self._folder / f"{key}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                found, written = file.get_tensor("embedding").clone(), file.metadata()["sha256"]
        except (OSError, SafetensorError, KeyError, TypeError):  # TypeError: it has no metadata
            return None
        with contextlib.suppress(OSError):  # the folder may be for reading only
            os.utime(path)
        return found if _sha256(found) == written else None

    def _write(self, key: str, embedding: Any) -> None:
        """Write a file that is whole or not there, and let those go that were not used for the longest time."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        assert self._folder is not None
        partial = self._folder / f".{key}.{os.getpid()}.partial"
        embedding = embedding.contiguous()
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            save_file({"embedding": embedding}, partial, {"sha256": _sha256(embedding)})
            partial.replace(self._folder / f"{key}.safetensors")
            _trim(self._folder)
        except (OSError, SafetensorError):  # a cache that cannot be written is no cache
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _sha256(tensor: Any) -> str:
    """The sha256 of a tensor's bytes on the host."""
    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def _trim(folder: Path) -> None:
    for left in folder.glob(".*.partial"):  # of a worker that was killed
        if time.time() - left.stat().st_mtime > PARTIAL_SECONDS:
            left.unlink(missing_ok=True)
    files = sorted(((path.stat(), path) for path in folder.glob("*.safetensors")), key=lambda each: -each[0].st_mtime)
    total = 0
    for status, path in files:
        total += status.st_size
        if total > FOLDER_BYTES:
            path.unlink(missing_ok=True)


def _decides(model: InstalledModel, device: str) -> Mapping[str, Any]:
    import diffusers
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
        "diffusers": diffusers.__version__,  # it has the chat template and the layers that are read
    }
