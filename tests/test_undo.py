"""`kleinctl undo` as it is typed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jsonschema
import pytest

from kleinctl import journal
from kleinctl.journal import Put, Record, Seen
from tests.conftest import REPOSITORY

SCHEMA = json.loads((REPOSITORY / "kleinctl" / "schemas" / "undo.json").read_text())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file that two fixes changed: from "first" to "second" to "third"."""
    path = tmp_path / ".wslconfig"
    path.write_text("first")
    for text in ("second", "third"):
        new = journal.spare_file("new")
        new.write_text(text)
        record = Record("wsl-memory", (f"write {text} to {path}",))
        former = journal.spare_file(path.name)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        record.perform(Put("put", str(path), sha256, str(former), None, (), Seen.of(path)), new)
        record.finish()
    return path


def test_nothing_was_fixed_yet(kleinctl):
    answer = kleinctl("undo", "--list")
    assert (answer.exit_code, answer.stdout) == (0, "nothing was fixed here yet\n")
    answer = kleinctl("undo", "--yes")
    assert answer.exit_code == 1
    assert "error[undo-impossible]: there is nothing to undo" in answer.stderr


def test_the_newest_is_undone_then_the_one_before(config, kleinctl):
    listed = kleinctl("undo", "--list").stdout.splitlines()
    assert [line.split()[:2] for line in listed[::2]] == [["2", "done"], ["1", "done"]]
    assert listed[1] == f"      write third to {config}"
    answer = kleinctl("undo", "--yes")
    assert (answer.exit_code, answer.stdout, config.read_text()) == (0, "entry 2 undone\n", "second")
    assert f"back at {config}" in answer.stderr
    answer = kleinctl("undo", "--yes", "--json")
    document = json.loads(answer.stdout)
    jsonschema.validate(document, SCHEMA)
    assert document["undone"]["number"] == 1 and document["undone"]["state"] == "undone"
    assert config.read_text() == "first"


def test_undoing_the_same_entry_twice(config, kleinctl):
    kleinctl("undo", "2", "--yes")
    answer = kleinctl("undo", "2", "--yes")
    assert answer.exit_code == 1
    assert "entry 2 was undone already" in answer.stderr
    assert config.read_text() == "second"


def test_an_entry_that_a_later_one_built_on(config, kleinctl):
    answer = kleinctl("undo", "1", "--yes")
    assert answer.exit_code == 1
    assert f"error[undo-file-changed]: {config} was changed since" in answer.stderr
    assert "Nothing was undone." in answer.stderr
    assert config.read_text() == "third"


def test_an_entry_that_does_not_exist(config, kleinctl):
    answer = kleinctl("undo", "9", "--json")
    assert answer.exit_code == 2
    assert json.loads(answer.stdout)["problem"]["why"] == "The newest are 2, 1."


def test_an_entry_of_a_journal_without_any(kleinctl):
    answer = kleinctl("undo", "9", "--json")
    assert json.loads(answer.stdout)["problem"]["why"] == "The journal has no entry."


def test_without_a_terminal_and_without_yes_nothing_is_undone(config, kleinctl):
    answer = kleinctl("undo")
    assert answer.exit_code == 2
    assert "nobody is there to be asked" in answer.stderr and "write third" in answer.stderr
    assert config.read_text() == "third"


def test_a_dry_run_tells_and_checks_and_changes_nothing(config, kleinctl):
    before = {path: path.stat().st_mtime_ns for path in journal.journal_folder().iterdir()}
    answer = kleinctl("undo", "--dry-run")
    assert (answer.exit_code, answer.stdout) == (0, "entry 2 can be undone; nothing was changed\n")
    document = json.loads(kleinctl("undo", "--dry-run", "--json").stdout)
    jsonschema.validate(document, SCHEMA)
    assert document["would_undo"]["number"] == 2 and document["undone"] is None
    assert {path: path.stat().st_mtime_ns for path in journal.journal_folder().iterdir()} == before
    config.write_text("what the user wrote since")
    assert "undo-file-changed" in kleinctl("undo", "--dry-run").stderr


def test_a_damaged_entry_among_the_others(config, kleinctl):
    (journal.journal_folder() / "0003.json").write_bytes(b"\xff\x00")
    document = json.loads(kleinctl("undo", "--list", "--json").stdout)
    jsonschema.validate(document, SCHEMA)
    assert [each["state"] for each in document["entries"]] == ["damaged", "done", "done"]
    assert kleinctl("undo", "--list").stdout.startswith("   3  damaged ")
    assert kleinctl("undo", "--yes").stdout == "entry 2 undone\n"
