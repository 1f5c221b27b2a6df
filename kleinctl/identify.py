"""What a file is: reads headers, leaves the weights on disk."""

from __future__ import annotations

import math
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kleinctl import header as formats
from kleinctl.fingerprint import fingerprint
from kleinctl.header import BadHeader, CutHeader, Header, Tensor
from kleinctl.lora import Lora, identify_lora, is_lora
from kleinctl.manifest import Model, Part
from kleinctl.signatures import BLOCKS, INPUTS, SIGNATURES, TITLES, Names, Signature, plain_names
from kleinctl.units import bytes_text

__all__ = [
    "Facts",
    "Identity",
    "LfsPointer",
    "Lora",
    "Signature",
    "TextEncoder",
    "Transformer",
    "Vae",
    "document",
    "encoder_title",
    "identify",
    "title",
]

SCHEMA = "kleinctl.identify/1"

#: Kinds of file whose header was read and agrees with the file's size.
WHOLE = ("safetensors", "gguf")


@dataclass(frozen=True)
class Transformer:
    """A denoiser: width of its text input (three encoder layers side by side in FLUX.2), channels of its latents.

    Blocks are counted in this file, which may be a shard. `scales` says how fp8 or fp4 scales are announced:
    `metadata`, `comfy_quant`, `scaled_fp8`, `unmarked` (ComfyUI ignores such scales and paints noise), or None;
    `scaled_by` what each scale is for: `tensor`, `row` or `block`. `model` is the manifest whose family this is.
    `missing` says which blocks of the whole model are not here ("3 of 5 double blocks").
    """

    path: Path
    family: str
    layout: str
    dtype: str
    model: str | None
    text_width: int
    image_channels: int
    double_blocks: int
    single_blocks: int
    scales: str | None
    shard: tuple[int, int] | None
    scaled_by: str | None = None
    missing: str = ""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder: `width` of its hidden states, and its layers in this file. The rest is as in `Transformer`."""

    path: Path
    family: str
    layout: str
    dtype: str
    width: int
    layers: int
    scales: str | None
    shard: tuple[int, int] | None
    scaled_by: str | None = None
    missing: str = ""

    @property
    def title(self) -> str:
        """`Qwen3 8B (4096 wide)`."""
        return f"{title(self.family)} ({self.width} wide)"


@dataclass(frozen=True)
class Vae:
    """An autoencoder. `statistics`: it has the batch-norm mean and variance that FLUX.2 latents are scaled by.

    `decoder_width` is that of the decoder's first convolution: 512, or 384 in the small decoder.
    """

    path: Path
    family: str
    layout: str
    dtype: str
    latent_channels: int
    decoder_width: int
    statistics: bool
    encoder: bool


@dataclass(frozen=True)
class LfsPointer:
    """The note that git leaves where a file should be: sha256 and size (bytes) of the file it stands for."""

    path: Path
    sha256: str
    size: int


Facts = Transformer | TextEncoder | Vae | Lora | LfsPointer


@dataclass(frozen=True)
class Identity:
    """What a file is. `kind` is its format or what stands in its place; see docs for the values of each field.

    A broken file keeps the role and family its header tells. `part` is `klein-4b/transformer` when the file has that
    part's sha256, its fingerprint, or its name and size; `sure` says which of these, or `header` where only the role
    and family are known. `checkpoint`: the file holds more than this one part. `saw` says in words what the verdict
    rests on.
    """

    path: Path
    kind: str
    saw: str
    role: str = "unknown"
    family: str = "unknown"
    layout: str | None = None
    dtype: str | None = None
    size_bytes: int = 0
    part: str | None = None
    facts: Facts | None = None
    sure: str | None = None
    checkpoint: bool = False

    @property
    def whole(self) -> bool:
        """Whether this is a weights file as long as its header says."""
        return self.kind in WHOLE

    def to_json(self) -> dict[str, Any]:
        """One entry of `files` in `identify --json`."""
        entry = {key: getattr(self, key) for key in ("kind", "role", "family", "layout", "dtype", "size_bytes")}
        known = {key: value for key in ("part", "sure") if (value := getattr(self, key))}
        return {"path": str(self.path), **entry, **known, "saw": self.saw}


def document(identities: Iterable[Identity]) -> dict[str, Any]:
    """What `identify --json` prints."""
    return {"schema": SCHEMA, "files": [identity.to_json() for identity in identities]}


def title(family: str) -> str:
    """A family as people call it: `FLUX.2 [klein] 4B`."""
    return TITLES.get(family, family)


def encoder_title(width: int) -> str:
    """The text encoder of a width, as klein's transformers want them: `Qwen3 4B (2560 wide)`."""
    families = {1024: "qwen3-0.6b", 2048: "qwen3-1.7b", 2560: "qwen3-4b", 4096: "qwen3-8b", 5120: "mistral-small"}
    return f"{title(families[width])} ({width} wide)" if width in families else f"a text encoder {width} wide"


def identify(
    path: Path, models: Sequence[Model] = (), sha256: str | None = None, signatures: Sequence[Signature] = ()
) -> Identity:
    """What the file at `path` is. Never raises for what the file holds, and reads little but its header.

    `models` are searched for the part this is: by `sha256` where the caller has computed it, else by fingerprint (a few
    kilobytes of a file whose role and family are a fingerprinted part's), else by name and size;
    `signatures` are tried before the built-in ones.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder; name a file in it" if stat.S_ISDIR(status.st_mode) else "no regular file"
            return Identity(path, "unreadable", what)
        with path.open("rb") as file:
            return _Look(path, status.st_size, models, sha256, (*signatures, *SIGNATURES)).judge(file)
    except OSError as error:
        return Identity(path, "unreadable", f"cannot be read: {error.strerror or error}")


_HEAD = 4096  # bytes looked at before a format is chosen
_SHARED = ("family", "layout", "dtype")  # what an identity and its facts both say


class _Look:
    """One file being looked at."""

    def __init__(
        self, path: Path, size: int, models: Sequence[Model], sha256: str | None, signatures: Sequence[Signature]
    ) -> None:
        self.path = path
        self.size = size
        self.models = models
        self.sha256 = sha256
        self.signatures = signatures
        self.part, self.remark = _find_part(path.name, size, sha256, models)
        self.sure = None if self.part is None else "sha256" if sha256 else "name and size"

    def judge(self, file: BinaryIO) -> Identity:
        head = file.read(_HEAD)
        file.seek(0)
        if head.startswith(b"GGUF"):
            return self.weights("gguf", file)
        if _maybe_safetensors(head):
            return self.weights("safetensors", file)
        kind, saw, facts = _no_weights(self.path, head, self.size)
        if kind == "json":
            saw = _json_saw(file, self.size)
        if facts:
            stands_for, _ = _find_part("", 0, facts.sha256, self.models)
            saw += f": {stands_for.ref}" if stands_for else ""
        return self.identity(kind, saw, facts=facts)

    def identity(self, kind: str, saw: str, **more: Any) -> Identity:
        remarks = f"{saw}; {self.remark}" if self.remark else saw
        part = self.part.ref if self.part else None
        sure = self.sure or ("header" if more.get("role", "unknown") != "unknown" else None)
        return Identity(self.path, kind, remarks, size_bytes=self.size, part=part, sure=sure, **more)

    def weights(self, kind: str, file: BinaryIO) -> Identity:
        """A file that starts as safetensors or GGUF do."""
        try:
            header = formats.read_gguf(file) if kind == "gguf" else formats.read_safetensors(file, self.size)
        except CutHeader as error:
            saw = f"a {kind} file that ends inside its header, at least {error.missing:,} bytes short"
            return self.identity("truncated", saw)
        except BadHeader as error:
            return self.identity("other", f"a {kind} file whose header {error}")
        length = _length_remark(kind, header.end, self.size)
        found = self.content(header, file if not length else None)
        if length:
            kind, found["saw"] = "truncated", f"{found['saw']}; {length}"
        elif self.sure != "sha256" and found.get("role") in _SAMPLED and (hollow := _hollow(header, file)):
            kind, found["saw"] = "zeros", f"{found['saw']}; {hollow}"
        return self.identity(kind, **found)

    def content(self, header: Header, file: BinaryIO | None) -> dict[str, Any]:
        """Role, family, facts and the rest that a header tells; of `file`, when it is whole, the fingerprint too."""
        dtype = _dtype(header) or "unknown"
        if is_lora(header.tensors):
            lora = identify_lora(self.path, header.tensors, dtype)
            return {**{key: getattr(lora, key) for key in _SHARED}, "role": "lora", "facts": lora, "saw": lora.saw}
        names, mixed = plain_names(header)
        signature, words = _recognise(names, self.signatures)
        if signature is None and not header.starts:  # some GGUF files have their axes in the other order
            names = Names({name: t._replace(shape=t.shape[::-1]) for name, t in names.tensors.items()}, names.prefix)
            signature, words = _recognise(names, self.signatures)
        if signature is None:
            return {"saw": _unknown_saw(header.tensors), "dtype": dtype}
        layout = signature.layout or _layout_by_name(self.path.name)
        found = {"role": signature.role, "family": signature.family, "layout": layout, "dtype": dtype}
        if file is not None:
            self.trace(found["role"], found["family"], names, header, file)
        facts = self.facts(found, names, header)
        remarks = [_fill(signature.saw, words), *_remarks(facts, dtype), *(self.variant(facts) if file else ())]
        if mixed:
            remarks.append("a whole checkpoint, with more than this one part in it")
        return {**found, "facts": facts, "saw": "; ".join(remarks), "checkpoint": mixed}

    def trace(self, role: str, family: str, names: Names, header: Header, file: BinaryIO) -> None:
        """Name the part by its fingerprint, where a manifest has one for this role and family. A sha256 says more."""
        parts = [part for model in self.models for part in model.parts if part.fingerprint and part.role == role]
        parts = [part for part in parts if part.family == family]
        if self.sha256 or not parts:
            return
        mine = fingerprint(role, names, header, file)
        if mine is None:
            return
        same = [part for part in parts if part.fingerprint == mine]
        if same:
            self.part = next((part for part in same if part.name == self.path.name), same[0])
            self.sure, self.remark = "fingerprint", f"its fingerprint is that of {self.part.ref}"
        elif self.part and self.part.fingerprint:
            self.remark = f"as long as {self.part.ref}, but with other weights"
            self.part = self.sure = None

    def facts(self, found: Mapping[str, str], names: Names, header: Header) -> Facts | None:
        """The numbers that pairing needs, where the header has them all."""
        role, family = found["role"], found["family"]
        common = {"path": self.path, **{key: found[key] for key in _SHARED}}
        if role == "vae":
            return _vae(names, common)
        blocks = {**common, "scales": _scales(header), "scaled_by": _scaled_by(header), "shard": _shard(self.path.name)}
        if role == "transformer":
            model = self.part.model if self.part else next((m.name for m in self.models if m.family == family), None)
            return _transformer(names, {**blocks, "model": model})
        return _text_encoder(names, blocks) if role == "text-encoder" else None

    def variant(self, facts: Facts | None) -> list[str]:
        """What tensors cannot tell, and what the name says of it."""
        if not isinstance(facts, Transformer) or facts.family not in ("flux2-klein-4b", "flux2-klein-9b"):
            return []
        said = []
        if not (self.part or self.remark):
            said.append("base and distilled have the same tensors; only the sha256 tells")
        if re.search(r"(?:^|[-_. ])kv(?:[-_. ]|$)", self.path.name, re.IGNORECASE):
            said.append("the name says KV; tensors cannot tell")
        return said


def _recognise(names: Names, signatures: Sequence[Signature]) -> tuple[Signature | None, Mapping[str, int]]:
    """The first signature that fits, and the numbers of its words."""
    for signature in signatures:
        words = signature.match(names)
        if words is not None:
            return signature, words
    return None, {}


def _find_part(name: str, size: int, sha256: str | None, models: Sequence[Model]) -> tuple[Part | None, str]:
    """The manifest part a file is, and a remark where name and size fit files of different content."""
    parts = [part for model in models for part in model.parts]
    if sha256:
        return next((part for part in parts if part.sha256 == sha256), None), ""
    near = [part for part in parts if part.size == size and part.name == name]
    if len({part.sha256 for part in near}) > 1:
        return None, f"as long as {' and '.join(part.ref for part in near)}: only the sha256 tells which"
    return (near[0] if near else None), ""


# What is there instead of weights.

_SERVER_ANSWERS = (
    b"access to model",
    b"access to this resource",
    b"cannot access gated",
    b"entry not found",
    b"not found",
    b"repository not found",
    b"revision not found",
    b"invalid username or password",
    b"invalid credentials",
    b"unauthorized",
    b"forbidden",
    b"too many requests",
    b"we had to rate limit",
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")


def _maybe_safetensors(head: bytes) -> bool:
    if len(head) < 8:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return 2 <= length <= formats.MAX_JSON and head[8:9] in (b"{", b"")


def _no_weights(path: Path, head: bytes, size: int) -> tuple[str, str, LfsPointer | None]:
    """Kind, words and facts of a file that starts like no weights."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text[:64].lower()
    if not head:
        return "empty", "empty: 0 bytes", None
    if text.startswith(b"version https://git-lfs"):
        return _lfs_pointer(path, text)
    if lower.startswith(_PAGES):
        return "web-page", f"a web page saved in place of the file: {_quoted(text)}", None
    if lower.startswith(_SERVER_ANSWERS):
        return "web-page", f"a server's answer saved in place of the file: {_quoted(text)}", None
    if text.startswith((b"{", b"[")):
        return "json", "JSON", None
    if head.startswith(b"PK"):
        return "pickle", "a zip archive, as PyTorch's .ckpt and .pth are; not opened, for pickles can run code", None
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle", "a Python pickle (.ckpt, .pth, .bin); not opened, for pickles can run code", None
    if not head.strip(b"\0"):
        return "zeros", f"zeros from the start: {bytes_text(size)} reserved by a download that did not happen", None
    if len(head) < 8:
        return "truncated", f"{len(head)} bytes: too short for any weights file", None
    if re.fullmatch(rb"[\t\n\r -~]+", text[:200]):
        return "other", f"text, no weights: {_quoted(text)}", None
    return "other", f"no format that holds weights; it starts with {head[:8].hex(' ')}", None


def _quoted(text: bytes) -> str:
    words = " ".join(text[:300].decode("utf-8", "replace").split())
    plain = "".join(char for char in words if char.isprintable())
    return repr(plain if len(plain) <= 80 else plain[:77] + "...")


def _lfs_pointer(path: Path, text: bytes) -> tuple[str, str, LfsPointer | None]:
    found = re.search(rb"oid sha256:([0-9a-f]{64})\s+size (\d{1,18})\s", text + b"\n")
    if not found:
        return "lfs-pointer", "a git-LFS pointer that names no file", None
    pointer = LfsPointer(path, found[1].decode(), int(found[2]))
    return "lfs-pointer", f"a git-LFS pointer to {bytes_text(pointer.size)}, sha256 {pointer.sha256[:12]}…", pointer


def _json_saw(file: BinaryIO, size: int) -> str:
    """What a JSON file is about: an error, a configuration, an index of shards."""
    try:
        value = formats.json_object(file.read(2**22)) if size <= 2**22 else {}
    except BadHeader as error:
        return f"JSON that {error}"
    if "error" in value:
        return f"a server's error saved in place of the file: {_quoted(str(value['error']).encode())}"
    if isinstance(value.get("weight_map"), dict):
        return f"JSON: index of {len({str(shard) for shard in value['weight_map'].values()})} shards"
    about = value.get("_class_name") or value.get("model_type")
    return f"JSON: configuration of {_quoted(str(about).encode())[1:-1]}" if about else "JSON, no weights"


# What a header says.

#: Roles whose weights are sampled. A LoRA may well be half zeros: it starts so.
_SAMPLED = ("transformer", "text-encoder", "vae")
_PAGE, _LARGE = 4096, 2**20  # bytes
_PLACES = 16


def places(header: Header) -> list[int]:
    """Where a safetensors file is looked into for zeros: bytes from its start, on pages inside of large tensors.

    They are spread over the file; the last three are in its last two large tensors, the very end among them.
    """
    starts = zip(header.tensors.values(), header.starts, strict=False)
    large = sorted((header.data + start, tensor.nbytes or 0) for tensor, start in starts)
    large = [each for each in large if each[1] >= _LARGE]
    if len(large) < 2:
        return []
    spread = dict.fromkeys(n * (len(large) - 1) // (_PLACES - 3) for n in range(_PLACES - 2))
    chosen = [large[n] for n in sorted({*spread, len(large) - 2})]
    return [*((at + size // 2) & -_PAGE for at, size in chosen), (sum(large[-1]) - _PAGE) & -_PAGE]


def _hollow(header: Header, file: BinaryIO) -> str:
    """Words for weights that are zeros where a download reserved room and did not fill it.

    Three pages are read of a sound file. No trained matrix has a page of zeros; one whole matrix of them is let pass.
    """
    sample = places(header)
    if not any(_is_zero(file, sample[n]) for n in (0, len(sample) // 2, -1)[: len(sample)]):
        return ""
    zero = [_is_zero(file, place) for place in sample]
    if not all(zero[-3:]) and sum(zero) < max(2, len(zero) // 4):
        return ""
    return f"zeros in {sum(zero)} of {len(zero)} places of its weights: room that a download reserved and did not fill"


def _is_zero(file: BinaryIO, place: int) -> bool:
    file.seek(place)
    return not file.read(_PAGE).strip(b"\0")


_DTYPES = {
    "BF16": "bf16",
    "F16": "fp16",
    "F32": "fp32",
    "F64": "fp64",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8-e5m2",
    "I8": "int8",
}


#: Ends of names by which packed weights show: of nunchaku's SVDQuant, of bitsandbytes.
_PACKED_BY = (
    ((".wcscales", ".wtscale"), "svdq-fp4"),
    ((".qweight", ".wscales"), "svdq-int4"),
    ((".quant_state.bitsandbytes__nf4",), "nf4"),
    ((".quant_state.bitsandbytes__fp4",), "fp4"),
    ((".SCB",), "bnb-int8"),
)
_SCALE_ENDS = (".weight_scale", ".scale_weight")


def _dtype(header: Header) -> str | None:
    """What most of the bytes are: `bf16`, `fp8`, `nvfp4`, or a GGUF type such as `Q4_K`."""
    totals: Counter[str] = Counter()
    for tensor, count in header.census.items():
        size = tensor.nbytes if tensor.nbytes is not None else math.prod(tensor.shape)
        totals[_DTYPES.get(tensor.dtype, tensor.dtype)] += count * size
    most = totals.most_common(1)[0][0] if totals else None
    if most not in ("U8", "int8", "I32") or not header.starts:
        return most
    packed = next((dtype for ends, dtype in _PACKED_BY if any(name.endswith(ends) for name in header.tensors)), None)
    if packed is None and any(
        f"{name}_scale" in header.tensors for name, t in header.tensors.items() if t.dtype == "U8"
    ):
        packed = "nvfp4"
    return packed or most


def _scales(header: Header) -> str | None:
    if "_quantization_metadata" in header.metadata:
        return "metadata"
    if not _may_have_scales(header):
        return None
    names = header.tensors
    if any(name.endswith(".comfy_quant") for name in names):
        return "comfy_quant"
    if any(name.endswith("scaled_fp8") for name in names):
        return "scaled_fp8"
    return "unmarked" if any(name.endswith(_SCALE_ENDS) for name in names) else None


def _scaled_by(header: Header) -> str | None:
    """What the usual scale of an fp8 weight is for: the whole tensor, a row, or a block of it."""
    if not _may_have_scales(header):
        return None
    kinds: Counter[str] = Counter()
    for name, tensor in header.tensors.items():
        if name.endswith(_SCALE_ENDS):
            one = math.prod(tensor.shape) == 1
            row = len(tensor.shape) == 1 or tensor.shape[1:] == (1,)
            kinds["tensor" if one else "row" if row else "block"] += 1
    return kinds.most_common(1)[0][0] if kinds else None


def _may_have_scales(header: Header) -> bool:
    return any(tensor.dtype.startswith(("F8", "U8", "I8")) for tensor in header.census)


def _shard(name: str) -> tuple[int, int] | None:
    found = re.search(r"-(\d{5})-of-(\d{5})\.", name)
    return (int(found[1]), int(found[2])) if found else None


def _layout_by_name(name: str) -> str:
    """transformers saves `model.safetensors` and `model-00001-of-00002.safetensors`; other names are one file's own."""
    return "diffusers" if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) else "single-file"


def _length_remark(kind: str, wanted: int | None, found: int) -> str:
    if wanted is None or wanted == found or (kind == "gguf" and found > wanted):  # GGUF data may be padded
        return ""
    if found < wanted:
        return f"cut short: {wanted - found:,} of {wanted:,} bytes are missing"
    return f"{found - wanted:,} bytes too long: {wanted:,} wanted"


def _fill(saw: str, words: Mapping[str, int]) -> str:
    return re.sub(r"\{(\w+)\}", lambda word: str(words.get(word[1], word[0])), saw)


def _unknown_saw(tensors: Mapping[str, Tensor]) -> str:
    if not tensors:
        return "no tensors"
    largest = sorted(tensors.items(), key=lambda item: -math.prod(item[1].shape))[:3]
    shown = ", ".join(f"{_quoted(name.encode())[1:-1]} {list(tensor.shape)}" for name, tensor in largest)
    return f"{len(tensors)} tensor{'s' * (len(tensors) != 1)} of a model that is not known here; the largest: {shown}"


_TEXT_INPUT = ("txt_in.weight", "context_embedder.weight", "cap_embedder.1.weight")
_IMAGE_INPUT = ("img_in.weight", "x_embedder.weight", "all_x_embedder.2-1.weight")
_LAYERS = ("model.layers.", "model.language_model.layers.", "encoder.block.", "text_model.encoder.layers.")


def _transformer(names: Names, common: Mapping[str, Any]) -> Transformer | None:
    usual = INPUTS.get(common["family"], (None, None))  # a shard may lack the inputs
    text_width = names.axis(1, *_TEXT_INPUT) or usual[0]
    image_channels = names.axis(1, *_IMAGE_INPUT) or usual[1]
    if text_width is None or image_channels is None:
        return None
    double = names.blocks("double_blocks.", "transformer_blocks.")
    single = names.blocks("single_blocks.", "single_transformer_blocks.")
    return Transformer(
        **common,
        text_width=text_width,
        image_channels=image_channels,
        double_blocks=len(double),
        single_blocks=len(single),
        missing=_missing(common, {"double block": double, "single block": single}),
    )


def _text_encoder(names: Names, common: Mapping[str, Any]) -> TextEncoder | None:
    width = names.axis(
        -1,
        "model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "shared.weight",
        "lm_head.weight",
        "model.layers.*.post_attention_layernorm.weight",
        "model.layers.*.mlp.gate_proj.weight",
        "model.language_model.layers.*.mlp.gate_proj.weight",
        "encoder.block.*.layer.1.DenseReluDense.wi_1.weight",
        "text_model.encoder.layers.*.mlp.fc1.weight",
    )
    layers = names.blocks(*_LAYERS)
    missing = _missing(common, {"layer": layers})
    return TextEncoder(**common, width=width, layers=len(layers), missing=missing) if width else None


def _missing(common: Mapping[str, Any], found: Mapping[str, Sequence[int]]) -> str:
    """Which blocks of a model of this family are not in the file, where it is no shard."""
    wanted = BLOCKS.get(common["family"], ())
    if common["shard"] or not wanted or not any(found.values()):
        return ""
    short = []
    for (kind, numbers), counts in zip(found.items(), wanted, strict=True):
        count = max(counts)
        if numbers != tuple(range(len(numbers))) or len(numbers) not in counts:
            short.append(f"{len(numbers)} of {count} {kind}s")
    return " and ".join(short)


def _vae(names: Names, common: Mapping[str, Any]) -> Vae | None:
    first = (
        "decoder.conv_in.weight",
        "decoder.conv1.weight",
        "decoder.conv_in.conv.weight",
        "decoder.layers.0.weight",
        "taesd_decoder.1.weight",
        "decoder.1.weight",
        "1.weight",
    )
    width, channels = names.axis(0, *first), names.axis(1, *first)
    if width is None or channels is None:
        return None
    return Vae(
        **common,
        latent_channels=channels,
        decoder_width=width,
        statistics="bn.running_mean" in names,
        encoder=names.starting("encoder.") or names.starting("taesd_encoder."),
    )


_SCALED_BY = {"tensor": "a scale per tensor", "row": "a scale per row", "block": "a scale per block"}
_PACKED = {
    "svdq-int4": "4-bit by SVDQuant, which needs nunchaku",
    "svdq-fp4": "4-bit floats by SVDQuant, which needs nunchaku",
    "nf4": "4-bit by bitsandbytes",
    "bnb-int8": "8-bit by bitsandbytes",
}


def _remarks(facts: Facts | None, dtype: str) -> list[str]:
    """What is worth saying beside the family."""
    remarks = []
    if isinstance(facts, Transformer) and (facts.double_blocks or facts.single_blocks):
        remarks.append(f"{facts.double_blocks} + {facts.single_blocks} blocks")
    if isinstance(facts, TextEncoder) and facts.layers:
        remarks.append(f"{facts.layers} layer{'s' * (facts.layers != 1)}")
    if isinstance(facts, Vae):
        if not facts.encoder:
            remarks.append("decoder only, so it cannot read pictures for an edit")
        if facts.family == "flux2-vae" and facts.decoder_width == 384:
            remarks.append("small decoder")
    if dtype in _PACKED:
        remarks.append(_PACKED[dtype])
    if isinstance(facts, (Transformer, TextEncoder)):
        if facts.missing:
            remarks.append(f"incomplete: only {facts.missing}, and its name says nothing of shards")
        if dtype.startswith("fp8"):
            remarks.append(f"fp8 with {_SCALED_BY[facts.scaled_by]}" if facts.scaled_by else "fp8 without scales")
        if facts.scales == "unmarked":
            remarks.append("its scales are not announced, and ComfyUI would ignore them")
        if facts.shard:
            remarks.append(f"shard {facts.shard[0]} of {facts.shard[1]}")
    return remarks
