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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import sub
from typing import Any, BinaryIO, NamedTuple

#: The format's own limit on the JSON (safetensors `MAX_HEADER_SIZE`), in bytes.
MAX_JSON = 100_000_000
#: What is read of it. Trainers put lists of all their pictures into metadata, a few MB: a tenth of this.
MAX_READ = 32_000_000
#: So short that whatever it says costs little.
SMALL = 2_000_000
#: Limits of our own: klein's files hold 149 to 400 tensors, the largest published models some ten thousand.
MAX_TENSORS = 100_000
MAX_COMMAS = 1_000_000
MAX_AXES = 8
MAX_NAME = 500  # characters
MAX_DIGITS = 18
MAX_AXIS = 2**48
MAX_ESCAPES = 4_000_000
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
    """What a file says it holds. `end` is how long the file must be, in bytes (None where that cannot be told).

    `census` counts the tensors of each dtype and shape. `starts` has where each tensor begins, in the order of
    `tensors` (empty for GGUF), in bytes from `data`, the place in the file behind the header.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    end: int | None
    census: Mapping[Tensor, int]
    starts: Sequence[int] = field(default=(), repr=False)
    data: int = 0


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
    if length > MAX_READ:
        raise BadHeader(f"is {length:,} bytes long; no known file's is a tenth of that")
    text = file.read(length)
    if len(text) < length:
        raise CutHeader(length - len(text))
    if length > SMALL:
        _reject_early(text)
    return _usual_form(text) or _any_form(text)


# As the library writes it: {"__metadata__":{...},"name":{"dtype":"BF16","shape":[3,4],"data_offsets":[0,24]},...}
# Longer kinds and spans are past a limit anyway; without bounds each entry would be sought to the end of the text.
_ENTRY = re.compile(r'"([^"]*)":\{"dtype":"([^\]]{0,200})\],"data_offsets":\[([^\]]{0,40})\]\}')
_FIXED = len('"":{"dtype":"],"data_offsets":[]},')


def _usual_form(raw: bytes) -> Header | None:
    """The header when it is written as the library writes it: one pattern reads that five times as fast as JSON.

    None for anything else, however slightly it differs.
    """
    try:
        text = raw.decode("utf-8")
        metadata, at = _leading_metadata(text)
        rows = _ENTRY.findall(text, at)
        names, kinds, spans = zip(*rows, strict=True)
        if not _nothing_else(text, at, names, len("".join(kinds)) + len("".join(spans))):
            return None
        counts = Counter(kinds)
        known = {kind: _known_tensor(kind) for kind in counts}
        begins, ends = _end_to_end(",".join(spans))
    except (ValueError, RecursionError, BadHeader):
        return None
    sizes = {kind: tensor.nbytes for kind, tensor in known.items()}
    as_shaped = list(map(sizes.__getitem__, kinds)) == list(map(sub, ends, begins))
    tensors = dict(zip(names, map(known.__getitem__, kinds), strict=True))
    if not as_shaped or len(tensors) < len(names) or "__metadata__" in tensors or max(map(len, names)) > MAX_NAME:
        return None
    data = 8 + len(raw)
    census = {known[kind]: count for kind, count in counts.items()}
    return Header(tensors, metadata, data + ends[-1], census, begins, data)


def _nothing_else(text: str, at: int, names: Sequence[str], others: int) -> bool:
    """Whether from `at` on there are these entries, with a comma between each two and a brace behind the last.

    What the search for entries may have skipped would make the text longer than they are, or stand in a comma's place.
    """
    joined = "".join(names)
    return (
        len(text.rstrip(" ")) - at == len(names) * _FIXED + len(joined) + others
        and text.count('},"', at) == len(names) - 1
        and text.rstrip(" ").endswith("]}}")
        and not ("}" in joined or "\\" in joined)
        and joined.isprintable()
    )


def _end_to_end(spans: str) -> tuple[list[int], list[int]]:
    """Where tensors begin and end, from `0,24,24,30`; ValueError unless each begins where the one before ended."""
    digits = spans.replace(",", "")
    if not (digits.isascii() and digits.isdigit()) or ",0" in spans or not spans.startswith("0,"):
        raise ValueError("no plain numbers")
    numbers = spans.split(",")
    if len(numbers) % 2 or numbers[2::2] != numbers[1:-1:2] or len(numbers[-1]) > MAX_DIGITS:
        raise ValueError("not end to end")
    ends = list(map(int, numbers[1::2]))
    return [0, *ends[:-1]], ends


def _leading_metadata(text: str) -> tuple[dict[str, Any], int]:
    """The metadata where it comes first, and where the tensors begin."""
    if not text.startswith('{"__metadata__":{'):
        return {}, text.index('{"', 0, 2) + 1
    metadata, at = _DECODER.raw_decode(text, len('{"__metadata__":'))
    if text[at : at + 2] != ',"':
        raise ValueError("no tensors")
    return metadata, at + 1


@lru_cache(4096)
def _known_tensor(kind: str) -> Tensor:
    """The tensor of `BF16","shape":[3,4`, of a dtype that is known and a shape written plainly, or ValueError."""
    dtype, shape = kind.split('","shape":[')
    axes = tuple(map(int, shape.split(","))) if shape else ()
    plain = ",".join(map(str, axes)) == shape and len(axes) <= MAX_AXES and min(axes, default=0) >= 0
    if not plain or dtype not in DTYPE_BITS or max(axes, default=0) > MAX_AXIS:
        raise ValueError(dtype)
    return Tensor(dtype, axes, (math.prod(axes) * DTYPE_BITS[dtype] + 7) // 8)


def _any_form(raw: bytes) -> Header:
    """The header by way of JSON: the meaning of any form of it, and what exactly is wrong with a bad one."""
    entries = json_object(raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise BadHeader("has a __metadata__ that is no table")
    tensors = {}
    spans = []
    for name, entry in entries.items():
        tensors[_name(name)], span = _tensor(name, entry)
        spans.append(span)
    data = 8 + len(raw)
    starts = [begin for begin, _ in spans]
    return Header(tensors, metadata, data + _contiguous(spans), Counter(tensors.values()), starts, data)


def _reject_early(text: bytes) -> None:
    """Brackets, commas and escapes are counted before anything is built from them."""
    brackets = text.count(b"{") + text.count(b"[")
    if brackets > 3 * MAX_TENSORS or text.count(b",") > MAX_COMMAS or text.count(b"\\") > MAX_ESCAPES:
        raise BadHeader("lists more tensors than any known model has")


def json_object(text: bytes) -> dict[str, Any]:
    """JSON of bounded cost."""
    _reject_early(text)
    try:
        value = _DECODER.decode(text.decode("utf-8"))
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


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_int=_int, parse_constant=_no_constant)


def _tensor(name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not re.fullmatch(r"\w{1,20}", str(dtype), re.ASCII) or len(shape) > MAX_AXES or begin > end:
        raise BadHeader(f"describes no tensor under {name[:60]!r}")
    if max(shape, default=0) > MAX_AXIS:
        raise BadHeader(f"gives {name[:60]!r} an axis of {max(shape):,}")
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
    tensors = {name: tensor for name, tensor, _ in found}
    return Header(tensors, metadata, end if known else None, Counter(tensors.values()))


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
        shape = bites.numbers(f"{axes}Q")[::-1]
        if max(shape, default=0) > MAX_AXIS:
            raise BadHeader(f"gives {name[:60]!r} an axis of {max(shape):,}")
        kind, offset = bites.numbers("IQ")
        dtype, elements, nbytes = GGML_TYPES.get(kind, (f"type {kind}", 0, 0))
        total = math.prod(shape)
        yield name, Tensor(dtype, shape, -(-total // elements) * nbytes if elements else None), offset


_LENGTH = struct.Struct("<Q")


class _Bites:
    """Takes values off the front of a file, never past its end or past the limit on headers."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.at = 0
        self.strings = 0
        self.buffer = b""

    def _reach(self, end: int) -> None:
        """Have the first `end` bytes of the file in the buffer."""
        if end > len(self.buffer):
            if end > MAX_GGUF_BYTES:
                raise BadHeader(f"is longer than {MAX_GGUF_BYTES:,} bytes")
            self.buffer += self.file.read(max(end - len(self.buffer), len(self.buffer), 2**18))
            if end > len(self.buffer):
                raise CutHeader(end - len(self.buffer))

    def skip(self, count: int) -> int:
        """Move on by `count` bytes, which are then in the buffer; returns where they start."""
        start, self.at = self.at, self.at + count
        self._reach(self.at)
        return start

    def take(self, count: int) -> bytes:
        start = self.skip(count)
        return self.buffer[start : self.at]

    def numbers(self, codes: str) -> tuple[Any, ...]:
        start = self.skip(struct.calcsize("<" + codes))
        return struct.unpack_from("<" + codes, self.buffer, start)

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def string(self) -> str:
        self._count_strings(1)
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Walk over the words of a tokenizer: hundreds of thousands, so the loop is a tight one."""
        self._count_strings(count)
        at, unpack = self.at, _LENGTH.unpack_from
        buffer, last = self.buffer, len(self.buffer) - 8
        for _ in range(count):
            if at > last:
                self._reach(at + 8)
                buffer, last = self.buffer, len(self.buffer) - 8
            at += 8 + unpack(buffer, at)[0]
        self._reach(at)
        self.at = at

    def _count_strings(self, count: int) -> None:
        self.strings += count
        if self.strings > MAX_GGUF_STRINGS:
            raise BadHeader(f"has more than {MAX_GGUF_STRINGS:,} words")
