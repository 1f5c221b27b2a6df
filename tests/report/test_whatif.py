"""`--set`: what would be wrong if a machine were a little different."""

from __future__ import annotations

from pathlib import Path

import pytest

from kleinctl.checks import own_checks, run_checks
from kleinctl.environment import Environment
from kleinctl.facts import Facts
from kleinctl.facts.system import System
from kleinctl.hardware import Hardware
from kleinctl.problem import Misuse
from kleinctl.units import GIB
from kleinctl.whatif import changed
from tests.report import machines

CARD = Facts(
    machines.hardware(),
    environments=(Environment(Path("python"), {"torch": "2.9.0+cu128"}, "12.8"), Environment(Path("b"), {}, name="b")),
)


def card(*said: str):
    return changed(CARD, said).hardware.gpus[0]


def test_less_memory_is_free():
    assert card("vram_free=6GiB").vram_free_bytes == 6 * GIB
    assert changed(CARD, ["ram_available=3GiB"]).hardware.ram_available_bytes == 3 * GIB


def test_another_size_keeps_what_is_taken():
    old = CARD.hardware.gpus[0]
    taken = old.vram_bytes - old.vram_free_bytes
    assert card("vram=8GiB").vram_free_bytes == 8 * GIB - taken
    assert changed(CARD, ["ram=4GiB"]).hardware.ram_bytes == 4 * GIB


def test_another_card_keeps_its_driver():
    found = card("gpu=3060 12GB", "driver=550.90")
    assert (found.name, found.driver) == ("NVIDIA GeForce RTX 3060", "550.90")
    assert card("gpu=RTX 4090").driver == CARD.hardware.gpus[0].driver


def test_another_driver_disk_system_and_torch():
    found = changed(CARD, ["cuda_driver=12.4", "disk_free=5GB", "os=windows", "torch=2.8.0+cu126"])
    assert found.hardware.gpus[0].cuda_driver == "12.4"
    assert (found.hardware.disk_free_bytes, found.hardware.platform) == (5 * 10**9, "win32")
    assert {disk.free_bytes for disk in found.hardware.disks.values()} == {5 * 10**9}
    first, second = found.environments
    assert (first.packages["torch"], first.torch_cuda) == ("2.8.0+cu126", "12.6")
    assert "torch" not in second.packages
    assert changed(CARD, ["torch=2.8.0+cpu"]).environments[0].torch_cuda is None
    assert changed(CARD, ["platform=linux"]).hardware.platform == "linux"
    assert changed(CARD, ["vram_free=6"]).hardware.gpus[0].vram_free_bytes == 6 * 2**30


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("vramfree=6GiB", "Did you mean vram_free?"),
        ("vram_free", "has no value"),
        ("vram_free=99GiB", "has 16.0 GiB in all"),
        ("ram_available=900GiB", "in all"),
        ("vram_free=much", "no amount of memory"),
        ("ram=" + "9" * 400, "A number and a unit are wanted"),
        ("disk_free=99999999999GiB", "No machine has as much"),
        ("driver=newest", "no version"),
        ("torch=nightly", "no version of torch"),
        ("gpu=Voodoo 2", "no NVIDIA card"),
        ("os=BeOS", "no system"),
    ],
)
def test_a_setting_that_makes_no_sense(said, words):
    with pytest.raises(Misuse) as caught:
        changed(CARD, [said])
    problem = caught.value.problem
    assert words in problem.what + problem.why


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("gpu=RTX 4075 Ti", 'kleinctl doctor --set "gpu=RTX 4070 Ti"'),
        ("gpu=RTX 3060 64GB", 'kleinctl doctor --set "gpu=RTX 3060"'),
        ("vram_free=much", "kleinctl doctor --set vram_free=6GiB"),
    ],
)
def test_a_setting_that_makes_no_sense_has_a_hint_for_doctor(said, fix):
    with pytest.raises(Misuse) as caught:
        changed(CARD, [said])
    problem = caught.value.problem
    assert problem.fix == fix and problem.name.startswith("unknown-") and not problem.what[:1].isupper()


def test_a_card_of_several_sizes_is_named_as_doctor_takes_it():
    [remark] = changed(CARD, ["gpu=RTX 3060"]).hardware.remarks
    assert remark.endswith('8 GB are assumed, --set "gpu=RTX 3060 12GB" means the other')


def test_a_machine_without_a_card_is_given_one():
    bare = Facts(Hardware(platform="linux"))
    with pytest.raises(Misuse):
        changed(bare, ["vram_free=6GiB"])
    assert changed(bare, ["gpu=RTX 4070", "vram_free=6GiB"]).hardware.gpus[0].vram_free_bytes == 6 * GIB


def test_nothing_is_wrong_with_the_driver_of_a_card_that_is_only_imagined():
    bare = Facts(Hardware(platform="linux", container="docker"), system=System(libcuda=False, nouveau=True))
    asked = [check for check in own_checks() if check.name in ("nvidia-card", "no-driver", "container-without-gpu")]
    assert [found for each in run_checks(asked, bare.once(), []) for found in each.problems]
    given = changed(bare, ["gpu=RTX 4070"])
    assert not [found for each in run_checks(asked, given.once(), []) for found in each.problems]
    assert changed(given, ["driver=550.90"]).hardware.gpus[0].driver == "550.90"


def test_a_setting_without_a_value_is_not_told_to_be_meant():
    with pytest.raises(Misuse) as caught:
        changed(CARD, ["vram"])
    assert "has no value" in caught.value.problem.what
    assert "Did you mean" not in caught.value.problem.why


def test_an_unknown_driver_is_called_so(tmp_path, kleinctl):
    answer = kleinctl("doctor", "--set", "gpu=RTX 4070")
    assert "VRAM free, driver unknown\n" in answer.stdout


def test_an_unknown_setting_has_a_lasting_name():
    with pytest.raises(Misuse) as caught:
        changed(CARD, ["x=1"])
    assert caught.value.problem.name == "unknown-setting"


def test_doctor_from_a_report_with_less_memory(tmp_path, kleinctl):
    machines.write(tmp_path / "a.zip", Facts(machines.hardware()))
    answer = kleinctl("doctor", "--from", "a.zip", "--set", "vram_free=3GiB")
    assert "3.0 GiB of 16.0 GiB VRAM free" in answer.stdout
