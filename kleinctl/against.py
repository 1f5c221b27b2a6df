"""A running ComfyUI server on this machine, drawing the same jobs for `kleinctl bench --against comfyui`."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from kleinctl.backends import Job
from kleinctl.bench import Opened
from kleinctl.manifest import Model
from kleinctl.problem import KleinctlError, Misuse, Problem

#: Longest answer that is read, in bytes (the list of a node's inputs names every file), and how long one may take.
MAX_BYTES, ANSWER_SECONDS = 8 * 2**20, 30.0
#: Seconds between two looks at whether a picture is there, and the longest wait for one.
POLL_SECONDS, PICTURE_SECONDS = 0.01, 900.0
#: Pictures stay in the server's output folder under this name.
PREFIX = "kleinctl-bench"
#: The loaders, the inputs that name their files, what those are, and what is in their names (of 4B and of 9B models).
FILES = (
    ("UNETLoader", "unet_name", "transformer", ("klein4b", "klein9b")),
    ("CLIPLoader", "clip_name", "text encoder", ("qwen34b", "qwen38b")),
    ("VAELoader", "vae_name", "VAE", ("flux2vae", "flux2vae")),
)


def check(url: str, changes: Mapping[str, Any]) -> None:
    """Whether the server can be asked.

    Raises:
        Misuse: it is not on this machine, or an edit is wanted.
    """
    if not _is_here(url):
        why = f"Found is {url[:80]}; bench asks a server on this machine alone."
        raise Misuse(Problem("--url is no server on this machine", why, "--url http://127.0.0.1:8188", name="usage"))
    if changes.get("images"):
        why = "The graph that is sent draws from text alone."
        raise Misuse(Problem("--image cannot be compared with ComfyUI", why, "--against diffusers", name="usage"))


def _is_here(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1") and parts.port != 0
    except ValueError:
        return False


@contextlib.contextmanager
def comfyui(url: str, model: Model) -> Iterator[Opened]:
    """The server with the names of the model's files, ready to draw.

    Raises:
        KleinctlError: it does not answer, or lacks the model.
    """
    system = ask(url, "/system_stats").get("system")
    version = str(system.get("comfyui_version", "unknown")) if isinstance(system, dict) else "unknown"
    files = model_files(url, model)

    def draw(job: Job, output: Path) -> tuple[str, Mapping[str, float]]:
        queued = ask(url, "/prompt", {"prompt": graph(model, job, files)})
        try:
            finished(url, queued)
        except BaseException:  # Ctrl-C as well
            _take_back(url, queued)
            raise
        return "", {}

    yield Opened(draw, lambda: f"server with {files['unet_name']}", {"comfyui": version})


def forget(url: str) -> None:
    """Let the server drop its models, so that the first picture pays for loading them.

    Raises:
        KleinctlError: it does not answer.
    """
    ask(url, "/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.0)  # it does so between two looks at its queue


def model_files(url: str, model: Model) -> dict[str, str]:
    """The names of the transformer, the text encoder and the VAE as the server lists them, by the loaders' inputs.

    Raises:
        KleinctlError: one is not there.
    """
    found = {}
    for node, key, kind, words in FILES:
        word = words["9b" in model.family]
        choices = _choices(ask(url, f"/object_info/{node}"), node, key)
        names = [name for name in choices if word in _plain(name)]
        if key == "unet_name":
            names = [name for name in names if ("base" in name.lower()) == (model.variant == "base")]
        if not names:
            listed = ", ".join(choices[:8]) or "none"
            raise KleinctlError(
                Problem(
                    f"the ComfyUI server has no {kind} of {model.name}",
                    f"A file with {word} in its name is wanted; its {node} lists {listed[:300]}.",
                    "kleinctl doctor --comfyui DIR",
                    name="comfyui-lacks-model",
                )
            )
        found[key] = min(names, key=lambda name: ("fp8" in name.lower(), len(name)))
    return found


def _plain(name: str) -> str:
    """A file's name without what people write differently: `flux-2-klein-base-4b` is `flux2klein4b`."""
    return name.lower().replace("-", "").replace("_", "").replace("base", "")


def _choices(answer: Mapping[str, Any], node: str, key: str) -> list[str]:
    """The file names that a node offers: `[[names], {}]`, or newer `["COMBO", {"options": names}]`."""
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        kind, *more = answer[node]["input"]["required"][key]
        listed = kind if isinstance(kind, list) else more[0]["options"]
        return [name for name in listed if isinstance(name, str)]
    return []


def graph(model: Model, job: Job, files: Mapping[str, str]) -> dict[str, Any]:
    """The official template's graph from text to image, as the API takes it."""
    base = model.variant == "base"
    negative = ("CLIPTextEncode", {"clip": ["2", 0], "text": ""}) if base else (
        "ConditioningZeroOut", {"conditioning": ["4", 0]}
    )  # fmt: skip
    size = {"width": job.width, "height": job.height}
    nodes: list[tuple[str, dict[str, Any]]] = [
        ("UNETLoader", {"unet_name": files["unet_name"], "weight_dtype": "default"}),
        ("CLIPLoader", {"clip_name": files["clip_name"], "type": "flux2", "device": "default"}),
        ("VAELoader", {"vae_name": files["vae_name"]}),
        ("CLIPTextEncode", {"clip": ["2", 0], "text": job.prompt}),
        negative,
        ("CFGGuider", {"model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0], "cfg": job.guidance}),
        ("KSamplerSelect", {"sampler_name": "euler"}),
        ("Flux2Scheduler", {"steps": job.steps, **size}),
        ("RandomNoise", {"noise_seed": job.seed}),
        ("EmptyFlux2LatentImage", {**size, "batch_size": 1}),
        (
            "SamplerCustomAdvanced",
            {
                "noise": ["9", 0],
                "guider": ["6", 0],
                "sampler": ["7", 0],
                "sigmas": ["8", 0],
                "latent_image": ["10", 0],
            },
        ),
        ("VAEDecode", {"samples": ["11", 0], "vae": ["3", 0]}),
        ("SaveImage", {"images": ["12", 0], "filename_prefix": PREFIX}),
    ]
    return {str(number): {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in enumerate(nodes, 1)}


def finished(url: str, queued: Mapping[str, Any]) -> None:
    """Wait until a queued prompt is done.

    Raises:
        KleinctlError: it failed, or took too long.
    """
    number = str(queued.get("prompt_id", ""))
    end = time.monotonic() + PICTURE_SECONDS
    while time.monotonic() < end:
        entry = ask(url, f"/history/{quote(number, safe='')}").get(number)
        status = entry.get("status") if isinstance(entry, dict) else None
        status = status if isinstance(status, dict) else {}
        if status.get("status_str") == "error":
            raise _refused(_said(status))
        if status.get("completed"):
            return
        time.sleep(POLL_SECONDS)
    raise _refused(f"no picture within {PICTURE_SECONDS:.0f} seconds")


def _take_back(url: str, queued: Mapping[str, Any]) -> None:
    """Take a prompt out of the queue, and end it where it runs; without an id the server would end anybody's."""
    if number := queued.get("prompt_id"):
        with contextlib.suppress(KleinctlError):
            ask(url, "/queue", {"delete": [number]})
            ask(url, "/interrupt", {"prompt_id": number})


def _said(status: Mapping[str, Any]) -> str:
    for message in status.get("messages", ()):
        if isinstance(message, list) and message[:1] == ["execution_error"] and isinstance(message[-1], dict):
            return f"{message[-1].get('node_type')}: {message[-1].get('exception_message')}"
    return "it does not say why"


class _Stay(urllib.request.HTTPRedirectHandler):
    """A server of this machine does not send us to another."""

    def redirect_request(self, *asked: Any) -> None:
        return None


def ask(url: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The server's answer to a question (with `body`: a POST), as JSON; empty where it says nothing.

    Raises:
        KleinctlError: it does not answer, or refuses.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay)
    try:
        with opener.open(request, timeout=ANSWER_SECONDS) as answer:
            text = answer.read(MAX_BYTES)
        found = json.loads(text) if text.strip() else {}
    except urllib.error.HTTPError as error:
        raise _refused(f"HTTP {error.code}: {error.read(2000).decode('utf-8', 'replace')}") from None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        why = f"{url}{path} gave no answer: {getattr(error, 'reason', error) or type(error).__name__}."
        fix = "start ComfyUI, then: kleinctl bench --against comfyui --url http://127.0.0.1:8188"
        raise KleinctlError(Problem("the ComfyUI server does not answer", why, fix, name="comfyui-silent")) from None
    return found if isinstance(found, dict) else {}


def _refused(why: str) -> KleinctlError:
    what = "the ComfyUI server drew no picture"
    return KleinctlError(
        Problem(what, f"It says: {why[:600]}.", "kleinctl doctor --comfyui DIR", name="comfyui-failed")
    )
