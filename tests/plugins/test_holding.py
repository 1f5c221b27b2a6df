"""Plans that would take more of the card than there is, or forget a block."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kleinctl_plugins import holding
from kleinctl_plugins.holding import Task

from kleinctl import Hardware, Model, memory
from kleinctl.hardware import imagine
from kleinctl.planner import default_job
from kleinctl.plugins import Plugins
from kleinctl.units import GIB

MODELS = Plugins(frozenset()).models
SIDES = st.sampled_from([512, 1024, 1536, 2048])


def task(model: Model = MODELS["klein-4b"], side: int = 1024, card: str = "RTX 4070 Ti SUPER") -> Task:
    return Task.of(model, imagine(card, 64 * GIB), default_job(model, width=side, height=side))


@settings(deadline=None)
@given(
    st.sampled_from(["klein-4b", "klein-base-4b", "klein-9b"]),
    SIDES,
    st.integers(2 * GIB, 40 * GIB),
    st.integers(0, 40 * GIB),
)
def test_a_plan_stays_within_its_room_and_every_unit_can_be_had(name, side, room, host):
    model = MODELS[name]
    plan = holding.fastest(task(model, side), room, host)
    if plan is None:
        return
    assert plan.vram_bytes <= room and plan.host_bytes <= host
    for held, units in (
        (plan.encoder, holding.encoder_units(model)),
        (plan.transformer, holding.transformer_units(model)),
    ):
        assert set(held.kept) <= set(held.resident) <= set(units)
        assert sorted((*held.kept, *held.host, *held.read)) == sorted(units)  # each is to be had in one way
        if held.way == "staged":
            assert set(held.read) == set(units)


@settings(deadline=None)
@given(SIDES, st.integers(3 * GIB, 24 * GIB))
def test_more_room_is_never_slower(side, room):
    less, more = (holding.fastest(task(side=side), each, 40 * GIB) for each in (room, room + GIB))
    assert less is None or (more is not None and more.seconds <= less.seconds * 1.03 + 0.02)


@pytest.mark.parametrize(
    ("gibibytes", "ram", "strategy"),
    [(24, 32, "resident"), (15.5, 16, "resident"), (7.5, 16, "streamed"), (3.8, 32, "streamed")],
)
def test_cards_from_four_gigabytes_up_run_klein(gibibytes, ram, strategy):
    plan = holding.fastest(task(), int(gibibytes * GIB), int(ram * GIB) - memory.PROCESS_BYTES)
    assert plan is not None and strategy in plan.strategy


@settings(deadline=None)
@given(st.integers(int(3.6 * GIB), 24 * GIB), st.integers(0, 14 * GIB))
def test_less_ram_makes_slower_and_refuses_no_card(room, host):
    less, more = (holding.fastest(task(), room, each + holding.READER_BYTES) for each in (host, host + GIB))
    assert less is not None and more is not None
    assert more.seconds <= less.seconds * 1.03 + 0.02


def test_what_is_read_for_each_picture_comes_from_the_disk_where_ram_cannot_hold_it():
    one, two = (holding.fastest(task(), 4 * GIB, host * GIB) for host in (6, 12))
    assert one is not None and two is not None
    assert one.strategy == "streamed from files" and two.strategy == "transformer streamed, encoder streamed from files"
    units = holding.transformer_units(MODELS["klein-4b"])
    read = sum(units[name] for name in one.transformer.read)
    assert read > GIB and not two.transformer.read
    assert one.seconds > two.seconds + read / memory.DISK_READ_RATE  # four steps need it four times


def test_little_ram_means_reading_again_instead_of_pinning():
    plan = holding.fastest(task(), 11 * GIB, GIB)
    assert plan is not None and plan.host_bytes < GIB
    assert plan.encoder.read and not plan.transformer.read


@settings(deadline=None)
@given(SIDES, st.integers(2 * GIB, 24 * GIB), st.integers(0, 16 * GIB))
def test_stepping_down_comes_to_an_end(side, room, host):
    """With little RAM the smallest plan that is allowed takes more of the card than the smallest there is."""
    now: holding.Holding | None = holding.best(task(side=side), room, host)
    seen = []
    while now is not None:
        seen.append(now.vram_bytes)
        now = holding.smaller(task(side=side), now, host)
    assert seen == sorted(set(seen), reverse=True)


def test_the_units_of_the_transformer_are_all_of_it():
    for model in MODELS.values():
        units = holding.transformer_units(model)
        assert sum(units.values()) == model.shape.transformer_bytes
        assert units[""] > 0
        assert len(units) == model.shape.double_blocks + model.shape.single_blocks + 1


def test_without_a_card_the_context_is_not_counted():
    model = MODELS["klein-tiny"]
    job = default_job(model)
    assert Task.of(model, Hardware(), job).base_bytes == model.shape.vae_bytes


@settings(deadline=None)
@given(SIDES, st.integers(4 * GIB, 20 * GIB), st.integers(0, GIB))
def test_for_a_larger_picture_the_last_to_come_go_first(side, room, less):
    """So that what they leave lies together: torch gives back no less than whole pieces."""
    one, other = (holding.best(task(side=side), each, 40 * GIB).encoder.kept for each in (room, room - less))
    both = min(len(one), len(other))
    assert one[:both] == other[:both]


def test_blocks_that_stream_lie_evenly_among_those_that_stay():
    names = [f"layers.{number}" for number in range(27)]
    for count in range(2, 26):
        stays = sorted(int(name[7:]) for name in holding._staying(names)[:count])
        gaps = [later - earlier for earlier, later in itertools.pairwise([*stays, 27 + stays[0]])]
        assert max(gaps) <= 2 * 27 / count + 2


def test_a_picture_that_fits_only_when_blocks_wait_for_each_other():
    large = task(side=1536, card="RTX 3050")
    room = int(3.6 * GIB)
    plan = holding.fastest(large, room, 40 * GIB)
    assert plan is not None and plan.slots == 1
    assert holding.fastest(large, room + GIB, 40 * GIB).slots == 2
    assert holding.fastest(task(), room, 40 * GIB).slots == 2


@pytest.mark.parametrize("name", ["staged-decode", "diffusers-offload"])
def test_the_models_own_precision_can_be_named(name):
    backend, klein, job = Plugins(frozenset()).backend(name).thing, MODELS["klein-4b"], default_job(MODELS["klein-4b"])
    hardware = imagine("RTX 4080", 64 * GIB)
    assert backend.fit(klein, hardware, replace(job, precision="bf16")) == backend.fit(klein, hardware, job)
    assert backend.fit(klein, hardware, replace(job, precision="fp32")).why_not.endswith("; fp32 was asked for.")


def test_a_slow_disk_is_not_waited_for_twice_by_the_first_picture():
    """What streams from the disk while the picture is made cannot be read before."""
    backend, klein = Plugins(frozenset()).backend("staged-decode").thing, MODELS["klein-4b"]
    before = []
    for ram in (8 * GIB, 64 * GIB):
        hardware, job = imagine("RTX 3050", ram), default_job(klein)
        hardware = replace(hardware, rates=replace(hardware.rates, disk=0.5e9))
        found = backend.fit(klein, hardware, job)
        before.append(found.seconds_first - found.seconds_next)
    host = imagine("RTX 3050", 8 * GIB).ram_available_bytes - memory.PROCESS_BYTES
    assert before[1] - before[0] > (sum(holding.encoder_units(klein).values()) - host) / 0.5e9 > 2


def test_fp8_reads_whole_files_for_what_it_holds_in_half_the_room():
    """A file has the model's own precision: packing saves memory, and no reading."""
    klein = MODELS["klein-4b"]
    fp8 = task(klein)
    fp8 = replace(fp8, job=replace(fp8.job, precision="fp8"))
    plan = holding._plan(fp8, 8 * GIB, 0, "staged", "staged", tiles=False, slots=2)
    read = sum(holding.encoder_units(klein).values()) + sum(holding.transformer_units(klein).values())
    assert plan.disk_bytes == read
    assert plan.seconds > read / memory.DISK_READ_RATE
