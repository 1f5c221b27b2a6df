"""The arithmetic agrees with what was measured and published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kleinctl import memory
from kleinctl.hardware import imagine
from kleinctl.hardware.facts import Disk
from kleinctl.manifest import Model
from kleinctl.planner import choose, compare, default_job
from kleinctl.plugins import Plugins
from kleinctl.units import GIB

TERA = 1e12


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins(frozenset())


@pytest.fixture(scope="module")
def klein(plugins: Plugins) -> Model:
    return plugins.model("klein-4b")


@pytest.mark.parametrize(
    ("side", "tera_flop"), [(512, 10.17), (768, 19.74), (1024, 34.82), (1440, 75.65), (2048, 191.39)]
)
def test_flop_of_a_step_as_counted_by_torch(klein, side, tera_flop):
    assert memory.step_flop(klein, default_job(klein, width=side, height=side)) == pytest.approx(
        tera_flop * TERA, rel=0.01
    )


@pytest.mark.parametrize(("side", "gibibytes"), [(512, 0.69), (1024, 2.41), (1536, 5.39), (2048, 9.57)])
def test_decode_memory_goes_through_the_measured_points(klein, side, gibibytes):
    found = memory.decode_bytes(klein, default_job(klein, width=side, height=side))
    assert 0 < found - gibibytes * GIB < 0.1 * GIB  # with less than measured, the bits change before memory runs out


def test_a_reference_picture_costs_as_much_as_a_megapixel_more(klein, tmp_path):
    edit = default_job(klein, images=(tmp_path / "a.png",))
    larger = default_job(klein, width=1024, height=2048)
    assert memory.denoise_bytes(klein, edit) == memory.denoise_bytes(klein, larger)


# Everything resident, bf16, 1024 x 1024, 4 steps: published by vipshop/cache-dit (docs/user_guide/QUANTIZATION.md).
@pytest.mark.parametrize(("card", "seconds"), [("RTX 5090", 0.97), ("L20", 2.13)])
def test_predicted_seconds_of_a_resident_model_are_near_published_ones(klein, card, seconds):
    encode, forward, decode = memory.stage_seconds(klein, imagine(card, 64 * GIB), default_job(klein))
    predicted = encode + 4 * forward + decode
    assert predicted == pytest.approx(seconds, rel=0.25)


def test_offload_peak_is_near_the_measured_one(plugins, klein):
    """7.8 GiB of tensors and 17.6 GiB of host memory at 1024 x 1024 (docs/measurements.md)."""
    fit = plugins.backend("diffusers").thing.fit(klein, imagine("RTX 4090", 64 * GIB), default_job(klein))
    assert fit.vram_bytes - memory.CONTEXT_BYTES == pytest.approx(7.8 * GIB, rel=0.05)
    assert fit.ram_bytes == pytest.approx(17.6 * GIB, rel=0.1)


def test_sixteen_gigabytes_of_ram_are_not_enough_to_offload_but_enough_to_stage(plugins, klein):
    """The model card's path was killed by the kernel with 16 GiB."""
    hardware = imagine("RTX 4070 Ti SUPER", 16 * GIB)
    fits = {each.backend: each for each in compare(plugins.backends.values(), klein, hardware, default_job(klein))}
    assert not fits["diffusers-offload"].runs
    assert "of RAM" in fits["diffusers-offload"].why_not
    assert fits["staged-decode"].runs


def test_the_faster_backend_that_fits_is_chosen_and_says_why(plugins, klein):
    hardware = imagine("RTX 4070 Ti SUPER", 32 * GIB)
    choice = choose(compare(plugins.backends.values(), klein, hardware, default_job(klein)))
    assert choice.candidate.backend == "staged-decode"
    assert "diffusers-offload would take" in choice.why


def test_a_card_that_is_too_small_is_told_the_figures(plugins, klein):
    hardware = imagine("RTX 3050 8GB", 32 * GIB)
    found = compare(plugins.backends.values(), klein, hardware, default_job(klein, width=4096, height=4096))
    assert choose(found) is None
    assert all("GiB of VRAM;" in each.why_not for each in found if each.backend != "comfyui-fp8")


def test_no_card_means_the_small_model_only(plugins, klein):
    hardware = imagine(None, 16 * GIB)
    assert choose(compare(plugins.backends.values(), klein, hardware, default_job(klein))) is None
    small = [model for model in plugins.models.values() if "cpu" in model.devices]
    assert small
    for model in small:
        assert choose(compare(plugins.backends.values(), model, hardware, default_job(model))) is not None


def test_guidance_doubles_the_forwards_of_a_base_model_only(plugins, klein):
    base = plugins.model("klein-base-4b")
    assert memory.forwards(base, default_job(base)) == 2 * base.defaults.steps
    assert memory.forwards(klein, default_job(klein, guidance=4.0)) == klein.defaults.steps


@pytest.mark.parametrize(
    ("backend", "free", "side", "gibibytes"),
    [
        ("diffusers", 16, 1024, 8.73),
        ("staged", 16, 512, 13.94),
        ("staged", 16, 1024, 14.23),
        ("staged", 12, 1024, 10.80),
        ("staged", 8, 512, 7.05),
        ("staged", 8, 1024, 7.19),
        ("staged", 6, 512, 5.37),
        ("staged", 6, 1024, 5.41),
    ],
)
def test_predicted_vram_is_near_what_a_full_size_run_took(plugins, klein, backend, free, side, gibibytes):
    """On an H100 with so much free, the CUDA context included (docs/measurements.md)."""
    hardware = imagine("H100", 64 * GIB)
    card = replace(hardware.gpus[0], vram_free_bytes=free * GIB)
    job = default_job(klein, width=side, height=side)
    fit = plugins.backend(backend).thing.fit(klein, replace(hardware, gpus=(card,)), job)
    assert fit.vram_bytes == pytest.approx(gibibytes * GIB, rel=0.05)


def test_a_driver_too_old_for_any_torch_is_told_before_anything_is_fetched(plugins, klein):
    hardware = imagine("RTX 4070 Ti SUPER", 32 * GIB)
    old = replace(hardware, gpus=(replace(hardware.gpus[0], driver="450.80"),))
    found = compare(plugins.backends.values(), klein, old, default_job(klein))
    assert choose(found) is None
    ours = [each for each in found if each.backend != "comfyui-fp8"]  # that one is not installed to begin with
    assert ours and all(each.problem.name == "no-torch-build" and "450.80" in each.why_not for each in ours)


def test_a_full_card_leaves_the_small_model_to_the_processor(plugins):
    hardware = imagine("RTX 4070 Ti SUPER", 32 * GIB)
    full = replace(hardware, gpus=(replace(hardware.gpus[0], vram_free_bytes=GIB // 4),))
    tiny = next(model for model in plugins.models.values() if "cpu" in model.devices)
    choice = choose(compare(plugins.backends.values(), tiny, full, default_job(tiny)))
    assert choice.candidate.device == "cpu"


def test_a_hidden_card_is_said_to_be_hidden(plugins, klein):
    hardware = imagine("RTX 4070 Ti SUPER", 32 * GIB)
    hidden = replace(hardware, gpus=(replace(hardware.gpus[0], hidden=True),))
    [first, *_] = compare(plugins.backends.values(), klein, hidden, default_job(klein))
    assert "is hidden by CUDA_VISIBLE_DEVICES" in first.why_not


def test_weights_that_are_read_again_take_longer_from_a_disk_that_turns(plugins, klein):
    backend = plugins.backend("staged-decode").thing
    solid = imagine("RTX 3060", 8 * GIB)
    turning = replace(solid, disks={"models": Disk("/models", 0, 0, rotational=True)})
    fits = [backend.fit(klein, each, default_job(klein)) for each in (solid, turning)]
    assert fits[1].seconds_next > 3 * fits[0].seconds_next
    assert fits[1].seconds_first > 3 * fits[0].seconds_first
