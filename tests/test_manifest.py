"""Manifests: ours are right, others' mistakes are told with file, line and key, and nothing leads out of its folder."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleinctl.manifest import Model, Source, confined, load
from kleinctl.problem import KleinctlError, Misuse
from tests import weights
from tests.conftest import REPOSITORY
from tests.hub import Hub

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

jsonschema = pytest.importorskip("jsonschema")

FILES = sorted((REPOSITORY / "manifests").glob("*.toml"))
SCHEMA = json.loads((REPOSITORY / "kleinctl" / "schemas" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def klein() -> Model:
    return load(REPOSITORY / "manifests" / "klein-4b.toml")


# Ours


def test_the_four_large_models_are_there():
    assert {"klein-4b", "klein-base-4b", "klein-9b", "klein-base-9b"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_manifests(path):
    model = load(path)
    assert model.name == path.stem
    jsonschema.validate(tomllib.loads(path.read_text(encoding="utf-8")), SCHEMA)
    jsonschema.validate(model.to_json(), SCHEMA)
    assert Model.from_json(json.loads(json.dumps(model.to_json()))) == model  # as it goes to a worker
    for source in (source for part in model.parts for source in part.sources if source.repo):
        assert re.fullmatch(r"[0-9a-f]{40}", source.revision or ""), "a branch moves, a commit does not"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_layout_has_one_of_every_role_a_backend_needs(path):
    model = load(path)
    for layout in model.layouts:
        roles = {part.role for part in model.parts_for(layout)}
        assert roles >= {"transformer", "text-encoder", "vae"}
        if layout == "diffusers":
            assert {part.to[layout] for part in model.parts_for(layout)} >= {
                "model_index.json",
                "scheduler/scheduler_config.json",
                "tokenizer/tokenizer.json",
                "transformer/config.json",
                "text_encoder/config.json",
                "vae/config.json",
            }
    assert all(part.family for part in model.parts if part.role in ("transformer", "text-encoder", "vae"))


def test_klein_4b_takes_what_the_hub_says_it_takes(klein):
    """15,980,141,329 bytes in 19 files, README.md left out: the repository's own total."""
    parts = klein.parts_for("diffusers")
    assert (len(parts), klein.bytes("diffusers")) == (19, 15_980_141_329)
    assert klein.unverified("diffusers") == klein.unverified("comfyui") == ()
    assert (klein.automatic, klein.gated, klein.licence) == (1, False, "Apache-2.0")


@pytest.mark.parametrize(
    ("name", "transformer", "encoder"),
    [("klein-4b", weights.KLEIN_4B, weights.QWEN3_4B), ("klein-9b", weights.KLEIN_9B, weights.QWEN3_8B)],
)
def test_shape_numbers_are_those_of_the_tensors(name, transformer, encoder):
    model = load(REPOSITORY / "manifests" / f"{name}.toml")
    shapes = weights.qwen3(**encoder) | ({"lm_head.weight": (151936, 4096)} if name == "klein-9b" else {})

    def size(tensors: weights.Shapes, prefix: str = "") -> int:
        return 2 * sum(math.prod(shape) for tensor, shape in tensors.items() if tensor.startswith(prefix))

    shape = model.shape
    assert shape.transformer_bytes == size(weights.flux2(**transformer)) == 2 * shape.transformer_parameters
    assert (shape.double_blocks, shape.single_blocks) == (transformer["double"], transformer["single"])
    assert shape.heads * shape.head_dim == transformer["hidden"]
    assert 3 * shape.text_hidden == transformer["text_width"]
    assert shape.text_encoder_bytes == size(shapes)
    assert shape.text_layer_bytes == size(shapes, "model.layers.7.")
    assert shape.text_embedding_bytes == size(shapes, "model.embed_tokens")
    assert shape.vae_bytes == size({name: shape for name, shape in weights.vae().items() if not name.startswith("bn.")})


def test_base_and_distilled_differ_by_hash_alone_and_run_differently(klein):
    base = load(REPOSITORY / "manifests" / "klein-base-4b.toml")
    pairs = [(klein.part(name), base.part(name)) for name in ("transformer", "transformer-bf16")]
    assert all(one.size == other.size and one.sha256 != other.sha256 for one, other in pairs)
    assert klein.part("text-encoder-1").sha256 == base.part("text-encoder-1").sha256
    assert (klein.variant, klein.defaults.steps, klein.defaults.guidance) == ("distilled", 4, 1.0)
    assert (base.variant, base.family) == ("base", klein.family)
    assert 25 <= base.defaults.steps <= 50 and 4 <= base.defaults.guidance <= 5
    assert base.unverified("diffusers") == ()


def test_the_9b_models_are_gated_but_not_every_part_of_them():
    model = load(REPOSITORY / "manifests" / "klein-9b.toml")
    assert model.gated and model.accept_licence and model.automatic is None
    assert model.part("transformer-1").gated and not model.part("vae").gated
    assert model.part("transformer-1").licence == "FLUX Non-Commercial License v2.1"
    assert model.part("vae").licence == "Apache-2.0"
    base = load(REPOSITORY / "manifests" / "klein-base-9b.toml")
    assert {part.role for part in base.unverified("diffusers")} == {"transformer", "config"}
    assert base.unverified("comfyui") == ()


def test_one_precision_is_installed(klein):
    def transformer(precision: str | None) -> list[str]:
        return [part.id for part in klein.parts_for("comfyui", precision) if part.role == "transformer"]

    assert klein.precisions("comfyui") == ("fp8", "bf16", "nvfp4")
    assert transformer(None) == transformer("fp8") == ["transformer-fp8"]
    assert transformer("nvfp4") == ["transformer-nvfp4"]
    assert klein.bytes("comfyui") == 4_070_624_520 + 8_044_982_048 + 336_211_292
    assert klein.parts_for("another-layout") == ()
    with pytest.raises(Misuse) as caught:
        klein.parts_for("comfyui", "int8")
    assert caught.value.problem.what == "klein-4b does not come as 'int8' for comfyui"
    assert caught.value.problem.why == "It comes as fp8, bf16, nvfp4."


def test_two_files_are_right_in_the_place_of_the_vae(klein):
    (vae,) = (part for part in klein.parts_for("comfyui") if part.role == "vae")
    assert [part.size for part in klein.accepted(vae, "comfyui")] == [336_211_292, 336_213_556]


def test_a_part_that_is_not_there(klein):
    with pytest.raises(Misuse) as caught:
        klein.part("transfomer")
    assert caught.value.problem.what == "klein-4b has no part 'transfomer'"
    assert caught.value.problem.why.endswith("Did you mean transformer?")


def test_the_plugin_that_brings_them():
    spec = importlib.util.spec_from_file_location("shipped", REPOSITORY / "manifests" / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.kleinctl_api == 1
    assert module.kleinctl_manifests() == FILES


def test_the_address_of_a_source():
    source = Source("split files/vae/a.safetensors", repo="org/name", revision="abc")
    assert source.url() == "https://huggingface.co/org/name/resolve/abc/split%20files/vae/a.safetensors"
    assert (
        source.url("http://127.0.0.1:8000/")
        == "http://127.0.0.1:8000/org/name/resolve/abc/split%20files/vae/a.safetensors"
    )


# Mistakes


@pytest.fixture
def edited(tmp_path: Path):
    """klein-4b's manifest with something replaced; loading it gives the problem."""
    original = (REPOSITORY / "manifests" / "klein-4b.toml").read_text(encoding="utf-8")

    def edit(old: str, new: str) -> tuple[Path, list[str]]:
        assert old in original
        path = tmp_path / "mine.toml"
        path.write_text(original.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(KleinctlError) as caught:
            load(path)
        problem = caught.value.problem
        assert (problem.what, problem.name) == (f"{path} is no manifest that kleinctl can use", "manifest-invalid")
        assert problem.fix == f"correct {path}, then: kleinctl models"
        return path, problem.why.splitlines()

    return edit


SHA = "51a76cb1cf3ed37423a1128c79c22faee8e6fbe7f5aaeb737f0a258930dbaac0"
MISTAKES = {
    "a key misspelt": (
        "size = 446",
        "sise = 446",
        ["line {line}: [[part]] 2, sise: unknown key. Did you mean size?"],
    ),
    "a table's key misspelt": (
        "guidance = 1.0",
        "guidence = 1.0",
        ["[defaults] guidance: missing", "line {line}: [defaults] guidence: unknown key. Did you mean guidance?"],
    ),
    "a section misspelt": (
        "[shape]",
        "[shapes]",
        ["[shape]: wanted a table with", "line {line}: shapes: unknown key. Did you mean shape?"],
    ),
    "no schema": ('schema = "kleinctl.manifest/1"', "", ["schema: None, wanted 'kleinctl.manifest/1'"]),
    "a later schema": (
        "kleinctl.manifest/1",
        "kleinctl.manifest/2",
        ["line {line}: schema: 'kleinctl.manifest/2', wanted 'kleinctl.manifest/1'"],
    ),
    "a short hash": (SHA, SHA[:40], [f"[[part]] 2, sha256: '{SHA[:40]}', wanted 64 lower-case hex digits"]),
    "an upper-case hash": (SHA, SHA.upper(), [f"sha256: '{SHA.upper()}', wanted 64 lower-case hex digits"]),
    "a size in words": (
        "size = 446",
        'size = "446"',
        ["line {line}: [[part]] 2, size: '446', wanted a whole number of at least 0"],
    ),
    "a size that is true": ("size = 446", "size = true", ["size: True, wanted a whole number of at least 0"]),
    "a size below nothing": ("size = 446", "size = -1", ["size: -1, wanted a whole number of at least 0"]),
    "a role misspelt": (
        'role = "licence"',
        'role = "license"',
        ["line {line}: [[part]] 1, role: 'license', wanted one of transformer, text-encoder, vae, tokenizer"],
    ),
    "an odd width": (
        "width = 1024",
        "width = 1000",
        ["line {line}: [defaults] width: 1000, wanted a multiple of 16 pixels"],
    ),
    "an id twice": (
        'id = "model-index"',
        'id = "licence" # again',
        ["line {line}: [[part]] 2, id: 'licence' is the id of an earlier part as well"],
    ),
    "two roles in one place": (
        'diffusers = "model_index.json"',
        'diffusers = "license.MD"',
        ["line {line}: [[part]] 2, to: 'license.MD' is where part 'licence' goes"],
    ),
    "a way out of the folder": (
        'diffusers = "model_index.json"',
        'diffusers = "../model_index.json"',
        ["{'diffusers': '../model_index.json'}, wanted a path inside its folder; '../model_index.json' has the"],
    ),
    "a name with a folder": (
        'name = "model_index.json"',
        'name = "sub/model_index.json"',
        ["line {line}: [[part]] 2, name: 'sub/model_index.json', wanted a file name, without folders"],
    ),
    "a source without a commit": (
        ' revision = "e7b7dc27f91deacad38e78976d1f2b499d76a294", path = "LICENSE.md"',
        ' path = "LICENSE.md"',
        ["wanted repo, revision and path, or package and path; this has path, repo"],
    ),
    "a repository that is an address": (
        'repo = "black-forest-labs/FLUX.2-klein-4B"',
        'repo = "https://evil.example/x"',
        ["wanted a repository as owner/name"],
    ),
    "no TOML": ("[shape]", "[shape", ["not TOML: "]),
    "the same key twice": ('name = "klein-4b"', 'name = "a"\nname = "b"', ["not TOML: Cannot overwrite a value"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_line_and_key(edited, mistake):
    old, new, told = MISTAKES[mistake]
    path, issues = edited(old, new)
    line = path.read_text()[: path.read_text().find(new)].count("\n") + 1
    assert len(issues) == len(told)
    for want in told:
        assert any(want.replace("{line}", str(line)) in issue for issue in issues), (want, issues)


def test_a_syntax_error_has_its_line(edited):
    _, issues = edited('title = "FLUX.2 [klein] 4B"', "title = FLUX")
    assert issues == ["not TOML: Invalid value (at line 4, column 9)"]


def test_every_mistake_of_a_file_is_told_at_once(edited):
    _, issues = edited(
        'name = "klein-4b"\ntitle = "FLUX.2 [klein] 4B"\nfamily = "flux2-klein-4b"', 'name = "../x"\nfamly = "a"'
    )
    assert issues == [
        "family: missing",
        "title: missing",
        "line 3: name: '../x', wanted a lower-case word such as klein-4b",
        "line 4: famly: unknown key. Did you mean family?",
    ]


def test_a_manifest_that_cannot_be_read(tmp_path):
    def why(path: Path) -> str:
        with pytest.raises(KleinctlError) as caught:
            load(path)
        return caught.value.problem.why

    assert why(tmp_path / "gone.toml") == "it cannot be read: No such file or directory"
    (tmp_path / "latin.toml").write_bytes(b'schema = "kleinctl.manifest/1"\ntitle = "caf\xe9"\n')
    assert why(tmp_path / "latin.toml") == "line 2: not UTF-8 text"
    (tmp_path / "long.toml").write_bytes(b"#" * (2**20 + 1))
    assert why(tmp_path / "long.toml") == "it is longer than 1048576 bytes"
    (tmp_path / "deep.toml").write_bytes(b"a = " + b"[" * 100_000)
    assert why(tmp_path / "deep.toml").startswith("not TOML")
    (tmp_path / "long.toml").write_text("a = " + "1" * 5000)
    assert why(tmp_path / "long.toml").startswith("not TOML")
    (tmp_path / "parts.toml").write_text('schema = "kleinctl.manifest/1"\npart = [1, 2]\n')
    assert "[[part]] 1" in why(tmp_path / "parts.toml")


def test_json_that_is_no_manifest():
    with pytest.raises(KleinctlError) as caught:
        Model.from_json({"schema": "kleinctl.manifest/1", "name": "x", "part": []})
    assert caught.value.problem.what == "'x' is no manifest that kleinctl can use"


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
places = st.sampled_from(
    [("name",), ("devices",), ("defaults",), ("defaults", "steps"), ("shape", "heads"), ("part",), ("part", 0)]
    + [("part", 0, key) for key in ("id", "role", "name", "size", "sha256", "to", "sources", "gated", "new")]
    + [("part", 0, "to", "diffusers"), ("part", 0, "sources", 0), ("part", 0, "sources", 0, "repo"), ("new",)]
)


@given(places, anything)
def test_whatever_stands_in_a_manifest_is_a_model_or_a_problem(klein, place, value):
    document = klein.to_json()
    table = document
    for step in place[:-1]:
        table = table[step]
    table[place[-1]] = value
    try:
        model = Model.from_json(document)
    except KleinctlError as error:
        assert error.problem.why.replace("\n", "").isprintable()
        return
    assert all(confined(path) is None for part in model.parts for path in (part.name, *part.to.values()))


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/./b",
        "a//b",
        "",
        ".",
        "a/",
        "C:/x",
        "c:x",
        "\\\\server\\share",
        "a\\b",
        "//server/share",
        "a\0b",
        "a\nb",
        "con",
        "a/NUL.txt",
        "com1",
        "com¹.txt",
        "CONIN$",
        "a/b.",
        "a/b ",
        "x:stream",
        "what?",
    ],
)
def test_paths_that_lead_out_or_that_windows_cannot_store(path):
    assert confined(path)
    schema = {"$defs": SCHEMA["$defs"], "$ref": "#/$defs/path"}
    stored = not any(word in path.lower() for word in ("con", "nul", "com"))  # the schema leaves device names to us
    assert jsonschema.Draft202012Validator(schema).is_valid(path) != stored


def test_a_name_that_is_longer_than_file_systems_take():
    assert confined("a/" + "é" * 128 + "/b") == "a name of more than 255 bytes"
    assert confined("a/" + "é" * 127 + "/b") is None


@pytest.mark.parametrize(
    "path", ["a", "a/b.safetensors", "split_files/vae/flux2-vae.safetensors", ".hidden", "a..b", "é/ü"]
)
def test_paths_that_stay_inside(path):
    assert confined(path) is None
    schema = {"$defs": SCHEMA["$defs"], "$ref": "#/$defs/path"}
    assert jsonschema.Draft202012Validator(schema).is_valid(path)


# Tools


def run_tool(name: str, *arguments: object, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def miniature(folder: Path) -> None:
    """A model's folder as diffusers saves it, with headers only."""
    configs = {
        "transformer": {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 5, "attention_head_dim": 32},
        "text_encoder": {"num_hidden_layers": 28, "hidden_size": 64},
        "vae": {"block_out_channels": [16, 32, 48, 64], "decoder_block_out_channels": [24, 40, 64, 64]},
    }
    shapes = {
        "transformer/diffusion_pytorch_model": weights.flux2_diffusers(160, 192, 2, 4, head=32),
        "text_encoder/model": weights.qwen3(64, 128, 2, layers=28, kv=1, vocabulary=2048, head=32),
        "vae/diffusion_pytorch_model": weights.vae_diffusers(width=16),
    }
    for name, tensors in shapes.items():
        weights.write(folder / f"{name}.safetensors", tensors, "F16", tracked="I64")
    for name, config in configs.items():
        (folder / name / "config.json").write_text(json.dumps(config))
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "LICENSE"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")


def test_a_manifest_is_written_from_a_folder_and_hand_edits_stay(tmp_path):
    miniature(tmp_path / "klein-mini")
    assert run_tool("write_manifest", "klein-mini", "--manifests", tmp_path)[0] == 0
    path = tmp_path / "klein-mini.toml"
    model = load(path)
    assert {part.id: (part.role, part.family) for part in model.parts} == {
        "license": ("licence", ""),
        "model-index-json": ("config", ""),
        "scheduler-scheduler-config": ("scheduler", ""),
        "text-encoder-config": ("config", ""),
        "text-encoder": ("text-encoder", "qwen3-other"),
        "tokenizer-tokenizer": ("tokenizer", ""),
        "transformer-config": ("config", ""),
        "transformer": ("transformer", "flux2-other"),
        "vae-config": ("config", ""),
        "vae": ("vae", "flux2-vae"),
    }
    assert model.part("vae").sources == (
        Source("klein-mini/vae/diffusion_pytorch_model.safetensors", package="kleinctl_manifests"),
    )
    assert model.shape.transformer_bytes == 4 * model.shape.transformer_parameters
    assert (model.shape.text_hidden, model.shape.text_layers, model.shape.vae_channels) == (64, 28, 24)
    assert model.unverified("diffusers") == ()
    path.write_text(path.read_text().replace("steps = 4", "steps = 6"))
    (tmp_path / "klein-mini" / "LICENSE").write_text("changed")
    assert run_tool("write_manifest", "klein-mini", "--manifests", tmp_path, "--check")[0] == 1
    assert run_tool("write_manifest", "klein-mini", "--manifests", tmp_path)[0] == 0
    assert run_tool("write_manifest", "klein-mini", "--manifests", tmp_path, "--check")[0] == 0
    assert (load(path).defaults.steps, load(path).part("license").size) == (6, 7)


@pytest.mark.parametrize(
    "folder", sorted(path for path in (REPOSITORY / "manifests").iterdir() if (path / "vae").is_dir())
)
def test_manifests_of_shipped_files_are_as_the_files(folder):
    code, said = run_tool("write_manifest", folder.name, "--check")
    assert (code, said) == (0, f"{folder}.toml: as its files are\n")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub with the three files of a small manifest, and the manifest."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hashes = [
            hub.add("org/model", "vae/weights.safetensors", b"w" * 5000),
            hub.add("org/model", "config.json", b"{}", lfs=False),
            hub.add("org/closed", "weights.safetensors", b"c" * 100, gated=True),
        ]
        head = (REPOSITORY / "manifests" / "klein-4b.toml").read_text().split("[[part]]")[0]
        rows = [
            ("vae", "vae", 5000, "org/model", "vae/weights.safetensors"),
            ("config", "config", 2, "org/model", "config.json"),
            ("transformer", "transformer", 100, "org/closed", "weights.safetensors"),
        ]
        for (part, role, size, repo, path), sha256 in zip(rows, hashes, strict=True):
            head += f'[[part]]\nid = "{part}"\nrole = "{role}"\nname = "{Path(path).name}"\nsize = {size}\n'
            head += f'sha256 = "{sha256}"\nto = {{ diffusers = "{path}" }}\n'
            head += f'sources = [{{ repo = "{repo}", revision = "main", path = "{path}" }}]\n'
        (tmp_path / "a.toml").write_text(head.replace('diffusers = "weights', 'diffusers = "transformer/weights'))
        yield hub, tmp_path / "a.toml"


def test_a_manifest_is_compared_with_the_hub(published):
    hub, path = published
    hub.allow("secret", "org/closed")
    code, said = run_tool("compare_manifest", path, HF_TOKEN="secret")
    assert (code, said) == (0, f"3 sources at {hub.url}: 0 differ, 0 could not be compared\n")
    assert all(seen.host == "hub" for seen in hub.requests)  # no weights were fetched, no token left the hub


def test_files_changed_on_the_hub(published):
    hub, path = published
    hub.allow("secret", "org/closed")
    new = hub.add("org/model", "vae/weights.safetensors", b"changed")
    config = hub.add("org/model", "config.json", b"[]", lfs=False)
    old = {part.id: part.sha256 for part in load(path).parts}
    code, said = run_tool("compare_manifest", path, HF_TOKEN="secret")
    assert code == 1
    assert said.splitlines() == [
        "klein-4b/vae at org/model/vae/weights.safetensors: size 5000, the hub has 7",
        f"klein-4b/vae at org/model/vae/weights.safetensors: sha256 {old['vae']}, the hub has {new}",
        f"klein-4b/config at org/model/config.json: sha256 {old['config']}, the hub has {config}",
        f"3 sources at {hub.url}: 2 differ, 0 could not be compared",
    ]


def test_a_gated_repository_without_a_token_and_a_hub_that_is_away(published):
    _, path = published
    code, said = run_tool("compare_manifest", path)
    assert code == 2
    assert (
        "transformer at org/closed/weights.safetensors: not compared: HTTP 401, accept its licence and set HF_TOKEN"
        in said
    )
    code, said = run_tool("compare_manifest", path, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and "3 could not be compared" in said


def test_a_hash_that_is_not_in_the_manifest_yet_is_shown(published):
    _, path = published
    text = path.read_text()
    sha256 = load(path).part("vae").sha256
    path.write_text(text.replace(f'sha256 = "{sha256}"\n', ""))
    code, said = run_tool("compare_manifest", path)
    assert code == 1
    assert f"sha256 not in the manifest, the hub has {sha256}" in said
