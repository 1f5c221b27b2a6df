"""Write the manifest of a model whose files lie in this repository, under manifests/NAME/ in diffusers' layout.

    python tools/write_manifest.py klein-tiny [--check]

Parts and the [shape] table are read off the files. What stands before [shape] in manifests/NAME.toml is kept, and can
be edited by hand. With `--check` nothing is written, and the exit code is 1 where the manifest differs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from kleinctl.fingerprint import of_file
from kleinctl.header import Header, read_safetensors
from kleinctl.identify import identify
from kleinctl.manifest import load
from kleinctl.verify import hash_file

MANIFESTS = Path(__file__).parent.parent / "manifests"
PACKAGE = "kleinctl_manifests"  # manifests/ as it is installed
WEIGHTS = {"transformer": "transformer", "text_encoder": "text-encoder", "vae": "vae"}
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# klein reads the states after layers 9, 18 and 27 (diffusers' pipeline_flux2_klein.py).
TEXT_LAYERS_READ = 27

HEAD = """\
# A miniature of FLUX.2 [klein], trained on coloured shapes (tools/make_klein_tiny.py). It travels the same road as the
# large ones and runs on a CPU in seconds. Parts and [shape]: python tools/write_manifest.py {name}
schema = "kleinctl.manifest/1"
name = "{name}"
title = "{name}, a miniature of FLUX.2 [klein]"
family = "flux2-other"
variant = "distilled"
licence = "Apache-2.0"
licence_url = "https://www.apache.org/licenses/LICENSE-2.0"
gated = false
accept_licence = false
automatic = 2
devices = ["cuda", "cpu"]
dtype = "float32"
note = "{name} is a miniature that draws coloured shapes: it shows that everything works, and knows nothing else."

[defaults]
steps = 4
guidance = 1.0
width = 256
height = 256
max_prompt_tokens = 512
"""


def manifest_text(manifests: Path, name: str) -> str:
    """The whole manifest of the model in `manifests/NAME/`."""
    file, folder = manifests / f"{name}.toml", manifests / name
    head = file.read_text(encoding="utf-8").split("\n[shape]")[0] if file.exists() else HEAD.format(name=name)
    dtype = next(line.split('"')[1] for line in head.splitlines() if line.startswith("dtype ="))
    return head + shape_text(folder, ELEMENT_BYTES[dtype]) + "".join(parts(folder, name))


def parts(folder: Path, name: str) -> Iterator[str]:
    """Each file of the folder as a [[part]]."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inside = path.relative_to(folder).as_posix()
        part_id, role = id_and_role(inside)
        family = identify(path).family if role in ("text-encoder", "vae") else ""
        digest = of_file(path, role) if role in WEIGHTS.values() else None
        yield "\n".join(
            [
                "",
                "[[part]]",
                f'id = "{part_id}"',
                f'role = "{role}"',
                f'name = "{path.name}"',
                f"size = {path.stat().st_size}",
                f'sha256 = "{hash_file(path)}"',
                *([f'fingerprint = "{digest}"'] if digest else []),
                *([f'family = "{family}"'] if family else []),
                f'to = {{ diffusers = "{inside}" }}',
                f'sources = [{{ package = "{PACKAGE}", path = "{name}/{inside}" }}]',
                "",
            ]
        )


def id_and_role(inside: str) -> tuple[str, str]:
    """`text_encoder/config.json` is `text-encoder-config`, a config; the weights are called by their role."""
    folder, _, file = inside.rpartition("/")
    if file.endswith(".safetensors") and folder in WEIGHTS:
        return WEIGHTS[folder], WEIGHTS[folder]
    stem = file.rsplit(".", 1)[0] if "/" in inside else file
    part_id = "-".join(filter(None, [folder, stem])).lower().replace("_", "-").replace("/", "-").replace(".", "-")
    role = folder if folder in ("tokenizer", "scheduler") else "licence" if file.startswith("LICENSE") else "config"
    return part_id, role


def shape_text(folder: Path, element_bytes: int) -> str:
    """The [shape] table, from the headers and configurations of the three components."""
    configs = {name: json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in WEIGHTS}
    headers = {name: header_of(folder / name) for name in WEIGHTS}
    transformer, text, vae = (configs[name] for name in WEIGHTS)
    values = {
        "transformer_bytes": elements(headers["transformer"]) * element_bytes,
        "transformer_parameters": elements(headers["transformer"]),
        "double_blocks": transformer["num_layers"],
        "single_blocks": transformer["num_single_layers"],
        "heads": transformer["num_attention_heads"],
        "head_dim": transformer["attention_head_dim"],
        "text_encoder_bytes": elements(headers["text_encoder"]) * element_bytes,
        "text_layers": text["num_hidden_layers"],
        "text_layers_read": TEXT_LAYERS_READ,
        "text_layer_bytes": elements(headers["text_encoder"], "model.layers.0.") * element_bytes,
        "text_embedding_bytes": elements(headers["text_encoder"], "model.embed_tokens.") * element_bytes,
        "text_hidden": text["hidden_size"],
        "vae_bytes": elements(headers["vae"]) * element_bytes,
        "vae_channels": (vae.get("decoder_block_out_channels") or vae["block_out_channels"])[0],
    }
    return "\n[shape]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


def header_of(folder: Path) -> Header:
    """The header of the one weights file in a folder."""
    (path,) = folder.glob("*.safetensors")
    with path.open("rb") as file:
        return read_safetensors(file, path.stat().st_size)


def elements(header: Header, prefix: str = "") -> int:
    """Numbers in the tensors whose names start so; counters, which are whole numbers, are left out."""
    return sum(
        math.prod(tensor.shape)
        for name, tensor in header.tensors.items()
        if name.startswith(prefix) and not tensor.dtype.startswith(("I", "U"))
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--manifests", type=Path, default=MANIFESTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = options.manifests / f"{options.name}.toml"
    text = manifest_text(options.manifests, options.name)
    if options.check:
        same = file.exists() and file.read_text(encoding="utf-8") == text
        print(f"{file}: {'as its files are' if same else 'differs from its files'}")
        return int(not same)
    file.write_text(text, encoding="utf-8")
    model = load(file)
    print(f"{file}: {len(model.parts)} parts, {model.bytes('diffusers'):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
