"""What a model needs of memory and time: arithmetic on manifest numbers, and a few measured constants.

Measured means: full-size FLUX.2 [klein] 4B, bf16, diffusers 0.42.1, on an H100 (docs/measurements.md). Other models are
scaled from it by their widths. Sizes are bytes, times seconds, pictures pixels.

Seconds go by `Hardware.rates` where `kleinctl bench --calibrate` measured them: the FLOP of a stage, as counted here,
over the FLOP a second that a piece of the same model reached at that size, linear between measured sizes. Elsewhere
they go by the card's data sheet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kleinctl.hardware.rates import NO_RATES, Rates, flops_at
from kleinctl.units import GIB, MIB, gib

if TYPE_CHECKING:
    from kleinctl.backends import Job
    from kleinctl.hardware import Gpu, Hardware
    from kleinctl.manifest import Model

#: CUDA context and libraries of one process, besides its tensors (measured: 616 MiB at start, 690 after a convolution,
#: 778 when every stage has run).
CONTEXT_BYTES = 780 * MIB
#: Share of the free VRAM that is left to the desktop, to what other programs may want meanwhile and to fragmentation,
#: and its bounds in bytes.
RESERVE_SHARE, RESERVE_LEAST, RESERVE_MOST = 0.1, int(0.3 * GIB), int(1.55 * GIB)
#: RAM of a worker that has imported torch, diffusers and transformers (measured 0.36 GiB) and started CUDA.
PROCESS_BYTES = int(1.4 * GIB)
#: Seconds to start Python and import torch, diffusers and transformers (measured 7-8 s on two slow cores).
IMPORT_SECONDS = 7.0
#: Bytes per second read from the page cache into VRAM (measured: 6 GB in 1.1 s), and assumed of an NVMe disk when cold.
CACHED_READ_RATE, DISK_READ_RATE = 5.5e9, 2.0e9
#: The same of a disk that turns (published for hard disks, in sequence: 0.15e9 to 0.28e9).
HARD_DISK_READ_RATE = 0.2e9

#: Activations in GiB by pixels, on top of weights: VAE decode, and denoising. Of a decode the least in which it gives
#: the same bits as with plenty (0.69, 2.41, 5.39, 9.57; with less, cuDNN takes other algorithms before memory runs out)
#: and 0.09 for what else is about; of denoising what is allocated (0.20, 0.57, 1.2, 2.1) and libraries' workspaces.
DECODE_GIB = ((512**2, 0.78), (1024**2, 2.5), (1536**2, 5.48), (2048**2, 9.66), (3072**2, 21.2))
DENOISE_GIB = ((512**2, 0.32), (1024**2, 0.72), (1536**2, 1.35), (2048**2, 2.3), (3072**2, 4.8))
#: Decoding in tiles of 512 x 512 pixels: one of them, and for each pixel of the picture (its tiles and their whole);
#: measured: 1.0 GiB is enough for 1024², 0.74 for 2048².
TILE_GIB, TILED_BYTES_PER_PIXEL = 0.8, 24
#: Encoding a reference picture of one megapixel, likewise (1.88, and 0.09 for what else is about).
REFERENCE_GIB = 1.97
#: Encoding 512 tokens on top of the text encoder's weights: 0.24 GiB with logits, 0.1 without.
ENCODE_BYTES = int(0.3 * GIB)

#: Share of the card's bf16 peak that large matrix products reach; that of the VAE's convolutions is in gpus.toml.
MATMUL_SHARE = 0.85
#: Seconds in which the host submits the kernels of a transformer block and of a text encoder's layer, at the least:
#: what small pictures take on a fast card (measured: 0.15 s for 4 steps at 512 x 512, 0.06 s for 27 layers).
BLOCK_SECONDS, TEXT_LAYER_SECONDS = 1.2e-3, 1.8e-3
#: Seconds between the stages of a picture on a card, when weights come and go (measured: 0.053 with 8 GiB free).
BETWEEN_SECONDS = 0.05
#: Bytes that element-wise kernels move per token, block and unit of width: the rest of a step's measured time.
PASSES = 141 * 2
#: FLOP of the VAE's convolutions per pixel at 128 channels: 9.92 TFLOP to decode 1024 x 1024, 4.6 to encode it.
DECODE_FLOP_PER_PIXEL, REFERENCE_FLOP_PER_PIXEL = 9.92e12 / 1024**2, 4.6e12 / 1024**2
#: Seconds of hashing, describing and writing one pixel as PNG (measured on two cores: 0.09 s for 1024 x 1024).
SAVE_SECONDS = 0.9e-7
#: What one CPU core does of fp32 arithmetic in such models, FLOP a second; and memory bandwidth, bytes a second.
CPU_FLOPS, CPU_BANDWIDTH = 2.5e10, 8e9

KLEIN_4B_WIDTH, KLEIN_VAE_CHANNELS, KLEIN_TEXT_HIDDEN = 3072, 128, 2560
TEXT_TOKENS = 512
MAX_REFERENCE_PIXELS = 1024**2  # the pipeline scales larger reference pictures down to this


def _interpolate(points: Sequence[tuple[int, float]], pixels: int) -> float:
    """Linear between measured points, and on through the last two beyond them; proportional below the first."""
    if pixels <= points[0][0]:
        return points[0][1] * pixels / points[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if pixels <= x1 or x1 == points[-1][0]:
            return y0 + (y1 - y0) * (pixels - x0) / (x1 - x0)
    raise AssertionError("points are never empty")


def decode_bytes(model: Model, job: Job) -> int:
    """Activations of an untiled VAE decode, in bytes, without the VAE's weights."""
    return int(_interpolate(DECODE_GIB, job.width * job.height) * GIB * model.shape.vae_channels / KLEIN_VAE_CHANNELS)


def tiled_decode_bytes(model: Model, job: Job) -> int:
    """Activations of a VAE decode in tiles of 512 x 512 pixels, in bytes, without the VAE's weights."""
    pixels = job.width * job.height
    scale = model.shape.vae_channels / KLEIN_VAE_CHANNELS
    return int((TILE_GIB * GIB + TILED_BYTES_PER_PIXEL * pixels) * scale)


def reference_bytes(model: Model, job: Job) -> int:
    """Activations of a VAE encode of the largest reference picture, in bytes, without the VAE's weights."""
    return int(REFERENCE_GIB * GIB * model.shape.vae_channels / KLEIN_VAE_CHANNELS) if job.images else 0


def encode_bytes(model: Model) -> int:
    """Activations of the text encoder for 512 tokens, in bytes, without its weights."""
    return ENCODE_BYTES * model.shape.text_hidden // KLEIN_TEXT_HIDDEN


def denoise_bytes(model: Model, job: Job) -> int:
    """Activations of one denoising step, in bytes, without the transformer's weights.

    Each reference picture of an edit adds its own tokens, at most one megapixel of them.
    """
    pixels = job.width * job.height + len(job.images) * MAX_REFERENCE_PIXELS
    return int(_interpolate(DENOISE_GIB, pixels) * GIB * transformer_width(model) / KLEIN_4B_WIDTH)


def transformer_width(model: Model) -> int:
    """Width of the transformer's hidden states."""
    return model.shape.heads * model.shape.head_dim


def text_encoder_bytes(model: Model) -> int:
    """Weights of the text encoder cut to the layers that are read, with its embedding table."""
    shape = model.shape
    return min(shape.text_encoder_bytes, shape.text_embedding_bytes + shape.text_layers_read * shape.text_layer_bytes)


def weight_bytes(model: Model) -> int:
    """All weights of the model, uncut."""
    return model.shape.transformer_bytes + model.shape.text_encoder_bytes + model.shape.vae_bytes


def step_flop(model: Model, job: Job) -> float:
    """FLOP of one forward of the transformer.

    A token meets 13 h² weights in each block (a single block's linear1 is 9 h², linear2 4 h²; a double block's
    image and text halves are as large each), and attention costs 4 T² h. Gives 34.8 TFLOP for klein 4B at 1024 x 1024.
    """
    h = transformer_width(model)
    tokens = _tokens(job)
    return (model.shape.double_blocks + model.shape.single_blocks) * (26 * h * h * tokens + 4 * tokens * tokens * h)


def _tokens(job: Job) -> int:
    return TEXT_TOKENS + job.width * job.height // 256 + len(job.images) * MAX_REFERENCE_PIXELS // 256


def forwards(model: Model, job: Job) -> int:
    """Forwards of the transformer for one picture: two a step where guidance is used (base models)."""
    return job.steps * (2 if job.guidance > 1 and model.variant == "base" else 1)


def compute_seconds(model: Model, hardware: Hardware, job: Job) -> float:
    """One picture with every weight in place: encode, denoise, decode, and write it."""
    encode, forward, decode = stage_seconds(model, hardware, job)
    return encode + forwards(model, job) * forward + decode + save_seconds(hardware, job)


def save_seconds(hardware: Hardware, job: Job) -> float:
    """Hashing, describing and writing a picture as PNG, in seconds."""
    return (hardware.rates.save_seconds or SAVE_SECONDS) * job.width * job.height


def start_seconds(hardware: Hardware) -> float:
    """Starting Python and importing torch, diffusers and transformers, in seconds."""
    return hardware.rates.start_seconds or IMPORT_SECONDS


def decode_flop(model: Model, pixels: int) -> float:
    """FLOP of a VAE decode: its convolutions, and the attention among the latents (1/64 of the pixels) in its middle.

    Gives 10.47 TFLOP for klein at 1024 x 1024, and 48.5 at 2048 x 2048.
    """
    channels = model.shape.vae_channels
    attention = 4 * (pixels / 64) ** 2 * 4 * channels
    return DECODE_FLOP_PER_PIXEL * pixels * (channels / KLEIN_VAE_CHANNELS) ** 2 + attention


def encode_flop(model: Model, layers: int) -> float:
    """FLOP of so many layers of the text encoder, over 512 tokens: two for each weight (2 bytes, 4 in float32)."""
    weights = layers * model.shape.text_layer_bytes / (4 if model.dtype == "float32" else 2)
    return 2 * TEXT_TOKENS * weights


def rates_of(model: Model, hardware: Hardware) -> Rates:
    """What was measured of the device that would run the model: the card, or the processor."""
    gpu = hardware.gpu if "cuda" in model.devices else None
    return hardware.rates.of(gpu.name if gpu else None)


def stage_seconds(model: Model, hardware: Hardware, job: Job) -> tuple[float, float, float]:
    """Arithmetic of encoding, of one forward of the transformer, and of decoding, in seconds.

    The text encoder counts with the layers whose states are read; references of an edit are encoded with the prompt.
    """
    gpu, rates = hardware.gpu if "cuda" in model.devices else None, rates_of(model, hardware)
    shape = model.shape
    blocks, floor = shape.double_blocks + shape.single_blocks, 1 if gpu else 0
    if gpu is None:
        flops, bandwidth, convolutions = CPU_FLOPS * hardware.cpu_count, CPU_BANDWIDTH, CPU_FLOPS * hardware.cpu_count
    else:
        peak, bandwidth = gpu.performance.tflops * 1e12, gpu.performance.memory_gb_s * 1e9
        flops, convolutions = peak * MATMUL_SHARE, peak * gpu.performance.convolution_share
    tokens, pixels = _tokens(job), job.width * job.height
    measured = flops_at(rates.forward, tokens)
    if measured:
        forward = step_flop(model, job) / measured
    else:
        moved = PASSES * transformer_width(model) * tokens * blocks
        forward = max(step_flop(model, job) / flops + moved / bandwidth, floor * blocks * BLOCK_SECONDS)
    decode = decode_flop(model, pixels) / (flops_at(rates.decode, pixels) or convolutions)
    scale = (shape.vae_channels / KLEIN_VAE_CHANNELS) ** 2
    references = REFERENCE_FLOP_PER_PIXEL * scale * len(job.images) * MAX_REFERENCE_PIXELS
    references /= flops_at(rates.decode, MAX_REFERENCE_PIXELS) or convolutions
    layers = shape.text_layers_read
    least = floor * layers * TEXT_LAYER_SECONDS
    return max(encode_flop(model, layers) / (rates.encode or flops), least) + references, forward, decode


def copy_rate(gpu: Gpu | None, rates: Rates = NO_RATES) -> float:
    """Bytes a second from pinned host memory to the card: as measured, else by its link.

    Measured: 55e9 over PCIe 5.0 x16 (docs/measurements.md); published for 4.0 x16: 22.5-23.9e9 (NVlabs/cuda-oxide#976).
    A link doubles with each generation.
    """
    if gpu is None:
        return CPU_BANDWIDTH
    if measured := rates.of(gpu.name).pinned:
        return measured
    lanes = (gpu.pcie_width or 16) * 2.0 ** ((gpu.pcie_generation or 4) - 5)
    return 55e9 * lanes / 16 if (gpu.pcie_generation or 4) >= 5 else 24e9 * lanes / 8


def usable_vram(gpu: Gpu) -> int:
    """VRAM that a job may take now: what is free, less the reserve."""
    reserve = min(max(int(gpu.vram_free_bytes * RESERVE_SHARE), RESERVE_LEAST), RESERVE_MOST)
    return max(0, gpu.vram_free_bytes - reserve)


def cached_rate(rates: Rates) -> float:
    """Bytes a second from a weights file in the page cache: as measured, else CACHED_READ_RATE."""
    return rates.cached or CACHED_READ_RATE


def disk_rate(hardware: Hardware) -> float:
    """Bytes a second from a weights file that is on the disk alone: as measured, else by the kind of disk."""
    disk = hardware.disks.get("models")
    return hardware.rates.disk or (HARD_DISK_READ_RATE if disk and disk.rotational else DISK_READ_RATE)


def read_seconds(count: int, hardware: Hardware, *, warm: bool) -> float:
    """Seconds to read `count` bytes of weights; from the page cache when `warm` and RAM can hold them."""
    if warm and hardware.ram_available_bytes > count + PROCESS_BYTES:
        return count / cached_rate(hardware.rates)
    return count / disk_rate(hardware)


def _no_card(hardware: Hardware) -> str:
    """Why there is no card to use."""
    hidden = [gpu.name for gpu in hardware.gpus if gpu.hidden]
    if hidden:
        return f"{hidden[0]} is hidden by CUDA_VISIBLE_DEVICES"
    return (
        f"{hardware.gpus[0].name} has no memory to give (MIG without a slice?)" if hardware.gpus else "none was found"
    )


def lacking(model: Model, hardware: Hardware, *, vram_bytes: int, ram_bytes: int) -> str | None:
    """Why a job with these peaks does not fit this machine, in one sentence; None where it does."""
    gpu = hardware.gpu
    if "cpu" not in model.devices and gpu is None:
        return f"{model.name} needs an NVIDIA card, and {_no_card(hardware)}."
    if gpu is not None and vram_bytes > usable_vram(gpu):
        return f"It needs {gib(vram_bytes)} of VRAM; {gib(usable_vram(gpu))} of {gib(gpu.vram_bytes)} can be used."
    if ram_bytes > hardware.ram_available_bytes:
        return f"It needs {gib(ram_bytes)} of RAM; {gib(hardware.ram_available_bytes)} are available."
    return None
