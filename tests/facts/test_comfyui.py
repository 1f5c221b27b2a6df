"""ComfyUI folders as people have them: checkouts, portables, base folders, bare models, and their settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kleinctl import documents
from kleinctl.facts import comfyui
from kleinctl.facts.comfyui import ComfyUI
from tests import weights

EXTRA = """\
# for a1111 ui
a111:
    base_path: {base}
    checkpoints: models/Stable-diffusion
    vae: models/VAE
    loras: |
         models/Lora
         models/LyCORIS
    unet: models/unet
"""


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def checkout(folder: Path, version: str = "0.9.2") -> Path:
    """A git checkout, as far as its files are looked at."""
    write(folder / "main.py")
    write(folder / "comfy" / "sd.py")
    write(folder / "comfyui_version.py", f'# made by the build\n__version__ = "{version}"\n')
    for kind in ("diffusion_models", "text_encoders", "vae", "checkpoints"):
        (folder / "models" / kind).mkdir(parents=True)
    return folder


def venv(folder: Path, *packages: str) -> Path:
    write(folder / "pyvenv.cfg", "version = 3.12.3\n")
    site = folder / "lib" / "python3.12" / "site-packages"
    for package in packages:
        write(site / f"{package}.dist-info" / "METADATA")
    write(site / "torch" / "version.py", "cuda: Optional[str] = '12.8'\n")
    return write(folder / "bin" / "python")


def read(folder: Path, settings: Path | None = None) -> ComfyUI:
    """What is read, as it would come out of a report."""
    found = comfyui.read(folder, settings)
    assert found is not None
    return documents.read(ComfyUI, documents.plain(found), "comfyui")


def test_a_git_checkout(tmp_path):
    root = checkout(tmp_path / "ComfyUI", "0.12.3")
    venv(root / "venv", "torch-2.10.0+cu128", "sageattention-1.0.6")
    weights.write(root / "models" / "vae" / "flux" / "flux2-vae.safetensors", weights.vae())
    found = read(root)
    assert (found.name, found.layout, found.version) == ("ComfyUI", "checkout", "0.12.3")
    assert found.files["vae"] == (str(Path("flux", "flux2-vae.safetensors")),)
    (environment,) = comfyui.environments(found)
    assert environment.name == found.environment == "ComfyUI"
    assert environment.packages["sageattention"] == "1.0.6"
    folders = list(comfyui.model_folders(found))
    assert ("vae", root / "models" / "vae") in folders
    assert ("diffusion_models", root / "models" / "unet") not in folders  # it would be searched, and is not there


def test_the_old_folders_unet_and_clip_are_the_new_kinds(tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    (root / "models" / "unet").mkdir()
    (root / "models" / "clip").mkdir()
    folders = list(comfyui.model_folders(read(root)))
    assert ("diffusion_models", root / "models" / "unet") in folders
    assert ("text_encoders", root / "models" / "clip") in folders


def test_a_windows_portable_by_its_top_folder_and_by_the_folder_in_it(tmp_path):
    top = tmp_path / "ComfyUI_windows_portable"
    checkout(top / "ComfyUI")
    write(top / "python_embeded" / "python.exe")
    write(top / "python_embeded" / "Lib" / "site-packages" / "torch-2.9.0+cu130.dist-info" / "METADATA")
    write(top / "run_cpu.bat", ".\\python_embeded\\python.exe -s ComfyUI\\main.py --cpu --windows-standalone-build\n")
    start = ".\\python_embeded\\python.exe -s ComfyUI\\main.py --windows-standalone-build --lowvram\r\npause\r\n"
    write(top / "run_nvidia_gpu.bat", start)
    found = read(top)
    assert (found.name, found.layout, found.path) == ("ComfyUI_windows_portable", "portable", str(top / "ComfyUI"))
    assert found.arguments == ("--windows-standalone-build", "--lowvram")
    assert comfyui.environments(found)[0].packages == {"torch": "2.9.0+cu130"}
    assert read(top / "ComfyUI").layout == "portable"
    assert read(top / "ComfyUI" / "models").path == str(top / "ComfyUI")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("python main.py", ()),
        ('exec venv/bin/python main.py --listen --port 8190 "$@"', ("--listen", "--port", "8190")),
        ('python main.py --base-directory "/data/my models" && true', ("--base-directory", "/data/my models")),
        ("python main.py ^\n --lowvram ^\n --fp16-vae", ("--lowvram", "--fp16-vae")),
        ("set COMMANDLINE_ARGS=--use-sage-attention\npython main.py %COMMANDLINE_ARGS%", ("--use-sage-attention",)),
        ("# python main.py --cpu\npython3 main.py --disable-dynamic-vram > log.txt", ("--disable-dynamic-vram",)),
        ("echo hello", ()),
    ],
)
def test_the_arguments_of_a_start_script(script, arguments, tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    write(root / "start.sh", script)
    assert read(root).arguments == arguments


def test_the_desktop_apps_base_folder(tmp_path):
    base = tmp_path / "Documents" / "ComfyUI"
    for name in ("models/vae", "custom_nodes", "user/default"):
        (base / name).mkdir(parents=True)
    write(
        base / "user" / "default" / "comfy.settings.json",
        '{"Comfy.Server.LaunchArgs": {"port": "8000", "lowvram": ""}}',
    )
    log = "pytorch version: 2.10.0+cu130\nDynamicVRAM support detected and enabled\nComfyUI version: 0.16.4\n"
    write(base / "user" / "comfyui.log", "old")
    write(base / "user" / "comfyui_8000.log", log)
    os.utime(base / "user" / "comfyui.log", (1, 1))
    settings = tmp_path / "AppData" / "ComfyUI"
    shared = tmp_path / "shared"
    weights.write(shared / "vae" / "flux2-vae.safetensors", weights.vae())
    mine = f"mine:\n  base_path: {shared}\n  is_default: true\n  vae: vae\n"
    text = f"comfyui_desktop:\n  base_path: {base}\n  vae: models/vae\n{mine}"
    write(settings / "extra_models_config.yaml", text)
    venv(base / ".venv", "torch-2.10.0")
    found = read(base, settings)
    assert (found.layout, found.version, found.dynamic_vram) == ("base-directory", "0.16.4", True)
    assert found.arguments == ("--port", "8000", "--lowvram")
    assert found.log == str(base / "user" / "comfyui_8000.log")
    assert found.folders["vae"][:2] == (str(shared / "vae"), str(base / "models" / "vae"))
    assert found.files["vae"] == ("flux2-vae.safetensors",)
    assert found.python == str(base / ".venv" / "bin" / "python")


def test_a_folder_of_models_alone(tmp_path):
    for name in ("vae", "text_encoders"):
        (tmp_path / "ai" / name).mkdir(parents=True)
    found = read(tmp_path / "ai")
    assert found.layout == "models"
    assert found.folders["vae"] == (str(tmp_path / "ai" / "vae"),)


def test_what_is_no_comfyui(tmp_path):
    diffusers = tmp_path / "klein"
    write(diffusers / "model_index.json", "{}")
    (diffusers / "vae").mkdir()
    (diffusers / "unet").mkdir()
    assert comfyui.read(diffusers) is None
    assert comfyui.read(tmp_path) is None
    assert comfyui.read(tmp_path / "nowhere") is None
    assert comfyui.read(Path("\0")) is None


def test_extra_model_paths_as_comfyui_reads_them(tmp_path, monkeypatch):
    base = tmp_path / "webui"
    for name in ("models/VAE", "models/Lora", "models/unet"):
        (base / name).mkdir(parents=True)
    root = checkout(tmp_path / "ComfyUI")
    monkeypatch.setenv("WEBUI", str(base))
    write(root / "extra_model_paths.yaml", EXTRA.format(base="${WEBUI}"))
    found = read(root)
    assert not found.yaml_error
    lines = {each.kind: (each.line, each.exists) for each in found.extra_paths}
    assert lines["checkpoints"] == (4, False)
    assert lines["vae"] == (5, True)
    assert [(each.line, each.path) for each in found.extra_paths if each.kind == "loras"] == [
        (7, str(base / "models" / "Lora")),
        (8, str(base / "models" / "LyCORIS")),
    ]
    assert found.folders["diffusion_models"][-2] == str(base / "models" / "unet")


def test_a_home_folder_and_a_relative_base_path(tmp_path, empty_home):
    (empty_home / "ai" / "vae").mkdir(parents=True)
    root = checkout(tmp_path / "ComfyUI")
    (tmp_path / "shared" / "vae").mkdir(parents=True)
    write(
        root / "extra_model_paths.yaml", "a:\n  base_path: ~/ai\n  vae: vae\nb:\n  base_path: ../shared\n  vae: vae/\n"
    )
    assert [each.path for each in read(root).extra_paths] == [
        str(empty_home / "ai" / "vae"),
        str(tmp_path / "shared" / "vae"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:\n\tbase_path: /x\n", "line 2: found character '\\t'"),
        ('a:\n  base_path: "C:\\models"\n', "line 2: found unknown escape character"),
        ("a:\n  vae:\n    - one\n    - two\n", "line 3: vae must be text; several paths go below `vae: |`"),
        ("a:\n  vae:\n", "line 2: vae must be text"),
        ("a:\n  base_path /x\n", "line 2: a is no list of names and paths"),
        ("# nothing yet\n", "the file is empty, and ComfyUI stops on that"),
        ("[" * 5000, "line 1: it is too large to be a list of model folders"),
    ],
)
def test_an_extra_model_paths_that_cannot_be_read(text, words, tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    write(root / "extra_model_paths.yaml", text)
    assert words in read(root).yaml_error


def test_tabs_and_backslashes_can_be_mended(tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    write(root / "extra_model_paths.yaml", 'a:\n\tbase_path: "C:\\models"\n\tvae: vae\n')
    assert read(root).yaml_patch == ("a:", "    base_path: 'C:\\models'", "    vae: vae")


def test_a_folder_that_only_the_old_keys_leave_out(tmp_path):
    base = tmp_path / "shared"
    (base / "models" / "unet").mkdir(parents=True)
    weights.write(base / "models" / "diffusion_models" / "klein.safetensors", {"a": (1,)})
    root = checkout(tmp_path / "ComfyUI")
    write(root / "extra_model_paths.yaml", f"shared:\n  base_path: {base}\n  unet: models/unet\n")
    found = read(root)
    assert [(each.kind, each.path) for each in found.unlisted] == [
        ("diffusion_models", str(base / "models" / "diffusion_models"))
    ]
    assert found.yaml_patch[2] == "  diffusion_models: models/diffusion_models"


def test_custom_nodes_with_their_versions(tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    nodes = root / "custom_nodes"
    write(nodes / "ComfyUI-GGUF" / "pyproject.toml", '[project]\nname = "ComfyUI-GGUF"\nversion = "1.1.10"\n')
    write(nodes / "ComfyUI-GGUF" / "loader.py", 'TXT_ARCH_LIST = {"t5", "llama", "qwen3"}\n')
    write(nodes / "rgthree-comfy.disabled" / "__init__.py")
    write(nodes / ".disabled" / "comfyui-kjnodes@1_0_0" / "nodes.py", 'NODE_CLASS_MAPPINGS = {"ImageResizeKJ": 1}')
    write(nodes / "mine" / "nodes.py", "NODE_CLASS_MAPPINGS = {'My Node': MyNode}")
    write(nodes / "websocket_image_save.py")
    failure = "Cannot import /x/custom_nodes/mine module for custom nodes: No module named 'cv2'"
    write(root / "user" / "comfyui.log", f"ComfyUI version: 0.9.2\n{failure}\n")
    found = read(root)
    packs = {each.name: each for each in found.custom_nodes}
    assert (packs["ComfyUI-GGUF"].version, packs["ComfyUI-GGUF"].current) == ("1.1.10", True)
    assert packs["rgthree-comfy.disabled"].disabled and packs["comfyui-kjnodes@1_0_0"].disabled
    assert packs["mine"].failure == "No module named 'cv2'"
    assert "websocket_image_save.py" not in packs
    told = comfyui.provided(found, ["My Node", "ImageResizeKJ", "Nowhere"])
    assert told.nodes == ("My Node",)  # what is switched off does not count
    assert told.sought == ("My Node", "ImageResizeKJ", "Nowhere")


def test_a_base_directory_elsewhere_is_what_is_read(tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    weights.write(root / "models" / "vae" / "flux2-vae.safetensors", weights.vae())
    (tmp_path / "data" / "models" / "vae").mkdir(parents=True)
    write(root / "run.sh", f"python main.py --base-directory {tmp_path / 'data'}\n")
    found = read(root)
    assert found.folders["vae"][0] == str(tmp_path / "data" / "models" / "vae")
    assert found.files["vae"] == ()
    assert found.unread == (str(root / "models" / "vae" / "flux2-vae.safetensors"),)


def test_a_folder_that_contains_itself_ends(tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    weights.write(root / "models" / "vae" / "a.safetensors", {"a": (1,)})
    (root / "models" / "vae" / "again").symlink_to(root / "models" / "vae")
    assert "a.safetensors" in read(root).files["vae"]
