"""What is built is what works: wheel, sdist and editable installs find plugins, manifests and klein-tiny."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

NEEDED = (
    "kleinctl/cli/up.py",
    "kleinctl/gpus.toml",
    "kleinctl/environments.toml",
    "kleinctl/schemas/doctor.json",
    "kleinctl/worker/bootstrap.py",
    "kleinctl/report/page.css",
    "kleinctl/comfyui_nodes.toml",
    "kleinctl_problems/wrong-vae.md",
    "kleinctl_manifests/klein-4b.toml",
    "kleinctl_manifests/klein-tiny.toml",
    "kleinctl_manifests/klein-tiny/transformer/diffusion_pytorch_model.safetensors",
    "kleinctl_plugins/staged_decode.py",
)
PLACES = {"kleinctl_plugins": "plugins", "kleinctl_manifests": "manifests", "kleinctl_problems": "docs/problems"}
SHIPPED_WEIGHTS = 12_000_000


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of the repository, so that nothing built lands in it."""
    copy = tmp_path_factory.mktemp("source")
    names = ("kleinctl", "plugins", "manifests", "docs", "pyproject.toml", "README.md", "LICENSE")
    paths = [REPOSITORY / name for name in names]
    subprocess.run(["cp", "-r", *paths, copy], check=True)
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> dict[str, Path]:
    """The sdist, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def test_the_wheel_has_everything_and_stays_small(built):
    names = zipfile.ZipFile(built["wheel"]).namelist()
    assert [name for name in NEEDED if name not in names] == []
    assert [name for name in names if name.startswith("tests/") or name.endswith((".pt", ".bin", ".pkl"))] == []
    weights = [info.file_size for info in zipfile.ZipFile(built["wheel"]).infolist() if "klein-tiny/" in info.filename]
    assert 0 < sum(weights) < SHIPPED_WEIGHTS


def _in_the_source(name: str) -> str:
    for package, folder in PLACES.items():
        name = name.replace(package, folder)
    return name


def test_the_sdist_has_what_the_wheel_is_made_of(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    own = [_in_the_source(name) for name in NEEDED]
    assert [name for name in own if name not in names] == []
    assert "LICENSE" in names


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_an_installation_finds_backends_and_models(how, built, source, tmp_path):
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    what = [str(built["wheel"])] if how == "wheel" else ["--editable", str(source)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *what]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = (
        "import kleinctl, kleinctl.plugins as p; f = p.Plugins(frozenset());"
        "print(kleinctl.__file__); print(sorted(f.backends)); print(sorted(f.models)); print(f.problems)"
    )
    told = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    place, backends, models, problems = told.stdout.splitlines()
    assert place.startswith(str(folder if how == "wheel" else source))
    assert backends == "['comfyui-fp8', 'diffusers-offload', 'staged-decode']"
    assert "'klein-4b'" in models and "'klein-tiny'" in models
    assert problems == "[]"
