"""`doctor --fix`: the right file ends up in the wrong one's place, nothing is lost, and nothing unasked is touched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kleinctl import environment, fixes, journal
from kleinctl.checks import own_checks, run_checks
from kleinctl.cli import fix as cli
from kleinctl.facts import weights as weights_facts
from kleinctl.fixes.texts import with_setting
from kleinctl.home import config_file, downloads_folder, envs_folder, home, quarantine_folder
from kleinctl.install import install_files, plan_files
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError, Problem, Remedy
from tests import weights
from tests.conftest import REPOSITORY
from tests.hub import Hub
from tests.test_environment import index, planned, wheel  # noqa: F401 (fixtures)
from tests.test_install import FILES, REPO, hub, klein  # noqa: F401 (fixtures)

NOTHING: Any = None
VAE = "vae/diffusion_pytorch_model.safetensors"
FLUX1_VAE = weights.vae_diffusers(channels=16, statistics=False)


def yes(plan: fixes.Plan) -> str:
    return ""


def fix(*arguments: Any, **more: Any) -> list[fixes.Outcome]:
    return fixes.fix(*arguments, **more)[0]


def problem(action: str, consent: str = "ask", **arguments: str) -> Problem:
    """A problem with that remedy."""
    remedy = Remedy(action, arguments, consent)  # type: ignore[arg-type]
    return Problem("something is wrong", "It is.", "mend it", name="some-problem", remedy=remedy)


def with_path(action: str, consent: str, path: Path, named: str = "", **arguments: str) -> Problem:
    remedy = Remedy(action, {"path": str(path), **arguments}, consent)  # type: ignore[arg-type]
    return replace(problem(action), path=named or str(path), remedy=remedy)


def plan(*arguments: Any, plugins: Any = None, **more: Any) -> fixes.Plan:
    return fixes.plan(problem(*arguments, **more), plugins or Plugins(), NOTHING)


def refusal(*arguments: Any, **more: Any) -> str:
    with pytest.raises(KleinctlError) as caught:
        plan(*arguments, **more)
    assert caught.value.problem.name == "fix-refused"
    return caught.value.problem.why


def tree(folder: Path) -> dict[str, Any]:
    """Every file below with its times: what a dry run must not change."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size, path.lstat().st_ino)
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


# The wrong VAE


@pytest.fixture
def tiny() -> Path:
    """The folder of klein-tiny, all of its files installed."""
    found = plan_files(Plugins().models["klein-tiny"], "diffusers")
    install_files(found)
    return found.folder


@pytest.fixture
def wrong_vae(tiny: Path) -> Path:
    """FLUX.1's VAE in the place of klein-tiny's."""
    (tiny / VAE).unlink()
    return weights.write(tiny / VAE, FLUX1_VAE)


def look() -> list[Problem]:
    """What the checks find wrong with files now."""
    scenes = [{"found_file": each} for each in weights_facts.gather(Plugins())]
    return [each for result in run_checks(own_checks(), {}, scenes) for each in result.problems]


def again() -> set[fixes.Key]:
    return set(map(fixes.key, look()))


def identity_of_the_tiny_vae() -> str:
    return Plugins().models["klein-tiny"].part("vae").sha256 or ""


def test_flux1_vae_in_place_of_the_models_own(wrong_vae):
    size = wrong_vae.stat().st_size
    found = [each for each in look() if each.name == "wrong-vae"]
    [outcome] = fix(found, Plugins(), NOTHING, ask=yes, again=again)
    assert (outcome.status, outcome.entry) == ("fixed", 1)
    assert hashlib.sha256(wrong_vae.read_bytes()).hexdigest() == identity_of_the_tiny_vae()
    [kept] = quarantine_folder().glob("*.safetensors")
    assert kept.name.startswith("flux1-vae-") and kept.stat().st_size == size
    reason = json.loads(kept.with_name(f"{kept.name}.json").read_text())
    assert reason["source"] == str(wrong_vae)
    assert reason["wanted"] == "diffusion_pytorch_model.safetensors of klein-tiny"
    assert "FLUX.1 VAE" in reason["looks_like"]
    assert outcome.plan is not None
    assert outcome.plan.sentences == (
        "take diffusion_pytorch_model.safetensors of klein-tiny (2.08 MB) from kleinctl_manifests and check its sha256",
        f"keep what is at {wrong_vae} as {kept}",
        f"put the right file at {wrong_vae}",
    )
    journal.undo(journal.find(1))
    assert wrong_vae.stat().st_size == size
    assert [each.name for each in look()] == [each.name for each in found]
    assert not list(quarantine_folder().glob("flux1*"))
    [outcome] = fix(found, Plugins(), NOTHING, ask=yes, again=again)  # and once more, from what undo kept
    assert (outcome.status, outcome.entry) == ("fixed", 2)


def test_a_dry_run_writes_nothing(wrong_vae, empty_home, capsys):
    before = tree(empty_home)
    document, left = cli.run(Plugins(), NOTHING, look(), again, dry_run=True)
    assert tree(empty_home) == before
    assert [each["outcome"] for each in document["fixes"]] == ["planned"]
    assert [each.name for each in left] == [each.name for each in look()]
    shown = capsys.readouterr().out
    assert f"planned       wrong-vae: {look()[0].what}\n" in shown
    assert "0 B to fetch, 2.08 MB to write; at once; `kleinctl undo` reverses it" in shown
    assert "  $ mv " in shown or "  $ move " in shown


def test_the_fix_as_people_see_it(wrong_vae, capsys):
    [found] = look()
    document, left = cli.run(Plugins(), NOTHING, [found], again)
    assert left == []
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        f"fixed         wrong-vae: {found.what}",
        "  kleinctl undo 1   # reverses it",
    ]
    assert "put the right file at" in shown.err and found.what in shown.err
    conforms(document)


def conforms(document: dict[str, Any]) -> None:
    schema = json.loads((REPOSITORY / "kleinctl" / "schemas" / "fix.json").read_text())
    jsonschema.validate(json.loads(json.dumps(document)), schema)


KILLED = """
import os, signal, sys
from kleinctl import fixes, journal, store
from kleinctl.checks import own_checks, run_checks
from kleinctl.facts import weights
from kleinctl.plugins import Plugins

point = sys.argv[1]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
saved, move, quarantined = journal.save, store.move, journal.keep

def save(entry):
    if point == "before it is written down": die()
    if point == "before it is known to be done" and entry.steps[0].after: die()
    saved(entry)
    if point == "when written down": die()

def keep(path, kept):
    quarantined(path, kept)
    if point == "when the old one is kept": die()

journal.save, journal.keep = save, keep
plugins = Plugins()
results = run_checks(own_checks(), {}, [{"found_file": each} for each in weights.gather(plugins)])
[problem] = [each for result in results for each in result.problems if each.name == "wrong-vae"]
fixes.carry_out(fixes.plan(problem, plugins, None))
"""


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
@pytest.mark.parametrize(
    "point",
    [
        "before it is written down",
        "when written down",
        "when the old one is kept",
        "before it is known to be done",
    ],
)
def test_killed_in_the_middle(wrong_vae, point):
    old = wrong_vae.stat().st_size
    done = subprocess.run([sys.executable, "-c", KILLED, point], cwd=REPOSITORY)
    assert done.returncode == -9
    new = point == "before it is known to be done"
    assert wrong_vae.stat().st_size == (2_075_558 if new else old)
    entries = [each for each in journal.entries() if isinstance(each, journal.Entry)]
    if entries:
        assert [each.state for each in entries] == ["cut short"]
        journal.undo(journal.find(None))
    assert wrong_vae.stat().st_size == old
    found = [each for each in look() if each.name == "wrong-vae"]
    assert [each.status for each in fix(found, Plugins(), NOTHING, ask=yes, again=again)] == ["fixed"]


# A part from the hub, into a ComfyUI


class Models:
    """Plugins that offer one model, of the hub double."""

    def model(self, name: str) -> Any:
        files = {f"vae/{Path(VAE).name}": FILES[VAE]}
        found = klein(files)
        return replace(
            found, parts=tuple(replace(each, to={"comfyui": "vae/flux2-vae.safetensors"}) for each in found.parts)
        )


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """FLUX.1's VAE in a ComfyUI, under the right name."""
    return weights.write(tmp_path / "ComfyUI" / "models" / "vae" / "flux2-vae.safetensors", FLUX1_VAE)


def in_comfyui(path: Path, action: str = "replace-file") -> Problem:
    return with_path(action, "ask", path, model="klein-4b", part="vae")


def nothing_left() -> set[fixes.Key]:
    return set()


def test_a_file_of_comfyui_is_replaced_after_asking(comfyui, hub: Hub, tmp_path):  # noqa: F811
    found, models = in_comfyui(comfyui), Models()
    before = tree(tmp_path)
    [outcome] = fix([found], models, NOTHING, ask=lambda plan: "no", again=nothing_left)
    assert (outcome.status, outcome.why) == ("skipped", "no")
    assert tree(tmp_path) == before and hub.requests == []
    assert outcome.plan is not None and outcome.plan.fetch_bytes == len(FILES[VAE])
    assert f"curl -L -o {comfyui} " in " ".join(outcome.plan.commands)
    [outcome] = fix([found], models, NOTHING, ask=yes, again=nothing_left)
    assert outcome.status == "fixed"
    assert comfyui.read_bytes() == FILES[VAE]
    assert [path.name for path in comfyui.parent.iterdir()] == ["flux2-vae.safetensors"]
    assert list(downloads_folder().iterdir()) == []
    journal.undo(journal.find(None))
    assert comfyui.stat().st_size > 10**7


def test_a_missing_part_is_fetched_and_taken_away_again(comfyui, hub: Hub):  # noqa: F811
    comfyui.unlink()
    found = in_comfyui(comfyui, "fetch-part")
    [outcome] = fix([found], Models(), NOTHING, ask=yes, again=nothing_left)
    assert outcome.status == "fixed" and comfyui.read_bytes() == FILES[VAE]
    journal.undo(journal.find(None))
    assert not comfyui.exists()


def test_a_download_that_was_prepared_and_never_filled(comfyui, hub: Hub):  # noqa: F811
    comfyui.write_bytes(bytes(len(FILES[VAE])))  # of the right size
    made = fixes.plan(in_comfyui(comfyui), Models(), NOTHING)
    assert made.fetch_bytes == len(FILES[VAE])
    fixes.carry_out(made)
    assert comfyui.read_bytes() == FILES[VAE]
    [kept] = quarantine_folder().glob("zeros-*.safetensors")
    assert kept.stat().st_size == len(FILES[VAE])


def test_a_good_copy_on_this_machine_is_taken(comfyui, hub: Hub):  # noqa: F811
    copy = comfyui.with_name("another name.safetensors")
    copy.write_bytes(FILES[VAE])
    made = fixes.plan(in_comfyui(comfyui), Models(), NOTHING)
    assert made.fetch_bytes == 0 and str(copy) in made.sentences[0]
    fixes.carry_out(made)
    assert comfyui.read_bytes() == copy.read_bytes() == FILES[VAE] and hub.requests == []


def test_the_user_was_faster(comfyui, hub: Hub):  # noqa: F811
    made = fixes.plan(in_comfyui(comfyui), Models(), NOTHING)
    comfyui.write_bytes(b"what the user put there meanwhile")
    with pytest.raises(KleinctlError, match="was changed meanwhile"):
        fixes.carry_out(made)
    assert comfyui.read_bytes() == b"what the user put there meanwhile" and journal.entries() == []


def test_the_file_cannot_be_had(comfyui, hub: Hub):  # noqa: F811
    hub.files.clear()
    size = comfyui.stat().st_size
    document, left = cli.run(Models(), NOTHING, [in_comfyui(comfyui)], nothing_left, yes=True)
    [outcome] = document["fixes"]
    assert outcome["outcome"] == "failed" and outcome["trouble"]["name"]
    assert comfyui.stat().st_size == size and journal.entries() == []
    assert [each.path for each in left] == [str(comfyui)]
    conforms(document)


def test_offline_it_is_for_people_to_do(comfyui, hub: Hub, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    document, _ = cli.run(Models(), NOTHING, [in_comfyui(comfyui)], nothing_left, yes=True)
    assert document["fixes"][0]["outcome"] == "for you to do"
    assert document["fixes"][0]["trouble"]["name"] == "offline"
    assert "for you to do some-problem: something is wrong" in capsys.readouterr().out


FETCHING = """
import sys
from tests.test_fixes import Models, in_comfyui, Path
from kleinctl import fixes
fixes.carry_out(fixes.plan(in_comfyui(Path(sys.argv[1])), Models(), None))
"""


def test_killed_while_it_fetches_and_started_again(comfyui, hub: Hub):  # noqa: F811
    hub.misbehave(VAE, "slow", rate=500_000)
    child = subprocess.Popen([sys.executable, "-c", FETCHING, str(comfyui)], cwd=REPOSITORY)
    deadline = time.monotonic() + 20
    while sum(each.stat().st_size for each in downloads_folder().glob("*.partial")) < 300_000:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert comfyui.stat().st_size > 10**7 and journal.entries() == []
    hub.requests.clear()
    fixes.carry_out(fixes.plan(in_comfyui(comfyui), Models(), NOTHING))
    assert comfyui.read_bytes() == FILES[VAE]
    assert hub.gets("cdn")[0].headers["range"].startswith("bytes=")


def test_a_name_that_no_disk_can_have(tmp_path):
    path = tmp_path / ("x" * 300 + ".yaml")
    remedy = Remedy("write-text", {"path": str(path), "text": "a: 1\n"}, "ask")
    assert "(File name too long)" in refused(replace(problem("write-text"), path=str(path), remedy=remedy))


def test_gigabytes_are_asked_about_even_where_a_check_would_not():
    found = problem("replace-file", "auto")
    large = fixes.Plan(found, (), (), NOTHING, fetch_bytes=8 * 10**9)
    assert (large.consent, replace(large, fetch_bytes=10**6).consent) == ("ask", "auto")


# What is refused


def test_an_action_nobody_knows():
    assert "there is no action 'replace-fil'. Did you mean replace-file?" in refusal("replace-fil")


@pytest.mark.parametrize(
    "where", ["/etc/passwd.safetensors", "relative.safetensors", "{home}/../up.safetensors", "a\x1b[0m"]
)
@pytest.mark.parametrize("action", ["replace-file", "fetch-part", "move-file", "quarantine-file"])
@pytest.mark.parametrize("consent", ["auto", "ask"])
def test_a_path_that_is_nobodys_to_change(action, where, consent):
    more = {"model": "klein-tiny", "part": "vae", "to": "/etc/x.safetensors", "why": "no reason"}
    remedy = Remedy(action, {**more, "path": where.format(home=home())}, consent)
    with pytest.raises(KleinctlError) as caught:
        fixes.plan(replace(problem(action), remedy=remedy), Plugins(), NOTHING)
    assert caught.value.problem.name == "fix-refused"


def refused(found: Problem, plugins: Any = None) -> str:
    with pytest.raises(KleinctlError) as caught:
        fixes.plan(found, plugins or Plugins(), NOTHING)
    assert caught.value.problem.name == "fix-refused"
    return caught.value.problem.why


def test_a_users_file_is_not_changed_unasked(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    made = fixes.plan(with_path("quarantine-file", "auto", path, why="it is wrong"), Plugins(), NOTHING)
    assert made.consent == "ask"
    ours = home() / "models" / "a.safetensors"
    ours.parent.mkdir(parents=True)
    ours.write_bytes(b"x")
    assert fixes.plan(with_path("quarantine-file", "auto", ours, why="it is"), Plugins(), NOTHING).consent == "auto"


def test_a_path_the_problem_does_not_name(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    for named in ("something else", str(path)[:-1], f"{path}2", f"{path}/below"):
        assert "is not a path that the problem names" in refused(
            with_path("quarantine-file", "ask", path, named, why="")
        )
    assert fixes.plan(with_path("quarantine-file", "ask", path, f"mv '{path}' away", why=""), Plugins(), NOTHING)


def test_a_link_out_of_our_folder_is_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    home().mkdir()
    (home() / "models").symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs" / "a.safetensors").write_bytes(b"x")
    found = with_path("quarantine-file", "auto", home() / "models" / "a.safetensors", "another", why="")
    assert "is not a path that the problem names" in refused(found)


def test_a_part_does_not_go_where_it_cannot_be():
    for name in ("vae.pth", "vae", "verified.json"):
        found = with_path("replace-file", "auto", home() / name, model="klein-tiny", part="vae")
        assert "is no place for" in refused(found)


# Moving


def test_a_file_in_the_wrong_folder_of_comfyui(comfyui):
    to = comfyui.parent.parent / "vae_approx" / comfyui.name
    planned_move = fixes.plan(with_path("move-file", "ask", comfyui, to=str(to)), Plugins(), NOTHING)
    assert planned_move.sentences == (f"move {comfyui} to {to}",)
    fixes.carry_out(planned_move)
    assert to.exists() and not comfyui.exists()
    journal.undo(journal.find(None))
    assert comfyui.exists() and not to.parent.exists()


@pytest.mark.skipif(os.name == "nt", reason="links want a right on Windows")
def test_a_link_that_would_lead_nowhere_from_the_right_folder_stays(comfyui):
    to = comfyui.parent.parent / "vae_approx" / "link.safetensors"
    link = comfyui.with_name(to.name)
    link.symlink_to(comfyui.name)
    with pytest.raises(KleinctlError) as failure:
        fixes.plan(with_path("move-file", "ask", link, to=str(to)), Plugins(), NOTHING)
    problem = failure.value.problem
    assert problem.name == "fix-refused" and f"{link} is a link, to {comfyui.name}" in problem.why
    subprocess.run(["sh", "-c", problem.fix], check=True)
    assert to.samefile(comfyui) and not os.path.lexists(link)

    link.symlink_to(comfyui)  # a whole path leads to the same file from anywhere
    to.unlink()
    fixes.carry_out(fixes.plan(with_path("move-file", "ask", link, to=str(to)), Plugins(), NOTHING))
    assert to.is_symlink() and to.samefile(comfyui)


def test_a_file_of_another_disk_goes_to_the_comfyui_that_is_named(comfyui, tmp_path):
    path = tmp_path / "elsewhere" / "flux.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"x")
    to = comfyui.parent.parent / "diffusion_models" / path.name
    found = with_path("move-file", "ask", path, to=str(to))
    assert "is not a path that the problem names" in refused(found)
    hint = f'kleinctl doctor --fix --comfyui "{tmp_path / "ComfyUI"}"'
    assert fixes.plan(replace(found, fix=hint), Plugins(), NOTHING).sentences == (f"move {path} to {to}",)


def test_paths_as_they_were_typed(comfyui, tmp_path, monkeypatch):
    monkeypatch.chdir(comfyui.parent)
    for typed in (comfyui.name, f"../vae/{comfyui.name}"):
        made = fixes.plan(with_path("quarantine-file", "ask", Path(typed), why="it is wrong"), Plugins(), NOTHING)
        assert made.sentences[0].startswith(f"move {comfyui} out of the way")


def test_a_wslconfig_with_a_txt_behind_it(tmp_path):
    (tmp_path / ".wslconfig.txt").write_text("[wsl2]\n")
    to, path = str(tmp_path / ".wslconfig"), str(tmp_path / ".wslconfig.txt")
    remedy = Remedy("move-file", {"path": path, "to": to}, "ask")
    found = Problem(".wslconfig.txt is not read by WSL", "WSL reads .wslconfig.", "ren", path=to, remedy=remedy)
    fixes.carry_out(fixes.plan(found, Plugins(), NOTHING))
    assert [each.name for each in tmp_path.iterdir()] == [".wslconfig"]


def test_moving_onto_another_file_or_far_away_is_refused(comfyui, tmp_path):
    for to, why in ((comfyui, "exists already"), (tmp_path / "x.safetensors", "is not a path that the problem names")):
        assert why in refused(with_path("move-file", "ask", comfyui, to=str(to)))
    assert "another suffix" in refused(with_path("move-file", "ask", comfyui, to=str(comfyui.with_suffix(".py"))))


def test_a_web_page_in_our_store_is_quarantined_under_what_it_is(tiny):
    path = tiny / VAE
    path.unlink()
    path.write_bytes(b"<!DOCTYPE html><html>Sign in</html>")
    fixes.carry_out(fixes.plan(with_path("quarantine-file", "auto", path, why="a VAE"), Plugins(), NOTHING))
    [kept] = quarantine_folder().glob("*.safetensors")
    assert kept.name.startswith("web-page-")
    assert json.loads(kept.with_name(f"{kept.name}.json").read_text())["wanted"] == "a VAE"
    assert "is not there" in refused(with_path("quarantine-file", "auto", path, why="a VAE"))
    assert "is a folder" in refused(with_path("quarantine-file", "auto", path.parent, why="a VAE"))
    journal.undo(journal.find(None))
    assert path.read_bytes().startswith(b"<!DOCTYPE")


# Small files


def test_a_wslconfig_that_wsl_does_not_read(tmp_path):
    path = tmp_path / ".wslconfig"
    path.write_bytes("[wsl2]\nmemory=12GB\n".encode("utf-16"))
    before = path.read_bytes()
    path.chmod(0o600)
    found = with_path("write-text", "ask", path, text="[wsl2]\nmemory=24GB\n")
    made = fixes.plan(found, Plugins(), NOTHING)
    assert made.sentences[:3] == (f"write {path}:", "  + [wsl2]", "  + memory=24GB")
    fixes.carry_out(made)
    assert path.read_bytes() == b"[wsl2]\nmemory=24GB\n"
    assert path.stat().st_mode & 0o777 == 0o600
    journal.undo(journal.find(None))
    assert path.read_bytes() == before
    path.unlink()
    fixes.carry_out(fixes.plan(found, Plugins(), NOTHING))
    journal.undo(journal.find(None))
    assert not path.exists()
    new = tmp_path / "new" / "folder" / "a.yaml"
    fixes.carry_out(fixes.plan(with_path("write-text", "ask", new, text="a: 1\n"), Plugins(), NOTHING))
    assert new.read_text() == "a: 1\n"
    journal.undo(journal.find(None))
    assert not (tmp_path / "new").exists()


def test_a_configuration_that_lies_elsewhere(tmp_path):
    home().mkdir(parents=True)
    (tmp_path / "dotfiles.toml").write_text("[run]\n")
    config_file().symlink_to(tmp_path / "dotfiles.toml")
    made = plan("set-config", "auto", table="run", key="steps", value="8")
    assert made.consent == "ask"
    fixes.carry_out(made)
    assert config_file().is_symlink() and (tmp_path / "dotfiles.toml").read_text() == "[run]\nsteps = 8\n"


def test_what_is_written_is_never_something_that_runs(tmp_path):
    for name in (".bashrc", "run.bat", "sitecustomize.py", "authorized_keys", "a.desktop", "crontab"):
        path = tmp_path / name
        assert "is no file of settings" in refused(with_path("write-text", "ask", path, text="x"))
    path = tmp_path / "a.yaml"
    assert "text is wanted" in refused(with_path("write-text", "ask", path, text="x" * 200_000))
    assert "cannot be printed" in refused(with_path("write-text", "ask", path, text="\x00"))
    assert "more than anyone would read" in refused(with_path("write-text", "ask", path, text="x\n" * 300))
    path.write_text("a: 1\nb: 2\n")
    made = fixes.plan(with_path("write-text", "ask", path, text="a: 1\nb: 3\n"), Plugins(), NOTHING)
    assert made.sentences[:3] == (f"write {path}:", "  - b: 2", "  + b: 3")


def test_a_file_that_was_changed_between_plan_and_yes(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\n")
    made = fixes.plan(with_path("write-text", "ask", path, text="a: 2\n"), Plugins(), NOTHING)
    path.write_text("a: 3\n")
    with pytest.raises(KleinctlError, match="was changed meanwhile"):
        fixes.carry_out(made)
    assert path.read_text() == "a: 3\n" and journal.entries() == []


API = {"1": {"class_type": "CLIPLoader", "inputs": {"type": "stable_diffusion", "n": 2, "b": True, "clip": ["4", 0]}}}
PAGE = {
    "nodes": [
        {
            "id": 1,
            "type": "CLIPLoader",
            "inputs": [
                {"name": "clip_name", "widget": {"name": "clip_name"}},
                {"name": "type", "widget": {"name": "type"}},
            ],
            "widgets_values": ["qwen_3_4b.safetensors", "stable_diffusion", "default"],
        },
        {
            "id": 2,
            "type": "KSampler",
            "inputs": [{"name": n, "widget": {}} for n in ("seed", "steps")],
            "widgets_values": {},
        },
    ],
    "links": [],
}


@pytest.mark.parametrize(
    ("document", "name", "value", "where", "new"),
    [
        (API, "type", "flux2", ("1", "inputs", "type"), "flux2"),
        (API, "n", "4", ("1", "inputs", "n"), 4),
        (API, "b", "false", ("1", "inputs", "b"), False),
        (API, "class_type", "CLIPLoaderGGUF", ("1", "class_type"), "CLIPLoaderGGUF"),
        ({"prompt": API}, "type", "flux2", ("prompt", "1", "inputs", "type"), "flux2"),
        (PAGE, "type", "flux2", ("nodes", 0, "widgets_values", 1), "flux2"),
        (PAGE, "class_type", "CLIPLoaderGGUF", ("nodes", 0, "type"), "CLIPLoaderGGUF"),
    ],
)
def test_a_node_of_a_workflow_is_set_right(tmp_path, document, name, value, where, new):
    path = tmp_path / "klein.json"
    path.write_text(json.dumps(document))
    before = path.read_bytes()
    found = with_path("edit-workflow", "ask", path, node="1", input=name, value=value)
    fixes.carry_out(fixes.plan(found, Plugins(), NOTHING))
    place: Any = json.loads(path.read_text())
    for step in where:
        place = place[step]
    assert place == new and type(place) is type(new)
    journal.undo(journal.find(None))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("node", "name", "why"),
    [
        ("1", "clip", "node 1 of klein.json has no value clip of its own"),
        ("1", "nothing", "node 1 of klein.json has no value nothing of its own"),
        ("9", "type", "klein.json has no node 9"),
    ],
)
def test_an_input_that_is_a_link_or_is_not_there(tmp_path, node, name, why):
    path = tmp_path / "klein.json"
    path.write_text(json.dumps(API))
    found = with_path("edit-workflow", "ask", path, node=node, input=name, value="x")
    assert refused(found) == f"What its check asks for is refused: klein.json cannot be edited: {why}."
    path.write_text("no json")
    assert "klein.json cannot be edited: Expecting value" in refused(found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", '[run]\nbackend = "staged-decode"\n'),
        ("[run]\nsteps = 4\n", '[run]\nbackend = "staged-decode"\nsteps = 4\n'),
        ('[run]\nbackend="x" # mine\n[up]\nbackend = 1\n', '[run]\nbackend = "staged-decode"\n[up]\nbackend = 1\n'),
    ],
)
def test_a_default_in_the_configuration(before, after):
    assert with_setting(before, "run", "backend", '"staged-decode"') == after
    home().mkdir(parents=True)
    if before:
        config_file().write_text(before)
    fixes.carry_out(plan("set-config", "auto", table="run", key="backend", value="staged-decode"))
    assert config_file().read_text() == after
    journal.undo(journal.find(None))
    assert (config_file().read_text() if config_file().exists() else "") == before


def test_a_configuration_that_cannot_be_changed_safely():
    home().mkdir(parents=True)
    config_file().write_text("run = {steps = 4}\n")
    assert "written in a way that kleinctl cannot change" in refusal(
        "set-config", "auto", table="run", key="steps", value="8"
    )
    assert "is no setting" in refusal("set-config", "auto", table="run.x", key="steps", value="8")
    assert config_file().read_text() == "run = {steps = 4}\n"


def test_unfinished_downloads_are_deleted_for_good():
    downloads_folder().mkdir(parents=True)
    for name in ("a.partial", "a.partial.json", "b.ready", "notes.txt"):
        (downloads_folder() / name).write_bytes(b"12345")
    made = plan("remove-partial-downloads", "ask")
    assert made.sentences == (f"delete 3 unfinished downloads in {downloads_folder()}, which frees 15 B",)
    assert not made.undoable
    fixes.carry_out(made)
    assert [path.name for path in downloads_folder().iterdir()] == ["notes.txt"]
    with pytest.raises(KleinctlError) as caught:
        journal.find(1)
    assert caught.value.problem.why == "What is deleted can only be fetched again."


# Packages


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of the user's own, with its pip."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    return folder / environment.PYTHON


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes packages from, and from nowhere else."""
    for name, number in (("tiny", "1.0"), ("tiny", "2.0"), ("addon", "1.5")):
        wheel(tmp_path / "wheels", name, number, requires=("tiny",) if name == "addon" else ())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_COMPILE", "1")
    return tmp_path / "wheels"


def packages(python: Path, wanted: str, index: str = "", consent: str = "ask", named: bool = True) -> Problem:  # noqa: F811
    remedy = Remedy("install-packages", {"python": str(python), "packages": wanted, "index": index}, consent)  # type: ignore[arg-type]
    fix = f"{python} -s -m pip install {wanted}" if named else "kleinctl doctor --fix"
    return replace(problem("install-packages"), fix=fix, remedy=remedy)


def installed(python: Path) -> dict[str, str]:
    return {
        name: version for name, version in environment.inspect(python).packages.items() if name in ("tiny", "addon")
    }


def test_packages_are_installed_and_set_back(python, wheels, tmp_path):
    fixes.carry_out(fixes.plan(packages(python, "tiny==1.0"), Plugins(), NOTHING))
    made = fixes.plan(packages(python, "tiny>=2 addon"), Plugins(), NOTHING)
    assert made.sentences == (f"install tiny>=2 addon into {python}", "there now: tiny 1.0, addon absent")
    assert made.commands == (f"{python} -s -m pip install 'tiny>=2' addon",)
    fixes.carry_out(made)
    assert installed(python) == {"tiny": "2.0", "addon": "1.5"}
    entry = journal.find(None)
    assert entry.steps[0].back == f"in {python} set back: addon away, tiny 1.0"
    [log, *_] = (home() / "logs").glob("fix-*.log")
    assert "Successfully installed" in log.read_text()
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "tiny"], check=True)
    with pytest.raises(KleinctlError) as caught:
        journal.undo(entry)
    assert caught.value.problem.why == "Left there was 2.0; now it is None. Nothing was undone."
    subprocess.run([python, "-m", "pip", "install", "-q", "tiny==2.0"], check=True)
    journal.undo(entry)
    assert installed(python) == {"tiny": "1.0"}
    journal.undo(journal.find(None))
    assert installed(python) == {}


def test_a_package_that_cannot_be_had(python, wheels):
    made = fixes.plan(packages(python, "tiny==9"), Plugins(), NOTHING)
    with pytest.raises(KleinctlError) as caught:
        fixes.carry_out(made)
    found = caught.value.problem
    assert (found.name, found.what) == ("install-failed", f"pip could not change the packages of {python}")
    assert "No matching distribution found for tiny==9" in found.why
    assert installed(python) == {} and journal.entries() == []


def test_what_pip_is_not_told(python):
    for wanted, source, why in (
        ("--index-url=http://evil", "", "is no package"),
        ("tiny@https://evil/tiny.whl", "", "is an address"),
        ("./folder", "", "is no package"),
        ("", "", "1 to 30 packages"),
        ("tiny", "http://download.pytorch.org/whl", "none of the package indexes"),
        ("tiny", "https://user:x@pypi.org/simple", "none of the package indexes"),
    ):
        assert why in refused(packages(python, wanted, source))
    assert fixes.plan(packages(python, "tiny", consent="auto"), Plugins(), NOTHING).consent == "ask"
    assert "is not a path that the problem names" in refused(packages(python, "tiny", named=False))
    assert "is no Python" in refused(packages(Path("/bin/sh"), "tiny"))
    assert "is no Python" in refused(packages(python.parent / "python99", "tiny"))


def test_a_broken_environment_is_built_again(planned, monkeypatch):  # noqa: F811
    (planned.folder / "lib").mkdir(parents=True)
    [found] = environment.broken()
    monkeypatch.setattr(environment, "plan", lambda requires, hardware, cuda: planned)
    [outcome] = fix([found], Plugins(), NOTHING, ask=yes, again=lambda: set(map(fixes.key, environment.broken())))
    assert outcome.status == "fixed", outcome.trouble
    assert environment.names() == [planned.name] and environment.broken() == []
    assert outcome.plan is not None and not outcome.plan.undoable
    assert str(planned.folder) in outcome.plan.commands[0] and "--environments" not in outcome.plan.commands[0]
    record = (planned.folder / environment.RECORD).read_text()
    whole = fixes.plan(found, Plugins(), NOTHING)  # it is whole, and still may have to be built again
    monkeypatch.setattr(environment, "build", lambda plan, progress: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fixes.carry_out(whole)
    assert (planned.folder / environment.RECORD).read_text() == record


def test_an_environment_nobody_has():
    assert "there is no managed environment '../x'" in refusal("rebuild-environment", "auto", environment="../x")
    assert envs_folder().exists() is False


# All of it


def test_problems_with_one_remedy_are_fixed_once(tmp_path):
    done: list[str] = []

    def do(plan: fixes.Plan) -> int:
        done.append(",".join(each.name for each in plan.problems))
        return len(done)

    def named(name: str, action: str = "remove-partial-downloads", consent: str = "auto") -> Problem:
        return replace(problem(action, consent), name=name)

    guide = replace(problem("x"), name="guide", remedy=None)
    setting = replace(problem("set-config", "auto", table="run", key="steps", value="4"), name="setting")
    found = [named("a"), guide, named("b", consent="ask"), setting, named("c", action="unknown")]
    asked: list[fixes.Plan] = []

    def ask(plan: fixes.Plan) -> str:
        asked.append(plan)
        return ""

    outcomes, left = fixes.fix(found, Plugins(), NOTHING, ask=ask, again=lambda: {fixes.key(named("b"))}, do=do)
    told = {",".join(each.name for each in outcome.problems): outcome.status for outcome in outcomes}
    assert told == {"setting": "fixed", "a,b": "still there", "c": "for you to do", "guide": "for you to do"}
    assert done == ["setting", "a,b"]
    assert [plan.problem.name for plan in asked] == ["b"]
    assert [each.name for each in left] == ["a", "guide", "b", "c"]


def test_a_wrong_file_that_is_a_missing_part_too(comfyui):
    both = [in_comfyui(comfyui), in_comfyui(comfyui, "fetch-part")]
    assert [len(group) for group in fixes.remedies(both)] == [2]


def test_a_problem_that_went_with_another(tmp_path):
    found = [replace(problem("set-config", "auto", table="run", key=key, value="4"), name=key) for key in ("a", "b")]
    left = set(map(fixes.key, found))

    def do(plan: fixes.Plan) -> int:
        left.clear()
        return 1

    first, second = fix(found, Plugins(), NOTHING, ask=yes, again=lambda: set(left), do=do)
    assert (first.status, second.status, second.why) == ("fixed", "fixed", "It went with an earlier one.")


def test_a_problem_that_only_a_log_shows(tmp_path):
    found = [replace(problem("set-config", "auto", table="run", key=key, value="4"), name=key) for key in ("a", "b")]
    done: list[str] = []
    outcomes, left = fixes.fix(
        found, Plugins(), NOTHING, ask=yes, again=nothing_left, do=lambda plan: done.append(plan.problem.name) or 1
    )
    assert done == ["a", "b"] and left == [] and [each.status for each in outcomes] == ["fixed", "fixed"]


def test_without_a_terminal_what_wants_asking_is_only_shown(comfyui, hub: Hub, capsys):  # noqa: F811
    document, left = cli.run(Models(), NOTHING, [in_comfyui(comfyui)], nothing_left)
    assert document["fixes"][0]["outcome"] == "skipped" and len(left) == 1
    shown = capsys.readouterr().out
    assert "skipped       some-problem: something is wrong" in shown
    assert "Nobody is there to be asked; --yes answers yes." in shown
    assert "1.50 MB to fetch, 1.50 MB to write; at once; `kleinctl undo` reverses it" in shown
    conforms(document)


def test_interrupted_after_the_first_fix(monkeypatch, capsys):
    def carry_out(plan: fixes.Plan) -> int:
        if plan.problem.name == "b":
            raise KeyboardInterrupt
        return 7

    monkeypatch.setattr(cli, "carry_out", carry_out)
    found = [replace(problem("set-config", "auto", table="run", key=key, value="4"), name=key) for key in ("a", "b")]
    with pytest.raises(KeyboardInterrupt):
        cli.run(Plugins(), NOTHING, found, nothing_left)
    assert "done before: 7; see kleinctl undo --list" in capsys.readouterr().err


def test_nothing_to_fix(capsys):
    assert cli.run(Plugins(), NOTHING, [], nothing_left)[1] == []
    assert capsys.readouterr().out == "nothing to fix\n"


def test_one_of_two_problems_of_the_same_file(tmp_path):
    first = replace(problem("set-config", "auto", table="run", key="a", value="4"), name="paths", path="/x.yaml")
    other = replace(first, what="line 3 names no folder", remedy=None)
    now = {fixes.key(replace(other, what="line 4 names no folder"))}
    seen = iter([set(map(fixes.key, [first, other])), now])
    outcomes, left = fixes.fix([first, other], Plugins(), NOTHING, ask=yes, again=lambda: next(seen), do=lambda plan: 1)
    assert [each.status for each in outcomes] == ["fixed", "for you to do"] and left == [other]


def test_a_file_of_windows_keeps_its_ends_of_lines(tmp_path):
    path = tmp_path / "extra_model_paths.yaml"
    path.write_bytes(b"comfyui:\r\n\tvae: x\r\n")
    found = with_path("write-text", "ask", path, text="comfyui:\n    vae: x\n")
    made = fixes.plan(found, Plugins(), NOTHING)
    assert made.sentences[1:3] == ("  - <tab>vae: x", "  +     vae: x")
    fixes.carry_out(made)
    assert path.read_bytes() == b"comfyui:\r\n    vae: x\r\n"


@pytest.mark.parametrize("layout", [{"indent": 1}, {"separators": (",", ":")}, {"indent": "\t"}, {}])
def test_a_workflow_keeps_its_layout(tmp_path, layout):
    path = tmp_path / "workflow.json"
    nodes = {"2": {"class_type": "CLIPLoader", "inputs": {"clip_name": "é.safetensors", "type": "qwen_image"}}}
    path.write_text(json.dumps(nodes, **layout), encoding="utf-8")
    before = path.read_text(encoding="utf-8")
    found = with_path("edit-workflow", "ask", path, node="2", input="type", value="flux2")
    fixes.carry_out(fixes.plan(found, Plugins(), NOTHING))
    assert path.read_text(encoding="utf-8") == before.replace("qwen_image", "flux2")
