"""Reports that somebody sent: whole ones, damaged ones, and ones made to do harm."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kleinctl.facts import Facts
from kleinctl.problem import KleinctlError
from kleinctl.report import bundle
from kleinctl.report.collect import Log
from tests.report import machines
from tests.report.machines import owned, report


def refused(path: Path) -> str:
    """Why a report is not read."""
    with pytest.raises(KleinctlError) as caught:
        bundle.read(path)
    problem = caught.value.problem
    assert problem.name == "report-unreadable"
    assert path.name in problem.what
    return problem.why


def zipped(path: Path, *entries: tuple[zipfile.ZipInfo | str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def whole() -> bytes:
    return bundle._member(report(owned()), "report.json")


def test_a_report_is_read_as_it_was_written(tmp_path):
    log = Log("worker-20260101-000000-1.log", "worker", "line one\nRuntimeError: no")
    path = machines.write(tmp_path / "a.zip", owned(), (log,), case="T-1", note="it stopped")
    found = bundle.read(path)
    assert (found.case, found.note, found.label, found.made) == ("T-1", "it stopped", "T-1", machines.MADE)
    assert found.facts.hardware.gpus[0].name.endswith("4070 Ti SUPER")
    assert found.logs == (log,)
    assert found.facts == Facts.from_json(json.loads(whole())["facts"])


def test_the_same_facts_are_the_same_bytes():
    once, again = ({**json.loads(whole()), "timings": None} for _ in range(2))
    for each in (once, again):
        for check in each["findings"]["checks"]:
            del check["seconds"]
    assert json.dumps(once) == json.dumps(again)
    parts = {"a": b"1", "b": b"2"}
    assert bundle.pack(parts) == bundle.pack(parts)


def test_members_have_lasting_names_and_no_times():
    with zipfile.ZipFile(io.BytesIO(report(owned(), (Log("comfyui.log", "comfyui", "x"),)))) as archive:
        assert archive.namelist() == ["README.txt", "report.json", "logs/01-comfyui-comfyui.txt"]
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_bare_report_and_doctors_answer_are_read_too(tmp_path):
    bare = tmp_path / "report.json"
    bare.write_bytes(whole())
    assert bundle.read(bare).facts.files
    doctor = tmp_path / "doctor.json"
    hardware = machines.hardware("rtx-4090").to_json()
    doctor.write_text(json.dumps({"schema": "kleinctl.doctor/1", "kleinctl": "0.1.0", "hardware": hardware}))
    assert bundle.read(doctor).facts == Facts(machines.hardware("rtx-4090"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Its text is no JSON"),
        (b"PK\x03\x04 cut off", "The zip is damaged"),
        (b"[" * 100_000, "Its text is no JSON"),
        (b'{"a":' * 60_000 + b"1" + b"}" * 60_000, "Its text is no JSON"),
        (b'{"schema": "kleinctl.report/1", "schema": 1}', "says the same name twice"),
        (b'{"schema": "kleinctl.report/1", "facts": {"hardware": NaN}}', "has NaN for a number"),
        (b'{"report": 1}', "It has no schema; wanted is kleinctl.report/1"),
        (b'{"schema": "other/1"}', "Its schema is 'other/1'; wanted is kleinctl.report/1"),
        (b'{"schema": "kleinctl.report/1"}', "facts in this report cannot be read"),
        (b"{" + b",".join(b'"%d":[]' % n for n in range(300_000)) + b"}", "more entries than any report"),
        (b'{"schema": "\xff"}', "Its text is no JSON"),
        (b'{"a": 1' + b"0" * 100_000 + b"}", "a number of too many digits"),
    ],
)
def test_something_that_is_no_report(content, why, tmp_path):
    path = tmp_path / "odd.zip"
    path.write_bytes(content)
    assert why in refused(path)


def test_a_report_that_is_not_there_or_is_a_folder(tmp_path):
    assert "No such file" in refused(tmp_path / "none.zip")
    assert "no regular file" in refused(tmp_path)


def test_a_zip_bomb_is_not_opened(tmp_path):
    assert "larger than 16 MiB" in refused(zipped(tmp_path / "a.zip", ("report.json", b"0" * (17 * 2**20))))
    assert "grow more than 200 times" in refused(zipped(tmp_path / "b.zip", ("report.json", b"0" * (15 * 2**20))))


def test_a_zip_that_lies_about_a_members_size(tmp_path):
    path = zipped(tmp_path / "a.zip", ("report.json", b"0" * (40 * 2**20)))
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 40 * 2**20), struct.pack("<I", 1000)))
    assert "damaged" in refused(path)


def test_a_zip_with_ten_thousand_members(tmp_path):
    entries = [(f"{number}.txt", b"") for number in range(10_000)]
    assert "more than 200 members" in refused(zipped(tmp_path / "a.zip", *entries))


def test_a_zip_with_two_reports_a_link_or_none(tmp_path):
    link = zipfile.ZipInfo("logs/x")
    link.external_attr = 0o120777 << 16
    with pytest.warns(UserWarning):
        twice = zipped(tmp_path / "a.zip", ("report.json", whole()), ("report.json", b"{}"))
    assert "two members of the same name" in refused(twice)
    assert "symbolic link" in refused(zipped(tmp_path / "b.zip", ("report.json", whole()), (link, b"/etc/passwd")))
    assert "no report.json" in refused(zipped(tmp_path / "c.zip", ("../report.json", whole())))
    assert "compressed in a way" in refused(zipped(tmp_path / "d.zip", ("report.json", whole()), how=zipfile.ZIP_LZMA))


def test_members_with_evil_names_are_left_alone(tmp_path):
    inner = tmp_path / "inner.zip"
    zipped(inner, ("report.json", b"{}"))
    evil = [("../../evil.txt", b"x"), ("/etc/evil", b"x"), ("C:\\evil", b"x"), ("nested.zip", inner.read_bytes())]
    found = bundle.read(zipped(tmp_path / "a.zip", ("report.json", whole()), *evil))
    assert found.facts.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "inner.zip"]


def test_text_of_strangers_cannot_speak_to_a_terminal(tmp_path):
    document = json.loads(whole())
    document["note"] = "\x1b]0;owned\x07\x1b[2J"
    document["logs"] = [{"name": "\x1b[31m", "kind": "worker", "tail": "a\x1b[2Jb\n\u202eevil"}]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document))
    found = bundle.read(path)
    assert "\x1b" not in found.note + found.logs[0].name + found.logs[0].tail
    assert "\u202e" not in found.logs[0].tail


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bits=st.binary(min_size=1, max_size=8), keep=st.floats(0.05, 1))
def test_any_damage_is_a_report_or_a_problem(at, bits, keep, tmp_path):
    data = bytearray(ONCE)
    at %= len(data)
    data[at : at + len(bits)] = bits
    path = tmp_path / "damaged.zip"
    path.write_bytes(data[: int(len(data) * keep)])
    try:
        bundle.read(path)
    except KleinctlError as error:
        assert error.problem.name == "report-unreadable"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=9) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON, data=st.data())
def test_any_value_anywhere_in_a_report_is_a_report_or_a_problem(value, data, tmp_path):
    document = json.loads(json.dumps(DOCUMENT))
    here, path = document, tmp_path / "report.json"
    while True:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        inside = here[key]
        if not inside or not isinstance(inside, (dict, list)) or data.draw(st.booleans()):
            here[key] = value
            break
        here = inside
    path.write_text(json.dumps(document))
    try:
        bundle.read(path)
    except KleinctlError as error:
        assert error.problem.name == "report-unreadable"


ONCE = report(owned(), (Log("worker-1.log", "worker", "said"),))
DOCUMENT = json.loads(bundle._member(ONCE, "report.json"))


def test_a_report_is_never_written_over_a_file(tmp_path):
    taken = tmp_path / "a.zip"
    taken.write_text("mine")
    with pytest.raises(KleinctlError) as caught:
        bundle.write(taken, b"x")
    assert caught.value.problem.name == "report-exists"
    assert caught.value.problem.fix == "kleinctl report -o a-2.zip"
    assert taken.read_text() == "mine"
    assert bundle.free_name(taken).name == "a-2.zip"


def test_a_report_where_nothing_can_be_written(tmp_path):
    with pytest.raises(KleinctlError) as caught:
        bundle.write(tmp_path / "none" / "a.zip", b"x")
    assert "No such file" in caught.value.problem.why
    assert list(tmp_path.iterdir()) == []


def test_what_powershell_saved_of_doctor_json(tmp_path):
    """`kleinctl doctor --json > x.json` writes UTF-16 with a byte order mark there."""
    document = {"schema": "kleinctl.doctor/1", "kleinctl": "0.1.0", "hardware": machines.hardware().to_json()}
    (tmp_path / "x.json").write_text(json.dumps(document), encoding="utf-16")
    assert bundle.read(tmp_path / "x.json").facts.hardware == machines.hardware()
