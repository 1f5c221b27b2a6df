"""Using a ComfyUI of the user's: what is read of it, what is refused, and that nothing in it is changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kleinctl import comfyui
from kleinctl.comfyui import adopt, find, install, record
from kleinctl.environment import PYTHON
from kleinctl.facts import comfyui as facts
from kleinctl.problem import KleinctlError, Misuse, Problem
from tests.comfyui import fake
from tests.test_environment import machine

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
RUNNING = find.running  # the other tests are told that nothing runs
PACKAGES = {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu", "addon": "1.5"}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A checkout of the user's, with its venv."""
    folder = tmp_path / "ComfyUI"
    fake.commit(folder, "0.29.0")
    fake.environment(folder / "venv", PACKAGES)
    (folder / ".git" / "info" / "exclude").write_text("venv\n")
    fake.git(folder, "remote", "add", "origin", "https://github.com/comfyanonymous/ComfyUI.git")
    return folder


def problem_of(call) -> Problem:
    with pytest.raises(KleinctlError) as raised:
        call()
    return raised.value.problem


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in sorted(folder.rglob("*"))}


def test_a_checkout_is_adopted_and_nothing_in_it_is_changed(theirs):
    before = state(theirs)
    adoption = adopt.examine(theirs)
    assert comfyui.known() is None  # looking at it is not using it
    used = install.use(adoption)
    assert comfyui.known() == used
    assert (used.owned, used.version, used.path, used.base) == (False, "0.29.0", theirs, None)
    assert used.url == "http://127.0.0.1:8188"  # where it is looked for before another is started
    assert used.python == theirs / "venv" / PYTHON and used.commit == fake.git(theirs, "rev-parse", "HEAD")
    assert state(theirs) == before
    assert list(adoption.remarks) == [
        "it asks for spare>=2 and has no spare; klein runs all the same",
        "its torch 2.13.0+cpu has no CUDA, so it runs on the processor",
    ]

    install.uninstall()
    assert comfyui.known() is None and state(theirs) == before


def test_a_comfyui_that_was_changed_and_is_a_fork_is_used_and_told_of(theirs):
    (theirs / "main.py").write_text("# mine\n")
    fake.git(theirs, "remote", "set-url", "origin", "https://me:secret@github.com/me/ComfyUI")
    remarks = adopt.examine(theirs).remarks
    assert "its main.py was changed, and stays as it is" in remarks
    assert "it is a fork: https://github.com/me/ComfyUI" in remarks


def test_a_comfyui_that_was_changed_and_has_no_origin(theirs):
    (theirs / "main.py").write_text("# mine\n")
    fake.git(theirs, "remote", "remove", "origin")
    remarks = adopt.examine(theirs).remarks
    assert "its main.py was changed, and stays as it is" in remarks
    assert not [each for each in remarks if "git state" in each]


def test_a_folder_whose_name_no_record_can_carry(theirs):
    odd = theirs.rename(theirs.with_name("Comfy\nUI"))
    problem = problem_of(lambda: adopt.examine(odd))
    assert problem.name == "not-comfyui" and "cannot be shown" in problem.why


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(theirs):
    (theirs / "requirements.txt").unlink()
    os.mkfifo(theirs / "requirements.txt")
    assert problem_of(lambda: adopt.examine(theirs)).name == "comfyui-incomplete"


def test_a_python_that_hangs(theirs, monkeypatch):
    monkeypatch.setattr(adopt, "PYTHON_SECONDS", 0.2)
    python = theirs / "venv" / PYTHON
    python.unlink()
    python.write_text("#!/bin/sh\nexec sleep 5\n")
    python.chmod(0o755)
    problem = problem_of(lambda: adopt.examine(theirs))
    assert problem.name == "comfyui-python-broken" and problem.why.endswith("it says: nothing in 0.2 s")


def test_git_settings_that_name_a_program_are_not_followed(theirs, tmp_path):
    """`git status` runs filters: whoever sends a folder could have a program run by adopting it."""
    fake.git(theirs, "config", "filter.evil.clean", f"touch {tmp_path}/ran; cat")
    (theirs / ".gitattributes").write_text("* filter=evil\n")
    (theirs / "main.py").write_text("# mine\n")
    remarks = adopt.examine(theirs).remarks
    assert not (tmp_path / "ran").exists()
    assert "its git state is not known: with filter.evil.clean set in it, git may run a program" in remarks


def test_the_portable_with_its_start_script(tmp_path):
    root = tmp_path / "ComfyUI_windows_portable"
    fake.commit(root / "ComfyUI", "0.29.0")
    line = (
        ".\\python_embeded\\python.exe -s ComfyUI\\main.py --windows-standalone-build --output-directory out --lowvram"
        " --disable-all-custom-nodes --whitelist-custom-nodes one two"
    )
    (root / "run_nvidia_gpu.bat").write_text(f"{line}\n")
    embedded = root / "python_embeded" / "python.exe"
    embedded.parent.mkdir()
    site = embedded.parent / "Lib" / "site-packages"
    embedded.write_text(f"#!/bin/sh\necho '{json.dumps([str(site)])}'\n")
    embedded.chmod(0o755)
    for name, version in PACKAGES.items():
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
    used = adopt.examine(root).checkout
    assert (used.path, used.python) == (root / "ComfyUI", embedded)
    nodes = ("--disable-all-custom-nodes", "--whitelist-custom-nodes", "one", "two")
    assert used.arguments == ("--output-directory", str(root / "out"), *nodes)


def test_the_desktop_app_keeps_program_and_models_apart(tmp_path, monkeypatch):
    base, local = tmp_path / "Documents" / "ComfyUI", tmp_path / "local"
    program = local / "Programs" / "ComfyUI" / "resources" / "ComfyUI"
    for folder in (base / "models" / "vae", base / "custom_nodes", base / "user"):
        folder.mkdir(parents=True)
    fake.environment(base / ".venv", PACKAGES)
    assert "app that reads them was not found" in problem_of(lambda: adopt.examine(base)).why
    fake.commit(program, "0.29.0")
    monkeypatch.setenv("LOCALAPPDATA", str(local))
    used = adopt.examine(base).checkout
    assert (used.path, used.base, used.python) == (program, base, base / ".venv" / PYTHON)
    assert adopt.shown_by(used) == base


def test_a_base_directory_named_in_the_start_script(theirs, tmp_path):
    (theirs / "run.sh").write_text('python main.py --base-directory "../data" --cuda-malloc --port 9000\n')
    (tmp_path / "data").mkdir()
    used = adopt.examine(theirs).checkout
    assert used.base == tmp_path / "data" and used.arguments == ("--cuda-malloc",)
    assert adopt.shown_by(used) == theirs
    assert used.url == "http://127.0.0.1:9000"


def test_where_it_runs_now_is_where_it_will_be_asked(theirs, monkeypatch):
    monkeypatch.setattr(find, "running", lambda: [find.Running(theirs, None, 8200)])
    assert adopt.examine(theirs).checkout.url == "http://127.0.0.1:8200"


# Refused


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "it is empty"),
        (["model_index.json", "vae/config.json"], "it has model_index.json, vae"),
        (["models/vae/x", "models/unet/x", "user/x"], "it has models and settings, and the app"),
    ],
)
def test_a_folder_that_is_no_comfyui(files, found, tmp_path):
    for name in files:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text("")
    (tmp_path / "x").mkdir(exist_ok=True)
    problem = problem_of(lambda: adopt.examine(tmp_path / "x"))
    assert problem.name == "not-comfyui" and found in problem.why


def test_a_folder_that_is_not_there(tmp_path):
    assert "it is not there" in problem_of(lambda: adopt.examine(tmp_path / "gone")).why


def test_a_comfyui_from_before_klein(theirs):
    (theirs / "comfyui_version.py").write_text('__version__ = "0.9.1"\n')
    problem = problem_of(lambda: adopt.examine(theirs))
    assert problem.name == "comfyui-too-old" and "0.9.2 or newer; this is 0.9.1" in problem.why
    assert "git -C" in problem.fix


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_of_another_user(theirs):
    theirs.chmod(0)
    assert problem_of(lambda: adopt.examine(theirs)).name == "comfyui-unreadable"


def test_a_folder_that_the_system_keeps_closed(theirs, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != theirs or mode == os.W_OK)
    assert problem_of(lambda: adopt.examine(theirs)).name == "comfyui-unreadable"


def test_a_folder_in_one_that_the_system_keeps_closed(theirs, monkeypatch):
    look = Path.stat

    def closed(path, **more):
        if path.is_relative_to(theirs):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **more)

    monkeypatch.setattr(Path, "stat", closed)
    monkeypatch.setattr(Path, "home", lambda: theirs)
    assert problem_of(lambda: adopt.examine(theirs)).name == "comfyui-unreadable"
    assert [each for each in find.candidates() if each.path.is_relative_to(theirs)] == []


def test_a_base_that_cannot_be_written(theirs, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    problem = problem_of(lambda: adopt.examine(theirs))
    assert problem.name == "folder-not-writable" and problem.path == str(theirs)


def test_a_comfyui_run_by_conda_wants_its_python_named(theirs, tmp_path, monkeypatch):
    shutil.rmtree(theirs / "venv")
    problem = problem_of(lambda: adopt.examine(theirs))
    assert problem.name == "comfyui-without-python" and "--comfyui-python" in problem.fix
    conda = fake.environment(tmp_path / "envs" / "comfy", PACKAGES)
    assert adopt.examine(theirs, conda).checkout.python == conda
    monkeypatch.chdir(tmp_path)
    found = adopt.examine(Path("ComfyUI"), Path("envs/comfy") / PYTHON)
    assert found.checkout.python == conda
    install.use(found)
    assert adopt.examine(theirs).checkout == found.checkout  # once it is known, it need not be named again


def test_a_python_that_does_not_start(theirs):
    python = theirs / "venv" / PYTHON
    python.unlink()
    python.write_text("#!/bin/sh\necho 'libpython3.12.so: cannot open' >&2; exit 127\n")
    python.chmod(0o755)
    problem = problem_of(lambda: adopt.examine(theirs))
    assert problem.name == "comfyui-python-broken" and "libpython3.12.so: cannot open" in problem.why


def test_an_environment_whose_python_was_removed(theirs):
    python = theirs / "venv" / PYTHON
    python.unlink()
    python.symlink_to(theirs.parent / "python3.10")
    problem = problem_of(lambda: adopt.examine(theirs))
    assert problem.name == "comfyui-python-broken" and problem.path == str(python)
    assert problem.why == f"{python} has to run; it says: No such file or directory"


def test_packages_of_an_environment_that_shares_those_of_another(theirs, tmp_path):
    """As images of rented machines have it: torch lies in the system's Python, and a `.pth` or setting leads to it."""
    site = next(theirs.rglob("addon-1.5.dist-info")).parent
    elsewhere = tmp_path / "system"
    elsewhere.mkdir()
    for info in [*site.glob("torch*"), *site.glob("addon*")]:
        info.rename(elsewhere / info.name.replace("2.13.0+cpu", "2.13.0+cu126"))
    (site / "system.pth").write_text(f"{elsewhere}\n")
    adoption = adopt.examine(theirs)
    assert adoption.environment.torch_cuda == "12.6" and not any("no CUDA" in each for each in adoption.remarks)
    (judged,) = facts.environments(adopt.facts_of(adoption.checkout))  # by doctor, which starts nothing
    assert (judged.packages["addon"], judged.torch_cuda) == ("1.5", "12.6")

    next(elsewhere.glob("addon*")).rename(elsewhere / "gone")
    assert problem_of(lambda: adopt.examine(theirs)).what == "ComfyUI lacks addon"
    (elsewhere / "addon").mkdir()
    (elsewhere / "addon" / "__init__.py").touch()  # put there by hand: nothing says of which version
    adopt.examine(theirs)


def test_doctor_knows_the_packages_that_an_environment_shares_with_the_system(theirs, tmp_path):
    system = tmp_path / "usr"
    for place, name in (("local/lib/python3.12/dist-packages", "torch"), ("lib/python3/dist-packages", "addon")):
        (system / place / f"{name}-1.5.dist-info").mkdir(parents=True)
    (system / "bin").mkdir()
    (system / "bin" / "python3").touch()
    shutil.rmtree(next(theirs.rglob("torch-*.dist-info")))
    settings = theirs / "venv" / "pyvenv.cfg"
    for shares, found in (("true", True), ("false", False)):
        settings.write_text(f"home = {system / 'bin'}\nversion = 3.12.3\ninclude-system-site-packages = {shares}\n")
        (judged,) = facts.environments(facts.read(theirs))
        assert ("torch" in judged.packages) == found
        assert judged.packages["torchvision"] == PACKAGES["torchvision"]


def test_packages_that_another_version_of_python_left_in_an_environment(theirs):
    site = next(theirs.rglob("addon-1.5.dist-info")).parent
    site.parent.rename(site.parents[1] / "python3.8")
    assert problem_of(lambda: adopt.examine(theirs)).what == "ComfyUI lacks torch and 2 more"


def test_a_requirement_that_is_missing(theirs):
    shutil.rmtree(next(theirs.rglob("addon-1.5.dist-info")))
    problem = problem_of(lambda: adopt.examine(theirs))
    assert problem.name == "comfyui-incomplete" and problem.what == "ComfyUI lacks addon"
    assert "wants addon>=1" in problem.why and "no addon" in problem.why
    assert problem.fix.endswith('-m pip install -r "' + str(theirs / "requirements.txt") + '"')


def test_another_version_than_it_pins_is_a_remark(theirs):
    (theirs / "requirements.txt").write_text("addon==1.6\ncomfyui-embedded-docs==0.5\n")
    remarks = " ".join(adopt.examine(theirs).remarks)
    assert "it asks for addon==1.6 and has addon 1.5" in remarks and "has no comfyui-embedded-docs" in remarks


def test_an_adopted_comfyui_that_is_deleted_is_told_of(theirs):
    install.use(adopt.examine(theirs))
    shutil.rmtree(theirs)
    problem = comfyui.trouble(comfyui.known())
    assert problem.name == "comfyui-gone" and str(theirs) in problem.fix


# Found


def test_none_is_found_on_a_machine_without(empty_home):
    assert problem_of(find.the_one).name == "comfyui-none-found"


def test_the_only_one_is_found_in_the_folder_of_another_program(empty_home):
    fake.commit(empty_home / "StabilityMatrix" / "Data" / "Packages" / "ComfyUI", "0.29.0")
    assert find.the_one() == empty_home / "StabilityMatrix" / "Data" / "Packages" / "ComfyUI"


def test_several_are_listed_and_one_has_to_be_named(empty_home):
    fake.commit(empty_home / "ComfyUI", "0.29.0")
    fake.commit(empty_home / "SwarmUI" / "dlbackend" / "ComfyUI", "0.28.0")
    with pytest.raises(Misuse) as raised:
        find.the_one()
    problem = raised.value.problem
    assert (problem.name, problem.what[:22]) == ("comfyui-several", "there are 2 ComfyUIs, ")
    assert len(problem.why.splitlines()) == 2 and "SwarmUI" in problem.why


def test_a_folder_with_two_of_them(tmp_path):
    for name in ("ComfyUI", "ComfyUI-dev"):
        fake.commit(tmp_path / "Packages" / name, "0.29.0")
    assert problem_of(lambda: adopt.examine(tmp_path)).name == "comfyui-several"


def test_the_desktop_app_and_stability_matrix_are_found_by_their_settings(empty_home, tmp_path, monkeypatch):
    config = empty_home / ".config"
    for name, key, place in (
        ("ComfyUI/config.json", "basePath", tmp_path / "base"),
        ("StabilityMatrix/library.json", "LibraryPath", tmp_path / "library"),
    ):
        (config / name).parent.mkdir(parents=True)
        (config / name).write_text(json.dumps({key: str(place)}))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    fake.commit(tmp_path / "Programs" / "ComfyUI" / "resources" / "ComfyUI", "0.29.0")
    (tmp_path / "base" / "models" / "vae").mkdir(parents=True)
    fake.commit(tmp_path / "library" / "Packages" / "ComfyUI", "0.29.0")
    assert {each.path for each in find.candidates()} == {
        tmp_path / "base",
        tmp_path / "library" / "Packages" / "ComfyUI",
    }


def test_settings_of_other_programs_that_are_damaged_are_passed_over(empty_home, monkeypatch):
    config = empty_home / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config))
    for text in ("", "[]", '{"basePath": 3}', '{"basePath": "\\u0000"}', "[" * 10000):
        (config / "ComfyUI").mkdir(parents=True, exist_ok=True)
        (config / "ComfyUI" / "config.json").write_text(text)
        assert find.candidates() == []


def test_kleinctls_own_is_not_a_candidate(empty_home, monkeypatch):
    monkeypatch.setenv("KLEINCTL_HOME", str(empty_home / "SwarmUI"))
    fake.commit(record.folder() / "dlbackend" / "ComfyUI", "0.29.0")
    fake.commit(empty_home / "SwarmUI" / "comfyui", "0.29.0")
    assert find.candidates() == []


@pytest.fixture
def server(theirs: Path) -> Iterator[Path]:
    """A process that looks like ComfyUI's, started as people do: in its folder, with an environment that is active."""
    (theirs / "main.py").write_text("import time\ntime.sleep(60)\n")
    env = {**os.environ, "VIRTUAL_ENV": str(theirs / "venv")}
    python = theirs / "venv" / PYTHON
    own = ["--port", "41663", "--user-directory", record.run_folder() / "user"]
    started = [["--port", "9123"], ["--port", "9124"], own]
    children = [subprocess.Popen([python, "main.py", *words], cwd=theirs, env=env) for words in started]
    yield theirs
    for child in children:
        child.kill()
        child.wait()


def test_one_that_runs_is_found_with_its_python_and_port(server, monkeypatch):
    end, found = time.monotonic() + 10, []
    while time.monotonic() < end and len(found) < 3:
        time.sleep(0.05)
        found = [each for each in RUNNING() if each.path == server]
    assert {(each.python, each.port, each.ours) for each in found} == {
        (server / "venv" / PYTHON, port, port == 41663) for port in (9123, 9124, 41663)
    }
    for order in (found, found[::-1]):  # where kleinctl's own answers for a while is nothing to remember
        monkeypatch.setattr(find, "running", lambda order=order: order)
        theirs = [each.port for each in order if not each.ours]
        adoption = adopt.examine(server)
        assert adoption.checkout.url == f"http://127.0.0.1:{theirs[0]}"
        assert f"it runs at ports {theirs[0]}, {theirs[1]}; the first of these is used" in adoption.remarks
    (server.parent / "link").symlink_to(server)
    assert adopt.examine(server.parent / "link").checkout.url == f"http://127.0.0.1:{theirs[0]}"
    monkeypatch.setattr(find, "running", lambda: [each for each in found if each.ours])
    assert adopt.examine(server).checkout.url == f"http://127.0.0.1:{find.PORT}"
    assert server not in [each.path for each in find.candidates()]


def test_one_that_runs_is_not_taken_away(repository, no_pip, monkeypatch):
    plan = install.plan(machine(), False)
    used = install.carry_out(plan, machine(), False, print, print)
    assert problem_of(lambda: adopt.examine(used.path)).name == "usage"  # it is kleinctl's own, and stays so
    (used.path.parent.parent / "link").symlink_to(used.path)
    assert problem_of(lambda: adopt.examine(used.path.parent.parent / "link")).name == "usage"
    (used.path.parents[2] / "linked").symlink_to(used.path.parents[1])
    place = (
        used.path.parents[2] / "linked" / used.path.relative_to(used.path.parents[1])
    )  # the system names one of these
    monkeypatch.setattr(find, "running", lambda: [find.Running(place, used.python, 8190)])
    problem = problem_of(install.uninstall)
    assert problem.name == "comfyui-running" and "port 8190" in problem.why
    assert comfyui.known() == used and used.path.is_dir() and used.python.exists()
