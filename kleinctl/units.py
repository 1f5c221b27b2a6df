"""Bytes, seconds, rates and pixel sizes: read from what people type, written for people to read."""

from __future__ import annotations

import re

from kleinctl.problem import Misuse, Problem

KIB, MIB, GIB = 2**10, 2**20, 2**30
#: The model works on squares of so many pixels a side; each is one token.
SQUARE = 16
#: The longest side of five digits, which is refused for what it is.
LONGEST = 99_999 // SQUARE * SQUARE
_FACTORS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": KIB,
    "m": MIB,
    "g": GIB,
}


def parse_bytes(text: str, option: str) -> int:
    """`12GiB`, `12 GB`, `12.5g` or a bare number, in bytes. `option` is what it was given for, as in `--vram-limit`.

    A bare number under a million is GiB, since nobody means 12 bytes by `--vram-limit 12`; a larger one is bytes.

    Raises:
        Misuse: `text` is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match and len(match[1]) < 20 and match[2].lower() in _FACTORS:
        number, unit = float(match[1]), match[2].lower()
        return int(number * (_FACTORS[unit] if unit or number >= 10**6 else GIB))
    what = f"{option} {text[:40]!r} is no amount of memory"
    raise Misuse(Problem(what, "A number and a unit are wanted.", f"{option} 12GiB", name="usage"))


def gib(count: float) -> str:
    """Memory as cards and RAM are sold: `15.6 GiB`."""
    return f"{count / GIB:.1f} GiB"


def bytes_text(count: float) -> str:
    """File sizes as hubs and disks show them: `7.75 GB`, `168 MB`, `446 B`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return (
                f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
            )
    return f"{int(count)} B"


def speed_text(rate: float) -> str:
    """Bytes a second: `24.3 GB/s`."""
    return f"{rate / 1e9:.1f} GB/s"


def work_text(flops: float) -> str:
    """FLOP a second: `52 TFLOP/s`, `8.1 GFLOP/s`."""
    return f"{flops / 1e12:.0f} TFLOP/s" if flops > 1e13 else f"{flops / 1e9:.1f} GFLOP/s"


def seconds_text(seconds: float) -> str:
    """`0.6 s`, `48 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """`1024x768` (or `1024` for a square) as width and height in pixels. `option` is what it was given for.

    Raises:
        Misuse: it is no size, or a side is no multiple of 16 (latents are 1/16 of the picture, in whole numbers).
    """
    match = re.fullmatch(r"(\d{1,5})(?:[xX×*](\d{1,5}))?", text.strip())
    if not match:
        why = "Width and height in pixels are wanted."
        raise Misuse(Problem(f"{text!r} is no picture size", why, f"{option} 1024x768", name="usage"))
    width, height = int(match[1]), int(match[2] or match[1])
    if width % 16 or height % 16 or not width or not height:
        near = f"{max(16, round(width / 16) * 16)}x{max(16, round(height / 16) * 16)}"
        raise Misuse(
            Problem(
                f"{width}x{height} cannot be drawn",
                "Each side has to be a multiple of 16 pixels (the model works on 16-pixel squares).",
                f"{option} {near}",
                name="usage",
            )
        )
    return width, height


def nearest_size(text: str) -> str:
    """A picture size as it is typed (`1000x700`), with each side at the nearest multiple of 16 that can be drawn."""

    def nearest(side: re.Match[str]) -> str:
        pixels = int(side[0])
        return str(min(max(SQUARE, round(pixels / SQUARE) * SQUARE), LONGEST) if pixels else 0)

    if not re.fullmatch(r"\d{1,5}(\D\d{1,5})?", text.strip()):
        return text  # what reads it says what is wrong, in the user's own words
    return re.sub(r"\d{1,5}", nearest, text)


def asked_size(text: str) -> tuple[int, int]:
    """Width and height in a size that has been read without complaint, as they were typed."""
    sides = re.findall(r"\d+", text)
    return int(sides[0]), int(sides[-1])
