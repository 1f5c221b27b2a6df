"""What doctor says of a ComfyUI that cannot run klein, or not as people think; and of a healthy one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kleinctl import documents
from kleinctl.checks import Check, run_checks
from kleinctl.checks import comfyui as comfyui_checks
from kleinctl.facts import ComfyUI, comfyui
from kleinctl.facts import weights as weights_facts
from kleinctl.facts.system import LocalServer, System
from kleinctl.facts.weights import FoundFile
from kleinctl.hardware import Gpu, Hardware
from kleinctl.identify import identify
from kleinctl.plugins import Plugins
from kleinctl.problem import Problem, Remedy, shell
from kleinctl.units import GIB
from tests import weights
from tests.facts.test_comfyui import checkout, venv, write

OWN = [each for each in vars(comfyui_checks).values() if isinstance(each, Check)]
Ask = Callable[..., dict[str, Problem]]


def card(
    name: str = "NVIDIA GeForce RTX 4060", capability: str = "8.9", free: int = 7 * GIB, driver: str | None = None
) -> Hardware:
    gpu = Gpu(name, capability, vram_bytes=8 * GIB, vram_free_bytes=free, driver=driver)
    return Hardware(gpus=(gpu,), ram_bytes=32 * GIB, platform="linux")


def gathered(found: comfyui.ComfyUI) -> tuple[FoundFile, ...]:
    """Its weights files, each as often as a kind of folder lists it."""
    return tuple(
        FoundFile(path, identify(path), found.name, kind)
        for kind, folder in comfyui.model_folders(found)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A ComfyUI with klein 4B and all that belongs to it."""
    folder = checkout(tmp_path / "ComfyUI", "0.29.0")
    models = folder / "models"
    weights.write(models / "diffusion_models" / "flux-2-klein-4b.safetensors", weights.flux2(**weights.KLEIN_4B))
    weights.write(models / "text_encoders" / "qwen_3_4b.safetensors", weights.qwen3(**weights.QWEN3_4B))
    weights.write(models / "vae" / "flux2-vae.safetensors", weights.vae())
    return folder


@pytest.fixture
def ask(root: Path) -> Ask:
    """The problems of that ComfyUI by name, after its facts went through a report."""

    def problems(
        folder: Path = root, system: System | None = None, hardware: Hardware | None = None
    ) -> dict[str, Problem]:
        read = comfyui.read(folder)
        assert read is not None
        found = documents.read(comfyui.ComfyUI, documents.plain(read), "comfyui")
        scene: dict[str, Any] = {
            "comfyui": found,
            "comfyui_files": gathered(found),
            "comfyui_environment": next(iter(comfyui.environments(found)), None),
        }
        results = run_checks(OWN, {"system": system or System(), "hardware": hardware or card()}, [scene])
        assert not [each.why for each in results if "crashed" in each.why]
        return {problem.name: problem for each in results for problem in each.problems}

    return problems


def start(root: Path, arguments: str) -> None:
    write(root / "run.sh", f"python main.py {arguments}\n")


def version(root: Path, number: str) -> None:
    write(root / "comfyui_version.py", f'__version__ = "{number}"\n')


def klein(root: Path, name: str, **more: Any) -> Path:
    return weights.write(root / "models" / name, weights.flux2(**weights.KLEIN_4B), **more)


def test_a_whole_and_recent_comfyui_is_no_problem(ask, root):
    start(root, "--listen --port 8188")
    venv(root / "venv", "torch-2.10.0+cu130")
    assert ask() == {}


def test_a_comfyui_from_before_klein(ask, root):
    version(root, "0.8.2")
    problem = ask()["comfyui-too-old"]
    assert problem.what == "ComfyUI is too old for klein"
    assert problem.why == "Wanted is ComfyUI 0.9.2 or newer; this is 0.8.2, which takes klein for another model."
    assert problem.fix.startswith(f"git -C {shell(root)} pull && ")
    assert problem.ref == "C07"
    assert "cliploader-lacks-flux2" not in ask()


def test_a_comfyui_from_before_flux2(ask, root):
    version(root, "0.3.64")
    problem = ask()["cliploader-lacks-flux2"]
    assert problem.why == "The type came with ComfyUI 0.3.72; this is 0.3.64."
    assert "comfyui-too-old" in ask()


def test_a_portable_is_updated_by_its_own_script(ask, root):
    version(root, "0.8.2")
    (root.parent / "python_embeded").mkdir()
    assert ask()["comfyui-too-old"].fix == f"{root.parent}\\update\\update_comfyui.bat"


def test_a_portable_of_windows_told_of_in_a_report():
    found = comfyui_checks.update(ComfyUI("ComfyUI", "D:\\my programs\\portable\\ComfyUI", layout="portable"))
    assert found == '"D:\\my programs\\portable\\update\\update_comfyui.bat"'


def test_a_comfyui_that_nothing_says_how_to_start(tmp_path):
    checks = [comfyui_checks.lowvram_does_nothing, comfyui_checks.black_picture, comfyui_checks.custom_node_broken]
    found = run_checks(checks, {}, [{"comfyui": ComfyUI("ComfyUI", str(tmp_path), "0.29.0")}])
    assert [each.status for each in found] == ["skipped"] * 3
    assert found[0].why == "No script or setting says with which arguments ComfyUI is started."
    assert found[2].why == "ComfyUI has no log of a start."


def test_a_comfyui_that_does_not_say_its_version(tmp_path):
    checks = [comfyui_checks.comfyui_too_old, comfyui_checks.cliploader_lacks_flux2]
    for result in run_checks(checks, {}, [{"comfyui": ComfyUI("models", str(tmp_path), layout="models")}]):
        assert (result.status, result.why) == ("skipped", "Nothing says which version of ComfyUI models is of.")


def test_the_transformer_was_put_into_checkpoints(ask, root):
    path = klein(root, "checkpoints/flux-2-klein-4b.safetensors")
    problem = ask()["transformer-in-checkpoints"]
    assert problem.what == "flux-2-klein-4b.safetensors is a transformer among the checkpoints"
    assert problem.remedy.arguments == {
        "path": str(path),
        "to": str(root / "models" / "diffusion_models" / "flux-2-klein-4b.safetensors"),
    }
    assert (problem.remedy.action, problem.remedy.consent, problem.ref) == ("move-file", "ask", "C19")
    assert "file-in-wrong-folder" not in ask()


def test_a_whole_checkpoint_may_lie_there(ask, root):
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in weights.flux2(**weights.KLEIN_4B).items()}
    shapes |= {f"first_stage_model.{name}": shape for name, shape in weights.vae().items()}
    weights.write(root / "models" / "checkpoints" / "klein-all-in-one.safetensors", shapes)
    assert "transformer-in-checkpoints" not in ask()


def test_the_vae_was_put_beside_the_text_encoder(ask, root):
    weights.write(root / "models" / "text_encoders" / "ae.safetensors", weights.vae())
    problem = ask()["file-in-wrong-folder"]
    assert problem.what == "ae.safetensors is in the wrong folder"
    assert problem.why == "It is a VAE (the FLUX.2 VAE) and lies in text_encoders; the loader of a VAE lists vae alone."
    assert problem.remedy.arguments["to"] == str(root / "models" / "vae" / "ae.safetensors")


def test_the_old_folders_are_not_wrong(ask, root):
    klein(root, "unet/klein.safetensors")
    weights.write(root / "models" / "clip" / "qwen.safetensors", weights.qwen3(**weights.QWEN3_4B))
    assert ask() == {}


def test_a_gguf_without_the_node_for_it(ask, root):
    gguf = root / "models" / "unet" / "flux-2-klein-4b-Q4_K_M.gguf"
    gguf.parent.mkdir()
    weights.write_gguf(gguf, weights.flux2(**weights.KLEIN_4B), "flux")
    problem = ask()["gguf-needs-node"]
    assert problem.what == "flux-2-klein-4b-Q4_K_M.gguf cannot be loaded by ComfyUI"
    assert "ComfyUI-GGUF is not installed" in problem.why
    assert problem.fix.startswith("git clone https://github.com/city96/ComfyUI-GGUF")
    assert problem.remedy.arguments["repository"] == "https://github.com/city96/ComfyUI-GGUF"
    pack = root / "custom_nodes" / "ComfyUI-GGUF"
    write(pack / "loader.py", 'TXT_ARCH_LIST = {"t5", "llama"}')
    assert "is from before Qwen3" in ask()["gguf-needs-node"].why
    assert ask()["gguf-needs-node"].remedy == Remedy("update-node", {"path": str(pack)}, "ask")
    write(pack / "loader.py", 'TXT_ARCH_LIST = {"t5", "llama", "qwen3"}')
    assert "gguf-needs-node" not in ask()
    pack.rename(root / "custom_nodes" / "ComfyUI-GGUF.disabled")
    assert "is switched off" in ask()["gguf-needs-node"].why
    assert ask()["gguf-needs-node"].fix.startswith(f"rename {shell(f'{pack}.disabled')} to {shell(pack)}")
    (root / "custom_nodes" / ".disabled").mkdir()
    (root / "custom_nodes" / "ComfyUI-GGUF.disabled").rename(root / "custom_nodes" / ".disabled" / "comfyui-gguf@1_0")
    assert ask()["gguf-needs-node"].remedy is None  # ComfyUI-Manager put it there


def test_fp8_scales_that_no_comfyui_reads(ask, root):
    shapes = weights.flux2(**weights.KLEIN_4B)
    scales = {name.replace(".weight", ".weight_scale"): () for name in shapes if "qkv" in name}
    path = root / "models" / "diffusion_models" / "klein-fp8.safetensors"
    weights.write(path, {**shapes, **scales}, dtype="F8_E4M3", _scale="F32")
    problem = ask()["fp8-scales-unread"]
    assert problem.what == "ComfyUI would ignore the fp8 scales of klein-fp8.safetensors"
    assert "paints noise" in problem.why
    marks = '{"format_version": "1.0", "layers": {}}'
    weights.write(path, {**shapes, **scales}, dtype="F8_E4M3", metadata={"_quantization_metadata": marks}, _scale="F32")
    assert "fp8-scales-unread" not in ask()
    version(root, "0.3.80")
    assert "ComfyUI reads since 0.4.0; this is 0.3.80" in ask()["fp8-scales-unread"].why
    assert ask()["fp8-scales-unread"].remedy is None
    (root / ".git").mkdir()
    assert ask()["fp8-scales-unread"].remedy == Remedy("update-comfyui", {"path": str(root)}, "ask")


def test_the_official_fp8_files_name_on_one_without_marks(root):
    shapes = weights.flux2(**weights.KLEIN_4B)
    scales = {name.replace(".weight", ".weight_scale"): () for name in shapes if "qkv" in name}
    path = root / "models" / "diffusion_models" / "flux-2-klein-4b-fp8.safetensors"
    weights.write(path, {**shapes, **scales}, dtype="F8_E4M3", _scale="F32")
    found = comfyui.read(root)
    files = tuple(each for each in weights_facts.gather(Plugins(), (found,), ()) if each.place == found.name)
    [problem] = comfyui_checks.fp8_scales_unread.function(found, files)
    assert problem.remedy.action == "replace-file"
    assert problem.remedy.arguments == {"model": "klein-4b", "part": "transformer-fp8", "path": str(path)}


def test_a_transformer_with_the_9b_models_text_encoder(ask, root):
    encoders = root / "models" / "text_encoders"
    (encoders / "qwen_3_4b.safetensors").unlink()
    weights.write(encoders / "qwen_3_8b.safetensors", weights.qwen3(**weights.QWEN3_8B))
    problem = ask()["part-missing"]
    assert problem.what == "flux-2-klein-4b.safetensors has no text encoder beside it"
    assert problem.why == "Wanted is Qwen3 4B in text_encoders; there is qwen_3_8b.safetensors (Qwen3 8B)."
    assert problem.remedy.action == "fetch-part"
    assert problem.remedy.arguments == {
        "model": "klein-4b",
        "part": "text-encoder-comfyui",
        "path": str(encoders / "qwen_3_4b.safetensors"),
    }


def test_a_transformer_alone(ask, root):
    (root / "models" / "vae" / "flux2-vae.safetensors").unlink()
    problem = ask()["part-missing"]
    assert problem.why == "Wanted is the FLUX.2 VAE in vae; there is none."
    assert problem.ref == "C24"


def test_the_parts_in_the_table_are_those_of_the_manifests():
    from kleinctl.plugins import Plugins

    models = Plugins(frozenset()).models
    for family, (model, parts) in comfyui_checks.PARTS.items():
        assert models[model].family == family
        for role, (wanted, part, place) in parts.items():
            found = models[model].part(part)
            assert (found.role, found.family, found.to["comfyui"]) == (role, wanted, place)


def test_the_kv_variant_in_a_comfyui_without_its_node(ask, root):
    path = root / "models" / "diffusion_models" / "flux-2-klein-9b-kv.safetensors"
    weights.write(path, weights.flux2(**weights.KLEIN_9B))
    assert "kv-variant" not in ask()
    version(root, "0.12.0")
    problem = ask()["kv-variant"]
    assert problem.why.endswith("which needs the node FluxKVCache of 0.17.0; this is 0.12.0.")


def test_video_helper_suite_from_before_flux2(ask, root):
    preview = root / "custom_nodes" / "comfyui-videohelpersuite" / "videohelpersuite" / "latent_preview.py"
    write(preview, "self.latent_rgb_factors = previewer.latent_rgb_factors\n")
    problem = ask()["preview-crash"]
    assert problem.what == "comfyui-videohelpersuite is too old for previews of FLUX.2"
    assert (problem.ref, problem.severity) == ("D08", "warning")
    assert problem.remedy == Remedy("update-node", {"path": str(preview.parents[1])}, "ask")
    write(preview, "x0 = self.latent_rgb_factors_reshape(x0)\n")
    assert "preview-crash" not in ask()


def test_a_custom_node_that_could_not_be_imported(ask, root):
    write(root / "custom_nodes" / "ComfyUI-Thing" / "__init__.py")
    failure = f"Cannot import {root}/custom_nodes/ComfyUI-Thing module for custom nodes: No module named 'cv2'"
    write(root / "user" / "comfyui.log", f"ComfyUI version: 0.29.0\n{failure}\n")
    problem = ask()["custom-node-broken"]
    assert problem.what == "the custom node ComfyUI-Thing could not be imported"
    assert problem.why == "ComfyUI's log says: No module named 'cv2'."


def test_the_release_with_dynamic_vram_trouble(ask, root):
    version(root, "0.30.1")
    problem = ask()["dynamic-vram-trouble"]
    assert "--disable-dynamic-vram" in problem.fix
    write(root / "user" / "comfyui.log", "DynamicVRAM support detected and enabled\nComfyUI version: 0.30.1\n")
    assert "dynamic-vram-trouble" in ask()
    start(root, "--disable-dynamic-vram")  # the log is of the start before
    assert "dynamic-vram-trouble" not in ask()


def test_dynamic_vram_in_wsl(ask, root):
    write(root / "user" / "comfyui.log", "DynamicVRAM support detected and enabled\nComfyUI version: 0.29.0\n")
    assert "With WSL people report" in ask(hardware=replace(card(), wsl=2))["dynamic-vram-trouble"].why
    assert "dynamic-vram-trouble" not in ask()


def test_lowvram_of_old_advice(ask, root):
    start(root, "--lowvram")
    problem = ask()["lowvram-does-nothing"]
    assert problem.what == "--lowvram does nothing in ComfyUI"
    version(root, "0.12.0")  # from before dynamic VRAM
    assert "lowvram-does-nothing" not in ask()


@pytest.mark.parametrize("flag", ["--fp16-vae", "--use-sage-attention", "--force-fp16"])
def test_arguments_that_are_known_for_black_pictures(flag, ask, root):
    start(root, f"--listen {flag}")
    problem = ask()["black-picture"]
    assert problem.what == f"ComfyUI is started with {flag}"
    assert (problem.ref, problem.severity) == ("D07", "warning")


def test_sage_attention_without_its_package(ask, root):
    start(root, "--use-sage-attention")
    venv(root / "venv", "torch-2.10.0+cu130")
    assert "ComfyUI ends at once" in ask()["sage-attention-missing"].why
    venv(root / "venv", "torch-2.10.0+cu130", "sageattention-1.0.6")
    assert "sage-attention-missing" not in ask()


def test_cuda_malloc_forced_on_a_card_without_it(ask, root):
    start(root, "--cuda-malloc")
    found = ask(hardware=card("NVIDIA GeForce GTX 1650", "7.5"))
    assert "GTX 1650 lacks" in found["cuda-malloc-unsupported"].what
    assert "cuda-malloc-unsupported" not in ask()


def test_fp8_with_a_torch_that_lacks_the_kernels(ask, root):
    shapes = weights.flux2(**weights.KLEIN_4B)
    scales = {name.replace(".weight", ".weight_scale"): () for name in shapes if "qkv" in name}
    marks = {"_quantization_metadata": '{"format_version": "1.0", "layers": {}}'}
    path = root / "models" / "diffusion_models" / "klein-fp8.safetensors"
    weights.write(path, {**shapes, **scales}, dtype="F8_E4M3", metadata=marks, _scale="F32")
    venv(root / "venv", "torch-2.9.0+cu128")
    problem = ask()["fp8-kernels-missing"]
    assert "this torch is for CUDA 12.8" in problem.why
    assert "torchvision" in problem.fix and problem.fix.endswith("/whl/cu130")
    assert problem.remedy is not None and problem.remedy.action == "install-packages"
    old = ask(hardware=card(driver="570.133.07"))["fp8-kernels-missing"]
    assert "that driver 580" in old.why and old.fix.startswith("install driver 580") and old.remedy is None
    assert "fp8-kernels-missing" not in ask(hardware=card("NVIDIA GeForce GTX 1080 Ti", "6.1"))


def test_tabs_in_extra_model_paths(ask, root):
    write(root / "extra_model_paths.yaml", "mine:\n\tbase_path: /data\n\tvae: vae\n")
    problem = ask()["extra-paths-wrong"]
    assert problem.what == "extra_model_paths.yaml cannot be read"
    assert "line 2: found character" in problem.why
    assert problem.remedy.arguments["text"] == "mine:\n    base_path: /data\n    vae: vae\n"
    assert (problem.remedy.action, problem.remedy.consent, problem.severity) == ("write-text", "ask", "error")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("text_encoders: ~/te", "`~` stands for the home folder in base_path alone"),
        ("vae: models\\vae", "A backslash separates no folders here"),
        ("vae: $NOWHERE_AT_ALL/vae", "A variable in it has no value"),
        ("vae: gone", "there is no such folder"),
    ],
)
def test_a_folder_in_extra_model_paths_that_is_not_there(line, words, ask, root):
    write(root / "extra_model_paths.yaml", f"mine:\n  base_path: {root.parent}\n  {line}\n")
    problem = ask()["extra-paths-wrong"]
    assert problem.what == "extra_model_paths.yaml, line 3, names a folder that is not there"
    assert words in problem.why
    assert problem.severity == "warning"


def test_one_of_several_folders_is_enough(ask, root):
    (root.parent / "vae").mkdir()
    write(
        root / "extra_model_paths.yaml",
        f"mine:\n  base_path: {root.parent}\n  vae: |\n    vae\n    VAE2\n  loras: gone\n",
    )
    assert [problem.what for problem in ask().values()] == [
        "extra_model_paths.yaml, line 6, names a folder that is not there"
    ]


def test_a_key_in_extra_model_paths_that_nothing_reads(ask, root):
    (root.parent / "te").mkdir()
    write(root / "extra_model_paths.yaml", f"mine:\n  base_path: {root.parent}\n  text_encoder: te\n")
    assert "names text_encoder, which no loader reads" in ask()["extra-paths-wrong"].what


def test_extra_model_paths_with_only_the_old_keys(ask, root):
    shared = root.parent / "shared"
    (shared / "models" / "unet").mkdir(parents=True)
    weights.write(shared / "models" / "diffusion_models" / "a.safetensors", {"a": (1,)})
    write(root / "extra_model_paths.yaml", f"shared:\n  base_path: {shared}\n  unet: models/unet\n")
    problem = ask()["extra-paths-wrong"]
    assert problem.what == f"extra_model_paths.yaml leaves out {shared / 'models' / 'diffusion_models'}"
    assert "\n  diffusion_models: models/diffusion_models\n" in problem.remedy.arguments["text"]


def test_files_in_a_models_folder_that_is_not_read(ask, root):
    start(root, "--base-directory /data/comfy")
    problem = ask()["other-base-directory"]
    assert problem.what == "ComfyUI does not read its own models folder"
    assert problem.why.startswith("Its arguments name /data/comfy; 3 weights files lie in ")


def test_the_server_reads_another_base_directory(ask, tmp_path):
    base = tmp_path / "base"
    (base / "models" / "vae").mkdir(parents=True)
    server = LocalServer(8000, "0.29.0", ("main.py", "--base-directory", "D:\\ai"))
    problem = ask(base, System(servers=(server,)))["other-base-directory"]
    assert problem.what == f"the ComfyUI that runs at port 8000 does not read {base}"
    right = LocalServer(8000, "0.29.0", ("main.py", "--base-directory", f"{base}/"))
    assert "other-base-directory" not in ask(base, System(servers=(right,)))


def test_another_program_has_the_port(ask):
    problem = ask(system=System(servers=(LocalServer(8188),)))["port-in-use"]
    assert problem.what == "port 8188 is taken by another program"
    assert problem.fix == "start ComfyUI with --port 8189"
    assert "port-in-use" not in ask(system=System(servers=(LocalServer(8188, "0.29.0"),)))


def test_a_comfyui_in_the_background_holds_the_memory(ask):
    system = System(servers=(LocalServer(8188, "0.29.0"),))
    problem = ask(system=system, hardware=card(free=1 * GIB))["memory-held-by-comfyui"]
    assert problem.why == "7.0 GiB of 8.0 GiB are taken; ComfyUI keeps its models after a run."
    assert problem.fix.startswith("curl -X POST http://127.0.0.1:8188/free")
    assert "memory-held-by-comfyui" not in ask(system=system)
    assert "memory-held-by-comfyui" not in ask(hardware=card(free=1 * GIB))
