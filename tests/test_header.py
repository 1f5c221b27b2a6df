"""Headers: right ones are read, hostile ones are refused in bounded time and memory, and nothing else happens."""

from __future__ import annotations

import io
import json
import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kleinctl import header as formats
from kleinctl.header import BadHeader, CutHeader, Header, read_gguf, read_safetensors
from tests import weights

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
