"""Time pieces of a model on this machine, for `kleinctl bench --calibrate`.

What predicts a picture's seconds best is the model's own code in the model's own shape: a slice of the transformer with
the same share of double and single blocks, four layers of the text encoder (both with random weights), the VAE as it
is, and the worker's own way of writing a picture. Each is timed at the sizes that people draw and becomes FLOP a
second as `kleinctl.memory` counts them, so that another model's shape can be predicted from it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from kleinctl import memory
from kleinctl.backends import Job
from kleinctl.hardware.rates import Rates, Speed
from kleinctl.units import MIB
from kleinctl.worker.protocol import Calibrate

#: Sides of the square pictures that are tried, in pixels: on a card, and on a processor.
SIDES, CPU_SIDES = (512, 1024, 1536, 2048), (128, 256, 512)
#: Layers of the text encoder that are timed.
LAYERS = 4
#: Bytes copied at once, most bytes read of a file, and its readers with the buffer of each.
COPY_BYTES, READ_BYTES, READERS, BUFFER_BYTES = 256 * MIB, 1024 * MIB, 4, 32 * MIB
#: Seconds that one piece is repeated for, and that all sizes of it may take together.
REPEAT_SECONDS, PIECE_SECONDS = 0.4, 6.0

Progress = Callable[[str, int, int], None]


def calibrate(request: Calibrate, progress: Progress) -> Rates:
    """Measure everything that this machine has; what fails (a card too full for the largest picture) stays unknown."""
    start = time.perf_counter()
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel  # noqa: F401 (imports are what is timed)
    from transformers import Qwen3Model  # noqa: F401

    torch.zeros(1, device=request.device)
    rates = Rates(start_seconds=time.perf_counter() - start)
    steps: list[tuple[str, Callable[[Calibrate], dict[str, Any]]]] = [
        ("read", _reading),
        ("encode", _encoding),
        ("denoise", _denoising),
        ("decode", _decoding),
    ]
    if request.device != "cpu":
        steps.insert(0, ("copy", _copying))
    for number, (name, step) in enumerate(steps):
        progress(name, number, len(steps))
        try:
            with torch.no_grad():
                rates = replace(rates, **step(request))
        except Exception:  # a card too full, a version that lacks something: the other rates still count
            traceback.print_exc()
        _let_go(request.device)
    progress("save", len(steps), len(steps))
    return rates


# Copies and files


def _copying(request: Calibrate) -> dict[str, Any]:
    """Bytes a second to the card from pinned and from pageable memory, and back to pageable memory that is new."""
    import torch

    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=request.device)
    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    pageable = torch.ones(COPY_BYTES, dtype=torch.uint8)
    seconds = {
        "pinned": _seconds(lambda: there.copy_(pinned, non_blocking=True), request.device),
        "pageable": _seconds(lambda: there.copy_(pageable), request.device),
        "back": _seconds(lambda: there.to("cpu"), request.device),
    }
    return {name: COPY_BYTES / each for name, each in seconds.items()}


def _reading(request: Calibrate) -> dict[str, Any]:
    """Bytes a second of the model's largest weights file: from disk, after the system was asked to forget it, and from
    the page cache."""
    path = max(request.folder.rglob("*.safetensors"), key=lambda each: each.stat().st_size, default=None)
    if path is None:
        return {}
    note = "" if _forget(path) else "this system cannot be asked to forget a file"
    cold = _read(path)
    cached = max(_read(path), _read(path))
    if not note and cold > 0.7 * cached:
        note = "the file was still in memory"
    return {"disk": None if note else cold, "disk_note": note, "cached": cached}


def _forget(path: Path) -> bool:
    """Ask the system to drop the file from its page cache."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fdatasync(file.fileno())  # what is not written yet cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _read(path: Path) -> float:
    """Bytes a second of several threads that read the file into buffers which exist already."""
    count = min(path.stat().st_size, READ_BYTES)
    share = -(-count // READERS)
    buffers = [bytearray(min(share, BUFFER_BYTES)) for _ in range(READERS)]

    def read(number: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(number * share)
            left = max(0, min(share, count - number * share))
            while left > 0 and (got := file.readinto(memoryview(buffers[number])[:left])):
                left -= got

    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))
    return count / (time.perf_counter() - start)


# Pieces of the model


def _encoding(request: Calibrate) -> dict[str, Any]:
    """FLOP a second of the text encoder: some of its layers over 512 tokens, most of them padding, as a prompt has."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, Qwen3Model

    config = AutoConfig.from_pretrained(request.folder / "text_encoder", local_files_only=True)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = LAYERS, 8, 0
    config.layer_types = config.layer_types and config.layer_types[:LAYERS]
    dtype = getattr(torch, request.model.dtype)
    with init_empty_weights(include_buffers=False):
        encoder = Qwen3Model._from_config(config, dtype=dtype).eval()
    _fill(encoder, request.device, dtype)
    tokens = torch.zeros(1, memory.TEXT_TOKENS, dtype=torch.long, device=request.device)
    mask = (torch.arange(memory.TEXT_TOKENS, device=request.device) < 40).long()[None]

    def encode() -> Any:
        return encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)

    seconds = _seconds(encode, request.device)
    return {"encode": memory.encode_flop(request.model, LAYERS) / seconds}


def _denoising(request: Calibrate) -> dict[str, Any]:
    """FLOP a second of the transformer, by tokens: one double block, and as many single ones as come with it."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import Flux2Transformer2DModel

    shape = request.model.shape
    doubles = 1 if shape.double_blocks else 0
    singles = max(1, round(shape.single_blocks / max(1, shape.double_blocks)))
    config = Flux2Transformer2DModel.load_config(request.folder / "transformer")
    dtype = getattr(torch, request.model.dtype)
    with init_empty_weights(include_buffers=False):
        slice_ = Flux2Transformer2DModel.from_config({**config, "num_layers": doubles, "num_single_layers": singles})
    _fill(slice_.eval(), request.device, dtype)
    small = replace(request.model, shape=replace(shape, double_blocks=doubles, single_blocks=singles))

    def forward(side: int) -> Callable[[], Any]:
        count = side * side // 256

        def numbers(*sizes: int) -> Any:
            return torch.randn(*sizes, dtype=dtype, device=request.device)

        inputs = {
            "hidden_states": numbers(1, count, slice_.config.in_channels),
            "encoder_hidden_states": numbers(1, memory.TEXT_TOKENS, slice_.config.joint_attention_dim),
            "timestep": torch.ones(1, dtype=dtype, device=request.device),
            "img_ids": torch.zeros(1, count, 4, device=request.device),
            "txt_ids": torch.zeros(1, memory.TEXT_TOKENS, 4, device=request.device),
            "guidance": None,
            "return_dict": False,
        }
        return lambda: slice_(**inputs)

    def flop(side: int) -> float:
        return memory.step_flop(small, Job("", side, side, 0, 1, 1.0))

    points = _by_size(request, forward, flop)
    return {"forward": tuple(Speed(memory.TEXT_TOKENS + side * side // 256, flops) for side, flops in points)}


def _decoding(request: Calibrate) -> dict[str, Any]:
    """FLOP a second of the VAE, by pixels, with the way from the card to a picture; and what writing a pixel takes."""
    import torch
    from diffusers import AutoencoderKLFlux2
    from diffusers.image_processor import VaeImageProcessor

    dtype = getattr(torch, request.model.dtype)
    vae = AutoencoderKLFlux2.from_pretrained(request.folder, subfolder="vae", torch_dtype=dtype, local_files_only=True)
    vae.to(request.device)
    processor = VaeImageProcessor()
    pictures: list[Any] = []

    def decode(side: int) -> Callable[[], Any]:
        latents = torch.randn(1, vae.config.latent_channels, side // 8, side // 8, dtype=dtype, device=request.device)

        def picture() -> None:
            pictures[:] = processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")

        return picture

    points = _by_size(request, decode, lambda side: memory.decode_flop(request.model, side * side))
    saving = {"save_seconds": _saving(pictures[0])} if pictures else {}
    return {"decode": tuple(Speed(side * side, flops) for side, flops in points), **saving}


def _saving(picture: Any) -> float:
    """Seconds a pixel of what the worker does with a picture that is there: write and describe it.

    Its pixels are hashed beside the writing, which takes longer.
    """
    from kleinctl.worker.looks import pixels_of
    from kleinctl.worker.main import write_png

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_png(picture, {"prompt": ""}, Path(folder, "partial"), Path(folder, "picture.png"))
        pixels_of(picture)
        return (time.perf_counter() - start) / (picture.width * picture.height)


# Timing


def _by_size(
    request: Calibrate, piece: Callable[[int], Callable[[], Any]], flop: Callable[[int], float]
) -> Iterable[tuple[int, float]]:
    """The side and the FLOP a second of each size that the device takes, while there is time."""
    found: list[tuple[int, float]] = []
    start = time.perf_counter()
    for side in CPU_SIDES if request.device == "cpu" else SIDES:
        left = PIECE_SECONDS - (time.perf_counter() - start)
        if found and 3 * flop(side) / found[-1][1] > left:
            break
        try:
            found.append((side, flop(side) / _seconds(piece(side), request.device)))
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a larger picture will not fit either
            if not found:
                raise
            print(f"{side} x {side} could not be timed: {error}")
            break
        finally:
            _let_go(request.device)
    return found


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Seconds of `work`: of the fastest of rounds, which on a card queue several and wait for the last.

    What else the machine does can only make a round slower.
    """
    wait = _wait(device)
    work()
    wait()
    rounds: list[float] = []
    count, start = 1, time.perf_counter()
    while not rounds or time.perf_counter() - start < REPEAT_SECONDS * (1 if len(rounds) > 2 else 3):
        since = time.perf_counter()
        for _ in range(count):
            work()
        wait()
        rounds.append((time.perf_counter() - since) / count)
        if device != "cpu":
            count = max(1, min(8, int(REPEAT_SECONDS / 4 / rounds[-1])))
    return min(rounds)


def _wait(device: str) -> Callable[[], None]:
    if device == "cpu":
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def _fill(module: Any, device: str, dtype: Any) -> None:
    """Give a module without weights random ones on the device."""
    import torch

    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02)
                owner._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = buffer if buffer is None else buffer.to(device)


def _let_go(device: str) -> None:
    """Give memory back to the card, for the next piece."""
    import torch

    gc.collect()
    if device != "cpu":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
