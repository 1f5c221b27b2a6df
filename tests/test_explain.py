"""What people read when they ask about a problem."""

from __future__ import annotations

import pytest

from kleinctl import explain
from tests.test_cli import conforms


def test_a_page_shows_symptom_cause_and_fix(kleinctl):
    answer = kleinctl("explain", "wrong-vae")
    assert answer.exit_code == 0
    assert answer.stdout.startswith("wrong-vae: ")
    assert [word in answer.stdout for word in ("\nsymptom\n", "\ncause\n", "\nfix\n", "\nsources\n")] == [True] * 4


def test_the_page_as_json(kleinctl):
    [page] = conforms(kleinctl("explain", "wrong-vae", "--json").stdout)["pages"]
    assert (page["name"], page["severity"]) == ("wrong-vae", "error")
    assert "C09" in page["refs"]


def test_a_misspelt_name_is_met_with_the_right_one(kleinctl):
    answer = kleinctl("explain", "wrongvae")
    assert answer.exit_code == 2
    assert "there is no problem 'wrongvae'" in answer.stderr
    assert "Did you mean wrong-vae?" in answer.stderr


def test_an_entry_of_the_catalogue_is_a_name_too(kleinctl):
    assert kleinctl("explain", "a01").stdout.startswith("driver-too-old: ")


def test_a_pasted_error_message_is_explained(kleinctl):
    text = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (512x2560 and 7680x3072)"
    assert kleinctl("explain", text).stdout.startswith("text-encoder-not-stacked: ")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("washed out", "washed-out"),
        ("black image", "black-picture"),
        ("no kernel image is available", "torch-lacks-card"),
        ("paging file is too small", "page-file-too-small"),
        ("header too large", "weights-lfs-pointer"),
        ("out of memory vae decode", "decode-memory"),
        ("lora key not loaded", "lora-mismatch"),
        ("value not in list", "value-not-in-list"),
        ("blurry image", "guidance-on-distilled"),
        ("oversaturated", "guidance-on-distilled"),
        ("burnt colors", "guidance-on-distilled"),
        ("very slow", "slow-run"),
        ("why is it so slow", "card-throttled"),
        ("lora does nothing", "lora-mismatch"),
        ("no gpu detected", "no-driver"),
        ("it is using cpu instead of gpu", "torch-without-cuda"),
        ("login required", "gated-repo"),
        ("file not showing in comfyui", "file-in-wrong-folder"),
        ("red nodes missing", "node-missing"),
        ("rtx 5090 not supported", "torch-lacks-card"),
        ("my picture is noisy", "steps-on-base"),
        ("computer freezes", "memory-full"),
        ("disk full", "disk-full"),
        ("stuck at 99%", "xet-stalls"),
    ],
)
def test_a_symptom_leads_to_its_page(words, name):
    assert name in [page.name for page in explain.search(words, explain.pages())[:3]]


def test_part_of_a_word_is_no_hit():
    assert "disk-full" not in [page.name for page in explain.search("OOM", explain.pages())]  # r-oom


def test_words_that_say_nothing(kleinctl):
    assert explain.search("", explain.pages()) == explain.search("why is it so", explain.pages()) == []


def test_words_that_nobody_wrote_lead_nowhere(kleinctl):
    answer = kleinctl("explain", "--search", "xyzzy plugh")
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert "no page has those words" in answer.stderr


def test_all_pages_are_listed_with_their_titles(kleinctl):
    lines = kleinctl("explain").stdout.splitlines()
    assert len(lines) == len(explain.pages())
    assert any(line.startswith("wrong-vae ") for line in lines)


def test_a_page_that_lacks_its_fix_is_refused():
    with pytest.raises(ValueError, match="lacks Fix"):
        explain.parse("x", "---\nrefs:\n---\n# T\n\n## Symptom\na\n## Cause\nb\n## How it is found\nc\n")
