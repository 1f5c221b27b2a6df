"""Installing a ComfyUI of kleinctl's own: what comes, what a crash leaves, what an upgrade and an uninstall keep."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kleinctl import comfyui, environment, facts, store
from kleinctl.comfyui import adopt, checkout, install, packages, record
from kleinctl.environment import EnvironmentPlan
from kleinctl.environment_build import Builder
from kleinctl.fixes import git
from kleinctl.home import envs_folder, home
from kleinctl.problem import KleinctlError
from tests.comfyui import fake
from tests.test_environment import TORCH, card, index, machine, wheel  # noqa: F401

CPU = machine()
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def have(ref: str | None = None, address: Path | None = None) -> list[str]:
    """Install, and return what was told."""
    told: list[str] = []
    plan = install.plan(CPU, False, ref, str(address) if address else None)
    install.carry_out(plan, CPU, False, told.append, lambda event: told.append(event.title))
    return told


def problem_of(call) -> object:
    with pytest.raises(KleinctlError) as raised:
        call()
    return raised.value.problem


def in_home() -> list[str]:
    """The folders of ComfyUI and of environments."""
    return sorted(f"{each.parent.name}/{each.name}" for place in (record.folder(), envs_folder()) if place.is_dir()
                  for each in place.iterdir() if each.is_dir())  # fmt: skip


# The whole road


def test_comfyui_is_installed_used_and_a_second_install_does_nothing(repository, no_pip):
    before = install.plan(CPU, False)
    assert not before.complete and before.steps[0].startswith("bring ComfyUI v0.29.0 (commit ")
    assert comfyui.known() is None
    told = have()
    used = comfyui.known()
    assert used.owned and used.version == "0.29.0" and used.commit == git.head(used.path)
    assert used.path.name == f"ComfyUI-0.29.0-{used.commit[:8]}" and used.python.exists()
    assert {path.name for path in used.base.iterdir()} == {"models", "input", "output", "custom_nodes", "user"}
    assert told[0].startswith("fetching v0.29.0 of")
    assert no_pip == [f"{used.python.parents[1].name}: addon>=1 spare>=2 torchvision==0.28.0 torchaudio==2.11.0"]
    there = sorted(home().rglob("*"))

    again = install.plan(CPU, False)
    assert again.complete and again.steps == () and again.fetch_bytes == 0
    have()
    assert sorted(home().rglob("*")) == there and len(no_pip) == 1


def test_the_environment_is_a_real_one_and_requirements_do_not_replace_its_torch(repository, index, monkeypatch):  # noqa: F811
    address, root = index
    wheel(root / "simple" / "spare", "spare", "2.0", requires=("torch",))
    wheel(root / "simple" / "torch", "torch", "9.9", code=TORCH)  # newer, and not of this build
    torch = root / "whl" / "cpu"
    wheel(torch / "torchvision", "torchvision", "0.28.0+cpu", requires=("torch==2.13.0",))
    wheel(torch / "torchaudio", "torchaudio", "2.11.0+cpu")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    row = {**environment.data()["builds"][-1], "index": f"{address}/whl/cpu"}
    own = {**environment.data(), "builds": [row], "stack": {**environment.data()["stack"], "pins": ["tiny==1.0"]}}
    monkeypatch.setattr(environment, "data", lambda: own)
    have()
    found = environment.inspect(comfyui.known().python)
    assert found.packages["torch"] == "2.13.0+cpu" and found.packages["torchvision"] == "0.28.0+cpu"
    assert {"addon": "1.5", "spare": "2.0", "tiny": "1.0"}.items() <= found.packages.items()
    assert install.plan(CPU, False).complete


def test_a_light_environment_is_built_without_torch(index, monkeypatch):  # noqa: F811
    """For the worker that talks to a ComfyUI of the user's: gigabytes of torch would be of no use to it."""
    address, root = index
    wheel(root / "simple" / "pluggy", "pluggy", "1.7.0")
    wheel(root / "simple" / "addon", "addon", "9.0")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    own = {**environment.data(), "stack": {**environment.data()["stack"], "pins": ["addon==1.5", "pluggy==1.7.0"]}}
    monkeypatch.setattr(environment, "data", lambda: own)
    plan = environment.plan(["addon>=1"], CPU, cuda=True)
    assert plan.name.startswith("light-") and plan.download_bytes < 10**8
    events: list[str] = []
    built = environment.build(plan, lambda event: events.append(event.title))
    assert set(plan.steps) <= set(events) and not any("torch" in title for title in plan.steps)
    assert {"addon": "1.5", "pluggy": "1.7.0"}.items() <= built.packages.items() and "torch" not in built.packages
    assert environment.find(["addon>=1"], machine(card("RTX 4090", "8.9")), cuda=True) == built
    assert environment.find(["addon>=1", "torch"], CPU, cuda=False) is None


def test_a_mirror_or_a_local_repository_does_as_well(repository, no_pip, tmp_path):
    mirror = tmp_path / "mirror of mine"
    fake.git(tmp_path, "clone", "--quiet", "--bare", str(repository), str(mirror))
    plan = install.plan(CPU, False, address=str(mirror))
    assert plan.wanted.pinned and plan.wanted.address == str(mirror)
    have(address=mirror)
    assert comfyui.known().version == "0.29.0"


def test_a_branch_is_asked_for_and_told_that_nothing_vouches_for_it(repository, no_pip):
    newest = fake.commit(repository, "0.31.0")
    plan = install.plan(CPU, False, ref="master")
    assert (plan.wanted.commit, plan.wanted.pinned) == (newest, False)
    assert plan.remarks[0] == "master is no release that kleinctl knows: its commit is compared with nothing"
    have("master")
    assert comfyui.known().version == "0.31.0"
    assert install.plan(CPU, False).complete  # and it stays, though the release is another one


def test_the_servers_list_of_models_has_the_store_and_survives_odd_folder_names(monkeypatch, tmp_path):
    import yaml

    monkeypatch.setenv("KLEINCTL_HOME", str(tmp_path / "it's $HOME ~"))
    assert yaml.safe_load(comfyui.paths_file().read_text()) == {}
    (store.model_folder("klein-4b", "comfyui") / "vae").mkdir(parents=True)
    store.model_folder("klein-tiny", "diffusers").mkdir(parents=True)
    (section,) = yaml.safe_load(comfyui.paths_file().read_text()).values()
    assert section["is_default"] is True and section["vae"] == str(store.model_folder("klein-4b", "comfyui") / "vae")
    assert set(section) == {"is_default", "vae"}  # of folders that are not there doctor would say so


# Moving on


def test_an_upgrade_keeps_pictures_settings_custom_nodes_and_what_lies_in_the_program(repository, no_pip):
    have("v0.28.0")
    old = comfyui.known()
    kept = {
        old.base / "output" / "red.png": None,
        old.base / "user" / "comfy.settings.json": None,
        old.base / "custom_nodes" / "Pack" / "__init__.py": None,
        old.path / "models" / "mine" / "lora.safetensors": old.base / "models" / "mine" / "lora.safetensors",
        old.path / "custom_nodes" / "Other" / "x.py": old.base / "custom_nodes" / "Other" / "x.py",
        old.path / "extra_model_paths.yaml": "beside main.py",
    }
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (old.path / "__pycache__").mkdir()
    (old.path / "__pycache__" / "main.pyc").write_text("")
    assert "--comfyui-ref v0.29.0" in install.plan(CPU, False).remarks[0]
    told = have("v0.29.0")
    new = comfyui.known()
    for path, now in kept.items():
        place = new.path / path.name if now == "beside main.py" else now or path
        assert place.read_text() == path.name
    assert not old.path.exists() and new.version == "0.29.0"
    assert checkout.programs() == [new.path] and any(line.startswith("moved to") for line in told)


def test_an_environment_that_no_longer_fits_gives_way_to_one_that_does(repository, no_pip):
    have("v0.28.0")
    fake.commit(repository, "0.30.0", {"requirements.txt": "torch\nother==3\n"}, tag="v0.30.0")
    listed = comfyui.known().base / "custom_nodes" / "Pack" / "requirements.txt"
    listed.parent.mkdir()
    listed.write_text("piexif\n")
    told = have("v0.30.0")
    assert f'Pack stays; what it needs: "{comfyui.known().python}" -m pip install -r "{listed}"' in told
    assert [line.partition(": ")[2] for line in no_pip] == [
        "addon>=1 spare>=2 torchvision==0.28.0 torchaudio==2.11.0",
        "other==3 torchvision==0.28.0 torchaudio==2.11.0",
    ]
    assert packages.names() == [comfyui.known().python.parents[1].name]


def test_a_broken_environment_is_built_anew(repository, no_pip):
    have()
    shutil.rmtree(next(comfyui.known().python.parents[1].rglob("addon-1.dist-info")))
    plan = install.plan(CPU, False)
    (problem,) = environment.broken()
    assert (problem.fix, problem.remedy) == ("kleinctl install --backend comfy", None)
    assert not plan.ready and plan.steps == ("make a Python environment for it with torch 2.13.0 (cpu)",)
    have()
    assert install.plan(CPU, False).complete and len(no_pip) == 2


def test_a_python_that_is_gone_is_told_before_a_run(repository, no_pip):
    have()
    assert comfyui.trouble(comfyui.known()) is None
    comfyui.known().python.unlink()
    problem = comfyui.trouble(comfyui.known())
    assert (problem.name, problem.fix) == ("comfyui-gone", "kleinctl install --backend comfy")


# Killed, and nothing half-done


def test_kill_in_the_middle_leaves_no_half_comfyui_and_the_next_install_goes_on(repository, no_pip, tmp_path):
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    real = shutil.which("git")
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *checkout*) touch {tmp_path}/reached; sleep 60;; esac\nexec {real} "$@"\n'
    )
    slow.chmod(0o755)
    code = f"""
from pathlib import Path
from kleinctl.comfyui import checkout
checkout.bring(checkout.Wanted({str(repository)!r}, "v0.29.0", {checkout.releases()["commits"]["v0.29.0"]!r}, True))
"""
    env = {**os.environ, "PATH": f"{slow.parent}{os.pathsep}{os.environ['PATH']}"}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True)
    end = time.monotonic() + 20
    while not (tmp_path / "reached").exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert in_home() == [f"comfyui/.new-{child.pid}"] and checkout.programs() == [] and comfyui.known() is None
    have()
    used = comfyui.known()
    assert in_home() == sorted([f"comfyui/{used.path.name}", "comfyui/data", f"envs/{used.python.parents[1].name}"])
    assert git.changes(used.path) == []


def test_what_broke_off_between_two_steps_goes_on_and_the_former_is_in_use_until_then(repository, no_pip, monkeypatch):
    have("v0.28.0")
    former = comfyui.known()

    def full(plan: EnvironmentPlan, *rest: object) -> None:
        raise KleinctlError(store.disk_problem(OSError(28, "No space left on device"), plan.folder))

    fake.commit(repository, "0.30.0", {"requirements.txt": "other==3\n"}, tag="v0.30.0")
    with monkeypatch.context() as broken:
        broken.setattr(environment, "build", full)
        assert problem_of(lambda: have("v0.30.0")).name == "disk-full"
    assert comfyui.known() == former and comfyui.trouble(former) is None
    told = have("v0.30.0")
    assert not any(line.startswith("fetching") for line in told)  # the program had come already
    assert comfyui.known().version == "0.30.0" and checkout.programs() == [comfyui.known().path]


def test_an_upgrade_that_is_interrupted_at_the_end_is_finished_by_the_next_install(repository, no_pip, monkeypatch):
    have("v0.28.0")
    old = comfyui.known()

    def interrupted(keep: Path | None) -> list[Path]:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(checkout, "tidy", interrupted)
        have("v0.29.0")
    assert comfyui.known().version == "0.29.0" and old.path.exists()
    have()
    assert checkout.programs() == [comfyui.known().path] and not old.path.exists()


def test_what_another_install_tidies_away_meanwhile_is_brought_again(repository, no_pip, monkeypatch):
    have("v0.28.0")
    build, others = environment.build, [lambda: have("v0.28.0")]

    def built(*arguments: object) -> object:
        made = build(*arguments)
        if others:
            others.pop()()
        return made

    monkeypatch.setattr(environment, "build", built)
    told = have("v0.29.0")
    used = comfyui.known()
    assert used.version == "0.29.0" and comfyui.trouble(used) is None and used.python.exists()
    assert checkout.programs() == [used.path] and sum(line.startswith("fetching v0.29.0") for line in told) == 2


# Bad input


def test_a_ref_that_is_not_there_is_met_with_the_nearest(repository):
    problem = problem_of(lambda: install.plan(CPU, False, ref="v0.29.9"))
    assert problem.name == "comfyui-ref-unknown" and problem.why.endswith("Did you mean v0.29.0?")
    assert "it has 3 of these: " in problem.why and "v0.28.0" in problem.why


def test_a_commit_that_is_not_there(repository, no_pip):
    problem = problem_of(lambda: have("a" * 40))
    assert (problem.name, problem.what) == ("comfyui-ref-unknown", f"there is no {'a' * 40!r} in {repository}")
    assert problem.why.endswith("it has no such commit.") and not record.folder().exists()


def test_a_repository_without_the_release_is_told_apart_from_one_that_is_damaged(repository, no_pip, tmp_path):
    other = tmp_path / "other"
    fake.commit(other, "0.31.0", tag="v0.31.0")
    problem = problem_of(lambda: have("v0.29.0", other))
    assert problem.name == "comfyui-ref-unknown" and "Did you mean v0.31.0?" in problem.why
    mirror = tmp_path / "mirror"
    fake.git(tmp_path, "clone", "--quiet", "--bare", "--no-local", str(repository), str(mirror))
    for pack in mirror.glob("objects/pack/*.pack"):
        pack.chmod(0o600)
        pack.write_bytes(pack.read_bytes()[:100])
    assert problem_of(lambda: have("v0.29.0", mirror)).name == "git-failed"
    assert checkout.programs() == [] and list(record.folder().glob(".new-*")) == []


def test_a_tag_that_was_moved_to_another_commit_is_refused(repository, no_pip, tmp_path):
    """The pinned commit is nowhere in that repository: what it calls v0.29.0 is something else."""
    other = tmp_path / "other"
    found = fake.commit(other, "0.29.0", {"main.py": "import os\n"}, tag="v0.29.0")
    problem = problem_of(lambda: have("v0.29.0", other))
    assert problem.name == "comfyui-not-the-pin"
    assert checkout.releases()["commits"]["v0.29.0"] in problem.why and found in problem.why
    assert comfyui.known() is None and checkout.programs() == [] and list(record.folder().glob(".new-*")) == []


def test_a_comfyui_from_before_klein_is_refused_after_it_came(repository, no_pip):
    fake.commit(repository, "0.9.1", tag="v0.9.1")
    problem = problem_of(lambda: have("v0.9.1"))
    assert (problem.name, problem.what) == ("comfyui-too-old", f"v0.9.1 of {repository} is too old for klein")
    assert problem.fix == "kleinctl install --backend comfy --comfyui-ref v0.29.0"
    assert in_home() == [] and comfyui.known() is None


def test_another_repository_is_refused(repository, no_pip, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    git.run(None, "init", "--quiet", "--initial-branch", "main", str(other))
    (other / "README.md").write_text("hello")
    fake.git(other, "add", "README.md")
    fake.git(other, "commit", "--quiet", "--message", "hello")
    problem = problem_of(lambda: have("main", other))
    assert problem.name == "not-comfyui" and "it has .git, README.md" in problem.why
    assert problem.what == f"main of {other} is no ComfyUI" and problem.path is None


def test_without_git(repository, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = problem_of(lambda: have())
    assert (problem.name, problem.what) == ("git-failed", "git is not installed")


@pytest.mark.parametrize("address", ["ext::sh -c touch% {}/ran", "--upload-pack=touch {}/ran"])
def test_an_address_that_is_a_command_is_not_run(address, repository, no_pip, tmp_path):
    for ref in ("v0.29.0", "main"):
        assert problem_of(lambda ref=ref: have(ref, address.format(tmp_path))).name == "git-failed"
    assert not (tmp_path / "ran").exists()


def test_a_server_that_does_not_answer(repository, no_pip):
    problem = problem_of(lambda: install.plan(CPU, False, "main", "https://127.0.0.1:9/ComfyUI"))
    assert problem.name == "git-failed"


def test_without_network_a_local_repository_still_serves(repository, no_pip, monkeypatch):
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    have()
    assert comfyui.known().version == "0.29.0"
    assert problem_of(lambda: install.plan(CPU, False, "main", "https://example.org/x")).name == "offline"


def test_no_room_for_comfyui_its_environment_and_the_model_together(repository, no_pip, monkeypatch):
    monkeypatch.setattr(store, "free_bytes", lambda folder: 2 * 10**9)
    assert install.plan(CPU, False).problems == ()
    plan = install.plan(CPU, False, more_bytes=16 * 10**9)
    assert [problem.name for problem in plan.problems] == ["disk-full"]
    assert problem_of(lambda: install.carry_out(plan, CPU, False, print, print)).name == "disk-full"
    assert in_home() == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written(repository, no_pip):
    home().mkdir(parents=True)
    home().chmod(0o500)
    assert problem_of(have).name == "folder-not-writable"


def test_files_of_the_program_that_were_changed_are_not_overwritten(repository, no_pip):
    have()
    mine = comfyui.known().path / "main.py"
    mine.write_text("# mine\n")
    problem = problem_of(have)
    assert problem.name == "comfyui-changed" and "main.py" in problem.why and problem.fix.startswith("git -C ")
    assert mine.read_text() == "# mine\n"


def test_a_requirement_that_contradicts_what_kleinctl_pins(repository, no_pip):
    fake.commit(repository, "0.31.0", {"requirements.txt": "torch\ntransformers<5\n"}, tag="v0.31.0")
    assert problem_of(lambda: have("v0.31.0")).name == "versions-clash"
    assert comfyui.known() is None


def test_a_requirements_file_that_is_none(repository, no_pip):
    fake.commit(repository, "0.31.0", {"requirements.txt": "<!doctype html>\n"}, tag="v0.31.0")
    problem = problem_of(lambda: have("v0.31.0"))
    assert problem.name == "comfyui-incomplete" and "line 1 is '<!doctype html>'" in problem.why


# What the machine can


@pytest.mark.parametrize(
    ("gpu", "precision", "words"),
    [
        (card("RTX 4070 Ti SUPER", "8.9", "580.65.06"), None, None),
        (card("RTX 4070 Ti SUPER", "8.9", "550.90.07"), None, "and that driver 580; here is 550.90.07"),
        (card("RTX 4070 Ti SUPER", "8.9", "550.90.07"), "bf16", None),
        (card("GTX 1080 Ti", "6.1"), None, "has no fast fp8 kernels"),
        (None, None, "without an NVIDIA card"),
    ],
)
def test_a_machine_without_the_fast_fp8_kernels_is_told(repository, gpu, precision, words):
    hardware = machine(*([gpu] if gpu else []))
    remarks = install.plan(hardware, gpu is not None, precision=precision).remarks
    assert (remarks == ()) if words is None else (words in remarks[-1])


def test_nvfp4_on_a_card_from_before_it(repository):
    problem = problem_of(lambda: install.check_precision("nvfp4", machine(card("RTX 4090", "8.9"))))
    assert problem.name == "nvfp4-without-card" and "RTX 4090 has 8.9" in problem.why
    without = problem_of(lambda: install.check_precision("nvfp4", machine()))
    assert without.name == "nvfp4-without-card" and "no NVIDIA card here" in without.why
    new = machine(card("RTX 5090", "12.0"))
    install.check_precision("nvfp4", new)
    assert "the fast nvfp4 kernels want torch for CUDA 13" in install.kernel_remarks(new, "12.8", "nvfp4")[0]
    assert install.kernel_remarks(new, "13.0", "nvfp4") == []


# Doctor, and going away


def test_doctor_judges_the_comfyui_in_use_with_its_own_python_and_the_stores_files(repository, no_pip):
    have()
    part = store.model_folder("klein-4b", "comfyui") / "vae" / "flux2-vae.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100)
    found = adopt.facts_of(comfyui.known())
    assert found.version == "0.29.0" and found.files["vae"] == ("flux2-vae.safetensors",)
    assert found.python == str(comfyui.known().python) and found.argument("--base-directory")
    assert found.yaml_error == "" and found.unread == ()
    from kleinctl.plugins import Plugins

    gathered = facts.gather(Plugins(frozenset()), CPU)
    assert [each.path for each in gathered.comfyuis] == [str(comfyui.known().path)]
    (scene,) = (each for each in gathered.scenes() if "comfyui" in each)
    assert scene["comfyui_environment"].name == comfyui.known().python.parents[1].name
    assert len({each.python for each in gathered.environments}) == len(gathered.environments)  # none is judged twice
    assert facts.gather(Plugins(frozenset()), CPU, folders=[repository]).comfyuis[0].path == str(repository)


def test_uninstall_takes_what_kleinctl_brought_and_leaves_what_it_did_not(repository, no_pip):
    have()
    picture = comfyui.known().base / "output" / "red.png"
    picture.write_text("red")
    node = comfyui.known().path / "custom_nodes" / "Mine" / "x.py"
    node.parent.mkdir(parents=True)
    node.write_text("mine")
    program = comfyui.known().path
    removed = install.uninstall()
    moved = record.data_folder() / "custom_nodes" / "Mine" / "x.py"
    assert removed.programs == (program,) and set(removed.left) == {picture, moved}
    assert moved.read_text() == "mine" and comfyui.known() is None and packages.names() == []
    assert in_home() == ["comfyui/data"]
    picture.unlink()
    shutil.rmtree(record.data_folder() / "custom_nodes")
    assert install.uninstall().left == () and not record.folder().exists()


def test_uninstall_takes_what_servers_wrote_but_not_what_workflows_saved_or_links_lead_to(empty_home, tmp_path):
    theirs = tmp_path / "theirs" / "a.png"
    run = record.run_folder()
    for path in (theirs, run / "temp" / "a.png", run / "user" / "x.json", run / "a.lock", run / "output" / "film.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (run / "temp" / "link").symlink_to(theirs.parent)
    (run / "linked").symlink_to(theirs.parent)
    assert install.uninstall().left == (run / "output" / "film.mp4",)
    assert in_home() == ["comfyui/run"] and [path.name for path in run.iterdir()] == ["output"]
    shutil.rmtree(run)
    run.symlink_to(theirs.parent)
    assert install.uninstall().left == () and not record.folder().exists()
    assert theirs.read_text() == "x"


def test_uninstall_waits_for_the_picture_that_a_server_of_ours_is_making(empty_home):
    from filelock import FileLock

    record.run_folder().mkdir(parents=True)
    with FileLock(record.run_folder() / "a.lock"):
        assert problem_of(install.uninstall).name == "comfyui-running"
    assert install.uninstall().left == ()


def test_environments_for_comfyui_are_tried_after_the_plain_ones(repository, no_pip):
    have()
    fake.built(envs_folder() / "cpu-12345678", {"torch": "2.13.0+cpu"})
    os.utime(envs_folder() / "cpu-12345678" / "environment.json", (1, 1))
    assert [each.name.split("-")[0] for each in environment.list_managed()] == ["cpu", "comfyui"]


def test_folders_that_git_needs_stay_in_custom_nodes_and_in_what_was_changed(repository, no_pip):
    have()
    used = comfyui.known()
    node = record.data_folder() / "custom_nodes" / "node"
    fake.commit(node, "1")
    fake.git(node, "pack-refs", "--all")  # refs/heads is empty then, and git is lost without it
    (used.path / "main.py").write_text("# mine")
    removed = install.uninstall()
    assert (removed.programs, removed.changed, removed.freed_bytes) == ((), (used.path,), 0)
    assert fake.git(node, "status", "--porcelain") == ""
    assert fake.git(used.path, "status", "--porcelain") == "M main.py"


def test_a_program_whose_git_is_broken_stays_and_stands_in_nobodys_way(repository, no_pip):
    have()
    used = comfyui.known()
    (used.path / ".git" / "HEAD").write_text("")
    have("v0.28.0")
    again = comfyui.known()
    assert again.version == "0.28.0" and used.path.is_dir()
    removed = install.uninstall()
    assert removed.programs == (again.path,) and used.path in removed.changed


def test_a_repository_that_does_not_answer_is_named_and_no_folder_that_is_gone(repository, no_pip, tmp_path):
    for ref in ("v0.29.0", "master"):
        problem = problem_of(lambda ref=ref: have(ref, tmp_path / "nowhere"))
        assert problem.name == "git-failed" and problem.what == f"ComfyUI cannot be had from {tmp_path / 'nowhere'}"
        assert problem.fix.startswith(f"git ls-remote {tmp_path / 'nowhere'} ") and problem.path is None


def test_a_folder_that_is_no_repository_is_told_before_anything_is_planned(repository, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, found in (("nowhere", "there is no such folder"), ("empty", "it has no .git")):
        problem = problem_of(lambda name=name: install.plan(CPU, False, address=str(tmp_path / name)))
        assert problem.why == f"Wanted is a URL, or the folder of a git repository; {found}."
    fake.git(tmp_path, "clone", "--quiet", "--bare", str(repository), "bare")
    fake.git(repository, "bundle", "create", "--quiet", str(tmp_path / "comfyui.bundle"), "master")
    for address in ("bare", "comfyui.bundle"):
        install.plan(CPU, False, "master", str(tmp_path / address))


def test_a_disk_that_fills_while_git_writes(repository, no_pip, monkeypatch):
    said = "fatal: unable to write loose object file: No space left on device"
    monkeypatch.setattr(checkout, "_fetch", lambda *words: (_ for _ in ()).throw(git._failed(None, said)))
    problem = problem_of(have)
    assert problem.name == "disk-full" and "make room there" in problem.fix
    assert not record.folder().exists()


@pytest.mark.parametrize(("said", "fix"), [("connection refused", "check the network, then: "), ("it ended", "")])
def test_a_build_that_fails_names_the_command_that_builds_this_one(said, fix, repository, monkeypatch):
    def fails(builder: Builder) -> None:
        raise builder.failure(said)

    monkeypatch.setattr(Builder, "run", fails)
    assert problem_of(have).fix == f"{fix}kleinctl install --backend comfy"
