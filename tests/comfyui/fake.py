"""A tiny ComfyUI in a git repository, and wheels of a few bytes in place of torch's family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kleinctl.environment import PYTHON, RECORD

#: What git needs to commit, and nothing of the user's.
GIT = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull,
}  # fmt: skip
FILES = {
    "main.py": "raise SystemExit('a ComfyUI is read, and never run, by an install')\n",
    "comfy/__init__.py": "",
    "requirements.txt": "torch\ntorchvision\naddon>=1  # a package\n\n#non essential dependencies:\nspare>=2\n",
    ".gitignore": "__pycache__/\n/output/\n/models/mine\n/custom_nodes/\n",
}


def git(folder: Path, *words: str) -> str:
    env = {**os.environ, **GIT}
    return subprocess.run(
        ["git", *words], cwd=folder, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(folder: Path, version: str, files: dict[str, str] | None = None, tag: str = "") -> str:
    """A new commit of a ComfyUI of this version; returns its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".git").exists():
        git(folder, "init", "--quiet", "--initial-branch", "master")
    written = {**FILES, "comfyui_version.py": f'__version__ = "{version}"\n', **(files or {})}
    for name, text in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", f"ComfyUI v{version}")
    if tag:
        git(folder, "tag", "--annotate", tag, "--message", tag)
    return git(folder, "rev-parse", "HEAD")


def environment(folder: Path, packages: dict[str, str], python: Path | None = None) -> Path:
    """An environment with these packages, by the names that installers leave; returns its Python."""
    interpreter = folder / PYTHON
    interpreter.parent.mkdir(parents=True, exist_ok=True)
    interpreter.symlink_to(python or sys.executable)
    (folder / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).parent}\nversion = 3.12.3\n")
    own = "lib/python{}.{}/site-packages".format(*sys.version_info)
    site = folder / ("Lib/site-packages" if os.name == "nt" else own)
    for name, version in packages.items():
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
    return interpreter


def built(folder: Path, packages: dict[str, str]) -> None:
    """What a build of a managed environment leaves, without pip."""
    environment(folder, packages)
    freeze = [f"{name}=={version}" for name, version in packages.items()]
    (folder / RECORD).write_text(json.dumps({"freeze": freeze}))
