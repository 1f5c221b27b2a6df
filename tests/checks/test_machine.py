"""Machines that are wrong in every way people's are, and the same machines in health."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kleinctl.checks import Check, CouldNotCheck, check, machine, run_checks
from kleinctl.facts import ComfyUI, System
from kleinctl.facts.system import Battery, WslConfig
from kleinctl.hardware import Gpu, Hardware, Mig, MigInstance, NvmlState, OtherGpu
from kleinctl.problem import Problem
from tests.conftest import REPOSITORY

FIXTURES = REPOSITORY / "tests" / "fixtures" / "hardware"
CHECKS = [each for each in vars(machine).values() if isinstance(each, Check)]
GB = 2**30
HEALTHY = System(home="/home/jo/.local/share/kleinctl", libcuda=True)
WINDOWS = System(home="C:\\Users\\Jo\\AppData\\Local\\kleinctl", libcuda=True, vc_runtime="14.44.35211")
NO_NVML = NvmlState("absent", "NVML Shared Library Not Found")
NVIDIA = OtherGpu("NVIDIA", "NVIDIA AD103 [GeForce RTX 4080]", "/sys/bus/pci/devices/0000:01:00.0", "nouveau")


def recorded(name: str) -> Hardware:
    return Hardware.from_json(json.loads((FIXTURES / f"{name}.json").read_text())["hardware"])


def problems(hardware: Hardware, system: System = HEALTHY, comfyui: ComfyUI | None = None) -> dict[str, Problem]:
    scenes = [{"comfyui": comfyui}] if comfyui else []
    results = run_checks(CHECKS, {"hardware": hardware, "system": system, "environments": ()}, scenes)
    assert not [each.why for each in results if "crashed" in each.why]
    return {problem.name: problem for each in results for problem in each.problems}


def card(hardware: Hardware, **changes: object) -> Hardware:
    return replace(hardware, gpus=(replace(hardware.gpus[0], **changes), *hardware.gpus[1:]))  # type: ignore[arg-type]


@pytest.fixture
def good() -> Hardware:
    return recorded("rtx-4070-ti-super")


@pytest.mark.parametrize(
    "name", ["h100", "laptop-rtx-4060", "rtx-3060-12gb", "rtx-4060", "rtx-4070-ti-super", "rtx-4090", "rtx-5090"]
)
def test_healthy_machines_are_silent(name):
    hardware = recorded(name)
    assert problems(hardware, WINDOWS if hardware.platform == "win32" else HEALTHY) == {}
    comfyui = ComfyUI("ComfyUI", "/home/jo/ComfyUI", arguments=("--lowvram",))
    assert problems(hardware, HEALTHY, comfyui) == {}


def test_every_problem_has_evidence_and_a_fix(good):
    broken = card(good, throttled=("heat",), vram_free_bytes=GB, compute_capability="7.5")
    found = problems(broken, replace(HEALTHY, libcuda=False, vc_runtime=""))
    assert len(found) >= 5 and all(each.evidence and each.fix for each in found.values())


def told(hardware: Hardware, system: System) -> dict[str, tuple[str, str]]:
    """How each check ended, and its line."""
    facts = {"hardware": hardware, "system": system, "environments": ()}
    return {each.name: (each.status, each.why) for each in run_checks(CHECKS, facts)}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no-bf16", "There is no NVIDIA card to use."),
        ("vram-taken", "There is no NVIDIA card to use."),
        ("card-throttled", "There is no NVIDIA card to use."),
        ("several-cards", "There is no NVIDIA card to use."),
        ("cuda-malloc-wanted", "There is no NVIDIA card to use."),
        ("no-driver", "There is no NVIDIA card."),
        ("card-hidden", "There is no NVIDIA card."),
        ("mig-slice", "There is no NVIDIA card."),
        ("container-without-gpu", "This is no container."),
        ("wsl-memory", "This is not WSL."),
        ("wslconfig-ignored", "This is not WSL."),
        ("page-file-too-small", "This is not Windows."),
        ("vc-runtime-missing", "This is not Windows."),
    ],
)
def test_what_a_machine_does_not_have_is_not_called_well(name, why, good):
    assert told(replace(good, gpus=()), HEALTHY)[name] == ("skipped", why)


def test_a_document_that_says_nothing_of_the_system_proves_nothing(good):
    found = told(good, System())
    assert found["path-trouble"] == ("skipped", "Nothing is known of the system around the card.")
    assert found["no-driver"] == ("skipped", "Nothing is known of libcuda.")


def test_windows_that_does_not_say_how_much_it_can_promise():
    windows = replace(recorded("rtx-4090"), commit_free_bytes=None)
    found = told(windows, replace(HEALTHY, vc_runtime=None))
    assert found["page-file-too-small"] == found["vc-runtime-missing"] == ("skipped", "Windows did not say.")


# The driver


def test_no_card():
    found = problems(recorded("no-nvml"), replace(HEALTHY, libcuda=False))
    assert set(found) == {"nvidia-card"}
    assert found["nvidia-card"].severity == "warning"


def test_a_card_that_nouveau_runs():
    hardware = replace(recorded("no-nvml"), other_gpus=(NVIDIA,))
    problem = problems(hardware, replace(HEALTHY, libcuda=False, nouveau=True))["no-driver"]
    assert problem.what == "NVIDIA AD103 [GeForce RTX 4080] has no NVIDIA driver"
    assert problem.why.startswith("Nouveau, which has no CUDA, runs it")
    assert (problem.ref, problem.severity) == ("A13", "error")


@pytest.mark.parametrize(
    ("wsl", "nodes", "fix"),
    [(1, (), "wsl --set-version"), (2, ("/dev/dxg",), "in Windows, then: wsl --shutdown")],
)
def test_wsl_without_the_windows_driver(wsl, nodes, fix):
    system = replace(HEALTHY, libcuda=False, device_nodes=nodes)
    problem = problems(replace(recorded("no-nvml"), wsl=wsl, other_gpus=()), system)["no-driver"]
    assert fix in problem.fix


def test_libcuda_is_missing_beside_a_driver_that_answers(good):
    problem = problems(good, replace(HEALTHY, libcuda=False))["no-driver"]
    assert problem.what == "libcuda.so.1 is missing"
    wsl = problems(replace(good, wsl=2), replace(HEALTHY, libcuda=False))["no-driver"]
    assert wsl.fix == "export LD_LIBRARY_PATH=/usr/lib/wsl/lib:$LD_LIBRARY_PATH"


def test_a_driver_that_was_updated_and_not_restarted():
    problem = problems(recorded("nvml-mismatch"))["driver-library-mismatch"]
    assert problem.ref == "A11" and "570.133.07" in problem.why


@pytest.mark.parametrize(("status", "name"), [("no-permission", "driver-no-permission"), ("error", "driver-broken")])
def test_a_driver_that_does_not_answer(status, name, good):
    assert name in problems(replace(good, gpus=(), nvml=NvmlState(status, "its words")))


def test_a_card_that_fell_off_the_bus(good):
    found = problems(replace(good, nvml=NvmlState("ok", "card 1: GPU is lost")))
    assert "card 1: GPU is lost" in found["card-lost"].why


def test_a_container_started_without_gpus_all():
    hardware = replace(recorded("no-nvml"), container="docker")
    system = replace(HEALTHY, libcuda=False, kernel_driver="570.133.07")
    problem = problems(hardware, system)["container-without-gpu"]
    assert problem.what == "this docker container was started without the card"
    assert "driver 570.133.07" in problem.why and "--gpus all" in problem.fix
    assert set(problems(hardware, replace(system, kernel_driver=None))) == {"nvidia-card"}


def test_a_container_with_half_of_the_cards_files(good):
    nodes = ("/dev/nvidiactl", "/dev/nvidia0")
    problem = problems(replace(good, container="docker"), replace(HEALTHY, device_nodes=nodes))["container-without-gpu"]
    assert problem.what == "this docker container lacks /dev/nvidia-uvm"
    assert problems(good, replace(HEALTHY, device_nodes=nodes)) == {}  # elsewhere it is made when first wanted


@pytest.mark.parametrize(
    ("gpu", "name", "words"),
    [
        (Gpu("RTX 4090", "8.9", 24 * GB, 24 * GB, "520.61.05"), "driver-too-old", "has driver 520.61.05"),
        (Gpu("RTX 5090", "12.0", 32 * GB, 32 * GB, "566.36"), "driver-too-old", "570"),
        (Gpu("GTX 780", "3.5", 6 * GB, 6 * GB, "470.1"), "torch-dropped-card", "builds start at 5.0"),
    ],
)
def test_a_card_or_driver_that_no_torch_is_made_for(gpu, name, words, good):
    problem = problems(replace(good, gpus=(gpu,)))[name]
    assert problem.severity == "error" and words in problem.why


def test_a_python_that_torch_is_not_made_for(good):
    new = replace(good, python=replace(good.python, version="3.15.0"))
    assert problems(new)["no-torch-build"].severity == "error"
    assert problems(replace(new, gpus=(), nvml=NO_NVML))["no-torch-build"].severity == "warning"
    narrow = replace(good, python=replace(good.python, bits=32))
    assert "32-bit" in problems(narrow)["no-torch-build"].what


# The card


def test_cuda_visible_devices_hides_the_only_card(good):
    hardware = card(good, hidden=True)
    problem = problems(hardware, replace(HEALTHY, variables={"CUDA_VISIBLE_DEVICES": "-1"}))["card-hidden"]
    assert (problem.severity, problem.fix) == ("error", "unset CUDA_VISIBLE_DEVICES")
    assert "'-1'" in problem.why


def test_the_small_card_is_hidden_on_purpose():
    hardware = recorded("two-cards")
    hardware = replace(hardware, gpus=(replace(hardware.gpus[0], vram_free_bytes=24 * GB), hardware.gpus[1]))
    shown = replace(hardware, gpus=(hardware.gpus[0], replace(hardware.gpus[1], hidden=True)))
    assert problems(shown) == {}
    wrong = replace(hardware, gpus=(replace(hardware.gpus[0], hidden=True), hardware.gpus[1]))
    assert problems(wrong)["card-hidden"].what == "NVIDIA GeForce RTX 4090 is hidden"


def test_the_big_card_is_taken_and_the_small_one_used():
    problem = problems(recorded("two-cards"))["several-cards"]
    assert problem.what == "NVIDIA GeForce RTX 3060 is used, for NVIDIA GeForce RTX 4090 is taken"
    assert "(ollama)" in problem.why


def test_a_larger_card_that_is_slower_is_not_called_taken():
    hardware = recorded("two-cards")
    old = replace(hardware.gpus[0], name="Tesla P40", compute_capability="6.1", vram_free_bytes=20 * GB, processes=())
    hardware = replace(hardware, gpus=(old, hardware.gpus[1]))
    assert (hardware.gpu, problems(hardware)) == (hardware.gpus[1], {})


def test_a_number_that_means_another_card():
    hardware = recorded("two-cards")
    hardware = replace(hardware, gpus=(replace(hardware.gpus[0], vram_free_bytes=24 * GB), hardware.gpus[1]))
    numbered = replace(HEALTHY, variables={"CUDA_VISIBLE_DEVICES": "0,1"})
    problem = problems(hardware, numbered)["several-cards"]
    assert problem.fix == "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
    ordered = replace(HEALTHY, variables={"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert problems(hardware, ordered) == {} == problems(hardware)


def test_a_card_in_slices():
    hardware = recorded("h100-mig")
    assert "mig-slice" not in problems(hardware)
    numbered = problems(hardware, replace(HEALTHY, variables={"CUDA_VISIBLE_DEVICES": "0"}))["mig-slice"]
    assert numbered.fix == "export CUDA_VISIBLE_DEVICES=MIG-00000000-0000-0000-0000-000000000000"
    uncut = replace(hardware.gpus[0], mig=Mig(True), vram_bytes=0, vram_free_bytes=0)
    assert "there is none to use" in problems(replace(hardware, gpus=(uncut,)))["mig-slice"].what
    assert MigInstance in {type(each) for each in hardware.gpus[0].mig.instances}


def test_vram_taken_by_another_server(good):
    problem = problems(card(good, vram_free_bytes=good.gpus[0].vram_bytes // 3))["vram-taken"]
    assert "Xorg (pid " in problem.why and problem.ref == "A16"
    windows = recorded("rtx-4090")
    problem = problems(card(windows, vram_free_bytes=4 * GB), WINDOWS)["vram-taken"]
    assert "dwm.exe" in problem.why and "Windows does not say" in problem.why


def test_vram_taken_by_the_model_that_kleinctl_keeps_warm(good):
    full = card(good, vram_free_bytes=good.gpus[0].vram_bytes // 3)
    assert problems(full, replace(HEALTHY, serving=True))["vram-taken"].fix.startswith("kleinctl serve --free ")


def test_a_card_without_bf16():
    problem = problems(recorded("gtx-1080-ti"))["no-bf16"]
    assert "sm_61" in problem.why and problem.severity == "warning"


def test_comfyui_is_forced_to_calculate_in_fp8_on_an_rtx_3060():
    def told(*arguments: str) -> ComfyUI:
        return ComfyUI("ComfyUI", "/home/jo/ComfyUI", arguments=arguments)

    hardware = recorded("rtx-3060-12gb")
    problem = problems(hardware, HEALTHY, told("--supports-fp8-compute"))["no-fp8-maths"]
    assert problem.severity == "error" and "sm_86" in problem.why
    assert problems(hardware, HEALTHY, told("--fast", "fp8_matrix_mult"))["no-fp8-maths"].severity == "warning"
    assert problems(hardware, HEALTHY, told("--fast")) == {}
    assert problems(recorded("rtx-4090"), WINDOWS, told("--fast", "fp8_matrix_mult")) == {}


def test_cuda_malloc_async_on_a_gtx_1650(good):
    asked = replace(HEALTHY, variables={"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"})
    small = card(good, name="NVIDIA GeForce GTX 1650", compute_capability="7.5")
    assert problems(small, asked)["cuda-malloc-unsupported"].fix == "unset PYTORCH_CUDA_ALLOC_CONF"
    assert problems(good, asked) == {}
    assert "cuda-malloc-unsupported" not in problems(small)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"throttled": ("heat",), "temperature_celsius": 91}, "91 °C"),
        ({"throttled": ("hardware",)}, "power supply"),
        ({"power_limit_watts": 100}, "100 of its usual 285 W"),
        ({"pcie_width_now": 1}, "1 of 16 lanes"),
    ],
)
def test_a_card_that_is_held_back(changes, words, good):
    problem = problems(card(good, **changes))["card-throttled"]
    assert words in problem.why and (problem.ref, problem.severity) == ("A31", "warning")


def test_a_laptop_on_its_battery():
    hardware = recorded("laptop-rtx-4060")
    problem = problems(hardware, replace(HEALTHY, battery=Battery(62, False)))["card-throttled"]
    assert "battery (62%)" in problem.why and problem.fix.startswith("plug the computer in")
    assert problems(hardware, replace(HEALTHY, battery=Battery(62, True))) == {}
    assert problems(card(hardware, throttled=("power",))) == {}  # every card at work is


# Memory


CONFIG = WslConfig("/mnt/c/Users/Jo/.wslconfig", True, lines=("[wsl2]", "processors=4", "[experimental]", "x=1"))


def test_wsl_has_half_of_16_gb(good):
    hardware = replace(good, wsl=2, ram_bytes=8 * GB, swap_bytes=2 * GB)
    problem = problems(hardware, replace(HEALTHY, wslconfig=CONFIG))["wsl-memory"]
    assert problem.what == "WSL gives Linux only 8.0 GiB of RAM"
    assert problem.why.endswith("there are 10.0 GiB. staged-decode runs with less, and slower.")
    assert problem.remedy is not None and (problem.remedy.action, problem.remedy.consent) == ("write-text", "ask")
    assert problem.remedy.arguments["text"].splitlines() == [
        "[wsl2]", "memory=12GB", "swap=16GB", "processors=4", "[experimental]", "x=1"
    ]  # fmt: skip
    absent = replace(CONFIG, exists=False, lines=())
    written = problems(hardware, replace(HEALTHY, wslconfig=absent))["wsl-memory"].remedy
    assert written is not None and written.arguments["text"] == "[wsl2]\nmemory=12GB\nswap=16GB\n"
    assert problems(replace(hardware, swap_bytes=16 * GB), replace(HEALTHY, wslconfig=CONFIG)) == {}


def test_wslconfig_in_utf_16(good):
    config = replace(CONFIG, encoding="utf-16", memory_bytes=12 * GB)
    found = problems(replace(good, wsl=2, ram_bytes=8 * GB, swap_bytes=0), replace(HEALTHY, wslconfig=config))
    problem = found["wslconfig-ignored"]
    assert "UTF-16" in problem.why and problem.remedy is not None
    assert problem.remedy.arguments["text"].startswith("[wsl2]\nprocessors=4\n")
    assert found["wsl-memory"].remedy is None  # one hand at a file at a time


def test_wslconfig_with_txt_behind_its_name(good):
    config = replace(CONFIG, exists=False, misnamed=(".wslconfig.txt",), lines=())
    problem = problems(replace(good, wsl=2), replace(HEALTHY, wslconfig=config))["wslconfig-ignored"]
    assert problem.what == ".wslconfig.txt is not read by WSL"
    assert problem.remedy is not None and problem.remedy.arguments == {
        "path": "/mnt/c/Users/Jo/.wslconfig.txt",
        "to": "/mnt/c/Users/Jo/.wslconfig",
    }


def test_wslconfig_was_changed_and_wsl_goes_on(good):
    hardware = replace(good, wsl=2, ram_bytes=16 * GB)
    config = replace(CONFIG, memory_bytes=24 * GB)
    problem = problems(hardware, replace(HEALTHY, wslconfig=config))["wslconfig-ignored"]
    assert "It says memory=24.0 GiB; Linux has 16.0 GiB." in problem.why
    right = replace(hardware, ram_bytes=int(23.4 * GB))
    assert problems(right, replace(HEALTHY, wslconfig=config)) == {}


def test_a_paging_file_that_is_off():
    hardware = replace(recorded("rtx-4060"), commit_free_bytes=6 * GB)
    problem = problems(hardware, WINDOWS)["page-file-too-small"]
    assert "6.0 GiB of RAM and paging file are left" in problem.why and problem.ref == "A08"


@pytest.mark.parametrize(("version", "severity"), [("", "error"), ("14.29.30133", "warning")])
def test_windows_without_the_visual_cpp_runtime(version, severity):
    problem = problems(recorded("rtx-4090"), replace(WINDOWS, vc_runtime=version))["vc-runtime-missing"]
    assert problem.severity == severity and problem.fix.startswith("winget install")


# Where things lie


@pytest.mark.parametrize(
    ("home", "words"),
    [
        ("C:\\Users\\Jürgen\\AppData\\Local\\kleinctl", "not plain ASCII"),
        ("C:\\Users\\Jo\\OneDrive - Firma\\kleinctl", "in OneDrive"),
        ("C:\\Program Files\\kleinctl", "Program Files"),
        ("C:\\" + "a" * 110, "113 characters long"),
    ],
)
def test_a_home_in_a_troublesome_place(home, words):
    problem = problems(recorded("rtx-4090"), replace(WINDOWS, home=home, long_paths=False))["path-trouble"]
    assert words in problem.why and problem.path == home and "KLEINCTL_HOME" in problem.fix


@pytest.mark.parametrize(
    ("disk", "wsl", "words"),
    [
        ({"network": True, "filesystem": "nfs4"}, None, "a network disk"),
        ({"filesystem": "exfat"}, None, "exFAT"),
        ({"filesystem": "9p"}, 2, "a Windows disk seen from WSL"),
    ],
)
def test_a_home_on_a_troublesome_disk(disk, wsl, words, good):
    disks = {name: replace(each, **disk) for name, each in good.disks.items()}
    problem = problems(replace(good, disks=disks, wsl=wsl))["path-trouble"]
    assert words in problem.why and problem.severity == "warning"


def test_umlauts_are_fine_on_linux(good):
    assert problems(good, replace(HEALTHY, home="/home/jürgen/kleinctl")) == {}


def test_comfyui_in_program_files():
    comfyui = ComfyUI("ComfyUI", "C:\\Program Files\\ComfyUI")
    problem = problems(recorded("rtx-4090"), WINDOWS, comfyui)["path-trouble"]
    assert problem.what == "ComfyUI in ComfyUI lies where things go wrong"


def test_a_card_that_is_newer_than_every_build_of_torch(good):
    problem = problems(card(good, compute_capability="14.0"))["torch-lacks-card"]
    assert "newer than the builds" in problem.why and problem.ref == "A03"


def test_a_hidden_card_on_windows():
    windows = recorded("rtx-4090")
    hidden = card(windows, hidden=True)
    problem = problems(hidden, replace(WINDOWS, variables={"CUDA_VISIBLE_DEVICES": "-1"}))["card-hidden"]
    assert problem.fix == r"reg delete HKCU\Environment /v CUDA_VISIBLE_DEVICES /f   # then open a new terminal"


def test_memory_that_is_taken_by_nobody_knows_whom():
    problem = problems(recorded("h100-mig"))["vram-taken"]
    assert problem.why == "The driver does not say by whom."
    assert problem.fix.startswith("nvidia-smi")


# How a check ends


def test_a_scene_that_crashes_a_check_hides_no_other():
    @check("odd")
    def odd(number: int) -> Problem:
        return Problem(f"{12 // number} is wrong", "Because.", "mend it")

    [result] = run_checks([odd], {}, [{"number": 3}, {"number": 0}, {"number": 4}])
    assert (result.status, result.why) == (
        "skipped",
        "The check crashed: ZeroDivisionError: integer division or modulo by zero",
    )
    assert [each.what for each in result.problems] == ["4 is wrong", "3 is wrong"]


def test_a_check_may_know_enough_of_one_scene():
    @check("some")
    def some(number: int) -> None:
        if number == 3:
            raise CouldNotCheck("It is three.")

    only, one_of_two = (run_checks([some], {}, [{"number": n} for n in numbers])[0] for numbers in ((3,), (3, 4)))
    assert (only.status, only.why) == ("skipped", "It is three.")
    assert one_of_two.status == "ok"
