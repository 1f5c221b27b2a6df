"""What is read from a log: real lines, of real failures."""

import time

import pytest

from kleinctl.logs import LogPattern, Match, explain
from kleinctl.problem import Problem

SHAPES = "RuntimeError: mat1 and mat2 shapes cannot be multiplied"


@pytest.mark.parametrize(
    ("line", "name", "ref"),
    [
        (f"{SHAPES} (512x12288 and 7680x3072)", "text-encoder-width", "C01"),
        (f"{SHAPES} (512x15360 and 7680x3072)", "text-encoder-width", "C02"),
        (f"{SHAPES} (512x2560 and 7680x3072)", "text-encoder-width", "C03"),
        (f"{SHAPES} (512x4096 and 7680x3072)", "text-encoder-width", "C04"),
        (f"{SHAPES} (512x7680 and 12288x4096)", "text-encoder-width", "C05"),
        (f"{SHAPES} (512x2560 and 4096x2560)", "text-encoder-vl", "C06"),
        (f"{SHAPES} (567x512 and 64x3072)", "vae-mismatch", "C10"),
        (
            "RuntimeError: linear(): input and weight.T shapes cannot be multiplied (512x2560 and 7680x3072)",
            "text-encoder-width",
            "C03",
        ),
        (
            "SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered",
            "weights-truncated",
            "B02",
        ),
        ("Error while deserializing header: MetadataIncompleteBuffer", "weights-truncated", "B02"),
        ("Error while deserializing header: header too large", "weights-not-safetensors", "B03"),
        ("Error while deserializing header: HeaderTooSmall", "weights-empty", "B04"),
        ("OSError: [Errno 28] No space left on device", "disk-full", "B06"),
        ("The NVIDIA driver on your system is too old (found version 12040).", "driver-too-old", "A01"),
        ("AssertionError: Torch not compiled with CUDA enabled", "torch-without-cuda", "A02"),
        ("CUDA error: no kernel image is available for execution on the device", "torch-lacks-card", "A03"),
        ("OSError: The paging file is too small for this operation. (os error 1455)", "page-file-too-small", "A08"),
        ("RuntimeError: Found no NVIDIA driver on your system.", "no-driver", "A13"),
        ("ImportError: cannot import name 'Flux2KleinPipeline' from 'diffusers'", "diffusers-too-old", "A24"),
        (
            "ImportError: `enable_model_cpu_offload` requires `accelerate v0.17.0` or higher.",
            "accelerate-missing",
            "A28",
        ),
        ("ModuleNotFoundError: No module named 'transformers.modeling_layers'", "module-missing", "A32"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.46 GiB.", "card-memory-full", "D01"),
        ("MemoryError", "memory-full", "D03"),
        ("Killed", "memory-full", "D03"),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "memory-full", "D03"),
    ],
)
def test_known_failures(line, name, ref):
    [match] = explain(f"Loading pipeline components...: 100%|##| 5/5\nTraceback:\n{line}\n")
    assert (match.problem.name, match.problem.ref) == (name, ref)
    assert (match.line, match.number) == (line, 3)


def test_the_shape_decoder_says_which_encoder_ran():
    [match] = explain(f"{SHAPES} (512x12288 and 7680x3072)")
    assert "those of Qwen3 4B" in match.problem.why and "12288, those of Qwen3 8B" in match.problem.why


@pytest.mark.parametrize(
    "log",
    [
        "",
        "Loading checkpoint shards: 100%\nRequested to load Flux2TEModel_\n4/4 [00:03<00:00]\nPrompt executed in 3.2 s",
        "the user asked: what if one is Killed in the game?",
        f"{SHAPES} (8x100 and 200x300)",
        "memory_errors: 0",
    ],
)
def test_a_healthy_log_has_no_problems(log):
    assert explain(log) == []


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
    assert match.number == 3 and "1.50 GiB" in match.problem.why


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


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(
    "flood", ["CUDA out of memory. Tried to allocate ", f"{SHAPES} (", " ", "a", "No module named '", "\x1b["]
)
def test_a_log_made_to_slow_us_down(flood, end):
    start = time.monotonic()
    explain((flood * 40 + end) * (4 * 2**20 // (len(flood) * 40)))
    assert time.monotonic() - start < 5
