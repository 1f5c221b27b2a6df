"""What is read from a log: real lines, of real failures, and healthy logs in which nothing is found."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kleinctl.facts import Facts, FoundFile
from kleinctl.hardware import Gpu, Hardware
from kleinctl.identify import Identity
from kleinctl.log_patterns import PATTERNS
from kleinctl.logs import MAX_CHARACTERS, LogPattern, Match, _words, explain
from kleinctl.problem import Problem
from kleinctl.units import GIB

LOGS = Path(__file__).parent / "fixtures" / "logs"
SHAPES = "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
HEADER = "Error while deserializing header"

#: A line as people have posted it, and the problem and entry of the catalogue that it stands for.
KNOWN = [
    ("The NVIDIA driver on your system is too old (found version 12040).", "driver-too-old", "A01"),
    ("AssertionError: Torch not compiled with CUDA enabled", "torch-without-cuda", "A02"),
    ("CUDA error: no kernel image is available for execution on the device", "torch-lacks-card", "A03"),
    (
        "NVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch installation.",
        "torch-lacks-card",
        "A03",
    ),
    (
        "Tesla V100-SXM2-16GB with CUDA capability sm_70 is not compatible with the current PyTorch installation.",
        "torch-dropped-card",
        "A04",
    ),
    ("Found GPU0 NVIDIA GeForce GTX 1080 which is of cuda capability 6.1.", "torch-dropped-card", "A04"),
    (
        "ERROR: Could not find a version that satisfies the requirement torch==2.8.0 (from versions: none)",
        "no-torch-build",
        "A05",
    ),
    ("OSError: The paging file is too small for this operation. (os error 1455)", "page-file-too-small", "A08"),
    (
        'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
        "container-without-gpu",
        "A10",
    ),
    ("Failed to initialize NVML: Driver/library version mismatch", "driver-library-mismatch", "A11"),
    (
        "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env",
        "cuda-gone",
        "A12",
    ),
    ("Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.", "cuda-gone", "A12"),
    ("RuntimeError: Found no NVIDIA driver on your system.", "no-driver", "A13"),
    ("ImportError: libcuda.so.1: cannot open shared object file: No such file or directory", "no-driver", "A13"),
    ("model weight dtype torch.bfloat16, manual cast: torch.float32", "no-bf16", "A17"),
    ("bf16 is only supported on A100+ GPUs", "no-bf16", "A17"),
    (
        "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9",
        "no-fp8-maths",
        "A18",
    ),
    ("torch._scaled_mm is only supported on devices with compute capability >= 9.0", "no-fp8-maths", "A18"),
    (
        "WARNING: You need pytorch with cu130 or higher to use optimized CUDA operations.",
        "fp8-kernels-missing",
        "A19",
    ),
    (
        "Failed to import comfy_kitchen, Error: no, fp8 and fp4 support will not be available.",
        "fp8-kernels-missing",
        "A19",
    ),
    (
        'OSError: [WinError 126] The specified module could not be found. Error loading "C:\\lib\\fbgemm.dll"',
        "vc-runtime-missing",
        "A20",
    ),
    ("RuntimeError: operator torchvision::nms does not exist", "torch-versions-differ", "A21"),
    (
        "A matching Triton is not available, some optimizations will not be enabled",
        "optional-packages-mismatched",
        "A22",
    ),
    ("Need to compile C++ extensions to use all xFormers features.", "optional-packages-mismatched", "A22"),
    (
        "To use the `--use-sage-attention` feature, the `sageattention` package must be installed first.",
        "sage-attention-missing",
        "A23",
    ),
    ("ImportError: cannot import name 'Flux2KleinPipeline' from 'diffusers'", "diffusers-too-old", "A24"),
    ("ImportError: cannot import name 'MT5Tokenizer' from 'transformers'", "transformers-clash", "A25"),
    ("ModuleNotFoundError: No module named 'transformers.modeling_layers'", "transformers-clash", "A25"),
    (
        "transformers 4.57.1 requires huggingface-hub<1.0,>=0.34.0, but you have huggingface-hub 1.29.0 which is",
        "hub-clash",
        "A26",
    ),
    ("ImportError: huggingface-hub>=0.34.0,<1.0 is required for a normal functioning", "hub-clash", "A26"),
    ("A module that was compiled using NumPy 1.x cannot be run in NumPy 2.2.1", "numpy-clash", "A27"),
    ("RuntimeError: Numpy is not available", "numpy-clash", "A27"),
    ("ImportError: `enable_model_cpu_offload` requires `accelerate v0.17.0` or higher.", "accelerate-missing", "A28"),
    (
        "It seems like you have activated model offloading by calling `enable_model_cpu_offload`, but are now manually",
        "offload-undone",
        "A28",
    ),
    ("RuntimeError: CUDA error: operation not supported", "cuda-malloc-unsupported", "A29"),
    ("WARNING: this card most likely does not support cuda-malloc, if you get", "cuda-malloc-unsupported", "A29"),
    ("cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built.", "cudnn-plans-missing", "A30"),
    ("ModuleNotFoundError: No module named 'diffusers'", "module-missing", "A32"),
    ("fatal: detected dubious ownership in repository at 'E:/ComfyUI'", "path-trouble", "A33"),
    ("Python 3.10.17 was not found and/or failed to install", "path-trouble", "A33"),
    ("GatedRepoError: 401 Client Error.", "gated-repo", "B01"),
    ("SafetensorError: Error while deserializing header: MetadataIncompleteBuffer", "weights-truncated", "B02"),
    (f"{HEADER}: incomplete metadata, file not fully covered", "weights-truncated", "B02"),
    (f"{HEADER}: invalid header length", "weights-truncated", "B02"),
    ("OSError: /m/x.safetensors ends at 2000000 bytes, in the middle of its weights", "weights-truncated", "B02"),
    (f"{HEADER}: header too large", "weights-not-safetensors", "B03"),
    (f"{HEADER}: HeaderTooLarge", "weights-not-safetensors", "B03"),
    (f"{HEADER}: HeaderTooSmall", "weights-empty", "B04"),
    (f"{HEADER}: invalid JSON in header: EOF while parsing a value at line 1 column 0", "weights-zeros", "B04"),
    (
        "OSError: Consistency check failed: file should be of size 8044982048 but has size 635 (model.safetensors).",
        "download-inconsistent",
        "B05",
    ),
    ("OSError: [Errno 28] No space left on device", "disk-full", "B06"),
    ("OSError: [Errno 27] File too large: 'E:/models/x.safetensors'", "file-too-large-for-disk", "B07"),
    ("OSError: [WinError 1314] A required privilege is not held by the client", "symlinks-not-allowed", "B09"),
    ("`huggingface_hub` cache-system uses symlinks by default to efficiently store", "symlinks-not-allowed", "B09"),
    (
        r"FileNotFoundError: [Errno 2] No such file or directory: 'C:\a\.cache\huggingface\download\x.incomplete'",
        "path-too-long",
        "B11",
    ),
    ("LocalEntryNotFoundError: An error happened while trying to locate the file on the Hub", "hub-unreachable", "B12"),
    ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local", "tls-not-trusted", "B13"),
    ("429 Client Error: Too Many Requests for url: https://huggingface.co/api", "rate-limited", "B14"),
    ("ValueError: Fast download using 'hf_transfer' is enabled", "hf-transfer-left-over", "B15"),
    ("An error occurred while downloading using hf_transfer. Consider disabling", "hf-transfer-left-over", "B15"),
    (f"{SHAPES} (512x12288 and 7680x3072)", "text-encoder-width", "C01"),
    (f"{SHAPES} (512x15360 and 7680x3072)", "text-encoder-width", "C02"),
    (f"{SHAPES} (512x2560 and 7680x3072)", "text-encoder-not-stacked", "C03"),
    (f"{SHAPES} (512x2560 and 12288x4096)", "text-encoder-not-stacked", "C03"),
    (
        "RuntimeError: linear(): input and weight.T shapes cannot be multiplied (512x2560 and 7680x3072)",
        "text-encoder-not-stacked",
        "C03",
    ),
    (f"{SHAPES} (512x4096 and 7680x3072)", "text-encoder-width", "C04"),
    ("KeyError: 't5xxl'", "wrong-text-encoder", "C04"),
    (f"{SHAPES} (512x7680 and 12288x4096)", "text-encoder-width", "C05"),
    (
        "Qwen3 encoder variant mismatch: FLUX.2 Klein klein_4b requires a qwen3_4b encoder, but",
        "text-encoder-width",
        "C01",
    ),
    (f"{SHAPES} (512x2560 and 4096x2560)", "text-encoder-vl", "C06"),
    (
        "clip missing: ['model.layers.0.self_attn.q_proj.weight', 'model.layers.0.self_attn.k_proj",
        "text-encoder-vl",
        "C06",
    ),
    ("Unexpected text model architecture type in GGUF file: 'qwen3vl'", "text-encoder-vl", "C06"),
    ("RuntimeError: Got [32, 32, 32, 32] but expected positional dim 64", "comfyui-too-old", "C07"),
    (
        "  - Value not in list: type: 'flux2' not in ['stable_diffusion', 'sdxl', 'flux']",
        "cliploader-lacks-flux2",
        "C08",
    ),
    (
        "RuntimeError: Given groups=1, weight of size [512, 16, 3, 3], expected input[1, 128, 64, 64] to have 16 "
        "channels, "
        "but got 128 channels instead",
        "vae-mismatch",
        "C09",
    ),
    (
        "RuntimeError: Given groups=1, weight of size [512, 16, 3, 3], expected input[1, 32, 64, 64] to have 16 "
        "channels, "
        "but got 32 channels instead",
        "vae-mismatch",
        "C09",
    ),
    (
        "Sizes of tensors must match except in dimension 1. Expected size 128 but got size 16 for tensor number 1",
        "vae-mismatch",
        "C09",
    ),
    (
        "The size of tensor a (128) must match the size of tensor b (16) at non-singleton dimension 1",
        "vae-mismatch",
        "C09",
    ),
    (f"{SHAPES} (567x512 and 64x3072)", "vae-mismatch", "C10"),
    ("Missing VAE keys ['encoder.conv_in.weight', 'encoder.conv_in.bias']", "vae-decoder-only", "C11"),
    (
        "ValueError: Cannot load /m/klein.safetensors because txt_in.weight expected shape torch.Size([6144, "
        "15360]), but got "
        "torch.Size([3072, 7680]).",
        "single-file-config",
        "C13",
    ),
    (
        "Some weights of the model checkpoint were not used when initializing Flux2Transformer2DModel: \n"
        " ['transformer_blocks.0.attn.to_q.weight_scale']",
        "fp8-in-diffusers",
        "C14",
    ),
    (
        "Expected types for text_encoder: (<class 'Mistral3ForConditionalGeneration'>,), got <class "
        "'Qwen3ForCausalLM'>.",
        "wrong-pipeline-class",
        "C15",
    ),
    ("lora key not loaded: lora_unet_something_else", "lora-mismatch", "C16"),
    ("No LoRA keys associated to Flux2Transformer2DModel found with the prefix='transformer'.", "lora-mismatch", "C16"),
    ("NOT LOADED diffusion_model.img_in.weight", "lora-mismatch", "C16"),
    ("lora key not loaded: lora_unet_double_blocks_18_img_attn_qkv.alpha", "lora-flux1", "C17"),
    ("Guidance scale 4.0 is ignored for step-wise distilled models.", "guidance-on-distilled", "C18"),
    (
        "RuntimeError: ERROR: Could not detect model type of: D:\\ComfyUI\\models\\checkpoints\\klein.safetensors",
        "transformer-in-checkpoints",
        "C19",
    ),
    ("RuntimeError: ERROR: clip input is invalid: None", "transformer-in-checkpoints", "C19"),
    ("ValueError: Unexpected architecture type in GGUF file: 'flux2'", "gguf-needs-node", "C21"),
    ("Falling back to numpy dequant for qtype: 23", "gguf-needs-node", "C21"),
    (
        "unet unexpected: ['double_blocks.0.img_attn.qkv.comfy_quant', 'double_blocks.0.img_attn.qkv.weight_scale']",
        "fp8-scales-unread",
        "C22",
    ),
    ("unet missing: ['img_in.weight']", "loader-warnings", "E11"),
    ("AssertionError: You do not have CLIP state dict!", "other-program", "C23"),
    ("No VAE source provided. Standalone safetensors/GGUF models require a separate VAE.", "part-missing", "C24"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.46 GiB.", "card-memory-full", "D01"),
    (
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)",
        "card-memory-full",
        "D01",
    ),
    ("Got an OOM, unloading all loaded models.", "card-memory-full", "D01"),
    (
        "Warning: Ran out of memory when regular VAE decoding, retrying with tiled VAE decoding.",
        "decode-memory",
        "D02",
    ),
    ("MemoryError", "memory-full", "D03"),
    ("Killed", "memory-full", "D03"),
    ("./start.sh: line 7:  4242 Killed                  python main.py", "memory-full", "D03"),
    ("comfyui-1 exited with code 137", "memory-full", "D03"),
    ("fatal : Memory allocation failure", "memory-full", "D03"),
    ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "memory-full", "D03"),
    ("Out of memory: Killed process 4242 (python3) total-vm:44GB", "memory-full", "D03"),
    ("RuntimeWarning: invalid value encountered in cast", "black-picture", "D07"),
    (
        "Expected size for first two dimensions of batch2 tensor to be: [64, 128] but got: [64, 32].",
        "preview-crash",
        "D08",
    ),
    (
        "The size of tensor a (3) must match the size of tensor b (128) at non-singleton dimension 1",
        "decoder-mismatch",
        "D09",
    ),
    ("RuntimeError: HostBuffer.read_file_slice failed", "dynamic-vram-trouble", "D10"),
    ("VRAM Allocation failed (non OOM)", "dynamic-vram-trouble", "D10"),
    ("ValueError: Image too small: 32x48. Both dimensions must be at least 64px", "references-large", "D12"),
    ("`height` and `width` have to be divisible by 16 but are 1000 and 1000.", "size-rounded", "D13"),
    ("Expected all tensors to be on the same device, but found at least two devices", "devices-mixed", "D18"),
    ("Node 'EmptyFlux2LatentImage' not found. The custom node may not be installed.", "comfyui-too-old", "E01"),
    ("Cannot execute because node Flux2Scheduler does not exist.", "comfyui-too-old", "E01"),
    ("Node 'FluxGuidancePlus' not found. The custom node may not be installed.", "node-missing", "E01"),
    ("This workflow was created with a newer version of ComfyUI (0.14.1). Some nodes", "comfyui-too-old", "E01"),
    ("Cannot execute because a node is missing the class_type property.: Node ID '#7'", "workflow-not-api", "E02"),
    ("  - Value not in list: vae_name: 'flux2-vae.safetensors' not in ['ae.safetensors']", "value-not-in-list", "E03"),
    ("Value not in list", "value-not-in-list", "E03"),
    (
        "requests.HTTPError: 400 Client Error: Bad Request for url: http://127.0.0.1:8188/prompt",
        "rejected-without-detail",
        "E04",
    ),
    ('  in "D:\\ComfyUI\\extra_model_paths.yaml", line 8, column 1', "extra-paths-wrong", "E05"),
    (
        "OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 8188): address already in use",
        "port-in-use",
        "E06",
    ),
    ("   0.3 seconds (IMPORT FAILED): /ComfyUI/custom_nodes/ComfyUI-Broken", "custom-node-broken", "E07"),
    (
        "WARNING: request with non matching host and origin 127.0.0.1:8188 != localhost:3000, returning 403",
        "origin-mismatch",
        "E08",
    ),
    ("403 Client Error: Forbidden for url: http://127.0.0.1:8188/prompt", "origin-mismatch", "E08"),
    ("RuntimeError: Could not acquire lock on database", "database-locked", "E10"),
]


def found(log, facts=None):
    return {match.problem.name: match.problem for match in explain(log, facts=facts)}


def only(log, facts=None):
    [match] = explain(log, facts=facts)
    return match.problem


@pytest.mark.parametrize(("line", "name", "ref"), KNOWN)
def test_known_failures(line, name, ref):
    [match] = explain(f"Loading pipeline components...: 100%|##| 5/5\nTraceback (most recent call last):\n{line}\n")
    assert (match.problem.name, match.problem.ref) == (name, ref)
    assert (match.line, match.number) == (line.split("\n")[0].strip(), 3)
    [evidence] = match.problem.evidence
    assert (evidence.looked_at, evidence.found) == ("line 3 of the log", match.line)
    assert match.problem.what[0] == match.problem.what.lstrip()[0] and not match.problem.what.endswith(".")


@pytest.mark.parametrize(("line", "name", "ref"), KNOWN[::3])
@pytest.mark.parametrize(
    "dress",
    [
        lambda line: f"\x1b[31m{line}\x1b[0m",
        lambda line: f"[31m{line}[0m",
        lambda line: f"> {line}".replace("\n", "\n> "),
        lambda line: f"    {line}".replace("\n", "\n    "),
        lambda line: f"comfyui-1  | {line}".replace("\n", "\ncomfyui-1  | "),
        lambda line: f"[2026-09-18 21:02:13.118] {line}",
        lambda line: f"Sep 18 21:02:13 host python[4242]: {line}",
        lambda line: f"100%|####| 4/4 [00:01<00:00]\r{line}\r",
        lambda line: f"\x1b]8;;https://example.org\x1b\\{line}\x1b]8;;\x1b\\",
        lambda line: "\0".join(f"{line}\n"),
    ],
)
def test_lines_as_terminals_web_pages_and_containers_dress_them(dress, line, name, ref):
    assert name in found(f"hello\r\n{dress(line)}\r\n")


@pytest.mark.parametrize(("line", "name", "ref"), KNOWN)
def test_a_wrapped_line(line, name, ref):
    """At the first space in the middle. What anchors at a line's end, or reads one line, is left out."""
    at = line.find(" ", len(line) // 2)
    whole = {"memory-full", "custom-node-broken", "hub-clash", "text-encoder-vl", "rejected-without-detail"}
    lists = {"loader-warnings", "fp8-scales-unread", "fp8-in-diffusers", "extra-paths-wrong", "value-not-in-list"}
    if at > 0 and name not in whole | lists | {"vae-decoder-only", "cliploader-lacks-flux2", "comfyui-too-old"}:
        assert name in found(f"{line[:at]}\n{line[at + 1 :]}")


@pytest.mark.parametrize("log", sorted((LOGS / "healthy").iterdir()), ids=lambda path: path.name)
def test_a_healthy_log_has_no_problems(log):
    assert explain(log.read_bytes().decode("utf-8")) == []


@pytest.mark.parametrize(
    "log",
    [
        "",
        "Loading checkpoint shards: 100%\nRequested to load Flux2TEModel_\n4/4 [00:03<00:00]\nPrompt executed in 3.2 s",
        "the user asked: what if one is Killed in the game?",
        f"{SHAPES} (8x100 and 200x300)",
        "memory_errors: 0",
        "loaded partially; 3612.43 MB usable, 3480.00 MB loaded, 405.21 MB offloaded",
        "Requested to load ZImageTEModel_\nRequested to load Lumina2\nPrompt executed in 4.1 seconds",
        "Found GPU0 NVIDIA GB10 which is of cuda capability 12.1.",
        "ModuleNotFoundError: No module named 'triton'",
        "Device: cpu\nmodel weight dtype torch.bfloat16, manual cast: torch.float32",
        "RuntimeError: Given groups=1, weight of size [64, 3, 3, 3], expected input[1, 4, 9, 9] to have 3 channels, "
        "but got 4 "
        "channels instead",
        "Process finished with exit code 0",
        "Stopped server\n\nD:\\ComfyUI>pause\nPress any key to continue . . .",
        'Traceback (most recent call last):\n  File "/x/hub.py", line 7, in get\n    raise GatedRepoError("Cannot '
        'access gated repo") from error\n    ~~~~~^^^^^^\nmy.own.Error: no\n',
        '{"traceback": ["  File \\"/x.py\\", line 1, in f\\n    raise OutOfMemoryError(\\"CUDA out of memory\\")\\n"]}',
        "╭── Traceback ──╮\n│ ❱ 12 raise RuntimeError('CUDA out of memory') │\n╰───────────────╯\nCancelled",
    ],
)
def test_what_looks_like_a_failure_and_is_none(log):
    assert explain(log) == []


# What ComfyUI 0.29 answered and wrote into its history.
ANSWERS = {
    "bad-cliptype": ("value-not-in-list", "flux3 is not offered by CLIPLoader as type"),
    "bad-size": ("prompt-rejected", "EmptyFlux2LatentImage"),
    "edit-flux1vae": ("vae-mismatch", "tiny-flux1-vae.safetensors"),
    "missing-node": ("node-missing", "Flux2SchedulerNope"),
    "missing-te": ("value-not-in-list", "qwen_3_4b.safetensors is not offered by CLIPLoader as clip_name"),
    "missing-unet": ("value-not-in-list", "flux-2-klein-4b.safetensors is not offered by UNETLoader as unet_name"),
    "missing-vae": ("value-not-in-list", "flux2-vae.safetensors is not offered by VAELoader as vae_name"),
    "te-clip-l": ("text-encoder-width", "tiny-clip-l.safetensors"),
    "te-mistral-no-tekken": ("wrong-text-encoder", "tiny-mistral-pruned.safetensors is Mistral Small"),
    "te-qwen3-8b": ("text-encoder-width", "slim-qwen3-8b.safetensors"),
    "te-qwen3-hidden256": ("wrong-text-encoder", "tiny-qwen3-h256.safetensors"),
    "te-t5xxl": ("text-encoder-width", "tiny-t5xxl.safetensors"),
    "te-type-flux-not-offered": ("value-not-in-list", "flux is not offered by CLIPLoader as type"),
    "te-type-qwen-image": ("text-encoder-not-stacked", "the text encoder was loaded for another model"),
    "te-unknown": ("text-encoder-width", "tiny-unknown.safetensors"),
    "unet-diffusers-names": ("diffusers-file-in-comfyui", "the transformer has the layout of diffusers"),
    "unet-in64": ("vae-mismatch", "does not fit the transformer"),
    "unet-truncated": ("weights-truncated", "truncated.safetensors is damaged"),
    "unet-unknown": ("wrong-transformer", "unknown.safetensors"),
    "vae-32ch-no-bn": ("vae-mismatch", "tiny-flux2-nobn-vae.safetensors"),
    "vae-flux1": ("vae-mismatch", "tiny-flux1-vae.safetensors"),
    "vae-sdxl": ("vae-mismatch", "tiny-sdxl-vae.safetensors"),
    "vae-truncated": ("weights-truncated", "truncated-vae.safetensors is damaged"),
}


@pytest.mark.parametrize("path", sorted((LOGS / "comfyui").iterdir()), ids=lambda path: path.stem)
def test_an_answer_of_comfyui_as_raw_json(path):
    name, says = ANSWERS[path.stem]
    document = path.read_text()
    for text in (document, json.dumps(json.loads(document))):
        problem = only(text)
        assert problem.name == name and says in problem.what


def test_the_shape_decoder_says_which_encoder_ran():
    problem = only(f"{SHAPES} (512x12288 and 7680x3072)")
    assert "those of Qwen3 4B" in problem.why and "12288, those of Qwen3 8B" in problem.why
    assert "T5-XXL" in only(f"{SHAPES} (512x4096 and 7680x3072)").why
    assert "one layer of Qwen3 8B" in only(f"{SHAPES} (512x4096 and 7680x3072)").why
    assert "type is not flux2" in only(f"{SHAPES} (512x2560 and 7680x3072)").why


def test_a_loader_of_the_wrong_type_explains_the_shapes_that_follow():
    log = (
        f"got prompt\n  - Value not in list: type: 'flux2' not in ['sdxl', 'flux']\n{SHAPES} (512x2560 and 7680x3072)\n"
    )
    assert list(found(log)) == ["cliploader-lacks-flux2", "text-encoder-not-stacked"]


def test_the_encoder_of_z_image_beside_a_flux2_transformer():
    problem = only("Requested to load ZImageTEModel_\nRequested to load Flux2\n")
    assert problem.name == "text-encoder-not-stacked"


def test_a_lora_of_klein_9b_on_klein_4b():
    blocks = "ERROR lora diffusion_model.double_blocks.0"
    problem = only(f"{blocks}.img_attn.qkv.weight shape '[9216, 3072]' is invalid for input of size 50331648")
    assert problem.name == "lora-mismatch" and "12288 x 4096, so it is for klein 9B" in problem.why
    flux1 = only(f"{blocks}.img_mlp.0.weight shape '[18432, 3072]' is invalid for input of size 37748736")
    assert flux1.name == "lora-flux1"
    keys = "\n".join(f"lora key not loaded: lora_unet_double_blocks_{block}_img_attn_proj.alpha" for block in (5, 6, 7))
    assert "klein 9B" in only(keys).why and "3 of its keys" in only(keys).why


def test_the_drivers_number_is_read():
    assert "CUDA 12.4" in only("The NVIDIA driver on your system is too old (found version 12040).").why


OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.46 GiB. GPU 0 has a total capacity of 11.75 GiB "
    "of which "
    "1.05 GiB is free. Including non-PyTorch memory, this process has {own} GiB memory in use. Of the allocated "
    "memory {torch} "
    "GiB is allocated by PyTorch, and 123.45 MiB is reserved by PyTorch but unallocated."
)


def test_the_numbers_of_a_card_whose_memory_ran_out():
    problem = only(OOM.format(own="10.20", torch="9.60"))
    assert problem.name == "card-memory-full"
    assert all(number in problem.why for number in ("2.5 GiB more", "11.8 GiB", "1.1 GiB free", "9.6 GiB were this"))


def test_another_program_has_the_cards_memory():
    problem = only(OOM.format(own="3.10", torch="2.40"))
    assert (problem.name, problem.ref) == ("vram-taken", "A16")
    assert "about 7.6 GiB other programs'" in problem.why
    old = (
        "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.79 GiB total capacity; 1.00 GiB already allocated; "
    )
    assert only(f"{old}14.00 MiB free; 1.10 GiB reserved in total by PyTorch)").name == "vram-taken"


def test_the_numbers_of_comfyuis_allocator():
    problem = only(
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)\n"
        "Currently allocated     : 7.10 GiB\nRequested               : 128.00 MiB\nDevice limit            : 8.00 GiB\n"
        "Free (according to CUDA): 0 bytes\n"
    )
    assert problem.name == "card-memory-full" and "0.1 GiB more" in problem.why


def test_memory_that_runs_out_in_the_decoder():
    frames = '  File "/ComfyUI/nodes.py", line 296, in decode\n    images = vae.decode(samples["samples"])\n'
    log = f"Traceback (most recent call last):\n{frames}{OOM.format(own='10.20', torch='9.60')}\n"
    assert only(log).name == "decode-memory"


def card(capability, name):
    return Facts(Hardware(gpus=(Gpu(name, capability, 16 * GIB, 15 * GIB, driver="560.35"),)))


def test_a_kernel_that_is_missing_is_explained_by_the_card():
    line = "CUDA error: no kernel image is available for execution on the device"
    new = only(line, card("12.0", "NVIDIA GeForce RTX 5090"))
    assert (new.name, new.what) == ("torch-lacks-card", "torch has no code for NVIDIA GeForce RTX 5090")
    old = only(line, card("6.1", "NVIDIA GeForce GTX 1080 Ti"))
    assert (old.name, old.ref) == ("torch-dropped-card", "A04") and "GTX 1080 Ti" in old.what
    frames = '  File "/v/site-packages/flash_attn/flash_attn_interface.py", line 91, in f\n    out = x()\n'
    extension = only(f"Traceback (most recent call last):\n{frames}RuntimeError: {line}\n", card("12.0", "RTX 5090"))
    assert (extension.name, "flash_attn" in extension.what) == ("optional-packages-mismatched", True)


def test_killed_in_wsl():
    inside = Facts(Hardware(ram_bytes=8 * GIB, wsl=2))
    assert (only("Killed", inside).name, only("Killed", inside).ref) == ("wsl-memory", "A06")
    log = "** Platform: Linux-5.15.153.1-microsoft-standard-WSL2\nTotal VRAM 8188 MB, total RAM 7574 MB\nKilled\n"
    assert only(log).name == "wsl-memory" and "7.4 GiB" in only(log).why


def test_a_container_without_the_card():
    assert (
        only("Found no NVIDIA driver on your system", Facts(Hardware(container="docker"))).name
        == "container-without-gpu"
    )


def test_the_smaller_of_two_cards_is_used():
    gpus = (
        Gpu("NVIDIA GeForce GTX 1650", "7.5", 4 * GIB, 4 * GIB),
        Gpu("NVIDIA GeForce RTX 3090", "8.6", 24 * GIB, 24 * GIB),
    )
    log = "Device: cuda:0 NVIDIA GeForce GTX 1650 : cudaMallocAsync\n"
    assert only(log, Facts(Hardware(gpus=gpus))).name == "several-cards"
    assert explain(log) == [] and explain(log, facts=Facts(Hardware(gpus=gpus[:1]))) == []


@pytest.mark.parametrize(
    ("kind", "name", "ref"),
    [
        ("lfs-pointer", "weights-lfs-pointer", "B03"),
        ("web-page", "weights-web-page", "B04"),
        ("gguf", "gguf-needs-node", "C21"),
        ("truncated", "weights-truncated", "B02"),
    ],
)
def test_a_file_that_is_no_safetensors_is_named_by_what_it_is(kind, name, ref):
    path = Path("/m/vae/flux2-vae.safetensors")
    file = FoundFile(
        path, Identity(path, kind, "its first bytes"), "ComfyUI", model="klein-4b", part="vae", fix="kleinctl x"
    )
    log = f"{HEADER}: header too large\n\nFile path: /m/vae/flux2-vae.safetensors\n"
    problem = only(log, Facts(Hardware(), files=(file,)))
    assert (problem.name, problem.ref) == (name, ref) and "flux2-vae.safetensors" in problem.what
    assert (problem.remedy is not None) == (kind != "gguf")
    assert only(log).what == "flux2-vae.safetensors is damaged"


def test_every_value_that_is_not_offered_is_told():
    log = (
        "Failed to validate prompt for output 13:\n* VAELoader 3:\n  - Value not in list: vae_name: "
        "'flux2-vae.safetensors' not "
        "in ['ae.safetensors']\n* UNETLoader 1:\n  - Value not in list: unet_name: 'flux-2-klein-4b.safetensors' not "
        "in "
        "['flux2/flux-2-klein-4b.safetensors', 'flux-2-klein-9b.safetensors']\nOutput will be ignored\n"
    )
    problem = only(log)
    assert problem.what == "flux-2-klein-4b.safetensors is not offered by UNETLoader as unet_name"
    assert problem.fix == "set unet_name of UNETLoader to flux2/flux-2-klein-4b.safetensors"
    assert "vae_name 'flux2-vae.safetensors'" in problem.why
    for others in ("'ae.safetensors', 'flux1-vae.safetensors'", "'full_encoder_small_decoder.safetensors'", ""):
        wrong = only(f"* VAELoader 3:\n  - Value not in list: vae_name: 'flux2-vae.safetensors' not in [{others}]")
        assert wrong.fix.startswith("put flux2-vae.safetensors into models/vae")
    precision = only(
        "- Value not in list: clip_name: 'qwen_3_4b.safetensors' not in ['qwen_3_4b_fp8_mixed.safetensors']"
    )
    assert precision.fix.endswith("to qwen_3_4b_fp8_mixed.safetensors")
    other = only(
        "* UNETLoader 1:\n  - Value not in list: unet_name: 'klein-4b.safetensors' not in ['klein-9b.safetensors']"
    )
    assert other.fix.startswith("put klein-4b.safetensors into models/diffusion_models")


def test_a_gguf_file_in_a_core_loader():
    line = "* UNETLoader 1:\n  - Value not in list: unet_name: 'flux-2-klein-4b-Q4_K_M.gguf' not in ['a.safetensors']\n"
    assert only(line).name == "gguf-needs-node"
    assert only("Node 'UnetLoaderGGUF' not found. The custom node may not be installed.").name == "gguf-needs-node"


@pytest.mark.parametrize(
    "line",
    [
        "* VAEDecode 12:\n  - Required input is missing: vae",
        "* VAEDecode 12:\n  - Return type mismatch between linked nodes: samples, received_type(IMAGE) mismatch",
        "* Flux2Scheduler 8:\n  - Failed to convert an input value to a INT value: width, x, invalid literal",
        "* LoadImage 14:\n  - Custom validation failed for node: image - Invalid image file: x.png",
        "* RandomNoise 9:\n  - Value -1 smaller than min of 0: noise_seed",
        "* VAEDecode 12:\n  - Bad linked input, must be a length-2 list of [node_id, slot_index]: vae",
        "* X 1:\n  - Exception when validating inner node: 'y'",
        '{"error": {"type": "prompt_no_outputs", "message": "Prompt has no outputs", "details": ""}}',
        '{"error": {"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided"}}',
    ],
)
def test_a_workflow_that_comfyui_rejects(line):
    problem = only(line)
    assert problem.name == "prompt-rejected"
    if line.startswith("*"):
        assert line.split()[1] in problem.what


def test_a_custom_node_that_lacks_a_package_is_a_warning():
    log = (
        'Traceback (most recent call last):\n  File "/c/nodes.py", line 2129, in load\n    x()\nModuleNotFoundError: '
        "No module named 'cv2'\n\nCannot import /c/custom_nodes/Broken module for custom nodes: No module named 'cv2'\n"
    )
    problem = only(log)
    assert (problem.name, problem.severity) == ("custom-node-broken", "warning") and "Broken" in problem.what


def test_a_program_that_ends_without_a_word():
    log = "got prompt\nRequested to load Flux2TEModel_\n\nD:\\ComfyUI>pause\nPress any key to continue . . .\n"
    assert (only(log).name, only(log).ref) == ("silent-exit", "A09")
    status = only("Requested to load Flux2\nComfyUI exited with code 3221225477\n")
    assert status.name == "silent-exit" and "access violation" in status.why
    assert explain("Requested to load Flux2\n") == []  # it may still be running
    assert "silent-exit" not in found(f"Requested to load Flux2\n{OOM}\n100%|##|\nPress any key to continue . . .\n")


def test_editing_that_fails_in_the_sampler():
    frames = '  File "/c/comfy/ldm/flux/model.py", line 232, in forward\n    for ref in ref_latents:\n'
    log = f"!!! Exception during processing !!! odd\nTraceback (most recent call last):\n{frames}RuntimeError: odd\n"
    assert (only(log).name, only(log).ref) == ("edit-fails-after-update", "E12")


def test_an_edit_in_bf16_with_an_old_diffusers():
    frames = '  File "/v/diffusers/pipelines/flux2/pipeline_flux2_klein.py", line 500, in prepare\n    x = y @ z\n'
    error = "RuntimeError: expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16"
    log = f"Traceback (most recent call last):\n{frames}{error}\n"
    assert (only(log).name, only(log).ref) == ("diffusers-edit-dtype", "D21")
    assert explain(error) == []


def test_the_name_of_a_gated_repository():
    line = "Access to model black-forest-labs/FLUX.2-klein-9B is restricted and you are not in the authorized list."
    assert only(line).what == "black-forest-labs/FLUX.2-klein-9B is gated" and "klein 4B needs no" in only(line).why


def test_lines_that_a_terminal_coloured_and_wrapped():
    [match] = explain(
        "\x1b[31mRuntimeError: mat1 and mat2 shapes cannot\nbe multiplied (512x12288 and\n  7680x3072)\x1b[0m"
    )
    assert match.problem.ref == "C01"


def test_what_a_progress_bar_has_overwritten_is_not_read():
    assert explain("CUDA out of memory\r100%|####| done\n") == []


def test_a_log_from_windows():
    [match] = explain("Loading\r\nCUDA out of memory.\r\n")
    assert match.line == "CUDA out of memory."


def test_the_last_of_many_is_shown_and_told_once():
    log = "CUDA out of memory. Tried to allocate 20.00 MiB\nretrying\nCUDA out of memory. Tried to allocate 1.50 GiB\n"
    [match] = explain(log)
    assert match.number == 3 and "1.5 GiB" in match.problem.why


def test_lines_are_counted_from_the_start_of_a_log_that_is_too_long():
    [match] = explain("\n" * MAX_CHARACTERS + "CUDA out of memory\n")
    assert match.number == MAX_CHARACTERS + 1


def test_errors_come_before_warnings_and_then_in_the_order_of_the_patterns():
    def pattern(name, severity="error"):
        return LogPattern(name, name, Problem(name, "why", "fix", severity=severity))

    patterns = [pattern("quiet", "warning"), pattern("second"), pattern("third")]
    assert [m.problem.name for m in explain("third\nquiet\nsecond\n", patterns)] == ["second", "third", "quiet"]


def test_one_line_has_one_explanation():
    patterns = [LogPattern(name, name, Problem(name, "why", "fix")) for name in ("no module named x", "no module")]
    assert [match.problem.name for match in explain("no module named x", patterns)] == ["no module named x"]


def test_a_pattern_of_a_plugin():
    problem = Problem("my_extension is missing", "It is not installed.", "pip install my-extension")
    [match] = explain("ImportError: No module named 'my_extension'", [LogPattern("mine", r"my_extension", problem)])
    assert isinstance(match, Match) and match.problem.name == "mine" and match.problem.fix == problem.fix


@pytest.mark.parametrize("slip", [lambda sighting: 1 // 0, lambda sighting: "it is missing"])
def test_a_pattern_of_a_plugin_that_raises_leaves_the_others_alone(slip):
    log = "ImportError: No module named 'my_extension'\ntorch.OutOfMemoryError: CUDA out of memory."
    own = LogPattern("other", "CUDA out of memory", Problem("the card is full", "It is.", "kleinctl plan"))
    first, second = sorted(explain(log, [LogPattern("mine", "my_extension", slip), own]), key=lambda each: each.number)
    assert first.problem.what == "the log pattern mine failed" and first.problem.severity == "warning"
    assert second.problem.name == "other"


@pytest.mark.parametrize(
    ("regex", "words"),
    [
        (r"abc|\[Errno 28\] def", ("abc", "[Errno")),
        (r"a longer\.word(?: or not)?", ("longer.word",)),
        (r"(?:one|two) shapes \(\d{1,9}x\)", ("shapes",)),
        (r"colou?rs? of", ("colo",)),
        (r"(?i)any", ()),
        (r"\d{1,9}|text", ()),
    ],
)
def test_the_words_that_a_regex_cannot_do_without(regex, words):
    assert _words(regex) == words


def test_every_pattern_has_words_so_that_a_log_is_read_fast():
    assert [pattern.name for pattern in PATTERNS if not _words(pattern.regex)] == []


FLOODS = [
    *("CUDA out of memory. Tried to allocate ", f"{SHAPES} (", " ", "a", "No module named '", "\x1b[", "\x1b]", "\r"),
    *(
        '  File "',
        '  File "x", line 1\n    ',
        "unet_name: 'x' not in [",
        "Cannot load expected shape ",
        "'",
        "x.safetensors ",
    ),
    *(
        "Expected types for text_encoder: Mistral3 got ",
        " ".join(sorted({w for p in PATTERNS for w in _words(p.regex)})),
    ),
]


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood[:12])
def test_a_log_made_to_slow_us_down(flood, end):
    """It takes 0.1 to 0.6 s; the bound allows for a machine that is busy with something else."""
    start = time.process_time()
    explain((flood * 40 + end) * (MAX_CHARACTERS // (len(flood) * 40) + 1))
    assert time.process_time() - start < 2


def test_a_long_healthy_log_is_read_fast():
    healthy = (LOGS / "healthy" / "comfyui-0.29.log").read_text()
    start = time.process_time()
    assert explain(healthy * (MAX_CHARACTERS // len(healthy))) == []
    assert time.process_time() - start < 1.5


@settings(max_examples=200, deadline=1000)
@given(st.text(max_size=2000))
def test_any_text_can_be_read(text):
    for match in explain(text, facts=card("8.9", "NVIDIA GeForce RTX 4090")):
        assert match.number <= text.count("\n") + 1


@settings(max_examples=300, deadline=1000)
@given(st.lists(st.sampled_from([line for line, _, _ in KNOWN]), min_size=1, max_size=4), st.data())
def test_failures_that_are_cut_and_mixed_can_be_read(lines, data):
    text = "\n".join(lines)
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(text)))
        until = min(len(text), at + data.draw(st.integers(0, 20)))
        text = text[:at] + data.draw(st.text(alphabet="0x9[](){}'\"\\\n\r \x1b%,.:", max_size=8)) + text[until:]
    for match in explain(text, facts=card("8.9", "NVIDIA GeForce RTX 4090")):
        assert match.problem.name and match.problem.what and match.problem.evidence


@pytest.mark.parametrize(
    ("text", "name", "ref"),
    [
        ("(512x15360 and 7680x3072)", "text-encoder-width", "C02"),
        ("(512x4096 and 7680x3072)", "text-encoder-width", "C04"),
        ("(512x7680 and 12288x4096)", "text-encoder-width", "C05"),
        ("(512x2560 and 4096x2560)", "text-encoder-vl", "C06"),
        ("… shape '[9216, 3072]' is invalid for input of size 50331648", "lora-mismatch", "C16"),
        ("The safetensors file is corrupt or invalid. Make sure this is", "weights-not-safetensors", "B03"),
        ("The safetensors file is corrupt/incomplete. Check the file size", "weights-truncated", "B02"),
        ("write /var/lib/docker/tmp/x: no space left on device", "disk-full", "B06"),
        ("cannot import name 'AutoProcessor' from 'transformers'", "torch-versions-differ", "A21"),
        ("Did you mean: 'Flux2Pipeline'?", "diffusers-too-old", "A24"),
        ("module diffusers has no attribute Flux2KleinPipeline", "diffusers-too-old", "A24"),
        ("cannot import name 'Qwen2TokenizerFast' from 'transformers'", "transformers-clash", "A25"),
        ("ImportError: huggingface-hub>=0.34.0 is required", "hub-clash", "A26"),
        ("OSError: [WinError 127] Error loading torch\\lib\\shm.dll", "vc-runtime-missing", "A20"),
        ("pynvml.NVMLError: NVML_ERROR_LIB_RM_VERSION_MISMATCH", "driver-library-mismatch", "A11"),
        ("Cannot copy out of meta tensor; no data!", "wrong-pipeline-class", "C15"),
        ("WARNING: No VAE weights detected, VAE not initalized.", "transformer-in-checkpoints", "C19"),
        (
            "size of tensor a (32) must match the size of tensor b (16) at non-singleton dimension 1",
            "vae-mismatch",
            "C09",
        ),
        ("OSError: [Errno 98] Address already in use", "port-in-use", "E06"),
        ("[Errno 13] error while attempting to bind on address ('::', 80): denied", "port-in-use", "E06"),
        ("node types were not found:\n- EmptyFlux2LatentImage", "comfyui-too-old", "E01"),
        ("RuntimeError: CUDA error: out of memory", "card-memory-full", "D01"),
        ("zsh: killed     python main.py", "memory-full", "D03"),
        ("HTTP Error 429: Too Many Requests", "rate-limited", "B14"),
        ("401 Client Error: Unauthorized for url: https://huggingface.co/x/y/resolve/main/z", "gated-repo", "B01"),
    ],
)
def test_a_piece_of_an_error_as_people_paste_it(text, name, ref):
    healthy = "\n".join(path.read_text(encoding="utf-8") for path in sorted((LOGS / "healthy").iterdir()))
    for log in (text, f"{healthy}\n{text}\n{healthy}"):
        assert [(match.problem.name, match.problem.ref) for match in explain(log)] == [(name, ref)]


NOISE = {
    "custom nodes": "FETCH ComfyRegistry Data: 5/98\n[SKIP] Downgrading pip package isn't allowed: huggingface-hub\n"
    "unet missing: []\nclip missing: ['text_projection.weight']\nno CLIP/text encoder weights in checkpoint\n"
    "Error handling request\nConnectionResetError: [Errno 104] Connection reset by peer\n"
    "[WinError 10054] An existing connection was forcibly closed\nError. No naistyles.csv found.\n",
    "pip": "Requirement already satisfied: huggingface-hub<2.0,>=0.34.0 in ./lib (from diffusers) (0.36.0)\n"
    "Attempting uninstall: numpy\n    Found existing installation: numpy 1.26.4\n  Using cached numpy-2.3.5.whl\n"
    "WARNING: Retrying (Retry(total=4)) after connection broken by 'ReadTimeoutError'\n",
    "system": "systemd[1]: foo.service: Main process exited, code=killed, status=15/TERM\n"
    'systemd[1]: snap.service: Killed\n"POST /api/x HTTP/1.1" 400 Bad Request\nexit code 143\n'
    "audit: denied [Errno 13] Permission denied: '/root'\nnpm ERR! code E403 403 Forbidden\n",
    "training": "mat1 shape (512x7680)\nmatmul(512x2560, 2560x7680) ok\ntxt_in (7680x3072)\n"
    "size of tensor a (64) and b (96)\nKilled 3 idle workers\nthe header is large\ngrad overflow, skipping step\n"
    "shape '[2, 3]' is invalid for input of size 7\nweights were not used when initializing Qwen3ForCausalLM\n",
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_that_looks_like_failures_in_a_long_healthy_log(kind):
    healthy = "\n".join(path.read_text(encoding="utf-8") for path in sorted((LOGS / "healthy").iterdir()))
    assert explain("\n".join([healthy, NOISE[kind]] * 100)) == []
