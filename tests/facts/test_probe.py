"""Asking torch itself, in a process that may crash: this environment's real one, and Pythons that fail in every way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kleinctl import documents, environment
from kleinctl.environment import Environment
from kleinctl.facts.probe import MARK, Probe, last_words, probe


def python(folder: Path, body: str) -> Environment:
    """An environment whose Python does as `body` says."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return Environment(path, {"torch": "2.13.0"}, "13.0", name="broken")


def test_the_real_torch_of_this_environment():
    found = probe(environment.inspect())
    assert (found.environment, found.exit_status, found.error) == ("this", 0, "")
    assert found.torch and found.cuda_available is False and found.computes is None
    assert documents.read(Probe, documents.plain(found), "probe") == found


def test_torch_that_computes_on_the_card(tmp_path):
    said = {"cu_init": 0, "torch": "2.13.0+cu130", "cuda": "13.0", "cuda_available": True}
    said |= {"architectures": ["sm_89"], "device": "RTX", "product": 64.0}
    found = probe(python(tmp_path, f"print('a warning')\nprint({MARK + json.dumps(said)!r})"))
    assert (found.torch, found.cu_init, found.computes, found.architectures) == ("2.13.0+cu130", 0, True, ("sm_89",))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_torch_that_crashes(tmp_path):
    found = probe(python(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    assert found.exit_status == 139 and found.torch is None


def test_torch_that_hangs(tmp_path):
    found = probe(python(tmp_path, "import time; time.sleep(30)"), seconds=0.3)
    assert found.exit_status is None and found.seconds < 5


def test_a_library_that_windows_cannot_load(tmp_path):
    words = "OSError: [WinError 126] The specified module could not be found. Error loading fbgemm.dll"
    found = probe(python(tmp_path, f"raise SystemExit({words!r})"))
    assert found.exit_status == 1 and "WinError 126" in found.error


def test_a_python_that_is_gone(tmp_path):
    found = probe(Environment(tmp_path / "gone", {}))
    assert found.exit_status == 127 and "does not start" in found.error


def test_last_words_are_short_and_name_nobody(empty_home):
    words = last_words(f"{empty_home}/venv/torch\nC:\\Users\\Jo\\torch /home/kim/x\n" + "y" * 5000)
    assert len(words) <= 1900
    told = last_words(f'File "{empty_home}/venv", C:\\Users\\Jo\\torch, /home/kim/x')
    assert "Jo" not in told and "kim" not in told and str(empty_home) not in told
