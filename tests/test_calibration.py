"""What `kleinctl bench --calibrate` measured, and what predictions make of it."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kleinctl import bench, memory, road
from kleinctl.backends import Fit
from kleinctl.environment import Environment
from kleinctl.hardware import NO_RATES, Hardware, Rates, Speed, detect, imagine, rates
from kleinctl.home import home
from kleinctl.planner import Candidate, compare, default_job
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError
from kleinctl.units import GIB
from kleinctl.worker.protocol import Calibrated
from tests.test_cli import conforms

CARD = "NVIDIA H100 80GB HBM3"
#: What an H100 takes: 512 x 512 and 1024 x 1024 measured (docs/measurements.md), as rates.
H100 = Rates(
    card=CARD,
    driver="580.159.04",
    cpu="a processor",
    model="klein-4b",
    date="2026-11-23",
    pinned=53e9,
    pageable=9e9,
    back=3e9,
    disk=1.5e9,
    cached=9e9,
    encode=46e12,
    forward=(Speed(1536, 271e12), Speed(4608, 398e12), Speed(16896, 450e12)),
    decode=(Speed(512**2, 85e12), Speed(1024**2, 80e12)),
    save_seconds=1.2e-7,
    start_seconds=5.5,
)


@pytest.fixture(scope="module")
def klein():
    return Plugins(frozenset()).model("klein-4b")


@pytest.fixture
def h100() -> Hardware:
    machine = imagine("H100", 64 * GIB)
    card = replace(machine.gpus[0], name=CARD, driver="580.159.04")
    return replace(machine, gpus=(card,), cpu="a processor", rates=H100)


def test_what_was_measured_comes_back_from_its_file(tmp_path, h100):
    rates.write(tmp_path, H100)
    assert rates.read(tmp_path) == H100
    assert Hardware.from_json(h100.to_json()).rates == H100


@pytest.mark.parametrize(("side", "measured"), [(512, 0.07 + 0.15 + 0.03), (1024, 0.06 + 0.35 + 0.13)])
def test_predicted_seconds_are_those_that_the_pieces_took(klein, h100, side, measured):
    encode, forward, decode = memory.stage_seconds(klein, h100, default_job(klein, width=side, height=side))
    assert encode + 4 * forward + decode == pytest.approx(measured, rel=0.2)


def test_another_cards_rates_are_not_used_for_this_one(klein, h100):
    other = replace(h100, gpus=(replace(h100.gpus[0], name="NVIDIA L4"),))
    unmeasured = replace(other, rates=NO_RATES)
    job = default_job(klein)
    assert memory.stage_seconds(klein, other, job) == memory.stage_seconds(klein, unmeasured, job)
    assert memory.copy_rate(other.gpus[0], H100) == memory.copy_rate(other.gpus[0])
    assert memory.copy_rate(h100.gpus[0], H100) == 53e9
    assert memory.save_seconds(other, job) == pytest.approx(1.2e-7 * 1024**2)  # no card has a part in it


def test_a_machine_imagined_by_name_has_no_rates(h100):
    assert not imagine("RTX 4090", None, h100).rates


def test_between_measured_sizes_the_rate_is_between_and_small_work_takes_as_long():
    points = (Speed(1000, 100.0), Speed(3000, 300.0))
    assert rates.flops_at(points, 2000) == 200
    assert rates.flops_at(points, 9000) == 300
    assert 500 / rates.flops_at(points, 500) == 1000 / rates.flops_at(points, 1000)
    assert rates.flops_at((), 500) is None


def test_offload_goes_by_copies_through_pageable_memory(klein, h100):
    fit = Plugins(frozenset()).backend("diffusers").thing.fit(klein, h100, default_job(klein))
    moved = memory.weight_bytes(klein) * (1 / 9e9 + 1 / 3e9)
    compute = memory.compute_seconds(klein, h100, default_job(klein))
    assert fit.seconds_next == pytest.approx(moved + compute, rel=0.02)
    assert fit.seconds_first == pytest.approx(5.5 + memory.weight_bytes(klein) / 1.5e9 + fit.seconds_next)


def test_backends_that_move_weights_themselves_tell_their_stages_apart(klein, h100):
    found = compare(Plugins(frozenset()).backends.values(), klein, h100, default_job(klein))
    assert [each.backend for each in found if not each.fit.stages] == ["comfyui-fp8"]  # what is where is its own matter
    for each in (each for each in found if each.fit.stages):
        assert [stage.name for stage in each.fit.stages] == ["encode", "denoise", "decode"]
        assert max(stage.vram_bytes for stage in each.fit.stages) == each.fit.vram_bytes
        assert sum(stage.seconds for stage in each.fit.stages) == pytest.approx(each.fit.seconds_next)
        assert all(0 <= stage.weights_bytes < stage.vram_bytes for stage in each.fit.stages)


def kept(empty_home, text: str) -> None:
    home().mkdir(parents=True)
    (home() / rates.FILE).write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"schema": "kleinctl.calibration/9", "rates": {}}',
        '{"schema": "kleinctl.calibration/1", "rates": {"date": "2026-01-01", "disk": 0.0}}',
        '{"schema": "kleinctl.calibration/1", "rates": {"date": "2026-01-01", "disk": NaN}}',
        '{"schema": "kleinctl.calibration/1", "rates": {"date": "x", "forward": [{"size": 0, "flops": 1.0}]}}',
        '{"schema": "kleinctl.calibration/1", "rates": {"date": 3}}',
        "[" * 100_000,
        " " * 100_000,
    ],
)
def test_a_broken_calibration_is_ignored_and_said(empty_home, text):
    kept(empty_home, text)
    found = detect()
    assert found.rates == NO_RATES
    assert any("calibration.json is ignored" in remark for remark in found.remarks)


def test_a_calibration_of_another_machine_is_ignored_and_said(empty_home, h100):
    kept(empty_home, json.dumps(rates.document(H100)))
    found = detect()
    assert not found.rates
    assert any(CARD in remark and "kleinctl bench --calibrate" in remark for remark in found.remarks)
    newer = replace(h100, gpus=(replace(h100.gpus[0], driver="590.1"),))
    assert rates.current(newer)[0] == NO_RATES
    assert "590.1" in rates.current(newer)[1]
    assert rates.current(h100) == (H100, "")


def test_a_strangers_rates_of_zero_are_refused(h100):
    document = h100.to_json()
    document["rates"]["forward"][0]["flops"] = 0.0
    with pytest.raises(KleinctlError, match="rates in this report cannot be read"):
        Hardware.from_json(document)


def test_a_miniature_says_nothing_of_how_fast_a_card_draws(klein, h100, monkeypatch):
    class Worker:
        """Answers with what 6 MB of weights reach on a card: what its kernels cost, not what it can do."""

        def start(self, *given, **named):
            return contextlib.nullcontext(self)

        def ask(self, *given):
            slow = (Speed(576, 1.3e11), Speed(1536, 4e11))
            return Calibrated(replace(H100, encode=8e10, forward=slow, decode=(Speed(128**2, 2e11),)))

    monkeypatch.setattr(bench, "ProcessExecutor", Worker)
    plugins, python = Plugins(frozenset()), Environment(Path(sys.executable), {})
    tiny, offer = plugins.model("klein-tiny"), plugins.backend("staged-decode")
    way = road.Way(tiny, offer, Candidate("staged-decode", tiny.name, Fit(0, 0, 0, 0, 0, True, "resident")))
    found = bench.calibrate(way, python, h100, lambda *said: None)
    assert (found.card, found.pinned) == (CARD, H100.pinned)
    job, measured, unmeasured = default_job(klein), replace(h100, rates=found), replace(h100, rates=NO_RATES)
    assert memory.stage_seconds(klein, measured, job) == memory.stage_seconds(klein, unmeasured, job)
    whole = bench.calibrate(replace(way, model=klein), python, h100, lambda *said: None)
    assert whole.forward[0].flops == 1.3e11


@pytest.mark.slow
def test_a_machine_is_measured_and_the_plan_says_so(kleinctl):
    assert kleinctl("install", "--model", "klein-tiny").exit_code == 0
    answer = kleinctl("bench", "--calibrate", "--json")
    assert answer.exit_code == 0, answer.stderr
    document = conforms(answer.stdout)
    assert document["rates"]["model"] == "klein-tiny"
    assert document["rates"]["forward"] and document["rates"]["decode"] and document["rates"]["save_seconds"]
    assert json.loads((home() / rates.FILE).read_text()) == document
    assert "rates measured on this machine" in kleinctl("plan").stdout
    planned = conforms(kleinctl("plan", "--json").stdout)
    assert planned["hardware"]["rates"] == document["rates"]


def test_a_machine_that_was_not_measured_says_how_it_can_be(kleinctl):
    assert "Predicted, not measured" in (said := kleinctl("plan", "--gpu", "RTX 4090").stdout)
    assert "`kleinctl bench --calibrate` measures this machine" in said
