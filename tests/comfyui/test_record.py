"""The record of the ComfyUI in use: whatever is in that file, kleinctl goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kleinctl import comfyui
from kleinctl.comfyui import Checkout, record

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
GOOD = {"schema": record.SCHEMA, "path": "/c", "python": "/c/venv/bin/python", "owned": False}


def write(raw: bytes) -> None:
    record.record_file().parent.mkdir(parents=True, exist_ok=True)
    record.record_file().write_bytes(raw)


def test_what_was_written_is_read_again():
    whole = Checkout(
        Path("/c"), Path("/c/venv/bin/python"), False, "0.29.0", "a" * 40, Path("/data"), ("--cpu",),
        "http://127.0.0.1:8188",
    )  # fmt: skip
    record.remember(whole)
    assert comfyui.known() == whole
    record.forget()
    assert comfyui.known() is None
    record.forget()


@pytest.mark.parametrize("url", ["http://example.org:8188", "https://127.0.0.1:8188", "http://127.0.0.1:8188/x", ""])
def test_a_server_that_is_not_on_this_machine_is_not_used(url):
    write(json.dumps({**GOOD, "url": url}).encode())
    assert comfyui.known() is not None and comfyui.known().url is None


@pytest.mark.parametrize("change", [{"path": "c"}, {"python": "python"}, {"base": "data"}, {"schema": "other/1"}])
def test_a_record_that_leads_nowhere_is_none(change):
    write(json.dumps({**GOOD, **change}).encode())
    assert comfyui.known() is None


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "version", "commit", "base", "arguments", "url"]), JSON) | JSON)
def test_any_document_is_a_checkout_or_none(document):
    if isinstance(document, dict):
        document = {**GOOD, **document}
    write(json.dumps(document).encode())
    found = comfyui.known()
    assert found is None or (isinstance(found.path, Path) and all(isinstance(each, str) for each in found.arguments))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_no_reason_to_stop(raw):
    write(raw)
    assert comfyui.known() is None


@pytest.mark.parametrize("raw", [b"[" * 60_000, b'{"schema": "' + b"x" * 70_000, b"\xff\xfe{", b"9" * 5000])
def test_a_record_that_is_made_to_hurt(raw):
    write(raw)
    assert comfyui.known() is None


def test_a_folder_in_its_place():
    record.record_file().mkdir(parents=True)
    assert comfyui.known() is None
