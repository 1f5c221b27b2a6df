"""Names that say nothing about a person: of programs, folders, files and servers that everybody may have.

What is not here becomes a token in a report, so a name that is missing costs a little clarity and no privacy.
"""

from __future__ import annotations

import re

#: Programs whose name may be told: what commonly holds a card's memory. The start of the name counts, in lower case.
PROGRAMS = """
a1111 blender brave chrome chromium comfy cinnamon code csrss cursor davinci discord dwm edge electron explorer firefox
fooocus forge game gnome gradio invoke java jupyter kate kdenlive kobold kwin kleinctl llama lm llm maya mpv msedge
mutter node nvidia obs ollama opera oobabooga pinokio plasma pt_main premiere python ray safari shellexperience
slack spotify stability steam streamlit swarmui teams text-generation thunderbird tensorboard tritonserver unity unreal
vivaldi vlc vllm wayland webui weston whisper wslg xorg xwayland zoom
""".split()  # noqa: SIM905

#: Folders whose name says nothing about a person, in lower case.
FOLDERS = frozenset(
    """
    . .. ~ .cache .conda .config .local .venv ai anaconda3 api app appdata apps bin blobs boot c cache checkpoints clip
    clip_vision comfy comfy_extras comfyui comfyui_windows_portable conda condabin content controlnet custom_nodes d
    data default desktop dev diffusers diffusers-folder diffusion_models dist-packages documents downloads site-packages
    drivers drv dropbox e embeddings env envs etc extra f flux flux2 forge fooocus games git github home hub hub-cache
    huggingface input install invokeai journal kaggle klein kleinctl lib lib64 local locallow logs loras main media
    microsoft miniconda3 miniforge3 mnt model models nvidia opt output packages pinokio portable proc programdata
    programs projects python python_embeded quarantine refs repos roaming root run runpod-volume scheduler scripts
    sd share snapshots snap src srv stability stability-matrix stabilitymatrix stable-diffusion-webui store style_models
    sts swarmui sys system32 temp text_encoder text_encoders this tmp tokenizer tools transformer unet unknown
    latent_upscale_models model_patches t2i_adapter upscale_models user users usr vae vae_approx var venv volumes webui
    wildcards windows workflows workspace wsl wsl$ wsl.localhost
    """.split()  # noqa: SIM905
) | {"program files", "program files (x86)", "stable diffusion", "all users", "google drive"}
FOLDER_SHAPES = re.compile(
    r"[A-Za-z]:|python[\d.]*|\d[\d.]*|v\d[\d.]*|[0-9a-f]{12,64}(?:[.\w]*\.incomplete)?|(?:cu\d+|cpu)-[0-9a-f]{8}|\.new-.*"
    r"|models--(?:black-forest-labs|comfy-org|qwen|unsloth)--.*|comfyui[-_.\dv]*|klein-[a-z0-9-]*",
    re.IGNORECASE,
)
#: Below these lie programs, not people's files.
SOFTWARE = {"site-packages", "dist-packages", "custom_nodes", "comfy", "comfy_extras", "kleinctl_plugins", "windows"}
SYSTEM = {"usr", "etc", "proc", "sys", "dev", "lib", "lib64", "run"}

#: Names of weights and settings that are the same on everybody's machine, in lower case.
FILES = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:[-.]\d{5}-of-\d{5})?(?:\.fp16|\.bf16)?\.(?:safetensors|bin)"
    r"|(?:diffusion_pytorch_model|model)\.safetensors\.index\.json|(?:ae|flux2-vae|full_encoder_small_decoder)\.\w+"
    r"|(?:flux[._-]?[12][\w.-]*|flux1-(?:dev|schnell|krea)[\w.-]*|qwen_?[23][\w.-]*|t5xxl[\w.-]*|umt5[\w.-]*"
    r"|clip_[lg][\w.-]*|mistral_3_small[\w.-]*|taef[\w.-]*|sd_xl_base[\w.-]*|v1-5-pruned[\w.-]*|sd3[\w.-]*)"
    r"\.(?:safetensors|gguf|sft)"
    r"|(?:\w+_)?config\.json|model_index\.json|tokenizer[\w.-]*|special_tokens_map\.json|vocab\.json|merges\.txt"
    r"|added_tokens\.json|requirements[\w.-]*\.txt|extra_model_paths\.yaml[\w.]*|comfy\.settings\.json|environment\.json"
    r"|pyproject\.toml|\.?wslconf\w*(?:\.\w+)?|(?:pyvenv|setup)\.cfg|report\.json|readme\.(?:md|txt)|config\.toml|.*-info\.json|record\.txt",
    re.IGNORECASE,
)
EXTENSIONS = (
    r"safetensors|sft|gguf|ckpt|pth?|bin|onnx|png|jpe?g|webp|gif|bmp|tiff?|mp4|webm|mov|zip|7z|rar|csv|jsonl?|ya?ml|txt"
    r"|toml|docx?|pdf|psd|kra|log|bat|sh|ps1"
)
IS_FILE = re.compile(rf"(?s).+\.({EXTENSIONS})", re.IGNORECASE)

#: Servers that everybody may have spoken to; the names of others are hidden.
SERVERS = re.compile(
    r"(?:[\w-]+\.)*(?:huggingface\.co|hf\.co|hf-mirror\.com|modelscope\.cn|xethub\.hf\.co|pypi\.org|pythonhosted\.org"
    r"|pytorch\.org|nvidia\.com|github\.com|githubusercontent\.com|microsoft\.com|aka\.ms|python\.org|astral\.sh"
    r"|comfy\.org|civitai\.com|tsinghua\.edu\.cn|aliyun\.com|localhost)|localhost|127(?:\.\d+){3}|0\.0\.0\.0|\[::1?\]",
    re.IGNORECASE,
)

#: Inputs of nodes, fields of records and facts that hold a prompt.
PROMPTS = frozenset(
    """
    caption clip_g clip_l negative negative_prompt populated_text positive positive_prompt prompt string t5xxl text
    text_a text_b text_c text_g text_l text_negative text_positive value wildcard_text description
    """.split()  # noqa: SIM905
)
