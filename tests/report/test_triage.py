"""What a supporter sees of one report, of many, of two, and of old ones."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from kleinctl.facts import Facts, gather
from kleinctl.hardware.rates import Rates, Speed
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError
from kleinctl.report import bundle, collect, triage
from kleinctl.report.collect import Log
from kleinctl.report.owner import Owner
from kleinctl.report.redact import Redactor
from kleinctl.survey import judge
from tests import weights
from tests.report import machines

SHAPES = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (512x12288 and 7680x3072)"


def schema(name: str) -> dict:
    return json.loads((resources.files("kleinctl.schemas") / f"{name}.json").read_text())


def sent(folder: Path, label: str, machine: str, **changes) -> Path:
    hardware = machines.hardware(machine)
    cards = tuple(replace(gpu, **changes) for gpu in hardware.gpus)
    return machines.write(folder / f"{label}.zip", Facts(replace(hardware, gpus=cards)))


@pytest.fixture
def reports(tmp_path) -> Path:
    folder = tmp_path / "reports"
    folder.mkdir()
    sent(folder, "well", "rtx-4070-ti-super")
    sent(folder, "old-1", "rtx-4070-ti-super", driver="450.51")
    sent(folder, "old-2", "rtx-4090", driver="450.51")
    sent(folder, "pascal", "gtx-1080-ti")
    (folder / "odd.zip").write_bytes(b"PK\x03\x04")
    (folder / "letter.txt").write_text("dear support")
    return folder


def test_one_report_shows_doctors_view_and_what_its_log_says(tmp_path, kleinctl):
    log = Log("worker-1.log", "worker", SHAPES)
    machines.write(tmp_path / "a.zip", Facts(machines.hardware()), (log,), case="T-7", note="grey picture")
    answer = kleinctl("triage", "a.zip")
    assert answer.exit_code == 1
    assert "case    T-7" in answer.stdout
    assert "note    grey picture" in answer.stdout
    assert "NVIDIA GeForce RTX 4070 Ti SUPER (sm_89)" in answer.stdout
    assert "would run  klein-4b" in answer.stdout
    assert "from its logs" in answer.stdout
    assert "error[text-encoder-width]" in answer.stdout


def test_a_healthy_machine_is_well(tmp_path, kleinctl):
    machines.write(tmp_path / "a.zip", Facts(machines.hardware()))
    answer = kleinctl("triage", "a.zip")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert "error" not in answer.stdout


def test_many_reports_are_sorted_by_how_many_people_one_fix_would_help(reports, kleinctl):
    answer = kleinctl("triage", str(reports), COLUMNS="140")
    assert answer.exit_code == 1
    lines = answer.stdout.splitlines()
    assert "2  error[driver-too-old]" in lines[1] or "2  error[no-torch-build]" in lines[1]
    assert "RTX 4070 Ti SUPER, Windows" in answer.stdout or "RTX 4070 Ti SUPER, Linux" in answer.stdout
    assert "old-1.zip, old-2.zip" in answer.stdout
    assert "4 reports: 2 with errors, 1 without a problem" in answer.stdout
    assert answer.stderr.count("\n") == 1  # the bad one is one line
    assert "error[report-unreadable]: odd.zip is no report that can be read: The zip is damaged" in answer.stderr


def test_triage_as_json_is_as_its_schema_says(reports, kleinctl):
    answer = kleinctl("triage", "--json", str(reports))
    document = json.loads(answer.stdout)
    jsonschema.validate(document, schema("triage"))
    assert document["problems"][0]["count"] == 2
    assert document["problems"][0]["alone"] == 2
    assert [problem["name"] for problem in document["unreadable"]] == ["report-unreadable"]


def test_what_differs_between_a_working_and_a_broken_machine(reports, kleinctl):
    answer = kleinctl("triage", "--diff", str(reports / "well.zip"), str(reports / "old-1.zip"))
    assert answer.exit_code == 0
    first = answer.stdout.splitlines()[1].split()
    assert (first[0], first[-1]) == ("gpu0.driver", "450.51")
    assert "only in well.zip: no problem" in answer.stdout
    assert "only in old-1.zip: " in answer.stdout
    document = json.loads(
        kleinctl("triage", "--diff", "--json", str(reports / "well.zip"), str(reports / "old-1.zip")).stdout
    )
    jsonschema.validate(document, schema("triage"))
    assert [each["name"] for each in document["diff"]] == ["gpu0.driver"]


def test_two_reports_of_one_machine_show_the_same(reports, kleinctl):
    for name, told in (("well", "both have no problem"), ("pascal", "both have the same problems: ")):
        answer = kleinctl("triage", "--diff", *[str(reports / f"{name}.zip")] * 2).stdout
        assert "both show the same machine\n" in answer and told in answer and "only in" not in answer


def test_one_report_that_is_judged_again_is_one(reports, kleinctl):
    told = kleinctl("triage", "--replay", str(reports / "well.zip")).stdout
    assert told.splitlines()[-1].startswith("1 report: ")


def test_a_backend_that_was_not_checked_is_not_said_not_to_run(reports, kleinctl):
    rows = [line.split() for line in kleinctl("triage", str(reports / "well.zip")).stdout.splitlines()]
    [head] = [row[0] for row in rows if row[1:4] == ["klein-4b", "with", "comfyui-fp8:"]]
    assert head == "perhaps"


def test_files_of_two_machines_are_told_apart_by_name():
    left = Facts(
        machines.hardware(), files=(machines.weights_file("~/ComfyUI/models/vae/ae.safetensors", folder="vae"),)
    )
    names = [each.name for each in triage.differences(left, Facts(machines.hardware()))]
    assert "file ComfyUI vae/ae.safetensors.identity.kind" in names


def test_memory_that_changes_from_minute_to_minute_is_no_difference():
    machine = machines.hardware()
    later = replace(machine, ram_available_bytes=machine.ram_available_bytes - 2**20)
    assert triage.differences(Facts(machine), Facts(later)) == []


def test_measured_rates_are_told_as_people_say_them():
    fast = Rates(date="d", pinned=2.43e10, disk=6e9, encode=9e12, forward=(Speed(1024, 5.2e13),))
    slow = replace(fast, pinned=2.4e10, disk=4.5e8, encode=8e11, forward=(Speed(1024, 2e13),))
    left, right = (Facts(replace(machines.hardware(), rates=rates)) for rates in (fast, slow))
    assert [(each.name, each.left, each.right) for each in triage.differences(left, right)] == [
        ("rates.disk", "6.0 GB/s", "0.5 GB/s"),
        ("rates.encode", "9000.0 GFLOP/s", "800.0 GFLOP/s"),
        ("rates.forward0.flops", "52 TFLOP/s", "20 TFLOP/s"),
    ]


def test_names_in_a_report_are_no_colours_and_no_links(tmp_path, kleinctl):
    document = json.loads(bundle._member(machines.report(Facts(machines.hardware())), "report.json"))
    document["findings"]["seen_there"] = ["[/red]", "[link=http://evil.example]here[/link]"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    answer = kleinctl("triage", "report.json")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert "from here: [/red], [link=http://evil.example]here[/link]" in answer.stdout


@pytest.mark.parametrize("flops", ["1e999", "1e-300"])
def test_a_report_with_a_rate_that_no_machine_has(tmp_path, flops):
    document = json.loads(bundle._member(machines.report(Facts(machines.hardware())), "report.json"))
    document["facts"]["hardware"]["rates"] = {"date": "d", "forward": [{"size": 1024, "flops": 0.5}]}
    (tmp_path / "report.json").write_text(json.dumps(document).replace('"flops": 0.5', f'"flops": {flops}'))
    with pytest.raises(KleinctlError, match="no report that can be read"):
        bundle.read(tmp_path / "report.json")


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
def test_a_pipe_among_the_weights_has_no_digest(tmp_path):
    os.mkfifo(tmp_path / "vae.safetensors")
    assert collect.header_digest(tmp_path / "vae.safetensors") == {"size_bytes": 0, "header_sha256": None}


def test_reports_of_the_same_name_are_machines_of_their_own(tmp_path, kleinctl):
    for name in ("anna", "bob"):
        (tmp_path / name).mkdir()
        machines.write(tmp_path / name / "report.zip", Facts(machines.hardware("gtx-1080-ti")))
    document = json.loads(kleinctl("triage", "--json", "anna/report.zip", "bob/report.zip").stdout)
    [problem] = document["problems"]
    assert (problem["count"], problem["reports"]) == (2, ["anna/report.zip", "bob/report.zip"])
    assert [each["file"] for each in document["reports"]] == problem["reports"]


def test_two_reports_of_one_case_are_one_machine(tmp_path, kleinctl):
    for name in ("a.zip", "b.zip"):
        machines.write(tmp_path / name, Facts(machines.hardware("gtx-1080-ti")), case="T-7")
    [problem] = json.loads(kleinctl("triage", "--json", "a.zip", "b.zip").stdout)["problems"]
    assert (problem["count"], problem["reports"]) == (1, ["T-7"])


def test_each_log_that_was_given_is_explained_and_named(tmp_path, kleinctl):
    logs = (Log("new.log", "given", "all is well"), Log("old.log", "given", f"starting\n{SHAPES}"))
    machines.write(tmp_path / "a.zip", Facts(machines.hardware()), logs)
    assert f"\nline 2 of FILE_2.log: {SHAPES}\n" in kleinctl("triage", "a.zip").stdout


def test_a_remedy_written_into_a_report_is_not_taken_over(tmp_path, kleinctl):
    document = json.loads(bundle._member(machines.report(Facts(machines.hardware())), "report.json"))
    remedy = {"action": "set", "arguments": {"path": str(tmp_path / "victim")}, "consent": "auto"}
    said = {"name": "vram-taken", "severity": "error", "what": "x", "why": "y", "fix": "z", "remedy": remedy}
    document["findings"]["problems"] = [said]
    (tmp_path / "report.json").write_text(json.dumps({**document, "remedy": remedy}))
    assert "victim" not in kleinctl("triage", "--json", "report.json").stdout
    assert "victim" not in kleinctl("doctor", "--from", "report.json", "--json").stdout
    assert kleinctl("doctor", "--from", "report.json", "--fix", "--yes").exit_code == 2


def test_one_report_as_a_page_is_doctors_page_with_its_case(tmp_path, kleinctl):
    log = Log("worker-1.log", "worker", SHAPES)
    machines.write(tmp_path / "a.zip", Facts(machines.hardware()), (log,), case="T-7", note="grey <picture>")
    answer = kleinctl("triage", "a.zip", "--html", "page.html")
    assert (answer.exit_code, answer.stderr) == (1, "the page is page.html\n")
    page = (tmp_path / "page.html").read_text()
    for words in ("kleinctl doctor", "1 error, no warnings", "T-7", "grey &lt;picture&gt;", f"worker-1.log: {SHAPES}"):
        assert words in page


def test_many_reports_as_a_page(reports, tmp_path, kleinctl):
    answer = kleinctl("triage", str(reports), "--html", "page.html")
    assert answer.exit_code == 1
    page = (tmp_path / "page.html").read_text()
    for words in (
        "4 reports: 2 with errors, 1 well",
        "the only error of 2",
        "old-1.zip, old-2.zip",
        "odd.zip is no report",
    ):
        assert words in page


def test_two_reports_side_by_side_and_old_ones_as_pages(reports, tmp_path, kleinctl):
    two = [str(reports / name) for name in ("well.zip", "old-1.zip")]
    kleinctl("triage", "--diff", *two, "--html", "page.html")
    assert "<td>gpu0.driver</td>" in (tmp_path / "page.html").read_text()
    kleinctl("triage", "--replay", str(reports), "--html", "page.html")
    assert "Judged differently now" in (tmp_path / "page.html").read_text()


def test_a_page_is_not_written_over_a_report(reports, kleinctl):
    well, before = reports / "well.zip", (reports / "well.zip").read_bytes()
    answer = kleinctl("triage", str(reports / "pascal.zip"), "--html", str(well))
    assert (answer.exit_code, well.read_bytes()) == (2, before)
    assert "Only such a page is written over." in answer.stderr


def test_todays_rules_on_old_reports(tmp_path, kleinctl):
    folder = tmp_path / "old"
    folder.mkdir()
    sent(folder, "as-it-was", "rtx-4090")
    document = json.loads(bundle._member(sent(tmp_path, "b", "gtx-1080-ti").read_bytes(), "report.json"))
    document["findings"]["problems"] = [
        {"name": "forgotten-rule", "severity": "error", "what": "x", "why": "", "fix": ""}
    ]
    (folder / "older.json").write_text(json.dumps(document))
    answer = kleinctl("triage", "--replay", str(folder))
    assert answer.exit_code == 1
    assert "older.json" in answer.stdout
    assert "gone     forgotten-rule" in answer.stdout
    assert "new      no-bf16" in answer.stdout
    assert "2 reports: 1 judged differently now, 1 as they were" in answer.stdout
    found = json.loads(kleinctl("triage", "--replay", "--json", str(folder)).stdout)
    jsonschema.validate(found, schema("triage"))


def test_two_flags_or_three_files_that_do_not_go_together(reports, kleinctl):
    for arguments in (["--diff", str(reports)], ["--diff", "--replay", str(reports), str(reports)]):
        answer = kleinctl("triage", *arguments)
        assert (answer.exit_code, answer.stdout) == (2, "")
    assert kleinctl("triage", "none.zip").exit_code == 2


def test_what_redaction_keeps_from_being_found_again_is_named(tmp_path):
    path = machines.write(tmp_path / "a.zip", Facts(machines.hardware()))
    document = json.loads(bundle._member(path.read_bytes(), "report.json"))
    document["findings"]["seen_there"] = ["path-too-long"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    each = triage.judged(Plugins(frozenset()), bundle.read(tmp_path / "report.json"))
    assert each.only_there == ["path-too-long"]
    assert triage.replayed(each).same


# From this machine to the supporter's.


def test_a_report_has_every_verdict_of_the_machine_and_none_of_its_names(tmp_path):
    root = tmp_path / "Jörg Müller" / "My AI" / "ComfyUI"
    models = root / "models"
    weights.write(models / "vae" / "my boss.safetensors", weights.vae(channels=16, statistics=False))
    weights.write(models / "checkpoints" / "flux-2-klein-4b.safetensors", weights.flux2(**weights.KLEIN_4B))
    weights.write(models / "text_encoders" / "qwen_3_8b.safetensors", weights.qwen3(**weights.QWEN3_8B))
    (root / "comfyui_version.py").write_text('__version__ = "0.3.10"\n')
    (models / "vae" / "Jörg.safetensors").write_text("<html>")
    plugins = Plugins(frozenset())
    facts = gather(plugins, machines.hardware(), folders=[root])
    hide = Redactor(Owner(user=("Jörg Müller", "Jörg"), home=(str(root.parents[1]),)))
    document = collect.document(plugins, facts, [], hide, made=machines.MADE)
    live = judge(plugins, facts)
    assert [each["name"] for each in document["findings"]["problems"]] == [each.name for each in live.problems]
    assert {"comfyui-too-old", "transformer-in-checkpoints"} <= {each.name for each in live.problems}
    assert document["findings"]["seen_there"] == []
    told = json.dumps(document, ensure_ascii=False)
    assert not [word for word in ("Jörg", "Müller", "boss", "My AI") if word in told]


def test_a_report_of_this_machine_and_its_diagnosis_elsewhere(empty_home, tmp_path, kleinctl):
    folder = empty_home / "kleinctl" / "models" / "klein-4b" / "diffusers"
    wrong = weights.vae_diffusers(channels=16, statistics=False)
    weights.write(folder / "vae" / "diffusion_pytorch_model.safetensors", wrong)
    logs = empty_home / "kleinctl" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-20260101-000000-1.log").write_text(f"\x1b[31mFile '{empty_home}/x.py'\x1b[0m\n{SHAPES}\n")
    (logs / "crash-20260101-000000-1.log").write_text("kleinctl run\nKeyError: 'x'\n")
    answer = kleinctl(
        "report", "-o", "mine.zip", "--case-id", "T-1", "--note", "all grey", HF_TOKEN="hf_mine0123456789ab"
    )
    assert (answer.exit_code, answer.stdout) == (0, "mine.zip\n")
    data = (tmp_path / "mine.zip").read_bytes()
    document = json.loads(bundle._member(data, "report.json"))
    jsonschema.validate(document, schema("report"))
    told = json.dumps(document)
    assert str(empty_home) not in told
    assert "hf_mine" not in told
    assert document["logs"][0]["tail"].startswith("File '~/x.py'\nRuntimeError")
    assert [log["kind"] for log in document["logs"]] == ["worker", "crash"]
    [file] = document["files"]
    assert file["path"].startswith("~/kleinctl/models/klein-4b/diffusers/vae/diffusion_pytorch_model")
    assert len(file["header_sha256"]) == 64
    assert {"wrong-vae", "text-encoder-width"} <= {
        each["name"] for each in (*document["findings"]["problems"], *document["findings"]["log"]["problems"])
    }
    elsewhere = kleinctl("triage", "mine.zip", KLEINCTL_HOME=str(tmp_path / "other"))
    assert elsewhere.exit_code == 1
    assert "error[wrong-vae]: " in elsewhere.stdout
    assert "diffusion_pytorch_model.safetensors is not the VAE of klein-4b" in elsewhere.stdout
    assert "error[text-encoder-width]" in elsewhere.stdout
    again = kleinctl("report", "-o", "mine.zip")
    assert (again.exit_code, "mine.zip exists" in again.stderr) == (2, True)


def test_a_log_that_powershell_wrote_hides_a_name_in_other_letters_too(tmp_path, kleinctl):
    said = "Пользователь Скворцов: папка D:\\Скворцов\\x не найдена\n"
    for lines in (1, 3000):  # the second is longer than what is kept of a log, and begins without the mark of UTF-16
        for encoding in ("utf-16-le", "utf-16-be"):
            (tmp_path / "said.txt").write_bytes(("\ufeff" + said * lines).encode(encoding))
            answer = kleinctl("report", "--json", "--log", "said.txt", USERNAME="Скворцов")
            tail = next(log["tail"] for log in json.loads(answer.stdout)["logs"] if log["kind"] == "given")
            first = re.match(r"Пользователь (USER_\d+_é): папка D:\\FOLDER_\d+_é\\", tail)
            assert first, tail[:100]
            assert tail.count(first[1]) == tail.count("Пользователь")


def test_reports_from_windows_are_judged_and_paired_as_there():
    def of(separator: str, start: str) -> Facts:
        """Facts with a VAE of another model, recorded in the folder `start`."""
        file = machines.weights_file("VAE", folder="vae")
        document = json.loads(json.dumps(Facts(machines.hardware("rtx-4090"), files=(file,)).to_json()))
        given = document["files"][0]
        for each in (given, given["identity"]):
            each["path"] = separator.join((start, "models", "klein-4b", "diffusers", "vae", "x y.safetensors"))
        given |= {"model": "klein-4b", "role": "vae", "family": "flux2"}
        given["identity"] |= {"role": "vae", "family": "flux1"}
        return Facts.from_json(document)

    def told(facts: Facts) -> list[str]:
        return [problem.what for problem in judge(Plugins(frozenset()), facts).problems]

    linux, windows, other = of("/", "~/kleinctl"), of("\\", "C:\\Users\\USER_1"), of("\\", "~\\kleinctl")
    assert [what for what in told(linux) if what.startswith("x y.safetensors ")]
    assert told(windows) == told(other) == told(linux)
    names = sorted(each.name for each in triage.differences(windows, other))
    assert names == ["file ComfyUI vae/x y.safetensors.identity.path", "file ComfyUI vae/x y.safetensors.path"]


def test_a_report_is_shown_before_it_is_written(tmp_path, kleinctl):
    answer = kleinctl("report", "--show")
    assert answer.exit_code == 0
    assert "report.json" in answer.stdout
    assert "hidden" in answer.stdout
    document = json.loads(kleinctl("report", "--json").stdout)
    jsonschema.validate(document, schema("report"))
    assert list(tmp_path.glob("*.zip")) == []


def test_a_report_without_a_name_takes_a_free_one(tmp_path, kleinctl):
    names = {kleinctl("report").stdout.strip() for _ in range(2)}
    assert len(names) == 2
    assert {path.name for path in tmp_path.glob("kleinctl-report-*.zip")} == names


def test_a_log_that_is_not_there(kleinctl):
    answer = kleinctl("report", "--log", "none.log")
    assert answer.exit_code == 1
    assert "error[log-unreadable]: none.log cannot be read" in answer.stderr


def test_a_workflow_goes_into_a_report_without_its_prompt(tmp_path, kleinctl):
    node = {"class_type": "CLIPTextEncode", "inputs": {"text": "portrait of my boss", "clip": ["2", 0]}}
    (tmp_path / "w.json").write_text(json.dumps({"6": node}))
    answer = kleinctl("report", "--json", "--workflow", "w.json", "--folder", str(tmp_path))
    assert "my boss" not in answer.stdout
    [told] = json.loads(answer.stdout)["facts"]["workflow"]["nodes"]
    assert told["type"] == "CLIPTextEncode"
