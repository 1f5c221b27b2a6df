"""Amounts and sizes as people type and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleinctl.problem import Misuse
from kleinctl.units import bytes_text, gib, parse_bytes, parse_size, seconds_text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GiB", 12 * 2**30),
        ("12 GB", 12 * 10**9),
        ("1.5g", 3 * 2**29),
        ("2MiB", 2**21),
        ("7kb", 7000),
        ("12", 12 * 2**30),
        ("7.5", 15 * 2**29),
        ("8589934592", 8 * 2**30),
        ("512b", 512),
    ],
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text, "--free") == count


@pytest.mark.parametrize("text", ["", "lots", "12 apples", "-3GiB", "1e9", "GiB", "12GiBs"])
def test_no_amount_of_memory(text):
    with pytest.raises(Misuse) as caught:
        parse_bytes(text, "--vram-limit")
    problem = caught.value.problem
    assert (problem.name, problem.fix) == ("usage", "--vram-limit 12GiB")
    assert problem.what == f"--vram-limit {text!r} is no amount of memory"


def test_sizes():
    assert parse_size("1024x768") == (1024, 768)
    assert parse_size("512") == (512, 512)


@pytest.mark.parametrize(
    ("text", "fix"), [("1000x1000", "--size 992x992"), ("1023x1024", "--size 1024x1024"), ("3x3", "--size 16x16")]
)
def test_a_size_that_is_no_multiple_of_16_gets_the_nearest_one(text, fix):
    with pytest.raises(Misuse) as caught:
        parse_size(text)
    assert caught.value.problem.fix == fix


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_misuse(text):
    try:
        width, height = parse_size(text)
    except Misuse:
        return
    assert width % 16 == height % 16 == 0


def test_what_people_read():
    assert (bytes_text(7_751_109_744), bytes_text(168_120_878), bytes_text(446)) == ("7.75 GB", "168 MB", "446 B")
    assert gib(16 * 2**30) == "16.0 GiB"
    assert [seconds_text(s) for s in (0.61, 48, 200, 3900)] == ["0.6 s", "48 s", "3 min 20 s", "1 h 5 min"]
