"""The commands as they are typed, well and badly."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from kleinctl import store
from kleinctl.cli import COMMANDS
from kleinctl.cli import group as cli_group
from tests.conftest import REPOSITORY

SCHEMAS = Path(importlib.import_module("kleinctl").__file__).parent / "schemas"


def conforms(text: str) -> dict:
    """The one JSON document in `text`, checked against the schema it names."""
    document = json.loads(text)
    name = document["schema"].removeprefix("kleinctl.").removesuffix("/1")
    jsonschema.validate(document, json.loads((SCHEMAS / f"{name}.json").read_text()))
    return document


def test_help_lists_every_command_with_its_own_words(kleinctl):
    answer = kleinctl("--help")
    assert answer.exit_code == 0
    for name, line in COMMANDS.items():
        command = cli_group.get_command(None, name)
        assert command.short_help == line
        assert command.name == name
        assert line.split(":")[0][:40] in answer.stdout
    files = {path.stem for path in (REPOSITORY / "kleinctl" / "cli").glob("*.py")} - {
        "__init__",
        "output",
        "options",
        "progress",
        "steps",
        "fix",
    }
    assert files == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, kleinctl):
    answer = kleinctl(name, "--help")
    assert answer.exit_code == 0
    assert answer.stdout.startswith(f"Usage: kleinctl {name}")


@pytest.mark.parametrize("command", [["--help"], ["doctor"], ["doctor", "--json"], ["plan"], ["models"], ["plugins"]])
def test_the_control_process_never_imports_torch(command):
    code = (
        "import sys; sys.argv = ['kleinctl', *sys.argv[1:]]\n"
        "from kleinctl.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_misspelled_command_gets_the_nearest_one_and_exit_code_2(kleinctl):
    answer = kleinctl("docter")
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert "There is no command 'docter'. Did you mean doctor?" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_no_command_at_all_gets_the_help_and_no_error(kleinctl):
    answer = kleinctl()
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert answer.stderr.startswith("Usage: kleinctl [OPTIONS] COMMAND")
    assert answer.stderr.endswith("Print the line that completes commands in your shell.\n")


@pytest.mark.parametrize("command", ["up", "run"])
def test_a_prompt_without_quotes_gets_them(kleinctl, command):
    answer = kleinctl(command, "a", "red", "circle", "--seed", "3")
    assert answer.exit_code == 2
    assert f'hint: kleinctl {command} "a red circle"\n' in answer.stderr


def test_an_option_without_its_value_points_at_the_help_of_its_command(kleinctl):
    answer = kleinctl("plan", "--gpu")
    assert (answer.exit_code, answer.stderr.splitlines()[-1]) == (2, "hint: kleinctl plan --help")


@pytest.mark.parametrize(("command", "words"), [("models", "klein-base-9b"), ("plugins", "diffusers-offload")])
def test_names_are_whole_in_60_columns(kleinctl, monkeypatch, command, words):
    monkeypatch.setenv("COLUMNS", "60")
    shown = kleinctl(command).stdout
    assert words in shown
    assert "…" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "--gpu", "RTX 4070 Ti SUPPER"), "RTX 4070 Ti SUPER"),
        (("plan", "--model", "klein-4"), "Did you mean klein-4b?"),
        (("plan", "--backend", "diffuser"), "Did you mean diffusers?"),
        (("plan", "--size", "wide"), "is no picture size"),
        (("doctor", "--vram-limit", "lots"), "is no amount of memory"),
        (("doctor", "--colour"), "No such option"),
        (("run", "a cat", "--steps", "0"), "--steps"),
        (("run",), "prompt"),
    ],
)
def test_what_is_typed_wrongly_is_one_clear_error(arguments, words, kleinctl):
    answer = kleinctl(*arguments)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr


def test_an_error_under_json_is_still_one_document(kleinctl):
    answer = kleinctl("plan", "--model", "klein-4", "--json")
    assert answer.exit_code == 2
    assert conforms(answer.stdout)["problem"]["name"] == "unknown-model"


def test_json_documents_match_their_schemas(kleinctl):
    for arguments in (["doctor"], ["plan"], ["plan", "--gpu", "RTX 5090", "--ram", "64"], ["models"], ["plugins"]):
        answer = kleinctl(*arguments, "--json")
        assert answer.exit_code in (0, 1), answer.stderr
        conforms(answer.stdout)


def test_plan_answers_for_a_machine_that_is_not_here(kleinctl):
    document = conforms(kleinctl("plan", "--gpu", "RTX 4070 Ti SUPER", "--ram", "32", "--json").stdout)
    assert document["hardware"]["gpus"][0]["arch"] == "sm_89"
    assert document["choice"]["model"] == "klein-4b"
    rows = {(row["backend"], row["width"]): row for row in document["rows"] if row["model"] == "klein-4b"}
    backends = ("comfyui-fp8", "diffusers-offload", "staged-decode")
    assert set(rows) == {(backend, side) for backend in backends for side in (512, 1024, 1536, 2048)}
    assert rows["comfyui-fp8", 1024]["why_not"].startswith("comfyui-fp8 could not be checked: ")
    text = kleinctl("plan", "--gpu", "RTX 4070 Ti SUPER", "--ram", "32").stdout
    assert "RTX 4070 Ti SUPER" in text
    assert "1024x1024" in text


def test_doctor_without_a_card_names_the_small_model_and_says_what_is_missing(kleinctl, monkeypatch):
    answer = kleinctl("doctor", "--json", CUDA_VISIBLE_DEVICES="")
    document = conforms(answer.stdout)
    if document["hardware"]["gpus"]:
        pytest.skip("this machine has a card")
    assert answer.exit_code == 0
    assert document["choice"]["model"] == "klein-tiny"
    whys = [each["why_not"] for each in document["alternatives"] if each["model"] == "klein-4b"]
    assert whys == ["klein-4b needs an NVIDIA card, and none was found."] * len(whys) != []


def test_strict_makes_a_warning_exit_with_1(kleinctl):
    if json.loads(kleinctl("doctor", "--json").stdout)["hardware"]["gpus"]:
        pytest.skip("this machine has a card")
    assert kleinctl("doctor").exit_code == 0
    assert kleinctl("doctor", "--strict").exit_code == 1


def test_a_pipe_that_closes_early_is_no_crash(tmp_path):
    line = f"{sys.executable} -m kleinctl models --json | head -c 10"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_output_without_colour_when_it_is_piped(kleinctl):
    assert "\x1b[" not in kleinctl("doctor").stdout


def test_a_console_that_lacks_characters_shows_something_all_the_same(kleinctl):
    for page, bar in (("cp437", "█"), ("cp1252", "#"), ("ascii", "#")):
        answer = kleinctl("doctor", PYTHONIOENCODING=page)
        assert answer.exit_code in (0, 1)
        assert "Traceback" not in answer.stderr
        assert bar in answer.stdout


def test_a_broken_config_file_is_named(kleinctl, empty_home):
    folder = empty_home / "kleinctl"
    folder.mkdir()
    (folder / "config.toml").write_text("[run\n")
    answer = kleinctl("doctor")
    assert answer.exit_code == 1
    assert "config.toml is no valid TOML" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_defaults_of_options_come_from_the_config_file(kleinctl, empty_home):
    folder = empty_home / "kleinctl"
    folder.mkdir()
    (folder / "config.toml").write_text('[plan]\nbackend = "staged"\ngpu = "RTX 3090"\n')
    document = conforms(kleinctl("plan", "--json").stdout)
    assert {row["backend"] for row in document["rows"]} == {"staged-decode"}
    assert "3090" in document["hardware"]["gpus"][0]["name"]


def test_a_broken_manifest_is_one_problem_that_names_file_line_and_key(kleinctl, empty_home):
    folder = empty_home / "kleinctl" / "manifests"
    folder.mkdir(parents=True)
    source = (REPOSITORY / "manifests" / "klein-4b.toml").read_text()
    (folder / "mine.toml").write_text(source.replace('dtype = "bfloat16"', 'dtipe = "bfloat16"', 1))
    answer = kleinctl("doctor", "--json")
    assert answer.exit_code == 1
    [problem] = [p for p in json.loads(answer.stdout)["problems"] if p["name"] == "manifest-invalid"]
    assert problem["path"].endswith("mine.toml")
    line = next(n for n, text in enumerate(source.splitlines(), 1) if text.startswith("dtype ="))
    assert f"line {line}: dtipe: unknown key. Did you mean dtype?" in problem["why"]


def test_completion_of_the_shell_in_use(kleinctl):
    answer = kleinctl("completion", SHELL="/usr/bin/zsh")
    assert answer.stdout.strip() == 'eval "$(_KLEINCTL_COMPLETE=zsh_source kleinctl)"'
    names = kleinctl(_KLEINCTL_COMPLETE="bash_complete", COMP_WORDS="kleinctl pl", COMP_CWORD="1").stdout
    assert {line.split(",")[-1] for line in names.splitlines()} == {"plan", "plugins"}


def test_a_limit_of_ram_changes_the_plan(kleinctl):
    words = ("plan", "--gpu", "RTX 4060 8GB", "--ram", "32", "--model", "klein-4b", "--backend", "staged", "--json")
    [wide, tight] = (
        json.loads(kleinctl(*words, "--size", "1024", *more).stdout)["rows"][0]
        for more in ((), ("--ram-limit", "4GiB"))
    )
    assert wide["fit"]["fits"] and wide["fit"]["ram_bytes"] > 8 * 2**30
    assert not tight["fit"]["fits"] or tight["fit"]["ram_bytes"] <= 4 * 2**30


def test_vram_limit_does_not_change_what_the_machine_is_said_to_be(kleinctl):
    free = json.loads(kleinctl("doctor", "--json").stdout)["hardware"]["ram_bytes"]
    document = conforms(kleinctl("doctor", "--json", "--vram-limit", "1GiB").stdout)
    assert document["hardware"]["ram_bytes"] == free
    assert "vram-taken" not in [problem["name"] for problem in document["problems"]]


def test_a_log_is_explained_with_the_line_that_proves_it(kleinctl, tmp_path):
    (tmp_path / "log.txt").write_text("hello\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    answer = kleinctl("doctor", "--log", "log.txt", "--json")
    assert answer.exit_code == 1
    [problem] = conforms(answer.stdout)["log"]["problems"]
    assert problem["ref"] == "D01"
    assert problem["evidence"][0]["looked_at"] == "line 2 of the log"
    assert problem["evidence"][0]["found"].startswith("torch.OutOfMemoryError: CUDA out of memory")
    healthy = kleinctl("doctor", "--log", "-", "--json", stdin="got prompt\nPrompt executed in 1.2 seconds\n")
    assert conforms(healthy.stdout)["log"]["problems"] == []


def test_every_command_in_a_hint_can_be_typed():
    """Hints that start with kleinctl name commands and options that exist."""
    import re

    hints = set()
    for path in (REPOSITORY / "kleinctl").rglob("*.py"):
        hints |= set(re.findall(r"""[f"']kleinctl ([a-z]+[^"'\n]*)["']""", path.read_text()))
    checked = 0
    for hint in hints:
        name, *words = hint.split()
        if name in COMMANDS:
            options = {option for each in cli_group.get_command(None, name).params for option in each.opts}
            unknown = [word for word in words if re.fullmatch(r"--[a-z-]+", word) and word not in {*options, "--help"}]
            assert not unknown, hint
            checked += 1
    assert checked > 15


def settings(home, text):
    (home / "kleinctl").mkdir()
    (home / "kleinctl" / "config.toml").write_text(text)


def test_a_setting_that_is_misspelt_is_named_with_the_one_that_was_meant(kleinctl, empty_home):
    settings(empty_home, '[plan]\nmodle = "klein-4b"\n')
    answer = kleinctl("plan", "--gpu", "RTX 4070")
    assert answer.exit_code == 1
    assert "[plan] has 'modle'; options stand there. Did you mean model?" in answer.stderr
    assert kleinctl("undo", "--list").exit_code == 0


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 5000 + "]" * 5000], ids=["digits", "brackets"])
def test_a_setting_without_end_is_no_mistake_of_kleinctls(kleinctl, empty_home, value):
    settings(empty_home, f"[run]\nsteps = {value}\n")
    answer = kleinctl("models")
    assert answer.exit_code == 1 and "error[config-broken]: " in answer.stderr
    assert "config.toml is no valid TOML" in answer.stderr


def test_a_table_that_is_named_after_no_command_is_named_with_the_one_that_was_meant(kleinctl, empty_home):
    settings(empty_home, '[hub]\ncertificates = "system"\n[runn]\nsteps = 8\n')
    answer = kleinctl("models")
    assert answer.exit_code == 1 and "error[config-broken]: " in answer.stderr
    assert "[runn] is there; " in answer.stderr and " Did you mean run?\n" in answer.stderr


def test_a_setting_with_a_value_that_cannot_be_is_not_called_mistyped_in_the_command(kleinctl, empty_home):
    settings(empty_home, '[run]\nsteps = "many"\n')
    answer = kleinctl("run", "a cat")
    file = empty_home / "kleinctl" / "config.toml"
    assert answer.exit_code == 2
    assert f"It stands below [run] in {file}" in answer.stderr
    assert f"hint: correct {file}\n" in answer.stderr


def test_a_setting_may_be_spelt_as_its_option_is(kleinctl, empty_home):
    settings(empty_home, '[doctor]\nvram-limit = "nonsense"\n')
    assert "'nonsense' is no amount of memory" in kleinctl("doctor").stderr


def test_what_doctor_says_to_type_next_has_the_log_that_showed_the_problem(kleinctl, tmp_path):
    from kleinctl.problem import shell

    log = tmp_path / "my log.txt"
    log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    answer = kleinctl("doctor", "--log", str(log))
    assert f"can be fixed by: kleinctl doctor --log {shell(log)} --fix --dry-run" in answer.stderr
    pretended = kleinctl("doctor", "--log", str(log), "--set", "ram_available=4GiB")
    assert "--fix" not in pretended.stderr


def test_a_model_of_which_not_all_sizes_are_known_is_larger_than_their_sum(kleinctl):
    shown = [line.split() for line in kleinctl("models").stdout.splitlines()]
    assert ["klein-base-9b", "diffusers", "over", "16.6", "GB"] in [line[:5] for line in shown]
    assert ["klein-4b", "diffusers", "16.0", "GB"] in [line[:4] for line in shown]


def test_a_setting_outside_a_table_is_named(kleinctl, empty_home):
    folder = empty_home / "kleinctl"
    folder.mkdir()
    (folder / "config.toml").write_text("run = 3\n")
    answer = kleinctl("doctor")
    assert (answer.exit_code, "run is no table" in answer.stderr) == (1, True)


def test_uninstall_with_nobody_to_ask_wants_yes(kleinctl):
    answer = kleinctl("uninstall", "klein-tiny")
    assert answer.exit_code == 2
    assert "hint: kleinctl uninstall klein-tiny --yes\n" in answer.stderr


def test_a_comfyui_to_take_copies_from_that_is_not_there(kleinctl, tmp_path):
    gone = tmp_path / "gone"
    answer = kleinctl(*("install", "--model", "klein-tiny", "--backend", "diffusers-offload", "--comfyui", gone))
    assert (answer.exit_code, answer.stdout) == (2, "") and f"{gone} is not there" in answer.stderr


def test_uninstall_says_for_whom_it_waits_and_leaves_downloads_that_are_under_way(empty_home):
    partial = empty_home / "kleinctl" / "downloads" / "a.partial"
    command = [sys.executable, "-m", "kleinctl", "uninstall", "--all", "--yes"]
    with store.locked(print):
        store.make_folder(partial.parent)
        partial.touch()
        waits = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert waits.stderr is not None
        assert waits.stderr.readline() == f"waiting for another kleinctl (pid {os.getpid()}) to finish\n"
        assert partial.exists()
    waits.communicate(timeout=60)
    assert waits.returncode == 0 and not partial.exists()
    assert not (empty_home / "kleinctl" / "install.lock").exists()


def test_uninstall_leaves_what_lies_behind_a_link_to_another_disk_and_says_so(kleinctl, empty_home, tmp_path):
    (tmp_path / "vae.safetensors").touch()
    (empty_home / "kleinctl" / "models").mkdir(parents=True)
    (empty_home / "kleinctl" / "models" / "klein-tiny").symlink_to(tmp_path, target_is_directory=True)
    said = kleinctl("uninstall", "klein-tiny", "--yes").stderr
    assert "left, for it lies behind a link of yours: " in said and (tmp_path / "vae.safetensors").exists()


def test_text_from_strangers_cannot_steer_the_terminal(capsys):
    from kleinctl.cli import output
    from kleinctl.problem import Problem

    output.show_problem(Problem("a\x1b]0;x\x07b", "c\x1b[31md", "e\x9bf"))
    output.remark("g\x1b[2Jh")
    told = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\x9b"} & set(told)
