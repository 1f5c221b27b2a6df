"""Which Python runs the worker, and building one. Builds here are real: a venv, pip, and wheels of a few bytes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from kleinctl import environment
from kleinctl.environment import BuildEvent, Environment, EnvironmentPlan, TorchBuild
from kleinctl.environment_build import Builder, offered_build
from kleinctl.hardware import Gpu, Hardware, OtherGpu, Python
from kleinctl.home import envs_folder, logs_folder
from kleinctl.problem import KleinctlError, Misuse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GB = 2**30
PYTHON = Python("3.12.8", "/usr/bin/python3")
MACHINE = Hardware(platform="linux", os="Ubuntu 24.04", machine="x86_64", python=PYTHON)


def card(name: str, capability: str, driver: str | None = "580.65.06", vram: int = 16) -> Gpu:
    return Gpu(name, capability, vram * GB, vram * GB, driver=driver)


def machine(*gpus: Gpu, **facts: object) -> Hardware:
    return replace(MACHINE, gpus=gpus, **facts)  # type: ignore[arg-type]


def found(packages: Mapping[str, str], cuda: str | None = None) -> Environment:
    return Environment(Path("/venv/bin/python"), packages, cuda)


# Which torch


@pytest.mark.parametrize(
    ("gpus", "build"),
    [
        ([card("RTX 4070 Ti SUPER", "8.9", "550.90.07")], "cu126"),
        ([card("RTX 4070 Ti SUPER", "8.9", "580.65.06")], "cu130"),
        ([card("RTX 4070 Ti SUPER", "8.9", "581.08")], "cu130"),
        ([card("RTX 5090", "12.0", "570.86.16")], "cu128"),
        ([card("RTX 5090", "12.0", "580.65.06")], "cu130"),
        ([card("GTX 1080 Ti", "6.1")], "cu126"),
        ([card("GTX 980 Ti", "5.2")], "cu126"),
        ([card("Tesla V100", "7.0")], "cu126"),
        ([card("RTX 2060", "7.5")], "cu130"),
        ([card("RTX 2060", "7.5", "530.30.02")], "cu126"),
        ([card("RTX 3060", "8.6", None)], "cu130"),
        ([card("RTX 4090", "8.9", vram=24), card("GTX 1080 Ti", "6.1")], "cu126"),  # one that serves both
        ([card("RTX 5090", "12.0", vram=32), card("GTX 1080 Ti", "6.1")], "cu130"),  # none does: the card to use counts
    ],
)
def test_the_torch_build_follows_card_and_driver(gpus, build):
    assert environment.torch_build(machine(*gpus), cuda=True).name == build


@pytest.mark.parametrize("others", [(), (OtherGpu("AMD", "Radeon RX 7900 XTX", "pci"),)])
def test_no_nvidia_card_means_a_torch_without_cuda(others):
    build = environment.torch_build(machine(other_gpus=others), cuda=False)
    assert (build.name, build.cuda, build.torch) == ("cpu", None, "2.13.0")
    assert build.index == "https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(
    ("hardware", "ref", "words"),
    [
        (machine(card("RTX 4090", "8.9", "520.61.05")), "A01", "It has driver 520.61.05; the oldest"),
        (machine(card("RTX 5090", "12.0", "566.36")), "A01", "is 570."),
        (machine(card("GTX 780", "3.5")), "A04", "capability 3.5; PyTorch's builds start at 5.0"),
        (machine(card("GTX 980 Ti", "5.2"), platform="win32"), "A04", "6.1 on Windows"),
        (machine(card("RTX 9090", "14.0")), "A03", "newer than the builds"),
        (machine(), "A05", "The driver offers none."),
        (machine(platform="darwin", os="macOS 15.1", machine="arm64"), "A05", "this is macOS 15.1 on arm64"),
        (machine(machine="aarch64"), "A05", "on aarch64"),
        (machine(python=replace(PYTHON, bits=32)), "A05", "64-bit Pythons alone"),
        (machine(python=replace(PYTHON, version="3.10.12")), "A05", "made for 3.11 to 3.14"),
        (machine(python=replace(PYTHON, version="3.15.0")), "A05", "made for 3.11 to 3.14"),
    ],
)
def test_a_machine_that_no_torch_is_made_for(hardware, ref, words):
    with pytest.raises(KleinctlError) as raised:
        environment.torch_build(hardware, cuda=True)
    problem = raised.value.problem
    assert (problem.name, problem.ref) == ("no-torch-build", ref)
    assert words in problem.why


@pytest.mark.parametrize(
    ("offered", "build"),
    [
        ({"torch": "2.13.0+cpu", "sympy": "1.14.0"}, "cpu"),
        ({"torch": "2.13.0"}, "cpu"),  # PyPI's wheel for Windows
        ({"torch": "2.13.0", "cuda-toolkit": "13.0.3.0", "nvidia-cublas": "13.1.1.3"}, "cu130"),  # and for Linux
        ({"torch": "2.7.1", "nvidia-cublas-cu12": "12.6.4.1"}, "CUDA"),
    ],
)
def test_what_an_index_offers_is_told_from_versions(offered, build):
    assert offered_build(offered) == build


# What is there, and what is missing


def test_this_interpreter_is_read_as_importlib_reads_it():
    here = environment.inspect()
    assert here.python == Path(sys.executable) and not here.managed
    assert here.packages["torch"] == version("torch")
    assert here.packages["huggingface-hub"] == version("huggingface_hub")
    assert here.to_json()["packages"]["diffusers"] == version("diffusers")


def test_looking_for_an_environment_imports_no_torch_and_starts_nothing():
    script = """
import subprocess, sys
subprocess.Popen = None
from kleinctl import environment
from kleinctl.hardware import Hardware
environment.find(["torch>=2.8", "no-such-package"], Hardware(), cuda=False)
assert not {"torch", "diffusers", "numpy"} & set(sys.modules), "find() imports what it looks for"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_torch_without_cuda_beside_a_card():
    reasons = environment.missing(found({"torch": "2.13.0+cpu"}), [], True, machine(card("RTX 4090", "8.9")))
    assert reasons == ["torch 2.13.0+cpu is a build without CUDA; RTX 4090 needs one with it."]


def test_packages_that_are_absent_old_or_unreadable():
    packages = {"diffusers": "0.36.0", "pillow": "11.0.0", "accelerate": "1.x-mine"}
    reasons = environment.missing(
        found(packages), ["torch>=2.8", "diffusers>=0.40,<0.43", "Pillow>=11", "accelerate>=1"], False, machine()
    )
    assert reasons == [
        "torch is not installed.",
        "diffusers is 0.36.0; wanted is <0.43,>=0.40.",
        "accelerate is 1.x-mine; wanted is >=1.",
    ]


@pytest.mark.parametrize(
    ("torch", "cuda", "gpu", "words"),
    [
        ("2.9.1+cu128", "12.8", card("GTX 1080 Ti", "6.1"), "no kernels for GTX 1080 Ti (sm_61)"),
        ("2.10.0+cu128", "12.8", card("Tesla V100", "7.0"), None),
        ("2.11.0+cu128", "12.8", card("Tesla V100", "7.0"), "no kernels for Tesla V100"),
        ("2.12.1+cu126", "12.6", card("RTX 5090", "12.0"), "no kernels for RTX 5090 (sm_120)"),
        ("2.13.0", "13.0", card("RTX 4090", "8.9", "570.86"), "wants driver 580 or newer; RTX 4090 has 570.86."),
        ("2.10.0+cu128", "12.8", card("RTX 4090", "8.9", "550.54"), None),
        ("2.13.0+cu130", "13.0", card("RTX 4090", "8.9"), None),
        ("2.6.0+cu118", "11.8", card("RTX 4090", "8.9"), None),  # not in our tables: not judged
    ],
)
def test_a_torch_that_does_not_suit_the_card(torch, cuda, gpu, words):
    reasons = environment.missing(found({"torch": torch}, cuda), [], True, machine(gpu))
    assert (reasons == []) if words is None else (words in reasons[0])


@pytest.mark.parametrize(
    ("files", "python", "version", "leaks"),
    [
        (["python_embeded/python313._pth", "python_embeded/python3._pth"], "python_embeded/python.exe", "3.13", False),
        (["venv/pyvenv.cfg", "venv/Lib/site-packages/x"], "venv/Scripts/python.exe", "3.12.10", False),
        (["opt/lib/python3.11/os.py"], "opt/bin/python", "3.11", True),
    ],
)
def test_other_pythons_are_read_from_their_files(files, python, version, leaks, tmp_path, monkeypatch, empty_home):
    """ComfyUI's portable, a venv of Windows, an installation: none of them is started."""
    for name in (*files, python):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("home = C:\\Python312\nversion = 3.12.10\n" if "cfg" in name else "")
    site = tmp_path / Path(python).parts[0] / ("lib/python3.11" if "opt" in python else "Lib") / "site-packages"
    (site / "transformers-5.5.0.dist-info").mkdir(parents=True)
    asked = "Requires-Dist: huggingface-hub<2.0,>=1.5.0\r\nRequires-Dist: tqdm\r\n\r\nRequires-Dist: numpy\r\n"
    (site / "transformers-5.5.0.dist-info" / "METADATA").write_text(asked)
    (empty_home / ".local/lib/python3.11/site-packages/numpy-1.26.4.dist-info").mkdir(parents=True)
    found = environment.inspect(tmp_path / python, "ComfyUI")
    assert (found.name, found.python_version, found.packages) == ("ComfyUI", version, {"transformers": "5.5.0"})
    assert found.requires == {"transformers": ("huggingface-hub<2.0,>=1.5.0",)}
    assert found.user_site == leaks and (found.leaks == {"user site": ("numpy",)}) == leaks


# The plan


def test_the_pins_are_what_the_shipped_backends_want():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plan = environment.plan(project["optional-dependencies"]["runtime"], machine(card("RTX 4090", "8.9")), cuda=True)
    assert plan.build.name == "cu130" and plan.extras == ()
    assert plan.name.startswith("cu130-") and plan.folder == envs_folder() / plan.name
    assert {"diffusers==0.42.1", "pluggy==1.7.0", "packaging==26.3"} <= set(plan.pins)
    assert 2.5e9 < plan.download_bytes < 3.5e9 and 4e9 < plan.disk_bytes < 6e9


def test_a_plugin_that_wants_another_package_gets_an_environment_of_its_own():
    plain = environment.plan(["torch"], machine(), cuda=False)
    more = environment.plan(["torch", "bitsandbytes>=0.45"], machine(), cuda=False)
    assert more.extras == ("bitsandbytes>=0.45",) and more.name != plain.name
    assert len(more.steps) == len(plain.steps) + 1


def test_a_plugin_that_wants_another_diffusers():
    with pytest.raises(KleinctlError) as raised:
        environment.plan(["diffusers<0.40"], machine(), cuda=False)
    problem = raised.value.problem
    assert (problem.name, problem.why) == ("versions-clash", "diffusers is 0.42.1; wanted is <0.40.")
    assert problem.fix == "pip install 'diffusers<0.40'"


# Building


def wheel(folder: Path, name: str, number: str, requires: tuple[str, ...] = (), code: str = "") -> None:
    """A wheel with one module."""
    folder.mkdir(parents=True, exist_ok=True)
    info, tag = f"{name}-{number}.dist-info", "py3-none-any"
    depends = "".join(f"Requires-Dist: {each}\n" for each in requires)
    files = {
        f"{name}/__init__.py": code or "import pathlib\n",
        f"{name}/version.py": f"__version__ = '{number}'\ncuda = {'None' if 'cu1' not in number else repr('13.0')}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{depends}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{number}-{tag}.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


TORCH = "from torch import version\nfrom torch.version import __version__\n"


class Quiet(SimpleHTTPRequestHandler):
    """A package index made of folders; each lists its wheels."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An index on loopback, and the folder it serves: `simple/<name>/` and `whl/cpu/<name>/` hold wheels."""
    root = tmp_path / "index"
    wheel(root / "simple" / "tiny", "tiny", "1.0")
    wheel(root / "simple" / "addon", "addon", "1.5", requires=("tiny",))
    wheel(root / "whl" / "cpu" / "torch", "torch", "2.13.0+cpu", requires=("tiny",), code=TORCH)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root
    server.shutdown()
    server.server_close()


@pytest.fixture
def planned(index: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> EnvironmentPlan:
    """A plan of three packages, two of which have another name than anything real."""
    address, _ = index
    secret = address.replace("://", "://user:s3cret@")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{secret}/simple")
    build = TorchBuild("cpu", "2.13.0", f"{address}/whl/cpu")
    real = environment.plan(["torch", "addon>=1"], machine(), cuda=False)
    return replace(real, build=build, pins=("tiny==1.0",))


def left_behind() -> list[str]:
    return sorted(path.name for path in envs_folder().iterdir() if path.name != ".lock")


def log_of(plan: EnvironmentPlan) -> str:
    return (logs_folder() / f"install-{plan.name}.log").read_text(encoding="utf-8")


def closed_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_an_environment_is_built_found_broken_and_removed(planned):
    (planned.folder / "lib").mkdir(parents=True)
    assert "the installation was not finished" in environment.broken()[0].why
    events: list[BuildEvent] = []
    built = environment.build(planned, events.append)
    assert left_behind() == [planned.name]
    assert (built.name, built.managed, built.torch_cuda) == (planned.name, True, None)
    assert {"torch": "2.13.0+cpu", "tiny": "1.0", "addon": "1.5"}.items() <= built.packages.items()
    assert [event.title for event in events if not event.detail] == list(planned.steps)
    record = json.loads((planned.folder / "environment.json").read_text(encoding="utf-8"))
    assert record["torch"]["version"] == "2.13.0+cpu" and "tiny==1.0" in record["freeze"]
    assert "Successfully installed" in log_of(planned) and "s3cret" not in log_of(planned)

    events.clear()
    assert environment.build(planned, events.append) == built and events == []
    assert environment.find(["torch", "addon"], machine(), cuda=False) == built
    assert environment.find(["torch", "addon>=2"], machine(), cuda=False) is None

    shutil.rmtree(next(planned.folder.rglob("tiny-1.0.dist-info")))
    assert environment.find(["torch", "addon"], machine(), cuda=False) is None
    (problem,) = environment.broken()
    assert environment.list_managed() == [] and environment.names() == [planned.name]
    assert (problem.name, problem.path) == ("environment-broken", str(planned.folder))
    assert "1 of its" in problem.why and "tiny" in problem.why
    built.python.unlink()
    assert "The Python it was made from is gone" in environment.broken()[0].why

    with pytest.raises(Misuse) as raised:
        environment.remove(planned.name[:-1])
    assert f"Did you mean {planned.name}?" in raised.value.problem.why
    with pytest.raises(Misuse):
        environment.remove("../envs")
    environment.remove(planned.name)
    assert left_behind() == []


def test_gigabytes_of_cuda_for_a_machine_without_a_card(planned, index):
    """They are refused, unless they are allowed; then it is a torch like another, and this one does not import."""
    simple, broken = index[1] / "simple", "raise OSError('[WinError 126] c10.dll')"
    wheel(simple / "torch", "torch", "2.13.0", requires=("nvidia-cublas",), code=broken)
    wheel(simple / "nvidia-cublas", "nvidia_cublas", "13.1")
    blocked = replace(planned, build=replace(planned.build, index=f"{closed_port()}/whl/cpu"), extras=())
    with pytest.raises(KleinctlError) as raised:
        environment.build(blocked)
    assert raised.value.problem.what == "torch 2.13.0 (cpu) cannot be had"
    assert "pip's own index has the CUDA build." in raised.value.problem.why
    assert left_behind() == []
    with pytest.raises(KleinctlError) as raised:
        environment.build(blocked, allow_large=True)
    assert "WinError 126" in raised.value.problem.why and "vc_redist" in raised.value.problem.fix
    assert left_behind() == []


def test_a_package_that_cannot_be_installed_leaves_a_log_and_nothing_else(planned):
    lacking = replace(planned, pins=("tiny==1.0", "absent==3.0"))
    with pytest.raises(KleinctlError) as raised:
        environment.build(lacking)
    problem = raised.value.problem
    assert problem.name == "install-failed" and problem.path == str(logs_folder() / f"install-{planned.name}.log")
    assert "No matching distribution found for absent==3.0" in problem.why and problem.path in problem.why
    assert "https://pypi.org" in problem.fix
    assert "absent==3.0" in log_of(planned)
    assert left_behind() == []


def test_a_disk_that_is_too_full_is_told_before_anything_is_made(planned):
    with pytest.raises(KleinctlError) as raised:
        environment.build(replace(planned, disk_bytes=10**18))
    assert raised.value.problem.name == "disk-full"
    assert left_behind() == []


def test_ctrl_c_in_the_middle(planned):
    def stop(event: BuildEvent) -> None:
        if event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment.build(planned, stop)
    assert left_behind() == []


BUILD = """
import sys, time
from pathlib import Path
from kleinctl.environment import EnvironmentPlan, TorchBuild, build
name, folder, python, index, wait = sys.argv[1:]
plan = EnvironmentPlan(name, Path(folder), Path(python), TorchBuild("cpu", "2.13.0", index), ("tiny==1.0",))
def show(event):
    print(event.step, flush=True)
    if event.step == 2: time.sleep(float(wait))
build(plan, show)
"""


def builder(plan: EnvironmentPlan, wait: float) -> subprocess.Popen[str]:
    """Another process at the same plan, which stays at step 2 for `wait` seconds."""
    arguments = [plan.name, str(plan.folder), str(plan.python), plan.build.index, str(wait)]
    return subprocess.Popen([sys.executable, "-c", BUILD, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_cleared_away_by_the_next_which_finds_pytorch_blocked(planned, index):
    """download.pytorch.org does not answer, as in a company; pip's own index has the same build."""
    with builder(planned, wait=60) as killed:
        assert killed.stdout
        next(line for line in killed.stdout if line == "2\n")
        killed.kill()
    assert left_behind() == [f".new-{killed.pid}"]
    assert environment.list_managed() == [] == environment.broken()
    wheel(index[1] / "simple" / "torch", "torch", "2.13.0+cpu", code=TORCH)
    blocked = replace(planned, build=replace(planned.build, index=f"{closed_port()}/whl/cpu"), extras=())
    events: list[BuildEvent] = []
    assert environment.build(blocked, events.append).packages["torch"] == "2.13.0+cpu"
    assert left_behind() == [planned.name]
    said = f"{blocked.build.index} cannot be reached; asking pip's own index for torch 2.13.0"
    assert said in [event.detail for event in events]


def test_two_at_once_build_one_which_works_where_it_was_moved_to(planned):
    events: list[BuildEvent] = []
    with builder(planned, wait=1) as other:
        assert other.stdout
        next(line for line in other.stdout if line == "1\n")
        built = environment.build(planned, events.append)
    assert other.returncode == 0
    assert [event.detail for event in events] == ["another kleinctl is building one; waiting for it"]
    assert environment.list_managed() == [built]
    script = "import sys, torch; print(sys.prefix, torch.__version__)"
    answer = subprocess.run([built.python, "-I", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.split() == [str(planned.folder), "2.13.0+cpu"]
    subprocess.run([built.python, "-I", "-m", "pip", "--version"], capture_output=True, check=True, timeout=60)


def test_bytes_are_told_as_pip_tells_them(planned, tmp_path):
    """Lines of pip 26.3 with `--progress-bar raw`."""
    events: list[BuildEvent] = []
    at_work = Builder(planned, events.append, False, step=3)
    with (tmp_path / "log").open("w") as log:
        for line in (
            "Collecting torch==2.13.0+cu130",
            "  Downloading https://download.pytorch.org/whl/cu130/torch-2.13.0%2Bcu130-cp312.whl.metadata (39 kB)",
            "  Downloading https://download.pytorch.org/whl/cu130/torch-2.13.0%2Bcu130-cp312.whl (526.6 MB)",
            "Progress 0 of 526574961",
            "Progress 65011712 of 526574961",
            "  Downloading nvidia_cublas-13.1.1.3-py3-none-manylinux_2_27_x86_64.whl (423.1 MB)",
            "Installing collected packages: nvidia-cublas, torch",
        ):
            at_work.heard(line, log)
    assert [(event.detail, event.done, event.total) for event in events] == [
        ("torch", 0, 0),
        ("torch", 0, 526574961),
        ("torch", 65011712, 526574961),
        ("nvidia-cublas", 0, 0),
        ("unpacking 2 packages", 0, 0),
    ]
    assert "Progress" not in (tmp_path / "log").read_text()
