"""A small model for tests that need one and no file of it."""

from kleinctl.manifest import Defaults, Model, Part, Shape, Source


def tiny_model() -> Model:
    """A model of one part."""
    part = Part("vae", "vae", "vae.safetensors", {"diffusers": "vae/vae.safetensors"}, (Source("a", "o/r", "main"),), 3)
    return Model(
        name="klein-test",
        title="A model for tests",
        family="flux2-klein-4b",
        variant="distilled",
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
        gated=False,
        accept_licence=False,
        devices=("cpu",),
        dtype="float32",
        defaults=Defaults(4, 1.0, 256, 256, 512),
        shape=Shape(*[1] * 14),
        parts=(part,),
    )
