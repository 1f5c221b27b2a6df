"""What `doctor --fix` can do about a ComfyUI: remedies, each None where the facts name nothing to act on."""

from __future__ import annotations

from collections.abc import Mapping

from kleinctl.facts.comfyui import ComfyUI, CustomNode, argument
from kleinctl.problem import Remedy, shell


def update(comfyui: ComfyUI) -> Remedy | None:
    """Bring a git checkout up to date; a portable and the Desktop app do that themselves."""
    if comfyui.layout != "checkout" or not comfyui.git:
        return None
    return Remedy("update-comfyui", {"path": comfyui.path}, "ask")


def install_node(comfyui: ComfyUI, pack: Mapping[str, str]) -> Remedy | None:
    """Clone a pack of `comfyui_nodes.toml` into `custom_nodes`."""
    if comfyui.layout == "models":
        return None
    arguments = {"path": f"{comfyui.path}/custom_nodes/{pack['title']}", "repository": pack["address"]}
    return Remedy("install-node", arguments, "ask")


def update_node(comfyui: ComfyUI, pack: CustomNode) -> Remedy:
    """Bring a pack up to date."""
    return Remedy("update-node", {"path": f"{comfyui.path}/custom_nodes/{pack.name}"}, "ask")


def switch_node(comfyui: ComfyUI, pack: CustomNode) -> Remedy | None:
    """Switch a pack off, or one on that was switched off by its name."""
    path, name = f"{comfyui.path}/custom_nodes/{pack.name}", pack.name.removesuffix(".disabled")
    if pack.disabled and name == pack.name:  # ComfyUI-Manager has it somewhere else
        return None
    to = f"{comfyui.path}/custom_nodes/{name if pack.disabled else f'{name}.disabled'}"
    return Remedy("switch-node", {"path": path, "to": to}, "ask")


def renaming(remedy: Remedy | None) -> str:
    """How to switch a pack by hand."""
    return f"rename {shell(remedy.arguments['path'])} to {shell(remedy.arguments['to'])}" if remedy else ""


def start_with(comfyui: ComfyUI, remove: str = "", add: str = "") -> Remedy | None:
    """Change an argument where the script, or the Desktop app's settings, have it."""
    there = {word for word in (*remove.split()[:1], add) if argument(comfyui.arguments, word) is not None}
    if comfyui.script is None or add in there or (remove and remove.split()[0] not in there):
        return None
    return Remedy("edit-start-script", {"path": comfyui.script, "remove": remove, "add": add}, "ask")


def without_fp8_maths(comfyui: ComfyUI) -> Remedy | None:
    """Take out what asks for maths in fp8; `--fast` alone would ask for everything fast, so it goes with its value."""
    words = comfyui.arguments
    if "--supports-fp8-compute" in words:
        return start_with(comfyui, "--supports-fp8-compute")
    at = words.index("fp8_matrix_mult") if "fp8_matrix_mult" in words else 0
    alone = words[at - 1 : at] == ("--fast",) and (*words, "--")[at + 1].startswith("--")
    return start_with(comfyui, "--fast fp8_matrix_mult" if alone else "fp8_matrix_mult")


def free_line(port: int) -> str:
    """How to empty a ComfyUI's memory, as a line to paste. Double quotes alone are known to every shell."""
    body = r'"{\"unload_models\": true, \"free_memory\": true}"'
    return f'curl -X POST http://127.0.0.1:{port}/free -H "Content-Type: application/json" -d {body}'


#: ComfyUI takes one of these at most.
ATTENTIONS = ("split-cross", "quad-cross", "pytorch-cross", "sage", "flash")


def split_attention(comfyui: ComfyUI) -> Remedy | None:
    """Attention that does without cuDNN, where no other was chosen."""
    if any(argument(comfyui.arguments, f"--use-{each}-attention") is not None for each in ATTENTIONS):
        return None
    return start_with(comfyui, add="--use-split-cross-attention")


def of_log(name: str, comfyui: ComfyUI) -> Remedy | None:
    """What can be done in a ComfyUI whose log shows a problem of that name."""
    if name in ("comfyui-too-old", "cliploader-lacks-flux2"):
        return update(comfyui)
    if name == "dynamic-vram-trouble":
        return start_with(comfyui, add="--disable-dynamic-vram")
    if name == "cuda-malloc-unsupported":
        forced = argument(comfyui.arguments, "--cuda-malloc") is not None
        return start_with(comfyui, "--cuda-malloc" if forced else "", "--disable-cuda-malloc")
    if name == "cudnn-plans-missing":
        return split_attention(comfyui)
    if name == "sage-attention-missing":
        return start_with(comfyui, "--use-sage-attention")
    return without_fp8_maths(comfyui) if name == "no-fp8-maths" else None
