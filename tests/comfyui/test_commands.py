"""`kleinctl install --backend comfy` and `uninstall --comfyui`, from what is typed to the files on the disk."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from kleinctl import Fit, comfyui, environment, store
from kleinctl.cli import install as install_command
from kleinctl.cli import models as models_command
from kleinctl.cli import uninstall as uninstall_command
from kleinctl.cli import verify as verify_command
from kleinctl.comfyui import find, record
from kleinctl.home import manifests_folder
from kleinctl.manifest import Shape
from kleinctl.plugins import Offer, Plugins
from kleinctl.problem import KleinctlError, shell
from tests.comfyui import fake
from tests.comfyui.test_adopt import PACKAGES, state
from tests.hub import Hub
from tests.test_cli import SCHEMAS
from tests.test_environment import card, machine

REPO = "someone/klein-small"
FILES = {
    "diffusion_models/klein-fp8.safetensors": random.Random(1).randbytes(1_200_000),
    "diffusion_models/klein.safetensors": random.Random(2).randbytes(1_300_000),
    "diffusion_models/klein-nvfp4.safetensors": random.Random(5).randbytes(1_150_000),
    "text_encoders/qwen.safetensors": random.Random(3).randbytes(1_100_000),
    "vae/vae.safetensors": random.Random(4).randbytes(1_050_000),
}
ROLES = {"diffusion_models": "transformer", "text_encoders": "text-encoder", "vae": "vae"}
HEAD = """
schema = "kleinctl.manifest/1"
name = "klein-small"
title = "Small"
family = "flux2-klein-4b"
variant = "distilled"
licence = "Apache-2.0"
licence_url = "https://www.apache.org/licenses/LICENSE-2.0"
gated = false
accept_licence = false
devices = ["cuda", "cpu"]
dtype = "bfloat16"
[defaults]
steps = 4
guidance = 1.0
width = 256
height = 256
max_prompt_tokens = 512
[shape]
"""
SHAPE = [each.name for each in fields(Shape)]


class InComfyui:
    """A backend that runs in ComfyUI, and does not."""

    name, aliases, requires, layout = "comfy-test", ("comfy",), ("addon>=1",), "comfyui"

    def fit(self, model: Any, hardware: Any, job: Any) -> Fit:
        return Fit(0, 0, 0, 1.0, 1.0, True, "test")

    def health(self, hardware: Any, environment: Any) -> None:
        return None

    def load(self, model: Any, budget: Any) -> None:
        raise AssertionError


def manifest() -> str:
    lines = [HEAD, *(f"{name} = 1" for name in SHAPE)]
    for path, data in FILES.items():
        names = {"klein-fp8": "fp8", "klein": "bf16", "klein-nvfp4": "nvfp4"}
        precision = {f"diffusion_models/{name}.safetensors": each for name, each in names.items()}
        lines += [
            "[[part]]",
            f'id = "{Path(path).stem}"',
            f'role = "{ROLES[Path(path).parent.name]}"',
            f'name = "{Path(path).name}"',
            f"size = {len(data)}",
            f'sha256 = "{hashlib.sha256(data).hexdigest()}"',
            f'to = {{ comfyui = "{path}" }}',
            f'sources = [{{ repo = "{REPO}", revision = "abc", path = "{path}" }}]',
            *([f'precision = "{precision[path]}"'] if path in precision else []),
        ]
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def house(repository: Path, no_pip: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A backend in ComfyUI, a model for it on a hub, and a machine without a card."""
    from huggingface_hub.utils import close_session

    manifests_folder().mkdir(parents=True)
    (manifests_folder() / "klein-small.toml").write_text(manifest())
    monkeypatch.setattr("kleinctl.cli.options.this_machine", lambda: machine(disks={}))
    offer = Offer(InComfyui(), "test", "tests.comfyui.test_commands")
    monkeypatch.setattr(Plugins, "backends", {"comfy-test": offer})
    with Hub() as hub:
        for path, data in FILES.items():
            hub.add(REPO, path, data, revision="abc", lfs=True)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield hub
        close_session()


def run(command: Any, *words: str) -> tuple[Any, str]:
    """What a command line comes to (its exit code, or the problem that ended it), and all it said."""
    result = CliRunner().invoke(command, list(words), standalone_mode=False)
    if isinstance(result.exception, KleinctlError):
        return result.exception.problem, result.output
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.output


def install(*words: str) -> tuple[Any, str]:
    return run(install_command.command, "--backend", "comfy", "--model", "klein-small", *words)


def uninstall(*words: str) -> tuple[Any, str]:
    return run(uninstall_command.command, *words)


def there() -> set[str]:
    folder = store.model_folder("klein-small", "comfyui")
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_one_line_brings_comfyui_its_environment_and_the_fp8_files(house):
    code, said = install("--dry-run")
    assert code == 0 and "bring ComfyUI v0.29.0" in said and "about 2" in said
    assert comfyui.known() is None and there() == set() and not house.requests
    code, said = install()
    assert code == 0 and "klein-small is installed for comfy-test" in said
    assert there() == {name for name in FILES if "diffusion_models" not in name or "fp8" in name}
    assert comfyui.known().version == "0.29.0"
    assert [name.split("-")[0] for name in environment.names()] == ["comfyui"]  # the worker runs in it too
    assert str(store.model_folder("klein-small", "comfyui") / "vae") in comfyui.paths_file().read_text()

    asked = len(house.requests)
    code, said = install()
    assert code == 0 and f"ComfyUI 0.29.0 is here: {comfyui.known().path}" in said
    assert "klein-small is here: 3 verified files" in said and len(house.requests) == asked


def test_another_precision_is_fetched_and_then_stays(house):
    assert install("--precision", "bf16")[0] == 0
    assert "diffusion_models/klein.safetensors" in there()
    assert "verified files" in install()[1]  # it does not go back to fp8 by itself
    problem, _ = install("--precision", "fp4")
    assert "does not come as 'fp4'" in problem.what
    problem, _ = install("--precision", "nvfp4")
    assert problem.name == "nvfp4-without-card"


def test_nvfp4_is_fetched_for_a_card_that_computes_in_it(house, monkeypatch):
    new = machine(card("RTX 5090", "12.0"), disks={})
    monkeypatch.setattr("kleinctl.cli.options.this_machine", lambda: new)
    assert install("--precision", "nvfp4")[0] == 0
    assert "diffusion_models/klein-nvfp4.safetensors" in there()
    assert "diffusion_models/klein-fp8.safetensors" not in there()


def test_files_of_an_adopted_comfyui_are_used_where_they_are_and_not_fetched_again(house, tmp_path):
    theirs = tmp_path / "ComfyUI"
    fake.commit(theirs, "0.29.0")
    fake.environment(theirs / "venv", PACKAGES)
    elsewhere = tmp_path / "big disk"
    for name, data in FILES.items():
        place = (elsewhere if name.startswith("text") else theirs / "models") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    (theirs / "extra_model_paths.yaml").write_text(f"mine:\n  text_encoders: '{elsewhere / 'text_encoders'}'\n")
    before = state(theirs)

    problem, said = install("--comfyui", str(theirs))
    again = f"kleinctl install --model klein-small --backend comfy {shell('--comfyui', theirs)} --yes"
    assert problem.name == "usage" and problem.fix == again and comfyui.known() is None
    assert "nothing in it is changed" in said and there() == set()
    code, said = install("--comfyui", str(theirs), "--yes")
    assert code == 0 and not [seen for seen in house.requests if seen.method == "GET"]
    assert len(there()) == 3
    own = store.model_folder("klein-small", "comfyui") / "text_encoders" / "qwen.safetensors"
    assert own.stat().st_ino == (elsewhere / "text_encoders" / "qwen.safetensors").stat().st_ino  # one copy
    assert {name: kept for name, kept in state(theirs).items() if name in before} == before
    assert comfyui.known().path == theirs and not comfyui.known().owned
    assert [name.split("-")[0] for name in environment.names()] == ["light"]  # for kleinctl's worker; without torch

    code, said = install()
    assert code == 0 and f"ComfyUI 0.29.0 in {theirs} is in use; it stays as it is" in said
    code, said = uninstall("klein-small", "--comfyui", "--yes")
    assert code == 0 and f"the ComfyUI in {theirs} is no longer used, and is as it was" in said
    assert comfyui.known() is None and state(theirs) == before


def test_what_would_fail_in_an_adopted_comfyui_is_said(tmp_path):
    theirs = tmp_path / "ComfyUI"
    fake.commit(theirs, "0.29.0")
    fake.environment(theirs / "venv", PACKAGES)
    (theirs / "extra_model_paths.yaml").write_text("mine:\n  vae: /gone/vae\n")
    (theirs / "run.sh").write_text("python main.py --base-directory ../data\n")
    (tmp_path / "data").mkdir()
    code, said = install("--comfyui", str(theirs), "--yes", "--dry-run")
    assert f"its models, settings and custom nodes lie in {tmp_path / 'data'}\n" in said
    assert code == 0 and "extra-paths-wrong" in said and "/gone/vae" in said
    assert comfyui.known() is None


def test_the_one_on_this_machine_is_found(empty_home):
    assert install("--adopt", "--yes")[0].name == "comfyui-none-found"
    fake.commit(empty_home / "ComfyUI", "0.29.0")
    fake.environment(empty_home / "ComfyUI" / "venv", PACKAGES)
    assert "has a ComfyUI (found in its folder); --comfyui uses it instead" in install("--dry-run")[1]
    assert install("--adopt", "--yes")[0] == 0
    assert comfyui.known().path == empty_home / "ComfyUI"
    code, said = install("--comfyui-ref", "v0.29.0")
    assert code == 0 and "use it in place of" in said and comfyui.known().owned
    assert (empty_home / "ComfyUI" / "main.py").is_file()


def test_a_comfyui_that_will_not_do_is_refused_before_anything_is_fetched(house, tmp_path):
    assert install("--comfyui", str(tmp_path), "--yes")[0].name == "not-comfyui"
    assert not house.requests and comfyui.known() is None


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--adopt", "--comfyui", "x"], "--adopt and --comfyui exclude each other"),
        (["--comfyui-ref", "v1", "--comfyui", "x"], "--comfyui-ref and --comfyui exclude each other"),
        (["--comfyui-url", "u", "--adopt"], "--comfyui-url and --adopt exclude each other"),
        (["--comfyui-python", "p"], "--comfyui-python wants --comfyui"),
    ],
)
def test_options_that_do_not_go_together(words, what):
    assert install(*words)[0].what == what


def test_options_of_comfyui_with_another_backend(monkeypatch):
    monkeypatch.setattr(InComfyui, "layout", "diffusers")
    problem, _ = install("--comfyui-ref", "v0.29.0")
    assert problem.what == "--comfyui-ref wants --backend comfy"


def test_another_precision_is_what_verify_and_models_look_at(house):
    def models() -> dict[str, Any]:
        rows = json.loads(run(models_command.command, "--json")[1])["models"]
        return next(row for row in rows if row["model"] == "klein-small")

    assert install("--precision", "bf16")[0] == 0
    code, said = run(verify_command.command)
    assert code == 0 and "3 parts" in said
    right, size = models(), sum(len(FILES[name]) for name in there())
    assert (right["parts"], right["parts_here"], right["bytes"]) == (3, 3, size)

    folder = store.model_folder("klein-small", "comfyui")
    (folder / "diffusion_models" / "klein.safetensors").write_bytes(b"mine")
    (folder / "vae" / "vae.safetensors").unlink()
    code, said = run(verify_command.command, "klein-small")
    assert code == 1 and "klein.safetensors is not klein-small/klein" in said and "klein-fp8" not in said
    assert said.count("hint: kleinctl install --model klein-small --precision bf16\n") == 2
    assert install("--precision", "bf16")[0] == 0 and run(verify_command.command)[0] == 0

    (folder / "vae" / "vae.safetensors").unlink()  # of all precisions
    assert "klein-fp8" not in install("--dry-run")[1]


def test_what_puts_a_part_right_names_a_backend_that_has_it_there(house):
    text = manifest().replace('to = { comfyui = "vae/vae', 'to = { diffusers = "vae/v", comfyui = "vae/vae')
    (manifests_folder() / "klein-small.toml").write_text(text)
    install()
    (store.model_folder("klein-small", "comfyui") / "vae" / "vae.safetensors").unlink()
    _, said = run(verify_command.command)
    assert "hint: kleinctl install --model klein-small --backend comfy-test\n" in said


def test_a_licence_is_asked_for_before_a_comfyui_comes_and_the_hint_installs_the_same(house):
    text = manifest().replace("accept_licence = false", "accept_licence = true")
    (manifests_folder() / "klein-small.toml").write_text(text)
    for more in ([], ["--dry-run"]):
        problem, said = install("--precision", "bf16", *more)
        line = "kleinctl install --model klein-small --backend comfy --precision bf16 --accept-licence"
        assert more or (problem.name, problem.fix) == ("licence-not-accepted", line)
        assert not more or f"hint: {line}\n" in said
    assert comfyui.known() is None and not house.requests and environment.names() == []


def test_all_of_it_goes_away_again():
    install()
    picture = record.data_folder() / "output" / "red.png"
    picture.write_text("red")
    code, said = uninstall("--comfyui", "--yes", "--json")
    assert code == 0 and str(picture) in said and "0.29.0-" in said
    assert record.folder().is_dir() and comfyui.known() is None and len(there()) == 3
    picture.unlink()
    assert uninstall("--all", "--yes")[0] == 0
    assert not record.folder().exists() and there() == set()


def test_what_uninstall_says_of_a_comfyui_that_was_changed():
    install("--yes")
    (comfyui.known().path / "main.py").write_text("# mine\n")
    said = uninstall("--comfyui", "--yes")[1]
    assert "0 files, 1 environment taken away, 0 B of files freed" in said
    assert "left, for files of it were changed: " in said and "did not put it there" not in said
    fake.git(next(record.folder().glob("ComfyUI-*")), "checkout", "--", ".")
    assert "3 files, 1 ComfyUI taken away" in uninstall("--all", "--yes")[1]


def test_the_json_documents_tell_of_comfyui_and_match_their_schemas():
    def document(name: str, call: Any, *words: str) -> Any:
        _, said = call(*words, "--json")
        found = json.JSONDecoder().raw_decode(said[said.index("{\n") :])[0]
        jsonschema.validate(found, json.loads((SCHEMAS / f"{name}.json").read_text()))
        return found

    planned = document("install", install, "--dry-run", "--comfyui-ref", "v0.28.0")["comfyui"]
    assert (planned["action"], planned["ref"], planned["path"]) == ("install", "v0.28.0", None)
    assert planned["fetch_bytes"] > 0 and planned["commit"]
    done = document("install", install, "--yes", "--comfyui-ref", "v0.28.0")["comfyui"]
    assert (done["action"], done["owned"], done["path"]) == ("present", True, str(comfyui.known().path))
    assert (done["commit"], done["fetch_bytes"], done["version"]) == (planned["commit"], 0, "0.28.0")
    gone = document("uninstall", uninstall, "--comfyui", "--yes")
    assert gone["comfyui"] == {"path": done["path"], "owned": True} and done["path"] in gone["files"]
    assert document("uninstall", uninstall, "--comfyui", "--yes")["comfyui"] is None


def test_json_of_an_adopted_comfyui(tmp_path):
    theirs = tmp_path / "ComfyUI"
    fake.commit(theirs, "0.29.0")
    fake.environment(theirs / "venv", PACKAGES)
    for words, action in ((["--dry-run"], "adopt"), ([], "present")):
        _, said = install("--comfyui", str(theirs), "--yes", "--json", *words)
        found = json.JSONDecoder().raw_decode(said[said.index("{\n") :])[0]
        jsonschema.validate(found, json.loads((SCHEMAS / "install.json").read_text()))
        told = found["comfyui"]
        assert (told["action"], told["owned"], told["path"]) == (action, False, str(theirs))
        assert "its torch 2.13.0+cpu has no CUDA, so it runs on the processor" in told["remarks"]


def test_json_of_a_disk_without_room_names_the_problem(monkeypatch):
    monkeypatch.setattr(store, "free_bytes", lambda folder: 5000)
    _, said = install("--dry-run", "--json")
    found = json.JSONDecoder().raw_decode(said[said.index("{\n") :])[0]
    assert len([each for each in found["problems"] if each["name"] == "disk-full"]) == 2  # ComfyUI, and the files


def test_a_password_in_the_address_is_shown_nowhere():
    for words in (["--dry-run"], ["--yes"]):
        problem, said = install("--comfyui-url", "https://me:secret@127.0.0.1:1/ComfyUI", *words)
        assert "https://127.0.0.1:1/ComfyUI" in said and "secret" not in f"{said} {problem}"


def test_models_stay_where_comfyui_cannot_go_because_it_runs(monkeypatch):
    install()
    monkeypatch.setattr(find, "running", lambda: [find.Running(comfyui.known().path, None, 8188)])
    assert uninstall("--all", "--yes")[0].name == "comfyui-running"
    assert len(there()) == 3 and comfyui.known() is not None
