"""Do the parts of a model belong together?"""

from __future__ import annotations

from kleinctl.checks import check
from kleinctl.identify import TextEncoder, Transformer, Vae, encoder_title
from kleinctl.problem import Problem

# klein reads its prompt from three layers of the text encoder, laid side by side.
LAYERS_READ = 3
# The transformer sees latents in patches of 2 x 2: 32 channels become 128.
PATCH = 4
REFS = {2560: "C05", 4096: "C01", 5120: "C02"}


@check("text-encoder-width")
def text_encoder_width(transformer: Transformer, text_encoder: TextEncoder) -> Problem | None:
    """The text encoder is the one this transformer was trained with."""
    wanted, found = transformer.text_width // LAYERS_READ, text_encoder.width
    if found == wanted:
        return None
    return Problem(
        what=f"{text_encoder.path.name} does not fit {transformer.path.name}",
        why=f"The transformer needs {encoder_title(wanted)}; this file is {encoder_title(found)}.",
        fix=_fix(transformer),
        path=str(text_encoder.path),
        ref=REFS.get(found),
    )


@check("vae-channels")
def vae_channels(transformer: Transformer, vae: Vae) -> Problem | None:
    """The VAE makes latents of the depth that this transformer reads."""
    wanted, found = transformer.image_channels // PATCH, vae.latent_channels
    if found == wanted:
        return None
    return Problem(
        what=f"{vae.path.name} does not fit {transformer.path.name}",
        why=f"The transformer reads latents of {wanted} channels; this VAE makes {found}.",
        fix=_fix(transformer),
        path=str(vae.path),
        ref="C09",
    )


def _fix(transformer: Transformer) -> str:
    return f"kleinctl install --model {transformer.model}" if transformer.model else "kleinctl models"
