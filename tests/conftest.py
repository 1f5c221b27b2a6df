"""Every test runs in an empty home: nothing of the user's is read, nothing is written there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
REAL_HOME = Path.home()

# Settings of the person who runs the tests; each would change what kleinctl finds.
OUTSIDE = (
    "HF_TOKEN",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HUGGING_FACE_HUB_TOKEN",
    "KLEINCTL_OFFLINE",
    "NO_COLOR",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest -m comfyui --comfyui=DIR` runs against a real ComfyUI, by default with the Python of this one."""
    parser.addoption("--comfyui", metavar="DIR", help="a ComfyUI checkout to test with")
    parser.addoption("--comfyui-python", metavar="PYTHON", default=sys.executable, help="what runs it")


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker of the tests that want one."""
    config.addinivalue_line("markers", "comfyui: needs a ComfyUI checkout; run with -m comfyui --comfyui=DIR")


@pytest.fixture(autouse=True)
def empty_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own for each test, with `KLEINCTL_HOME` in it."""
    folder = tmp_path_factory.mktemp("home")
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("KLEINCTL_HOME", str(folder / "kleinctl"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return folder


@pytest.fixture(autouse=True, scope="session")
def real_home_untouched():
    """A test that writes to the real home folder fails by name."""
    watched = [REAL_HOME / ".local" / "share" / "kleinctl", REAL_HOME / ".cache" / "kleinctl"]
    before = [path.exists() for path in watched]
    yield
    assert [path.exists() for path in watched] == before, "a test wrote to the real home folder"


@dataclass(frozen=True)
class Answer:
    """What a command printed, and how it ended."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def kleinctl(tmp_path: Path) -> Callable[..., Answer]:
    """Run kleinctl as a user does, in a process of its own, in an empty folder."""

    def run(*arguments: str, cwd: Path = tmp_path, timeout: float = 240, stdin: str = "", **env: str) -> Answer:
        done = subprocess.run(
            [sys.executable, "-m", "kleinctl", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "100", **env},
            input=stdin,
            capture_output=True,
            text=True,
            encoding=env.get("PYTHONIOENCODING", "utf-8"),
            timeout=timeout,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    return run
