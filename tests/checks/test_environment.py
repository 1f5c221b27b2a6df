"""Environments as they really look on disk: dist-info folders, torch/version.py, a venv's notes; and what is said."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kleinctl.checks import Check, environment, run_checks
from kleinctl.environment import Environment, inspect
from kleinctl.facts import Facts, Probe, System
from kleinctl.hardware import Gpu, Hardware, Python
from kleinctl.problem import Problem, shell

CHECKS = [each for each in vars(environment).values() if isinstance(each, Check)]
GB = 2**30
PYTHON = Python("3.12.8", "/usr/bin/python3")
MACHINE = Hardware(platform="linux", os="Ubuntu 24.04", machine="x86_64", python=PYTHON, ram_bytes=32 * GB)


def card(name: str = "RTX 4090", capability: str = "8.9", driver: str = "580.65.06") -> Hardware:
    return replace(MACHINE, gpus=(Gpu(name, capability, 24 * GB, 24 * GB, driver=driver),))


#: What packages say in their METADATA, as they really do.
REQUIRES = {
    "torchvision": ("numpy", "torch (=={torch})", "pillow (!=8.3.*,>=5.3.0)"),
    "diffusers-0.40.0": ("huggingface-hub<2.0,>=1.23.0", "numpy", "Pillow", 'torch>=2.6; extra == "torch"'),
    "transformers-4.57.1": ("huggingface-hub<1.0,>=0.34.0", "numpy>=1.17", "tokenizers<=0.23.0,>=0.22.0"),
    "transformers-5.5.0": ("huggingface-hub<2.0,>=1.5.0", "numpy>=1.17", "tokenizers<=0.23.0,>=0.22.0"),
    "torch-2.8.0": ('triton==3.4.0; platform_system == "Linux" and platform_machine == "x86_64"',),
    "xformers-0.0.32.post2": ("numpy", "torch==2.8.0"),
    "opencv-python-4.9.0.80": (
        'numpy>=1.21.2; python_version >= "3.10"', 'numpy<2.0,>=1.26.0; python_version < "3.13"'
    ),
}  # fmt: skip
HEALTHY = {
    "torch": "2.13.0+cu130",
    "torchvision": "0.28.0+cu130",
    "torchaudio": "2.13.0+cu130",
    "triton": "3.6.0",
    "diffusers": "0.40.0",
    "transformers": "5.5.0",
    "tokenizers": "0.22.2",
    "huggingface_hub": "1.24.0",
    "accelerate": "1.15.0",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "comfyui_frontend_package": "1.30.0",
}


def venv(folder: Path, cuda: str | None = "13.0", **packages: str) -> Path:
    """The Python of a venv with these packages, without their code."""
    site = folder / "lib" / "python3.12" / "site-packages"
    for name, version in packages.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        bare = f"{name.replace('_', '-')}-{version.partition('+')[0]}"
        lines = REQUIRES.get(bare) or REQUIRES.get(name, ())
        asked = [line.format(torch=packages.get("torch", "").partition("+")[0]) for line in lines]
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        text += "".join(f"Requires-Dist: {line}\n" for line in asked) + "\nRequires-Dist: in the description\n"
        (info / "METADATA").write_text(text)
    if "torch" in packages:
        (site / "torch").mkdir()
        told = f"__version__ = '{packages['torch']}'\ncuda: Optional[str] = {cuda!r}\n"
        (site / "torch" / "version.py").write_text(told)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.12.8\n")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text("")
    return python


def comfyui(folder: Path, cuda: str | None = "13.0", **packages: str) -> Environment:
    """The environment of a ComfyUI, read from its folder."""
    return inspect(venv(folder, cuda, **{**HEALTHY, **packages}), "ComfyUI")


def problems(
    *environments: Environment,
    hardware: Hardware = MACHINE,
    system: System | None = None,
    probe: Probe | None = None,
) -> dict[str, Problem]:
    """What the checks of environments say to facts that went through a report."""
    facts = Facts(hardware, system or System(), environments=environments, probes=(probe,) if probe else ())
    again = Facts.from_json(facts.to_json())
    results = run_checks(CHECKS, again.once(), again.scenes())
    assert not [each.why for each in results if "crashed" in each.why]
    found = {problem.name: problem for each in results for problem in each.problems}
    assert all(problem.evidence for problem in found.values())
    return found


def test_an_environment_in_health_is_silent(tmp_path):
    found = comfyui(tmp_path)
    assert (found.python_version, found.torch_cuda, found.leaks) == ("3.12.8", "13.0", {})
    assert problems(found, hardware=card()) == {}
    assert problems(replace(found, name="this"), hardware=card()) == {}
    assert problems(replace(found, name="cu130-0", managed=True), hardware=card("RTX 5090", "12.0")) == {}


def test_the_environment_of_these_tests_is_silent():
    assert problems(inspect()) == {}


# torch and the card


def test_a_torch_without_cuda_in_comfyui(tmp_path):
    problem = problems(comfyui(tmp_path, None, torch="2.13.0+cpu"), hardware=card())["torch-without-cuda"]
    assert problem.what == "the torch 2.13.0+cpu of the Python of ComfyUI cannot use RTX 4090"
    assert (problem.severity, problem.ref) == ("error", "A02")
    assert problem.fix.endswith(
        "-s -m pip install torch==2.13.0+cu130 torchvision==0.28.0+cu130 torchaudio "
        "--index-url https://download.pytorch.org/whl/cu130"
    )
    assert problem.remedy is not None and problem.remedy.consent == "ask"
    assert problem.remedy.arguments["index"] == "https://download.pytorch.org/whl/cu130"


def test_a_torch_without_cuda_beside_kleinctl_is_a_warning_and_in_its_own_is_built_again(tmp_path):
    found = comfyui(tmp_path, None, torch="2.13.0+cpu", torchvision="0.28.0+cpu", torchaudio="2.13.0+cpu")
    beside = problems(replace(found, name="this"), hardware=card())["torch-without-cuda"]
    assert beside.severity == "warning" and beside.remedy is None
    assert beside.why.endswith("kleinctl makes an environment of its own with one that can.")
    own = problems(replace(found, name="cpu-1", managed=True), hardware=card())["torch-without-cuda"]
    assert own.remedy is not None and (own.remedy.action, own.remedy.consent) == ("rebuild-environment", "auto")
    assert problems(found) == {}  # no card, no need


@pytest.mark.parametrize(
    ("torch", "cuda", "hardware", "name", "words"),
    [
        ("2.7.1+cu126", "12.6", card("RTX 5090", "12.0"), "torch-lacks-card", "no kernels for RTX 5090 (sm_120)"),
        ("2.13.0+cu130", "13.0", card("GTX 1080 Ti", "6.1"), "torch-dropped-card", "was not made for GTX 1080 Ti"),
        ("2.10.0+cu128", "12.8", card("GTX 1070", "6.1"), "torch-dropped-card", "was not made for GTX 1070 (sm_61)"),
        (
            "2.13.0+cu130",
            "13.0",
            card(driver="570.86"),
            "driver-too-old",
            "wants driver 580 or newer",
        ),
    ],
)
def test_a_torch_for_other_cards_or_drivers(torch, cuda, hardware, name, words, tmp_path):
    tag = torch.partition("+")[2]
    packages = {"torch": torch, "torchvision": f"0.22.1+{tag}", "torchaudio": f"2.7.1+{tag}"}
    problem = problems(comfyui(tmp_path, cuda, **packages), hardware=hardware)[name]
    assert words in problem.why and problem.remedy is not None
    assert "https://download.pytorch.org/whl/cu1" in problem.fix
    assert all(Requirement(each) for each in problem.remedy.arguments["packages"].split())


# Packages among themselves


def test_a_node_replaced_torch_and_left_torchvision(tmp_path):
    found = comfyui(tmp_path, torchvision="0.26.0+cu128")
    problem = problems(found, hardware=card())["torch-versions-differ"]
    assert problem.why == "One was built for cu130, the other for cu128."
    assert "torchvision==0.28.0+cu130" in problem.fix and problem.ref == "A21"


def test_torchvision_of_another_torch(tmp_path):
    packages = {**HEALTHY, "torchvision": "0.28.0+cu130"}
    python = venv(tmp_path, **packages)
    metadata = next(tmp_path.rglob("torchvision-*/METADATA"))
    metadata.write_text("Name: torchvision\nRequires-Dist: torch (==2.12.1)\n")
    assert problems(inspect(python, "ComfyUI"))["torch-versions-differ"].why == "It wants torch==2.12.1."
    metadata.unlink()
    assert problems(inspect(python, "ComfyUI")) == {}
    older = replace(inspect(python, "ComfyUI"), packages={"torch": "2.13.0", "torchvision": "0.26.0"})
    assert problems(older)["torch-versions-differ"].why == "torchvision 0.26 was made for torch 2.11."


def test_xformers_of_another_torch(tmp_path):
    found = comfyui(tmp_path, xformers="0.0.32.post2")
    problem = problems(found)["optional-packages-mismatched"]
    assert "xformers 0.0.32.post2 wants torch==2.8.0; it is 2.13.0+cu130." in problem.why
    assert (problem.severity, problem.ref) == ("warning", "A22")
    assert "pip uninstall xformers" in problem.fix
    assert problem.remedy is not None and problem.remedy.action == "uninstall-packages"
    assert problem.remedy.arguments == {"python": str(found.python), "packages": "xformers"}


def test_sageattention_built_for_another_torch(tmp_path):
    found = comfyui(tmp_path, sageattention="2.2.0+cu128torch2.8.0")
    assert "was built for torch 2.8" in problems(found)["optional-packages-mismatched"].why
    packages = {**found.packages, "sageattention": "2.2.0+cu130torch2.13.0"}
    assert problems(replace(found, packages=packages)) == {}


def test_a_marker_is_read_for_the_machine_in_question(tmp_path):
    packages = {"torch": "2.8.0+cu128", "torchvision": "0.23.0+cu128", "torchaudio": "2.8.0+cu128", "triton": "3.5.0"}
    found = comfyui(tmp_path, "12.8", **packages)
    problem = problems(found)["optional-packages-mismatched"]
    assert "triton==3.4.0" in problem.why and "pip install triton==3.4.0" in problem.fix  # torch itself stays
    assert problems(found, hardware=replace(MACHINE, platform="win32", machine="AMD64")) == {}


def test_an_old_diffusers(tmp_path):
    found = replace(comfyui(tmp_path, diffusers="0.36.0", transformers="4.56.0"), name="this")
    problem = problems(found)["diffusers-too-old"]
    assert problem.why == "FLUX.2 [klein] came with diffusers 0.37.0; this is 0.36.0."
    assert (problem.severity, problem.fix) == ("warning", "kleinctl install   # makes an environment of its own")


def test_an_old_diffusers_and_a_new_transformers(tmp_path):
    problem = problems(comfyui(tmp_path, diffusers="0.36.0"))["transformers-clash"]
    assert "MT5Tokenizer, which transformers 5 lacks; it is 5.5.0" in problem.why and problem.ref == "A25"


def test_a_transformers_without_qwen3(tmp_path):
    found = comfyui(tmp_path, transformers="4.50.0")
    assert "new in transformers 4.51; it is 4.50.0" in problems(found)["transformers-clash"].why


def test_transformers_4_beside_diffusers_0_40(tmp_path):
    found = comfyui(tmp_path, transformers="4.57.1", huggingface_hub="0.36.0")
    problem = problems(found)["hub-clash"]
    assert problem.why == "diffusers 0.40.0 wants huggingface-hub<2.0,>=1.23.0; it is 0.36.0."
    assert problem.remedy is not None
    wanted = [Requirement(each).name for each in problem.remedy.arguments["packages"].split()]
    assert wanted == ["diffusers", "huggingface-hub", "tokenizers", "transformers"]


def test_numpy_2_for_something_made_for_numpy_1(tmp_path):
    problem = problems(comfyui(tmp_path, opencv_python="4.9.0.80"))["numpy-clash"]
    assert problem.why == "opencv-python 4.9.0.80 wants numpy<2.0,>=1.26.0; it is 2.4.6."
    assert problem.fix.endswith(shell("numpy<2.0,>=1.26.0"))
    old = Environment(Path("/x"), {"torch": "2.2.2+cu121", "numpy": "2.1.0"}, "12.1", name="ComfyUI")
    assert "compiled for NumPy 1" in problems(old)["numpy-clash"].why


def test_an_old_safetensors(tmp_path):
    found = comfyui(tmp_path, safetensors="0.4.0")
    found = replace(found, requires={"diffusers": ("safetensors>=0.8.0",)})
    assert "safetensors>=0.8.0; it is 0.4.0" in problems(found)["packages-clash"].why


def test_accelerate_is_missing(tmp_path):
    python = venv(tmp_path, **{name: version for name, version in HEALTHY.items() if name != "accelerate"})
    problem = problems(inspect(python))["accelerate-missing"]
    assert problem.what == "accelerate is missing in the Python beside kleinctl" and problem.ref == "A28"
    assert problems(inspect(python, "ComfyUI")) == {}  # ComfyUI does not need it


# Two Pythons


def test_what_pip_installed_went_elsewhere(tmp_path):
    problem = problems(inspect(venv(tmp_path, pip="26.3"), "ComfyUI"))["packages-in-other-python"]
    assert problem.what == "the Python of ComfyUI has no torch"
    assert f"{shell(tmp_path / 'bin' / 'python')} -s -m pip install" in problem.fix


def test_packages_leak_in_by_pythonpath(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "numpy-1.26.4.dist-info").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(elsewhere)]))
    (tmp_path / "venv").mkdir()
    problem = problems(comfyui(tmp_path / "venv"))["packages-in-other-python"]
    assert problem.why.startswith("Mixed in are numpy from PYTHONPATH") and problem.severity == "warning"


@pytest.mark.skipif(os.name == "nt", reason="the folder's place")
def test_packages_leak_in_from_the_users_own_folder(tmp_path, empty_home):
    (empty_home / ".local/lib/python3.12/site-packages/torch-2.1.0.dist-info").mkdir(parents=True)
    found = comfyui(tmp_path)
    assert found.leaks == {} and not found.user_site  # a venv looks away
    shared = "home = /usr/bin\ninclude-system-site-packages = true\nversion = 3.12.8\n"
    (tmp_path / "pyvenv.cfg").write_text(shared)
    found = inspect(found.python, "ComfyUI")
    assert found.user_site and found.leaks == {"user site": ("torch",)}
    assert problems(found)["packages-in-other-python"].fix.endswith("-s main.py")


def test_what_an_environment_does_not_have_is_not_called_well():
    scene = {"environment": Environment(Path("/usr/bin/python3"), {})}
    found = {each.name: each for each in run_checks(CHECKS, {"hardware": card(), "system": System()}, [scene])}
    for name in ("torch-without-cuda", "torch-versions-differ"):
        assert (found[name].status, found[name].why) == ("skipped", "There is no torch in the Python beside kleinctl.")
    for name in ("diffusers-too-old", "accelerate-missing", "packages-in-other-python", "home-writable"):
        assert found[name].status == "skipped"


def test_pythonhome_is_set():
    problem = problems(system=System(variables={"PYTHONHOME": "/opt/python3.9"}))["packages-in-other-python"]
    assert problem.fix == "unset PYTHONHOME"


# What torch itself said


WELL = Probe("ComfyUI", 0, 4.0, "2.13.0+cu130", True, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_120"), "RTX 4090")


def test_a_torch_that_runs_is_silent():
    assert problems(hardware=card(), probe=replace(WELL, cu_init=0, computes=True, cuda="13.0")) == {}
    without = replace(
        WELL, exit_status=1, cuda_available=False, error="RuntimeError: Found no NVIDIA driver on your system"
    )
    assert problems(probe=without) == {}


def test_cuda_is_gone_after_sleep():
    error = "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing"
    slept = replace(WELL, cu_init=999, cuda_available=False, exit_status=1, cuda="13.0", error=error)
    problem = problems(hardware=card(), probe=slept)["cuda-gone"]
    assert "cuInit answers 999" in problem.why and "rmmod nvidia_uvm" in problem.fix
    quiet = replace(WELL, cuda_available=False, cuda="13.0")
    assert "torch finds no card" in problems(hardware=card(), probe=quiet)["cuda-gone"].why


def test_a_library_of_torch_that_windows_cannot_load():
    error = 'OSError: [WinError 126] The specified module could not be found.\nError loading "fbgemm.dll"'
    problem = problems(probe=Probe("ComfyUI", 1, 0.5, error=error))["vc-runtime-missing"]
    assert problem.what.endswith("(ComfyUI)") and "WinError 126" in problem.evidence[-1].found


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (139, "Fatal Python error: Segmentation fault", "signal 11"),
        (None, "", "nothing for 60 seconds"),
        (1, "Traceback (most recent call last):\nValueError: odd", "Its last words: ValueError: odd"),
    ],
)
def test_a_torch_that_crashes_or_hangs(status, error, words):
    problem = problems(hardware=card(), probe=Probe("ComfyUI", status, 1.0, error=error))["environment-crashes"]
    assert words in problem.why and problem.severity == "error"
    own = problems(probe=Probe("cu130-0a1b2c3d", status, 1.0, error=error))["environment-crashes"]
    assert own.remedy is not None and own.remedy.arguments == {"environment": "cu130-0a1b2c3d"}


def test_the_real_list_of_architectures_lacks_the_card():
    problem = problems(hardware=card("RTX 6090", "14.0"), probe=WELL)["torch-lacks-card"]
    assert problem.why == "It has code for sm_75, sm_80, sm_86, sm_90, sm_120; the card is sm_140."
    assert "torch-dropped-card" in problems(hardware=card("GTX 1080", "6.1"), probe=WELL)
    later = replace(WELL, architectures=("sm_90", "compute_120"))
    assert problems(hardware=card("RTX 6090", "14.0"), probe=later) == {}


def test_the_card_calculates_wrong():
    assert "came out wrong" in problems(hardware=card(), probe=replace(WELL, computes=False))["environment-crashes"].why


def test_a_home_that_cannot_be_written_to():
    system = System(home="/srv/kleinctl", home_error="/srv does not let this user write")
    assert problems(system=system)["home-writable"].fix == "set KLEINCTL_HOME to a folder of yours"
