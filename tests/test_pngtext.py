"""Text in PNG files, written and read by our own code and by Pillow."""

import io
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kleinctl.pngtext import MAX_TEXT_BYTES, SIGNATURE, plain_text, read_text, utf8_text, with_chunks
from kleinctl.problem import KleinctlError


def png(*chunks, size=(16, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "PNG")
    return with_chunks(buffer.getvalue(), *chunks)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write(folder, data):
    path = folder / "picture.png"
    path.write_bytes(data)
    return path


def problem_of(path):
    with pytest.raises(KleinctlError) as caught:
        read_text(path)
    return caught.value.problem


def test_other_programs_read_what_we_write(tmp_path):
    path = write(
        tmp_path,
        png(plain_text("Description", "ein Käfer 🐞"), plain_text("Software", "kleinctl"), utf8_text("k", "ü")),
    )
    with Image.open(path) as image:
        image.load()
        assert image.text == {"Description": "ein Käfer 🐞", "Software": "kleinctl", "k": "ü"}
        assert image.getpixel((3, 3)) == (200, 30, 30)


def test_we_read_what_other_programs_write(tmp_path):
    info = PngInfo()
    info.add_text("Comment", "café")
    info.add_text("Squeezed", "many words " * 99, zip=True)
    info.add_itxt("kleinctl", '{"prompt": "日本"}', zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png", pnginfo=info)
    texts = {"Comment": "café", "Squeezed": "many words " * 99, "kleinctl": '{"prompt": "日本"}'}
    assert read_text(tmp_path / "picture.png") == texts


@given(st.text(), st.text())
def test_any_text_comes_back(tmp_path_factory, first, second):
    path = write(tmp_path_factory.mktemp("png"), png(utf8_text("one", first), plain_text("two", second)))

    def storable(text):
        return text.replace("\0", "")

    assert read_text(path) == {"one": storable(first), "two": storable(second)}


def test_a_jpeg_named_png(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png", "JPEG")
    assert problem_of(tmp_path / "picture.png").what == "picture.png is no PNG"


def test_a_path_that_is_not_there(tmp_path):
    assert "No such file" in problem_of(tmp_path / "picture.png").why


def test_a_download_that_was_cut_off(tmp_path):
    whole = png(plain_text("Description", "x"))
    for length in (len(SIGNATURE), 20, 40, len(whole) // 2, len(whole) - 12):
        assert problem_of(write(tmp_path, whole[:length])).what == "picture.png is damaged"


def test_a_bit_that_flipped(tmp_path):
    damaged = png(plain_text("Description", "a red circle")).replace(b"red", b"rad")
    assert "checksum" in problem_of(write(tmp_path, damaged)).why


def test_a_text_that_unfolds_to_gigabytes(tmp_path):
    """A zip bomb: a few kilobytes that would become many megabytes are refused, not unfolded."""
    bomb = zlib.compress(b"A" * (MAX_TEXT_BYTES * 20))
    for kind, head in ((b"zTXt", b"kleinctl\0\0"), (b"iTXt", b"kleinctl\0\1\0\0\0")):
        assert "unfolds to more than" in problem_of(write(tmp_path, png(chunk(kind, head + bomb)))).why


def test_many_texts_that_unfold_to_gigabytes_together(tmp_path):
    text = zlib.compress(b"A" * MAX_TEXT_BYTES)
    bombs = [chunk(b"zTXt", b"%d\0\0" % number + text) for number in range(17)]
    assert "longer than 16 MiB together" in problem_of(write(tmp_path, png(*bombs))).why


def test_a_huge_text_is_left_alone(tmp_path):
    path = write(tmp_path, png(plain_text("Huge", "x" * (MAX_TEXT_BYTES + 1)), plain_text("Description", "x")))
    assert read_text(path) == {"Description": "x"}


def test_a_length_beyond_the_file(tmp_path):
    lying = SIGNATURE + struct.pack(">I", 2**31 - 1) + b"tEXt" + b"x" * 50
    assert "beyond the end" in problem_of(write(tmp_path, lying)).why


@given(st.binary(max_size=300))
def test_no_garbage_gets_past_the_reader(tmp_path_factory, data):
    """Whatever a stranger sends, the answer is texts or a problem."""
    path: Path = write(tmp_path_factory.mktemp("png"), SIGNATURE + data)
    problem_of(path)


@given(st.sampled_from([b"tEXt", b"zTXt", b"iTXt"]), st.binary(max_size=60))
def test_malformed_text_chunks(tmp_path_factory, kind, data):
    path = write(tmp_path_factory.mktemp("png"), png(chunk(kind, data)))
    try:
        assert all(isinstance(text, str) for text in read_text(path).values())
    except KleinctlError as error:
        assert error.problem.name == "picture-damaged"
