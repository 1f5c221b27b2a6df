"""`doctor --fix` in a ComfyUI: it is updated, its nodes and start script are changed, and all of it can be undone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kleinctl import environment, fixes, journal, logs
from kleinctl.checks import Check, run_checks
from kleinctl.checks import comfyui as comfyui_checks
from kleinctl.checks import workflow as workflow_checks
from kleinctl.cli.fix import plan_lines
from kleinctl.facts import Facts, comfyui, workflow
from kleinctl.facts.system import LocalServer, System
from kleinctl.fixes import comfyui as actions
from kleinctl.hardware import Gpu, Hardware
from kleinctl.home import quarantine_folder
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError, Problem, Remedy
from kleinctl.units import GIB
from tests import weights
from tests.facts.test_comfyui import checkout, write
from tests.test_fixes import python, tree, wheels, yes  # noqa: F401 (fixtures)

NOTHING: Any = None
CARD = Hardware(gpus=(Gpu("NVIDIA GeForce 930M", "5.0", vram_bytes=8 * GIB, vram_free_bytes=GIB),))
PACK = {"id": "comfyui-gguf", "title": "ComfyUI-GGUF", "nodes": ["UnetLoaderGGUF"]}


def git(folder: Path, *words: str) -> str:
    own = ("-c", "user.name=A", "-c", "user.email=a@localhost", "-c", "init.defaultBranch=master")
    done = subprocess.run(["git", *own, "-C", folder, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def committed(folder: Path, **files: str) -> str:
    """A commit with these files (`__` stands for a dot). Returns it."""
    for name, text in files.items():
        write(folder / name.replace("__", "."), text)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "next")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository in the place of ComfyUI's own: 0.8.2, then 0.29.0 with another requirement."""
    folder = checkout(tmp_path / "origin", "0.8.2")
    git(folder, "init", "-q")
    write(folder / ".gitignore", "/models/\n/venv/\n/custom_nodes/\n__pycache__/\n")
    committed(folder, requirements__txt="tiny==1.0\n")
    return folder


@pytest.fixture
def root(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of the first version; kleinctl takes its origin for ComfyUI's own repository."""
    folder = tmp_path / "ComfyUI"
    subprocess.run(["git", "clone", "-q", origin, folder], check=True)
    for name in ("models/vae", "models/diffusion_models", "custom_nodes"):
        (folder / name).mkdir(parents=True)
    version = '__version__ = "0.29.0"\n'
    committed(origin, comfyui_version__py=version, requirements__txt="tiny==2.0\naddon\n")
    update = partial(actions.update_comfyui, repositories=(str(origin),))
    monkeypatch.setitem(fixes.ACTIONS, "update-comfyui", update)
    return folder


def look(root: Path, system: System | None = None, flow: Path | None = None) -> list[Problem]:
    """What the checks of ComfyUI and its workflow find now."""
    found = comfyui.read(root)
    assert found is not None
    read = workflow.read(flow) if flow else None
    found = comfyui.provided(found, (node.type for node in read.nodes)) if read else found
    scene = {
        "comfyui": found,
        "comfyui_files": (),
        "comfyui_environment": next(iter(comfyui.environments(found)), None),
    }
    scenes = [scene, *([{"workflow": read, "workflow_comfyui": found, "workflow_files": ()}] if read else [])]
    modules = (comfyui_checks, workflow_checks)
    checks = [each for module in modules for each in vars(module).values() if isinstance(each, Check)]
    results = run_checks(checks, {"system": system or System(), "hardware": CARD}, scenes)
    assert not [each.why for each in results if "crashed" in each.why]
    return [problem for each in results for problem in each.problems]


def fix(name: str, see: Callable[[], list[Problem]]) -> fixes.Outcome:
    """Fix the problems of that name, as doctor does."""
    found = [each for each in see() if each.name == name]
    assert found and found[0].auto
    [outcome], _ = fixes.fix(found, Plugins(), NOTHING, ask=yes, again=lambda: set(map(fixes.key, see())))
    return outcome


def undo() -> None:
    journal.undo(journal.find(None))


def refused(found: Problem) -> str:
    with pytest.raises(KleinctlError) as caught:
        fixes.plan(found, Plugins(), NOTHING)
    assert caught.value.problem.name == "fix-refused"
    return caught.value.problem.why.removeprefix("What its check asks for is refused: ")


def asking(action: str, path: Path, **arguments: str) -> Problem:
    """A problem that names `path` and asks for an action on it."""
    remedy = Remedy(action, {"path": str(path), **arguments}, "ask")
    names = " and ".join(f"'{each}'" for each in arguments.values())
    return Problem("something is wrong", "It is.", f"mend it with {names}", name="x", path=str(path), remedy=remedy)


# Its version


def test_a_comfyui_from_before_klein_is_updated_and_set_back(root, origin, python, wheels):  # noqa: F811
    shutil.copytree(python.parent.parent, root / "venv", symlinks=True)
    own = root / "venv" / environment.PYTHON
    subprocess.run([own, "-s", "-m", "pip", "install", "-q", "tiny==1.0"], check=True)
    model = write(root / "models" / "vae" / "mine.safetensors", "weights")
    old, new = git(root, "rev-parse", "HEAD"), git(origin, "rev-parse", "HEAD")
    problem = next(each for each in look(root) if each.name == "comfyui-too-old")
    made = fixes.plan(problem, Plugins(), NOTHING)
    assert made.sentences == (
        f"move {root} (ComfyUI 0.8.2) forward on master, from commit {old[:10]} to {new[:10]} of {origin}",
        f"install what its requirements.txt lists, where it has one, into {own}",
        "ComfyUI has to be started again to notice",
    )
    assert made.commands[1] == f"{own} -s -m pip install -r {root / 'requirements.txt'}"
    assert made.consent == "ask" and made.undoable
    outcome = fix("comfyui-too-old", lambda: look(root))
    assert outcome.status == "fixed", outcome.trouble
    assert git(root, "rev-parse", "HEAD") == new and git(root, "status", "--porcelain") == ""
    assert comfyui.read(root).version == "0.29.0" and model.read_text() == "weights"
    installed = environment.inspect(own).packages
    assert (installed["tiny"], installed["addon"]) == ("2.0", "1.5")
    entry = journal.find(None)
    assert [step.back for step in entry.steps] == [
        f"set {root} back to commit {old[:10]}",
        f"in {own} set back: addon away, tiny 1.0",
    ]
    undo()
    assert git(root, "rev-parse", "HEAD") == old and comfyui.read(root).version == "0.8.2"
    installed = environment.inspect(own).packages
    assert installed["tiny"] == "1.0" and "addon" not in installed
    assert "comfyui-too-old" in {each.name for each in look(root)}


def test_packages_that_cannot_be_had_leave_the_old_version_in_place(root, origin, python, wheels):  # noqa: F811
    shutil.copytree(python.parent.parent, root / "venv", symlinks=True)
    committed(origin, requirements__txt="tiny==99\n")
    old = git(root, "rev-parse", "HEAD")
    outcome = fix("comfyui-too-old", lambda: look(root))
    assert outcome.status == "failed"
    assert outcome.trouble is not None and "tiny==99" in outcome.trouble.why
    assert git(root, "rev-parse", "HEAD") == old and journal.entries() == []


def test_a_dry_run_of_an_update_fetches_nothing(root):
    before = tree(root)
    [found] = [each for each in look(root) if each.name == "comfyui-too-old"]
    [outcome], _ = fixes.fix([found], Plugins(), NOTHING, ask=yes, again=set, dry_run=True)
    assert outcome.status == "planned" and tree(root) == before
    assert outcome.plan is not None
    assert f"leave what its requirements.txt lists to you: no Python was found beside {root}" in outcome.plan.sentences
    costs = "nobody knows how much to fetch and to write; nobody knows how long; `kleinctl undo` reverses it"
    assert plan_lines(outcome.plan)[-1].strip() == costs  # only the server knows, and what pip finds


def test_a_workflow_with_a_core_node_of_a_newer_comfyui(root, tmp_path):
    write(root / "comfyui_version.py", '__version__ = "0.3.64"\n')
    committed(root)
    git(root, "push", "-q", "origin", "HEAD:refs/heads/old")
    git(root, "fetch", "-q", "origin", "+HEAD:refs/remotes/origin/master")
    flow = write(tmp_path / "f.json", json.dumps({"1": {"class_type": "Flux2Scheduler", "inputs": {"steps": 4}}}))
    [problem] = [each for each in look(root, flow=flow) if each.name == "node-missing"]
    assert problem.remedy == Remedy("update-comfyui", {"path": str(root)}, "ask")
    names = {each.name for each in look(root) if each.remedy == problem.remedy}
    assert names == {"comfyui-too-old", "cliploader-lacks-flux2"}


def test_checkouts_that_are_for_people_to_update(root, origin, tmp_path):
    def why() -> str:
        return refused(asking("update-comfyui", root))

    main = (root / "main.py").read_text()
    write(root / "main.py", "mine")
    assert why() == "files of it were changed: main.py."
    write(root / "main.py", main)
    own = committed(root, mine__py="x")
    assert why() == "its branch master has 1 commits of its own."
    git(root, "checkout", "-q", own)
    assert why() == f"{root} is at a commit, {own[:10]}, on no branch."
    git(root, "checkout", "-q", "-b", "local")
    assert why() == "its branch local follows no other."
    git(root, "checkout", "-q", "master")
    git(root, "reset", "-q", "--hard", "HEAD~1")
    git(root, "config", "remote.origin.url", "https://me:secret@github.com/someone/fork.git")
    assert why() == f"its branch master follows https://github.com/someone/fork.git, which is not {origin}."
    git(root, "config", "remote.origin.url", str(origin))
    git(root, "pull", "-q", "--ff-only")
    assert "newest commit already" in why()
    (root.parent / "python_embeded").mkdir()
    assert "is updated by its own script" in why()
    assert [each.remedy for each in look(root)] == []
    (root.parent / "python_embeded").rmdir()
    shutil.rmtree(root / ".git")
    assert why() == f"{root} is no git checkout."
    assert "is not where a ComfyUI's program lies" in refused(asking("update-comfyui", root / "models"))


PROGRAMS = {
    "filter.x.clean": "{evil}",
    "core.alternateRefsCommand": "{evil}",
    "remote.origin.uploadpack": "{evil}",
    "url.ext::{evil} .insteadOf": "{origin}",
    "gpg.program": "{evil}",
    "branch.master.mergeOptions": "-S",
    "core.worktree": "{elsewhere}",
    "include.path": "{elsewhere}/none",
}


@pytest.mark.parametrize(("setting", "value"), PROGRAMS.items(), ids=list(PROGRAMS))
def test_a_checkout_whose_own_settings_name_a_program(setting, value, root, origin, tmp_path):
    evil, ran, elsewhere = tmp_path / "evil", tmp_path / "ran", tmp_path / "elsewhere"
    write(evil, f"#!/bin/sh\ntouch {ran}\n").chmod(0o755)
    elsewhere.mkdir()
    places = {"evil": evil, "origin": origin, "elsewhere": elsewhere}
    write(root / ".git" / "info" / "attributes", "* filter=x\n")
    os.utime(root / "main.py", (1, 1))
    git(root, "config", "protocol.ext.allow", "always")
    git(root, "config", setting.format(**places), value.format(**places))
    assert f"in {root / '.git' / 'config'} git may run a program or go elsewhere." in refused(
        asking("update-comfyui", root)
    )
    assert not ran.exists() and not any(elsewhere.iterdir())


def test_hooks_and_settings_that_are_overruled(root, tmp_path):
    ran, evil = tmp_path / "ran", tmp_path / "evil"
    write(evil, f"#!/bin/sh\ntouch {ran}\n").chmod(0o755)
    for hook in ("post-merge", "post-checkout", "reference-transaction"):
        shutil.copy(evil, root / ".git" / "hooks" / hook)
    for name in ("core.fsmonitor", "core.sshCommand", "core.askPass", "credential.helper"):
        git(root, "config", name, str(evil))
    ran.unlink(missing_ok=True)
    assert fix("comfyui-too-old", lambda: look(root)).status == "fixed"
    undo()
    assert not ran.exists()


def test_a_setting_that_came_between_fix_and_undo(root, tmp_path):
    assert fix("comfyui-too-old", lambda: look(root)).status == "fixed"
    git(root, "config", "filter.x.smudge", "evil")
    with pytest.raises(KleinctlError, match=r"With filter\.x.smudge in its \.git/config git may run a program"):
        undo()


def test_a_checkout_that_is_not_what_it_seems(root, origin, tmp_path):
    git(root, "config", "--add", "remote.origin.url", "ext::evil")
    assert "follows ext::evil, which is not" in refused(asking("update-comfyui", root))
    git(root, "config", "--replace-all", "remote.origin.url", str(origin))
    (root / ".git").rename(tmp_path / "other.git")
    (root / ".git").symlink_to(tmp_path / "other.git")
    assert refused(asking("update-comfyui", root)) == f"{root / '.git'} leads elsewhere."
    (root / ".git").unlink()
    write(root / ".git", f"gitdir: {tmp_path / 'other.git'}\n")
    assert refused(asking("update-comfyui", root)) == f"{root / '.git'} leads elsewhere."
    (root / ".git").unlink()
    (tmp_path / "other.git").rename(tmp_path / ".git")  # a repository around the folder is not the folder's
    (root / ".git").mkdir()
    with pytest.raises(KleinctlError, match=r"[Nn]ot a git repository"):
        fixes.plan(asking("update-comfyui", root), Plugins(), NOTHING)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives folders away")
def test_a_checkout_of_another_user(root):
    for path in (root, root / ".git"):
        os.chown(path, 12345, 12345)
    with pytest.raises(KleinctlError, match="dubious ownership"):
        fixes.plan(asking("update-comfyui", root), Plugins(), NOTHING)


def test_comfyuis_own_repository_by_all_its_names():
    for address in (
        "https://github.com/comfyanonymous/ComfyUI.git",
        "https://github.com/Comfy-Org/ComfyUI/",
        "git@github.com:comfyanonymous/ComfyUI.git",
        "https://token@github.com/comfy-org/comfyui",
    ):
        assert any(actions.git.same(address, each) for each in actions.REPOSITORIES)
    paths = (
        "github.com/Comfy-Org/ComfyUI",
        "/github.com/Comfy-Org/ComfyUI",
        "ext::https://github.com/Comfy-Org/ComfyUI",
    )
    for address in (
        "https://github.com/comfyanonymous/ComfyUI2",
        "https://evil/github.com/Comfy-Org/ComfyUI",
        "",
        *paths,
    ):
        assert not any(actions.git.same(address, each) for each in actions.REPOSITORIES)


def test_without_the_network_or_with_a_server_that_is_gone(root, origin, monkeypatch):
    def trouble() -> Problem:
        with pytest.raises(KleinctlError) as caught:
            fixes.plan(asking("update-comfyui", root), Plugins(), NOTHING)
        return caught.value.problem

    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    assert trouble().name == "offline"
    monkeypatch.delenv("KLEINCTL_OFFLINE")
    origin.rename(origin.with_name("gone"))
    assert (trouble().name, trouble().what) == ("git-failed", f"git failed in {root}")
    monkeypatch.setenv("PATH", "")
    assert trouble().why == "Git is not installed."


def test_a_file_that_was_edited_between_plan_and_yes(root):
    made = fixes.plan(asking("update-comfyui", root), Plugins(), NOTHING)
    write(root / "main.py", "mine")
    with pytest.raises(KleinctlError, match="files of it were changed: main"):
        fixes.carry_out(made)
    assert (root / "main.py").read_text() == "mine" and journal.entries() == []


def test_a_comfyui_that_was_updated_again_is_not_set_back(root, origin):
    assert fix("comfyui-too-old", lambda: look(root)).status == "fixed"
    write(root / "main.py", "mine")
    with pytest.raises(KleinctlError, match="Files of it were edited"):
        undo()
    git(root, "checkout", "-q", "main.py")
    committed(origin, news__py="x")
    git(root, "pull", "-q", "--ff-only")
    with pytest.raises(KleinctlError, match="Left there was"):
        undo()
    assert (root / "news.py").exists()


# Its custom nodes


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """ComfyUI-GGUF, in a repository on this machine."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    git(folder, "init", "-q")
    committed(folder, __init____py='NODES = ["UnetLoaderGGUF"]\n', loader__py="old = 1\n", requirements__txt="tiny\n")
    packs = [{**PACK, "address": str(folder)}]
    for name, action in (("install-node", actions.install_node), ("update-node", actions.update_node)):
        monkeypatch.setitem(fixes.ACTIONS, name, partial(action, packs=packs))
    known = comfyui.catalogue()
    table = [{**each, "address": str(folder)} if each["id"] == PACK["id"] else each for each in known["pack"]]
    monkeypatch.setitem(known, "pack", table)
    return packs[0]


def test_a_gguf_file_gets_its_custom_node(root, pack, python, wheels):  # noqa: F811
    shutil.copytree(python.parent.parent, root / "venv", symlinks=True)
    own = root / "venv" / environment.PYTHON
    write(root / "models" / "diffusion_models" / "klein-Q4_K.gguf", "GGUF")
    write(Path(pack["address"]) / "loader.py", "arch = 'qwen3'\n")
    commit = committed(Path(pack["address"]))
    folder = root / "custom_nodes" / "ComfyUI-GGUF"
    outcome = fix("gguf-needs-node", lambda: look(root))
    assert outcome.status == "fixed", outcome.trouble
    assert outcome.plan is not None and outcome.plan.consent == "ask"
    assert outcome.plan.sentences[0] == f"clone {pack['address']}, at commit {commit[:10]}, into {folder}"
    assert "qwen3" in (folder / "loader.py").read_text() and environment.inspect(own).packages["tiny"] == "2.0"
    write(folder / "settings.json", "the user's own")
    undo()
    assert not folder.exists() and "tiny" not in environment.inspect(own).packages
    [kept] = quarantine_folder().glob("ComfyUI-GGUF-*")
    assert (kept / "settings.json").read_text() == "the user's own"
    assert fix("gguf-needs-node", lambda: look(root)).status == "fixed"


def test_a_workflow_gets_the_custom_node_that_it_wants(root, pack, tmp_path):
    flow = write(tmp_path / "f.json", json.dumps({"1": {"class_type": "UnetLoaderGGUF", "inputs": {}}}))
    assert fix("node-missing", lambda: look(root, flow=flow)).status == "fixed"
    undo()
    assert [each.name for each in look(root, flow=flow) if each.ref == "E01"] == ["node-missing"]


def test_a_gguf_node_from_before_qwen3_is_updated(root, pack):
    write(root / "models" / "diffusion_models" / "klein-Q4_K.gguf", "GGUF")
    folder = root / "custom_nodes" / "ComfyUI-GGUF"
    subprocess.run(["git", "clone", "-q", pack["address"], folder], check=True)
    committed(Path(pack["address"]), loader__py="arch = 'qwen3'\n")
    assert fix("gguf-needs-node", lambda: look(root)).status == "fixed"
    assert "qwen3" in (folder / "loader.py").read_text()
    undo()
    assert (folder / "loader.py").read_text() == "old = 1\n"
    git(folder, "config", "remote.origin.url", "https://github.com/someone/else")
    assert "which is not" in refused(asking("update-node", folder))


def test_a_custom_node_of_a_strangers_is_never_cloned(root, pack):
    folder = root / "custom_nodes" / "ComfyUI-GGUF"
    for place, repository, why in (
        (folder, "https://github.com/evil/ComfyUI-GGUF", "is no repository that kleinctl knows"),
        (folder, "--upload-pack=touch x", "is no repository that kleinctl knows"),
        (root / "custom_nodes" / "other", pack["address"], "is no repository that kleinctl knows for other"),
        (root / "ComfyUI-GGUF", pack["address"], "is no place of a custom node"),
        (root.parent / "custom_nodes" / "ComfyUI-GGUF", pack["address"], "is no place of a custom node"),
    ):
        assert why in refused(asking("install-node", place, repository=repository))
    folder.mkdir()
    assert "exists already" in refused(asking("install-node", folder, repository=pack["address"]))
    (root / "custom_nodes" / "mine").mkdir()
    assert "is no pack that kleinctl knows" in refused(asking("update-node", root / "custom_nodes" / "mine"))


def test_interrupted_in_the_middle_of_a_clone(root, pack, monkeypatch):
    folder = root / "custom_nodes" / "ComfyUI-GGUF"

    def half(address: str, to: Path) -> None:
        write(to / ".git" / "half")
        raise KeyboardInterrupt

    made = fixes.plan(asking("install-node", folder, repository=pack["address"]), Plugins(), NOTHING)
    monkeypatch.setattr(actions.git, "clone", half)
    with pytest.raises(KeyboardInterrupt):
        fixes.carry_out(made)
    assert journal.find(None).state == "cut short"
    undo()
    assert not folder.exists()


def test_a_custom_node_that_breaks_is_switched_off_and_on_again(root):
    folder = root / "custom_nodes" / "broken"
    write(folder / "__init__.py", "import nothing\n")
    log = f"Cannot import {folder} module for custom nodes: No module named 'nothing'\n"
    write(root / "user" / "comfyui.log", log)
    outcome = fix("custom-node-broken", lambda: look(root))
    assert outcome.status == "fixed" and outcome.plan is not None and outcome.plan.consent == "ask"
    assert not folder.exists() and (root / "custom_nodes" / "broken.disabled" / "__init__.py").exists()
    undo()
    assert (folder / "__init__.py").exists()


def test_a_gguf_node_that_was_switched_off(root):
    write(root / "models" / "diffusion_models" / "klein-Q4_K.gguf", "GGUF")
    write(root / "custom_nodes" / "ComfyUI-GGUF.disabled" / "loader.py", "qwen3")
    assert fix("gguf-needs-node", lambda: look(root)).status == "fixed"
    write(root / "custom_nodes" / "ComfyUI-GGUF" / "__pycache__" / "x.pyc")  # ComfyUI ran since
    undo()
    assert (root / "custom_nodes" / "ComfyUI-GGUF.disabled" / "loader.py").exists()


def test_only_a_custom_node_is_switched_and_only_by_its_name(root):
    folder = root / "custom_nodes" / "a"
    assert "is not there" in refused(asking("switch-node", folder, to=f"{folder}.disabled"))
    folder.mkdir()
    assert "without" in refused(asking("switch-node", folder, to=str(folder.with_name("b"))))
    assert "is no place" in refused(asking("switch-node", root / "models", to=str(root / "models.disabled")))
    folder.with_name("a.disabled").mkdir()
    assert "exists already" in refused(asking("switch-node", folder, to=f"{folder}.disabled"))


# What it is started with

BAT = "@echo off\r\nrem main.py --use-sage-attention\r\n.\\python.exe -s ComfyUI\\main.py {}--port 8190\r\npause\r\n"


@pytest.mark.parametrize(
    ("script", "remove", "add", "after"),
    [
        ("python main.py --use-sage-attention --port 1\n", "--use-sage-attention", "", "python main.py --port 1\n"),
        ("python main.py\n", "", "--disable-dynamic-vram", "python main.py --disable-dynamic-vram\n"),
        (
            'exec "$D/main.py" --cuda-malloc "$@"\n',
            "--cuda-malloc",
            "--disable-cuda-malloc",
            'exec "$D/main.py" --disable-cuda-malloc "$@"\n',
        ),
        (
            "set ARGS=--fp16-vae --cpu\npython main.py %ARGS%\n",
            "--fp16-vae",
            "",
            "set ARGS= --cpu\npython main.py %ARGS%\n",
        ),
        ("python main.py ^\n --fast fp8_matrix_mult\n", "--fast fp8_matrix_mult", "", "python main.py ^\n\n"),
        (
            "python main.py --fast fp8_matrix_mult autotune\n",
            "fp8_matrix_mult",
            "",
            "python main.py --fast autotune\n",
        ),
        (BAT.format("--use-sage-attention "), "--use-sage-attention", "", BAT.format("")),
    ],
)
def test_an_argument_in_a_start_script(root, script, remove, add, after):
    path = root / "start.sh"
    path.write_bytes(script.encode())
    path.chmod(0o755)
    found = asking("edit-start-script", path, remove=remove, add=add)
    made = fixes.plan(found, Plugins(), NOTHING)
    assert made.consent == "ask" and any(line.startswith(("  + ", "  - ")) for line in made.sentences)
    fixes.carry_out(made)
    assert path.read_bytes() == after.encode() and (os.name == "nt" or path.stat().st_mode & 0o777 == 0o755)
    undo()
    assert path.read_bytes() == script.encode()


def test_arguments_of_the_desktop_app(tmp_path):
    base = tmp_path / "ComfyUI"
    (base / "models" / "vae").mkdir(parents=True)
    (base / "user").mkdir()
    path = base / "user" / "default" / "comfy.settings.json"
    text = json.dumps({"Comfy.Server.LaunchArgs": {"use-sage-attention": "", "port": "8000"}, "x": 1}, indent=4)
    write(path, text)
    found = asking("edit-start-script", path, remove="--use-sage-attention", add="--disable-dynamic-vram")
    fixes.carry_out(fixes.plan(found, Plugins(), NOTHING))
    assert json.loads(path.read_text()) == {
        "Comfy.Server.LaunchArgs": {"port": "8000", "disable-dynamic-vram": ""},
        "x": 1,
    }
    undo()
    assert path.read_text() == text


def test_what_no_fix_puts_into_a_script(root, tmp_path):
    path = write(root / "start.sh", "python main.py --cpu\n")
    for remove, add in (("", "; rm -rf ~"), ("", "--listen"), ("--cpu", ""), ("", "")):
        assert "is no change of arguments" in refused(asking("edit-start-script", path, remove=remove, add=add))
    sage = {"remove": "--use-sage-attention", "add": ""}
    other = write(root / "other.sh", "python main.py --use-sage-attention\n")  # start.sh is not the first, by its name
    assert comfyui.read(root).script == str(other)
    assert "is not what starts a ComfyUI" in refused(asking("edit-start-script", path, **sage))
    assert "is not what starts" in refused(asking("edit-start-script", write(tmp_path / "x.sh", "main.py"), **sage))
    other.write_bytes(b"# \xff\npython main.py --use-sage-attention\n")
    assert "cannot change" in refused(asking("edit-start-script", other, **sage))
    other.write_text("A='--use-sage-attention'\nB=\"$A\"\npython main.py $B\n")
    assert "cannot change" in refused(asking("edit-start-script", other, **sage))


@pytest.mark.parametrize(
    ("name", "arguments", "after"),
    [
        ("dynamic-vram-trouble", "", "--disable-dynamic-vram"),
        ("sage-attention-missing", "--use-sage-attention", ""),
        ("cuda-malloc-unsupported", "--cuda-malloc", "--disable-cuda-malloc"),
        ("black-picture", "--fp16-vae", ""),
    ],
)
def test_arguments_that_give_trouble(name, arguments, after, root):
    write(root / "comfyui_version.py", '__version__ = "0.30.1"\n')
    write(root / "venv" / "bin" / "python")
    write(root / "user" / "comfyui.log", "DynamicVRAM support detected and enabled\nComfyUI version: 0.30.1\n")
    write(root / "start.sh", f"python main.py {arguments}".rstrip() + "\n")
    before = (root / "start.sh").read_text()
    assert fix(name, lambda: look(root)).status == "fixed"
    assert (root / "start.sh").read_text() == f"python main.py {after}".rstrip() + "\n"
    undo()
    assert (root / "start.sh").read_text() == before
    (root / "start.sh").unlink()
    assert [each.remedy for each in look(root) if each.name == name] in ([None], [])


def test_weights_beside_a_base_directory_elsewhere_are_named_to_comfyui(root, tmp_path):
    (tmp_path / "data" / "models").mkdir(parents=True)
    write(root / "start.sh", f"python main.py --base-directory {tmp_path / 'data'}\n")
    weights.write(root / "models" / "vae" / "flux2-vae.safetensors", weights.vae())
    weights.write(root / "models" / "clip" / "sub" / "qwen.safetensors", weights.qwen3(**weights.QWEN3_4B))
    settings = write(root / "extra_model_paths.yaml", "# mine\nother:\n    loras: /x\n")
    assert comfyui.read(root).files["vae"] == ()
    outcome = fix("other-base-directory", lambda: look(root))
    assert outcome.status == "fixed", outcome.trouble or outcome.why
    assert settings.read_text().startswith("# mine\nother:\n    loras: /x\nown_models:\n    base_path: ")
    found = comfyui.read(root)
    assert found.files["vae"] == ("flux2-vae.safetensors",)
    assert found.files["text_encoders"] == (str(Path("sub", "qwen.safetensors")),)
    undo()
    assert settings.read_text() == "# mine\nother:\n    loras: /x\n"


# The memory it holds


class Server(BaseHTTPRequestHandler):
    """As much of ComfyUI's server as `POST /free` needs; it lets go a moment after it was asked."""

    def do_GET(self) -> None:
        told: Any = self.server
        free = GIB if not told.asked else 7 * GIB
        stats = {"system": told.system, "devices": [{"vram_free": free}]}
        answers = {"/system_stats": stats, "/prompt": {"exec_info": {"queue_remaining": told.waiting}}}
        raw = json.dumps(answers[self.path]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(raw)

    def do_POST(self) -> None:
        told: Any = self.server
        told.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    """A ComfyUI that runs on this machine and does nothing."""
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.asked, made.waiting, made.system = [], 0, {"comfyui_version": "0.29.0"}
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_comfyui_in_the_background_lets_the_cards_memory_go(root, server):
    port = server.server_address[1]
    system = System(servers=(LocalServer(port, "0.29.0"),))
    found = [each for each in look(root, system) if each.name == "memory-held-by-comfyui"]
    made = fixes.plan(found[0], Plugins(), NOTHING)
    assert (made.consent, made.undoable, server.asked) == ("ask", False, [])
    [outcome], _ = fixes.fix(found, Plugins(), NOTHING, ask=yes, again=set)
    assert outcome.status == "fixed"
    assert server.asked == [("/free", {"unload_models": True, "free_memory": True})]
    with pytest.raises(KleinctlError, match="ComfyUI loads its models again by itself"):
        journal.find(outcome.entry)


def test_a_server_that_is_not_asked_to_free_anything(server):
    def why(url: str) -> str:
        found = Problem("x", "y", "z", remedy=Remedy("free-comfyui", {"url": url}, "ask"))
        return refused(replace(found, name="x"))

    port = server.server_address[1]
    for url in (
        "http://192.168.0.1:8188",
        f"http://127.0.0.1:{port}/x",
        f"http://127.0.0.1:{port}@evil:80",
        f"https://127.0.0.1:{port}",
        "http://evil:8188",
        "http://127.0.0.1:99999",
    ):
        assert "is no server on this machine" in why(url)
    server.waiting = 2
    assert "is at work (2 in its queue)" in why(f"http://127.0.0.1:{port}")
    server.system = {}
    assert "is no ComfyUI" in why(f"http://localhost:{port}")
    server.server_close()
    server.shutdown()
    assert "does not answer" in why(f"http://127.0.0.1:{port}")
    assert server.asked == []


# What only a log shows


@pytest.mark.parametrize(
    ("log", "arguments", "after"),
    [
        ("HostBuffer.read_file_slice failed", "", "--disable-dynamic-vram"),
        ("RuntimeError: CUDA error: operation not supported", "--cuda-malloc", "--disable-cuda-malloc"),
        (
            "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9, or ROCm",
            "--fast fp8_matrix_mult --port 1",
            "--port 1",
        ),
        (
            "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9, or ROCm",
            "--fast autotune fp8_matrix_mult",
            "--fast autotune",
        ),
        (
            "To use the `--use-sage-attention` feature, the `sageattention` package must be installed first.",
            "--use-sage-attention",
            "",
        ),
        ("RuntimeError: No valid execution plans built.", "--port 1", "--use-split-cross-attention --port 1"),
    ],
)
def test_an_argument_that_a_log_blames(root, log, arguments, after):
    write(root / "start.sh", f"python main.py {arguments}".rstrip() + "\n")
    facts = Facts(hardware=CARD, comfyuis=(comfyui.read(root),))
    [match] = logs.explain(log, facts=facts)
    assert match.problem.path == str(root / "start.sh")
    fixes.carry_out(fixes.plan(match.problem, Plugins(), NOTHING))
    assert (root / "start.sh").read_text() == f"python main.py {after}".rstrip() + "\n"
    facts = replace(facts, comfyuis=(comfyui.read(root),))
    assert [each.problem.remedy for each in logs.explain(log, facts=facts)] == [None]  # it is done
    assert [each.problem.remedy for each in logs.explain(log)] == [None]


def test_another_attention_was_chosen_already(root):
    write(root / "start.sh", "python main.py --use-flash-attention\n")  # ComfyUI takes one of them and ends at two
    facts = Facts(hardware=CARD, comfyuis=(comfyui.read(root),))
    [match] = logs.explain("RuntimeError: No valid execution plans built.", facts=facts)
    assert (match.problem.name, match.problem.remedy) == ("cudnn-plans-missing", None)


def test_a_log_of_a_comfyui_from_before_klein(root):
    facts = Facts(hardware=CARD, comfyuis=(comfyui.read(root),))
    [match] = logs.explain("Got [32, 32, 32, 32] but expected positional dim 64", facts=facts)
    assert match.problem.remedy == Remedy("update-comfyui", {"path": str(root)}, "ask")
    assert fixes.plan(match.problem, Plugins(), NOTHING).consent == "ask"
