"""Headers: right ones are read, hostile ones are refused in bounded time and memory, and nothing else happens."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kleinctl import header as formats
from kleinctl.header import BadHeader, CutHeader, Header, read_gguf, read_safetensors
from tests import weights
from tests.conftest import REPOSITORY

safetensors = pytest.importorskip("safetensors")


def parse(data: bytes) -> Header:
    return read_safetensors(io.BytesIO(data), len(data))


def with_json(text: bytes | str, data: bytes = b"") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_names_shapes_and_length_as_the_library_does(tmp_path):
    shapes = {"a.weight": (2, 3), "b.bias": (5,), "scalar": ()}
    path = weights.write(tmp_path / "a.safetensors", shapes, "F32", {"made": "here"})
    with path.open("rb") as file:
        found = read_safetensors(file, path.stat().st_size)
    with safetensors.safe_open(path, "np") as library:
        assert {name: tuple(library.get_slice(name).get_shape()) for name in library.keys()} == shapes  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == shapes
    assert (found.metadata, found.end) == ({"made": "here"}, path.stat().st_size)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("[1, 2]", "is no JSON object"),
        ('{"a": 1}', "describes no tensor under 'a'"),
        ('{"a": {"dtype": "F32"}}', "describes no tensor under 'a'"),
        (b'{"a": "\xff\xfe"}', "is no JSON"),
        ('{"a": NaN}', "has NaN for a number"),
        ('{"__metadata__": 3}', "has a __metadata__ that is no table"),
        ('{"a": {}, "a": {}}', "says the same name twice"),
        ('{"a": ' + "9" * 10_000 + "}", "has a number of too many digits"),
        ("[" * 100_000, "is no JSON"),
        ("[" * 400_000, "lists more tensors than any known model has"),
        ("{" + ",".join(f'"{n}":0' for n in range(1_100_000)) + "}", "lists more tensors than any known model has"),
        (json.dumps({"a": entry(shape=(-1,))}), "describes no tensor under 'a'"),
        (json.dumps({"a": entry(offsets=(4, 0))}), "describes no tensor under 'a'"),
        (json.dumps({"a": entry(offsets=(0.0, 4.0))}), "describes no tensor under 'a'"),
        (json.dumps({"a": entry(shape=[1] * 9)}), "describes no tensor under 'a'"),
        (json.dumps({"a" * 501: entry()}), "has a tensor whose name is 501 characters long"),
        (json.dumps({"a": entry(dtype="F32\n")}), "describes no tensor under 'a'"),
        (json.dumps({"a": entry(shape=(True,))}), "describes no tensor under 'a'"),
        (json.dumps({"a": entry(shape=(2,))}), "gives 'a' 4 bytes, which its shape [2] in F32 does not take"),
        (json.dumps({"a": entry(), "b": entry()}), "has tensors that overlap"),
        (json.dumps({"a": entry(), "b": entry(offsets=(8, 12))}), "leaves a hole between tensors"),
        (json.dumps({"a": entry(offsets=(4, 8))}), "leaves a hole between tensors"),
    ],
)
def test_a_header_that_contradicts_itself(header, why):
    start = time.perf_counter()
    with pytest.raises(BadHeader) as caught:
        parse(with_json(header))
    assert str(caught.value) == why
    assert time.perf_counter() - start < 2


def test_a_header_longer_than_the_format_allows_is_not_read():
    with pytest.raises(BadHeader, match=r"claims a length of 18,446,744,073,709,551,615 bytes"):
        parse(b"\xff" * 64)


@pytest.mark.parametrize(("keep", "missing"), [(0, 8), (5, 3), (8, 40), (20, 28)])
def test_a_file_that_ends_inside_its_header(keep, missing):
    whole = with_json('{"a":{"dtype":"F32","shape":[],"data_o":1}}'[:40].ljust(40))
    with pytest.raises(CutHeader) as caught:
        parse(whole[:keep])
    assert caught.value.missing == missing


def test_a_huge_header_of_one_string_costs_little_more_than_itself():
    tracemalloc.start()
    found = parse(with_json(json.dumps({"__metadata__": {"picture": "A" * 20_000_000}})))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tensors == {} and peak < 120_000_000


def test_the_most_tensors_that_are_accepted_stay_within_bounds():
    many = {f"t{n}": entry("U8", (1,), (n, n + 1)) for n in range(formats.MAX_TENSORS // 2)}
    data = with_json(json.dumps(many))
    tracemalloc.start()
    found = parse(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.tensors) == len(many) and peak < 300_000_000


@pytest.mark.parametrize("entry", ['"x":{"dtype":"', '"":{"dtype":"],"data_offsets":['])
def test_a_short_header_of_entries_that_nearly_fit_is_judged_at_once(entry):
    start = time.process_time()
    with pytest.raises(BadHeader, match="is no JSON"):
        parse(with_json("{" + entry * (formats.SMALL // len(entry) - 1)))
    assert time.process_time() - start < 5


def test_a_header_longer_than_any_known_one_is_not_read_either():
    front = struct.pack("<Q", formats.MAX_READ + 1) + b'{"a'
    with pytest.raises(BadHeader, match="is 32,000,001 bytes long"):
        read_safetensors(io.BytesIO(front), 99_000_000)


HOSTILE = {
    "nested": lambda length: b'{"a":' + b"[" * (length - 5),
    "many tensors": lambda length: with_tensors(length),
    "many numbers": lambda length: b'{"a":[' + b"1," * ((length - 6) // 2),
    "one number": lambda length: b'{"a":' + b"9" * (length - 6) + b"}",
    "one string": lambda length: b'{"a":"' + b"x" * (length - 8) + b'"}',
    "escapes": lambda length: b'{"a":"' + b"\\u0041" * ((length - 8) // 6) + b'"}',
    "quotes": lambda length: b'{"a":' + b'"' * (length - 5),
    "unicode": lambda length: '{"a":"\U0001f600'.encode() + b"x" * (length - 12) + b'"}',
    "blanks": lambda length: b"{" + b" " * (length - 2) + b"}",
    "one name many times": lambda length: b"{" + b'"a":{},' * ((length - 8) // 7) + b'"a":{}}',
    "zeros": lambda length: b"{" + bytes(length - 1),
    "entries that nearly fit": lambda length: b"{" + b'"":{"dtype":"' * ((length - 1) // 13),
}


def with_tensors(length: int) -> bytes:
    entries = (f'"{n}":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{n + 1}]}},' for n in range(length // 75))
    return b"{" + "".join(entries).encode()[:-1] + b"}"


JUDGE = """
import re, resource, sys, time
from pathlib import Path
from kleinctl.identify import identify
resource.setrlimit(resource.RLIMIT_AS, (600_000_000, 600_000_000))
for path in map(Path, sys.argv[1:]):
    start = time.process_time()
    found = identify(path)
    print(path.name, round(time.process_time() - start, 2), found.kind, found.saw, sep="|")
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss has the parent's in it
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("length", [30_000_000, 99_000_000])
def test_hostile_headers_cost_neither_time_nor_memory(tmp_path, length):
    paths = []
    for name, make in HOSTILE.items():
        text = make(length) if length < formats.MAX_READ else make(1000)
        paths.append(tmp_path / name)
        with paths[-1].open("wb") as file:
            file.write(struct.pack("<Q", max(length, len(text))) + text)
            file.truncate(8 + max(length, len(text)) + 10)
    done = subprocess.run([sys.executable, "-c", JUDGE, *paths], capture_output=True, text=True, timeout=120)
    for path in paths:
        path.unlink()
    assert done.returncode == 0, done.stderr
    *lines, peak = done.stdout.splitlines()
    print(done.stdout)
    assert len(lines) == len(HOSTILE)
    assert max(float(line.split("|")[1]) for line in lines) < 2
    assert int(peak) * 1024 < 400_000_000


def test_hostile_gguf_files_cost_neither_time_nor_memory():
    lies = [
        gguf(values=1, rest=key("a") + struct.pack("<IIQ", 9, 8, 999_999) + bytes(8 * 999_999)),
        gguf(tensors=99_999, rest=bytes(60_000_000)),
        gguf(values=99_999, rest=bytes(60_000_000)),
    ]
    for data in lies:
        start = time.process_time()
        with contextlib.suppress(BadHeader):
            read_gguf(io.BytesIO(data))
        assert time.process_time() - start < 2


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
tensor_like = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "U8", "nonsense"]) | anything,
        "shape": st.lists(st.integers(-2, 9), max_size=3) | anything,
        "data_offsets": st.lists(st.integers(-4, 40), min_size=2, max_size=2) | anything,
    },
)


@given(
    st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), tensor_like | anything, max_size=5),
    st.integers(0, 60),
)
def test_any_json_ends_in_a_header_or_a_bad_header(tables, extra):
    data = with_json(json.dumps(tables), b"\0" * extra)
    try:
        found = parse(data)
    except BadHeader:
        return
    assert found.end is not None and found.end >= 8
    assert all(tensor.nbytes is not None and tensor.nbytes >= 0 for tensor in found.tensors.values())


usual_entry = st.tuples(
    st.text(max_size=4), st.sampled_from(["F32", "BF16", "F4"]), st.lists(st.integers(0, 3), max_size=3)
)


@given(st.lists(usual_entry, max_size=5), st.booleans(), st.data())
def test_the_quick_way_reads_what_the_slow_way_reads(entries, metadata, data):
    shapes = {name: tuple(shape) for name, _, shape in entries}
    dtypes = {name: dtype for name, dtype, _ in entries}
    raw = bytearray(weights.header(shapes, "F32", {"a": "b"} if metadata else None, **dtypes)[8:])
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw) - 1))
        junk = st.sampled_from([b"", b",", b"}", b'"', b"0", b" ", b"\\", b'},"', b"\n", b"_", b"{"])
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(junk)
    quick = formats._usual_form(bytes(raw))
    if quick is not None:
        assert quick == formats._any_form(bytes(raw))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_the_quick_way_is_taken_for_what_the_library_writes(part):
    (path,) = (REPOSITORY / "manifests" / "klein-tiny" / part).glob("*.safetensors")
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    quick = formats._usual_form(raw[8 : 8 + length])
    assert quick is not None and quick == formats._any_form(raw[8 : 8 + length])


@given(st.binary(max_size=200) | st.binary(max_size=60).map(with_json))
def test_any_bytes_end_in_a_header_or_a_bad_header(data):
    for read in (parse, lambda raw: read_gguf(io.BytesIO(raw))):
        try:
            assert isinstance(read(data), Header)
        except BadHeader:
            continue


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(max_size=12).filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 5), max_size=3)
    )
)
def test_what_we_accept_the_library_accepts(tables):
    front = weights.header({name: tuple(shape) for name, shape in tables.items()}, "F32")
    found = parse(front)
    data = front + b"\0" * (found.end - len(front))
    loaded = safetensors.deserialize(data)
    assert {name: tuple(info["shape"]) for name, info in loaded} == {n: t.shape for n, t in found.tensors.items()}


# GGUF


def gguf(*, version: int = 3, tensors: int = 0, values: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def test_reads_a_gguf_file_with_its_tokenizer_in_a_fraction_of_a_second(tmp_path):
    shapes = {f"blk.{n}.attn_q.weight": (4096, 2560) for n in range(36)}
    path = weights.write_gguf(tmp_path / "a.gguf", shapes, "qwen3", words=300_000)
    start = time.perf_counter()
    with path.open("rb") as file:
        found = read_gguf(file)
    assert time.perf_counter() - start < 3
    assert found.metadata == {"general.architecture": "qwen3", "tokenizer.ggml.tokens": 300_000}
    assert found.tensors["blk.0.attn_q.weight"].shape == (4096, 2560)
    assert found.end == path.stat().st_size


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GGML" + b"\0" * 40, "does not start with GGUF"),
        (gguf(version=1), "is of version 1; 2 and 3 are known"),
        (gguf(tensors=2**60), "lists more tensors than any known model has"),
        (gguf(values=2**60), "lists more tensors than any known model has"),
        (gguf(values=1, rest=struct.pack("<Q", 2**62)), "is longer than 64,000,000 bytes"),
        (gguf(values=1, rest=key("a") + struct.pack("<I", 99)), "has a value of unknown type 99"),
        (gguf(values=1, rest=key("a") + struct.pack("<IIQ", 9, 9, 1)), "has an array of unknown type 9"),
        (gguf(values=1, rest=key("a") + struct.pack("<IIQ", 9, 8, 2**40)), "has more than 1,000,000 words"),
        (gguf(values=1, rest=key("a") + struct.pack("<IIQ", 9, 10, 2**60)), "is longer than 64,000,000 bytes"),
        (gguf(tensors=1, rest=key("a") + struct.pack("<I", 2**31)), "gives 'a' 2147483648 axes"),
        (gguf(values=1, rest=key("general.alignment") + struct.pack("<II", 4, 0)), "states no usable alignment"),
    ],
)
def test_a_gguf_file_that_lies(data, why):
    with pytest.raises(BadHeader) as caught:
        read_gguf(io.BytesIO(data))
    assert str(caught.value) == why


def test_a_gguf_file_that_ends_inside_its_header():
    with pytest.raises(CutHeader):
        read_gguf(io.BytesIO(gguf(values=1, rest=struct.pack("<Q", 100) + b"abc")))
