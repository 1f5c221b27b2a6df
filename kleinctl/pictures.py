"""What a picture file is, from its first bytes: PNG, JPEG or WebP, and its size in pixels."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kleinctl.pngtext import SIGNATURE
from kleinctl.problem import KleinctlError, Misuse, Problem

#: Sides and shape that FLUX.2's image processor takes (diffusers, pipelines/flux2/image_processor.py).
MIN_SIDE, MAX_ASPECT = 64, 8
#: Larger pictures are refused rather than unfolded in memory; at four bytes a pixel this is 400 MB.
MAX_PIXELS = 100_000_000
_MAX_SEGMENTS = 1000  # of a JPEG; each holds 64 KiB at most


@dataclass(frozen=True)
class Picture:
    """A picture file; width and height in pixels, as stored (before an EXIF rotation)."""

    path: Path
    kind: str
    width: int
    height: int


def reference(path: Path) -> Picture:
    """Check by its header that the picture at `path` can be a reference.

    Raises:
        KleinctlError: it cannot be read, or is no picture that FLUX.2 takes.
    """
    try:
        with path.open("rb") as file:
            kind, width, height = _header(file)
    except OSError as error:
        why = "There is no such file." if isinstance(error, FileNotFoundError) else f"{error.strerror}."
        raise Misuse(_unusable(path, why, "give the path of a PNG, JPEG or WebP file")) from None
    except (struct.error, ValueError, IndexError):
        why = "PNG, JPEG and WebP are read; its first bytes are of none of them."
        raise KleinctlError(_unusable(path, why, "save it as PNG and give that")) from None
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        why = f"It is {width}x{height}; each side needs {MIN_SIDE} pixels and the longer one at most 8 times the other."
        raise KleinctlError(_unusable(path, why, "crop or enlarge it"))
    if width * height > MAX_PIXELS:
        raise KleinctlError(
            _unusable(path, f"It is {width}x{height}; the model sees one megapixel.", "make it smaller")
        )
    return Picture(path, kind, width, height)


def _unusable(path: Path, why: str, fix: str) -> Problem:
    what = f"{path.name or path} cannot be used as a reference picture"
    return Problem(what, why, fix, name="reference-unusable", path=str(path))


def _header(file: BinaryIO) -> tuple[str, int, int]:
    """Kind, width and height. Raises ValueError, IndexError or struct.error for anything else."""
    head = file.read(32)
    if head.startswith(SIGNATURE) and head[12:16] == b"IHDR":
        return "png", *struct.unpack_from(">II", head, 16)
    if head.startswith(b"\xff\xd8\xff"):
        file.seek(2)
        return "jpeg", *_jpeg_size(file)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp", *_webp_size(head)
    raise ValueError("no picture")


def _jpeg_size(file: BinaryIO) -> tuple[int, int]:
    """Size in the start-of-frame segment (ITU-T T.81, B.2.2)."""
    for _ in range(_MAX_SEGMENTS):
        mark, kind = struct.unpack(">BB", file.read(2))
        if mark != 0xFF:
            break
        if kind == 0xFF:  # a marker may have any number of fill bytes before it
            file.seek(-1, 1)
            continue
        (length,) = struct.unpack(">H", file.read(2))
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            _precision, height, width = struct.unpack(">BHH", file.read(5))
            return width, height
        file.seek(max(length, 2) - 2, 1)
    raise ValueError("no frame")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Size in the first chunk (RFC 9649, section 2)."""
    kind = head[12:16]
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no WebP chunk")
