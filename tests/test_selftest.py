"""A kleinctl whose dependencies are broken where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kleinctl import selftest
from tests.test_cli import conforms


@pytest.mark.slow
def test_a_working_installation_passes(kleinctl):
    answer = kleinctl("selftest", "--json")
    document = conforms(answer.stdout)
    assert [(trial["name"], trial["why"]) for trial in document["trials"] if not trial["ok"]] == []
    assert answer.exit_code == 0
    assert {"click", "rich", "huggingface-hub"} <= set(document["versions"])


@pytest.mark.slow
def test_a_rich_that_lost_its_tables(kleinctl, tmp_path: Path):
    broken = tmp_path / "broken"
    (broken / "rich").mkdir(parents=True)
    (broken / "rich" / "__init__.py").write_text("raise ImportError('half an update')\n")
    answer = kleinctl("selftest", PYTHONPATH=f"{broken}")
    assert answer.exit_code == 1
    assert "half an update" in answer.stdout
    assert "hint: pip install --force-reinstall kleinctl" in answer.stdout


def test_a_click_that_does_not_import(kleinctl, tmp_path: Path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "click.py").write_text("raise ImportError('half an update')\n")
    answer = kleinctl("doctor", PYTHONPATH=str(tmp_path / "broken"))
    assert answer.exit_code == 1
    assert "error[cannot-start]: kleinctl cannot start" in answer.stderr
    assert "hint: kleinctl selftest" in answer.stderr
    tested = kleinctl("selftest", PYTHONPATH=str(tmp_path / "broken"))
    assert tested.exit_code == 1
    assert "half an update" in tested.stdout


def test_the_trials_know_every_command():
    from kleinctl.cli import COMMANDS

    assert selftest._commands() == list(COMMANDS)


def test_a_document_that_breaks_its_schema_is_noticed():
    assert "schema of models" in selftest._against_schema({"schema": "kleinctl.models/1"})
    assert sys.version.split()[0] == selftest.document([])["python"]
