"""Text inside PNG files: written and read without an image library, so that the control process can do it.

Chunks as the PNG specification, third edition, has them: https://www.w3.org/TR/png-3/#11textinfo
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from kleinctl.problem import KleinctlError, Problem

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Longest text chunk that is read, and the most text that a compressed one may unfold to: 1 MiB.
MAX_TEXT_BYTES = 2**20
#: The most text of one picture, all of it together, in characters.
MAX_TEXTS = 16 * MAX_TEXT_BYTES
#: Most chunks looked at; a 4096 x 4096 picture has about a thousand.
MAX_CHUNKS = 100_000


def utf8_text(keyword: str, text: str) -> bytes:
    """An iTXt chunk: any text, in UTF-8."""
    data = text.replace("\0", "").encode("utf-8", "replace")
    return _chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + data)


def plain_text(keyword: str, text: str) -> bytes:
    """A tEXt chunk, which every viewer shows; an iTXt chunk where `text` is more than ASCII."""
    if not text.isascii():
        return utf8_text(keyword, text)
    return _chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + text.replace("\0", "").encode("ascii"))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """The same picture with `chunks` right after its header, where a reader meets them first."""
    if not png.startswith(SIGNATURE):
        raise ValueError("no PNG")
    end_of_header = len(SIGNATURE) + 12 + struct.unpack_from(">I", png, len(SIGNATURE))[0]
    return png[:end_of_header] + b"".join(chunks) + png[end_of_header:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def read_text(path: Path) -> dict[str, str]:
    """Every text in the PNG file at `path`, by keyword; of two with one keyword the first. Pixels are not read.

    Raises:
        KleinctlError: it cannot be read, is no PNG, or is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                raise KleinctlError(
                    Problem(
                        f"{path.name} is no PNG",
                        "A PNG picture starts with eight particular bytes; this file does not.",
                        "give a picture that kleinctl made",
                        name="not-a-png",
                        path=str(path),
                    )
                )
            return _texts(file, path)
    except OSError as error:
        raise KleinctlError(
            Problem(
                f"{path} cannot be read",
                f"{error.strerror}.",
                "check the path",
                name="picture-unreadable",
                path=str(path),
            )
        ) from None


def _texts(file: BinaryIO, path: Path) -> dict[str, str]:
    size = path.stat().st_size
    texts: dict[str, str] = {}
    room = MAX_TEXTS
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise _damaged(path, "it ends before its last chunk")
        length, kind = struct.unpack(">I4s", head)
        if file.tell() + length + 4 > size:
            raise _damaged(path, f"a chunk of {length} bytes goes beyond the end of the file")
        if kind == b"IEND":
            return texts
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or length > MAX_TEXT_BYTES:
            file.seek(length + 4, 1)
            continue
        data, (checksum,) = file.read(length), struct.unpack(">I", file.read(4))
        if zlib.crc32(kind + data) != checksum:
            raise _damaged(path, "the checksum of a text in it is wrong")
        try:
            keyword, text = _decoded(kind, data)
        except (ValueError, zlib.error) as error:
            raise _damaged(path, f"a text in it cannot be read ({error})") from None
        room -= len(keyword) + len(text)
        if room < 0:
            raise _damaged(path, "its texts are longer than 16 MiB together")
        texts.setdefault(keyword, text)
    raise _damaged(path, f"it has more than {MAX_CHUNKS} chunks")


def _decoded(kind: bytes, data: bytes) -> tuple[str, str]:
    """Keyword and text of one chunk's `data`. Raises ValueError or zlib.error when it is malformed."""
    keyword, rest = data.split(b"\0", 1)
    compressed = kind == b"zTXt"
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        compressed, rest = rest[:1] == b"\1", rest[2:]
        _language, _translated, rest = rest.split(b"\0", 2)
    if compressed:
        inflater = zlib.decompressobj()
        rest = inflater.decompress(rest, MAX_TEXT_BYTES)
        if inflater.unconsumed_tail:
            raise ValueError("it unfolds to more than 1 MiB")
    return keyword.decode("latin-1"), rest.decode("utf-8" if kind == b"iTXt" else "latin-1")


def _damaged(path: Path, why: str) -> KleinctlError:
    return KleinctlError(
        Problem(
            f"{path.name} is damaged",
            f"It starts like a PNG, but {why}.",
            "copy it again from where it came from",
            name="picture-damaged",
            path=str(path),
        )
    )
