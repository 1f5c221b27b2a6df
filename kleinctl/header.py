"""The front of a weights file: names and shapes of its tensors, read within bounds. The weights stay on disk.

safetensors: 8 bytes of length, then JSON (https://huggingface.co/docs/safetensors). GGUF: a table of typed values and
one of tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Whatever the bytes are, reading ends in a
`Header` or a `BadHeader`, in bounded time and memory.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

#: The format's own limit on the JSON (safetensors `MAX_HEADER_SIZE`), in bytes.
MAX_JSON = 100_000_000
#: Limits of our own: klein's files hold 149 to 400 tensors, the largest published models some ten thousand.
MAX_TENSORS = 100_000
MAX_COMMAS = 1_000_000
MAX_AXES = 8
MAX_NAME = 500  # characters
MAX_DIGITS = 18
#: GGUF files carry their tokenizer: 150,000 words and as many merges, about 6 MB.
MAX_GGUF_BYTES = 64_000_000
MAX_GGUF_STRINGS = 1_000_000

#: Bits of one element, by the names safetensors uses.
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

#: ggml types: number in the file -> name, elements in a block, bytes of a block (ggml's `type_traits`).
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
# GGUF values of fixed size: type number -> struct code. 8 is a string, 9 an array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class BadHeader(Exception):
    """The bytes contradict the format. The message completes "a safetensors file whose header ..."."""


class CutHeader(BadHeader):
    """The file ends inside its header. `missing` is how many bytes the header wants beyond the end."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"is cut off: {missing:,} more bytes are wanted for the header alone")
        self.missing = missing


class Tensor(NamedTuple):
    """One tensor: dtype as the file names it, shape in the order of torch, bytes it takes (None: unknown dtype)."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None


@dataclass(frozen=True)
class Header:
    """What a file says it holds. `end` is how long the file must be, in bytes (None where that cannot be told)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    end: int | None = None


def read_safetensors(file: BinaryIO, size: int) -> Header:
    """The header of a safetensors file of `size` bytes, from the start of `file`.

    Raises:
        CutHeader: the file ends before its header does.
        BadHeader: the header is no JSON object of tensors, is past a limit, or its offsets contradict its shapes.
    """
    start = file.read(8)
    if len(start) < 8:
        raise CutHeader(8 - len(start))
    (length,) = struct.unpack("<Q", start)
    if not 2 <= length <= MAX_JSON:
        raise BadHeader(f"claims a length of {length:,} bytes")
    if size < 8 + length:
        raise CutHeader(8 + length - size)
    text = file.read(length)
    if len(text) < length:
        raise CutHeader(length - len(text))
    entries = json_object(text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise BadHeader("has a __metadata__ that is no table")
    tensors = {}
    spans = []
    for name, entry in entries.items():
        tensors[_name(name)], span = _tensor(name, entry)
        spans.append(span)
    return Header(tensors, metadata, 8 + length + _contiguous(spans))


def json_object(text: bytes) -> dict[str, Any]:
    """JSON of bounded cost: brackets and commas are counted before anything is built from them."""
    if text.count(b"{") + text.count(b"[") > 3 * MAX_TENSORS or text.count(b",") > MAX_COMMAS:
        raise BadHeader("lists more tensors than any known model has")
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_int=_int, parse_constant=_no_constant
        )
    except (ValueError, RecursionError):
        raise BadHeader("is no JSON") from None
    if not isinstance(value, dict):
        raise BadHeader("is no JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise BadHeader("says the same name twice")
    return table


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BadHeader("has a number of too many digits")
    return int(digits)


def _no_constant(word: str) -> None:
    raise BadHeader(f"has {word} for a number")


def _tensor(name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not re.fullmatch(r"\w{1,20}", str(dtype), re.ASCII) or len(shape) > MAX_AXES or begin > end:
        raise BadHeader(f"describes no tensor under {name[:60]!r}")
    bits = DTYPE_BITS.get(str(dtype))
    if bits and (math.prod(shape) * bits + 7) // 8 != end - begin:
        raise BadHeader(f"gives {name[:60]!r} {end - begin:,} bytes, which its shape {shape} in {dtype} does not take")
    return Tensor(str(dtype), tuple(shape), end - begin), (begin, end)


def _name(name: str) -> str:
    if len(name) > MAX_NAME:
        raise BadHeader(f"has a tensor whose name is {len(name):,} characters long")
    return name


def _contiguous(spans: list[tuple[int, int]]) -> int:
    """Bytes of data, when the tensors lie end to end from 0 as the format demands."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise BadHeader("has tensors that overlap" if begin < at else "leaves a hole between tensors")
        at = end
    return at


def read_gguf(file: BinaryIO) -> Header:
    """The header of a GGUF file, from the start of `file`. Shapes come in torch's order.

    Metadata holds plain values and strings; of arrays only the length is kept.

    Raises:
        CutHeader: the file ends before its header does.
        BadHeader: not GGUF 2 or 3, past a limit, or it describes no tensors.
    """
    bites = _Bites(file)
    if bites.take(4) != b"GGUF":
        raise BadHeader("does not start with GGUF")
    version = bites.number("I")
    if version not in (2, 3):
        raise BadHeader(f"is of version {version}; 2 and 3 are known")
    tensor_count, value_count = bites.number("Q"), bites.number("Q")
    if tensor_count > MAX_TENSORS or value_count > MAX_TENSORS:
        raise BadHeader("lists more tensors than any known model has")
    metadata = {bites.string(): _gguf_value(bites) for _ in range(value_count)}
    found = list(_gguf_tensors(bites, tensor_count))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise BadHeader("states no usable alignment")
    data = -(-bites.at // alignment) * alignment
    known = all(tensor.nbytes is not None for _, tensor, _ in found)
    end = data + max((offset + (tensor.nbytes or 0) for _, tensor, offset in found), default=0)
    return Header({name: tensor for name, tensor, _ in found}, metadata, end if known else None)


def _gguf_value(bites: _Bites) -> Any:
    kind = bites.number("I")
    if kind == 8:
        return bites.string()
    if kind in _GGUF_SCALARS:
        return bites.number(_GGUF_SCALARS[kind])
    if kind != 9:
        raise BadHeader(f"has a value of unknown type {kind}")
    of, count = bites.number("I"), bites.number("Q")
    if of == 8:
        bites.skip_strings(count)
    elif of in _GGUF_SCALARS:
        bites.skip(count * struct.calcsize(_GGUF_SCALARS[of]))
    else:
        raise BadHeader(f"has an array of unknown type {of}")
    return count


def _gguf_tensors(bites: _Bites, count: int) -> Iterator[tuple[str, Tensor, int]]:
    for _ in range(count):
        name = _name(bites.string())
        axes = bites.number("I")
        if axes > MAX_AXES:
            raise BadHeader(f"gives {name[:60]!r} {axes} axes")
        shape = tuple(bites.number("Q") for _ in range(axes))[::-1]
        kind, offset = bites.number("I"), bites.number("Q")
        dtype, elements, nbytes = GGML_TYPES.get(kind, (f"type {kind}", 0, 0))
        total = math.prod(shape)
        yield name, Tensor(dtype, shape, -(-total // elements) * nbytes if elements else None), offset


class _Bites:
    """Takes values off the front of a file, never past its end or past the limit on headers."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.at = 0
        self.strings = 0
        self.buffer = bytearray()

    def skip(self, count: int) -> int:
        """Move on by `count` bytes, which are then in the buffer; returns where they start."""
        start, end = self.at, self.at + count
        if end > len(self.buffer):
            if end > MAX_GGUF_BYTES:
                raise BadHeader(f"is longer than {MAX_GGUF_BYTES:,} bytes")
            self.buffer += self.file.read(end - len(self.buffer) + 2**18)
            if end > len(self.buffer):
                raise CutHeader(end - len(self.buffer))
        self.at = end
        return start

    def take(self, count: int) -> bytes:
        start = self.skip(count)
        return bytes(self.buffer[start : self.at])

    def number(self, code: str) -> Any:
        start = self.skip(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.buffer, start)[0]

    def string(self) -> str:
        self._count_strings(1)
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        self._count_strings(count)
        for _ in range(count):
            self.skip(self.number("Q"))

    def _count_strings(self, count: int) -> None:
        self.strings += count
        if self.strings > MAX_GGUF_STRINGS:
            raise BadHeader(f"has more than {MAX_GGUF_STRINGS:,} words")
