"""The picture that `kleinctl plan` draws of a job's stages."""

from __future__ import annotations

import re

import pytest

from kleinctl import memory
from kleinctl.backends import Stage
from kleinctl.cli import output
from kleinctl.cli.plan import BAR, stage_line
from kleinctl.units import GIB


@pytest.mark.parametrize(("encoding", "marks"), [("utf-8", "█▒░"), ("cp437", "█▒░"), ("cp1252", "#+:")])
def test_stages_are_drawn_in_characters_that_the_console_has(kleinctl, encoding, marks):
    words = ("plan", "--gpu", "RTX 4070 Ti SUPER", "--ram", "32", "--model", "klein-4b", "--size", "1024")
    answer = kleinctl(*words, PYTHONIOENCODING=encoding, COLUMNS="80")
    drawn = [line for line in answer.stdout.splitlines() if line.startswith(("encode", "denoise", "decode"))]
    assert [line.split()[0] for line in drawn] == ["encode", "denoise", "decode"]
    assert all(len(line) <= 80 and line.rstrip().endswith(" s") and "|" in line for line in drawn)
    assert all(mark in drawn[1] for mark in marks)
    assert f"{marks[0]} weights  {marks[1]} activations  {marks[2]} CUDA context" in answer.stdout


def test_verbose_draws_the_stages_of_every_backend(kleinctl):
    words = ("plan", "--gpu", "RTX 4070 Ti SUPER", "--ram", "32", "--model", "klein-4b", "--size", "1024")
    assert kleinctl(*words).stdout.count("\ndecode   ") == 1
    answer = kleinctl(*words, "-v").stdout
    assert answer.count("\ndecode   ") == 2
    assert "diffusers-offload at 1024x1024: VRAM in each stage" in answer


def test_a_bar_shows_what_the_stage_is_made_of_and_where_the_budget_ends(monkeypatch):
    monkeypatch.setattr(output, "can_show", lambda characters: False)
    monkeypatch.setattr(memory, "CONTEXT_BYTES", 3 * GIB // 4)
    stage = Stage("decode", 6 * GIB + memory.CONTEXT_BYTES, 4 * GIB, 0.5)
    line = stage_line(stage, 8 * GIB, 8 * GIB)
    assert line.startswith("decode   " + "#" * 18 + "+" * 8)
    assert line[9 + BAR] == "|" and ":" in line and line.endswith("6.8 GiB    0.50 s")
    over = stage_line(stage, 4 * GIB, stage.vram_bytes)
    assert over.endswith("too much") and len(over) <= 78
    figures, bar = stage_line(stage, 4 * GIB, stage.vram_bytes, narrow=True).splitlines()
    assert figures == "decode    6.8 GiB    0.50 s  too much" and bar == "  " + over[9 : 9 + BAR + 1].rstrip()


@pytest.mark.parametrize("columns", [40, 78, 80, 200])
def test_every_figure_and_every_bar_is_there_on_a_console_of_any_width(kleinctl, columns):
    words = ("plan", "--gpu", "RTX 3050", "--ram", "16", "--model", "klein-4b", "-v")
    answer = kleinctl(*words, COLUMNS=str(columns)).stdout
    assert "…" not in answer
    [titles, *_] = [line for line in answer.splitlines() if "VRAM" in line and "first" in line]
    assert titles.split()[-5:] == ["VRAM", "RAM", "first", "next", "fits"]
    figures = [line for line in answer.splitlines() if "x2048 " in line or line.startswith(("encode", "decode"))]
    bars = [line for line in answer.splitlines() if "|" in line]
    assert len(figures) == 3 + 2 * 2 and len(bars) == 2 * 3 + 2
    assert all(len(line.rstrip()) <= columns for line in [titles, *figures, *bars])
    assert all(line.split()[-1] in ("yes", "no", "?") for line in figures[:3])


def test_what_could_not_be_checked_is_not_called_unfit(kleinctl):
    answer = kleinctl("plan", "--gpu", "RTX 4090", "--ram", "64", "--model", "klein-4b", "--backend", "comfyui")
    figures = [line for line in answer.stdout.splitlines() if line.split()[:1] == ["comfyui-fp8"] and "x" in line]
    assert [line.split()[-1] for line in figures if line.rstrip().endswith("?")] == ["?"] * 4
    assert "comfyui-fp8 could not be checked: " in answer.stdout and "no: " not in answer.stdout
    assert answer.exit_code == 1 and "Nothing that could be checked would run." in answer.stdout
    chosen = kleinctl("plan", "--gpu", "RTX 3060", "--ram", "32", "--model", "klein-4b", "--size", "1024").stdout
    assert "nothing else fits here" not in chosen


def test_a_gamer_with_8_gb_is_told_what_would_make_pictures_faster(kleinctl):
    words = ("plan", "--model", "klein-4b", "--size", "1024", "--gpu")
    small = kleinctl(*words, "RTX 3060", "--ram", "8").stdout
    [(takes, more, fp8)] = re.findall(
        r"Weights that RAM has no room for are read again for each picture: with (\S+) GiB of RAM available "
        r"\(close programs, or more RAM\) it would take (\S+) s; `kleinctl run --precision fp8` takes (\S+) s, "
        r"for nearly the same picture\.\n",
        small,
    )
    [now] = re.findall(r"GiB of RAM, about (\d+) s a picture", small)
    assert float(takes) > 5 and max(float(more), float(fp8)) < int(now)
    assert f"about {more} s a picture" in kleinctl(*words, "RTX 3060", "--ram", "16").stdout
    assert "read again" not in kleinctl(*words, "RTX 4090", "--ram", "8").stdout  # all of it stays on the card


def test_fp8_is_not_recommended_where_it_does_not_fit(kleinctl):
    words = ("plan", "--gpu", "GTX 1650", "--ram", "8", "--model", "klein-4b", "--size", "1024")
    answer = kleinctl(*words).stdout
    assert "are read again for each picture: with 13.2 GiB of RAM available" in answer and "--precision" not in answer


def test_a_reason_says_for_which_sizes_it_goes(kleinctl):
    answer = kleinctl("plan", "--gpu", "RTX 3050", "--ram", "32", "--model", "klein-4b", "--backend", "diffusers")
    told = [line for line in answer.stdout.splitlines() if ", no: " in line]
    assert [line.split(",")[0] for line in told] == [
        f"diffusers-offload at {side}x{side}" for side in (512, 1024, 1536, 2048)
    ]


def test_a_card_without_a_name(kleinctl):
    answer = kleinctl("plan", "--gpu", "")
    assert (answer.exit_code, answer.stdout) == (2, "") and "[unknown-gpu]" in answer.stderr


def test_a_size_on_disk_that_is_not_wholly_known_is_told_as_models_tells_it(kleinctl):
    words = ("plan", "--model", "klein-base-9b", "--backend", "diffusers", "--gpu", "RTX 5090", "--ram", "64")
    assert "\nklein-base-9b, over 16.6 GB on disk; " in kleinctl(*words, "--size", "1024").stdout
    assert "over 16.6 GB" in kleinctl("models").stdout


def test_a_machine_without_a_card_is_shown_no_figures_of_what_wants_one(kleinctl):
    answer = kleinctl("plan", "--gpu", "none", "--ram", "32", "--size", "1024").stdout
    assert "\nklein-4b, 16.0 GB on disk: nothing runs it without an NVIDIA card\n" in answer
    assert " min" not in answer and [line for line in answer.splitlines() if line.rstrip().endswith(" yes")]


@pytest.mark.parametrize("columns", [40, 80])
def test_figures_of_an_impossible_size_are_whole(kleinctl, columns):
    words = ("plan", "--gpu", "RTX 4090", "--ram", "64", "--model", "klein-4b", "--size", "99999")
    answer = kleinctl(*words, COLUMNS=str(columns)).stdout
    assert "…" not in answer and " 22005.1 " in answer
    assert "99984x99984 " in answer or ("99984x9 " in answer and "\n   9984 " in answer)
