"""What the worker can tell of a prompt and a picture: words that were not read, and pixels in figures."""

from __future__ import annotations

import contextlib
from typing import Any

from kleinctl.worker.protocol import Channel, Pixels, PromptCut

#: Tokens of the chat template around a prompt, at most; no token is shorter than a byte.
TEMPLATE_TOKENS = 32
#: Characters of the unread words that are told.
TAIL_CHARACTERS = 400


def prompt_cut(tokenizer: Any, prompt: str, limit: int) -> PromptCut | None:
    """What of `prompt` the model did not read, with the `limit` tokens that the pipeline hands on; None: it read all.

    The pipeline puts the prompt into the chat template and cuts the end of that (diffusers,
    pipelines/flux2/pipeline_flux2_klein.py). `tokenizer` is the session's, if it shows one.
    """
    if tokenizer is None or len(prompt.encode(errors="replace")) + TEMPLATE_TOKENS <= limit:
        return None
    with contextlib.suppress(Exception):  # a stranger's tokenizer must not cost a picture that is there
        return _cut(tokenizer, prompt, limit)
    return None


def _cut(tokenizer: Any, prompt: str, limit: int) -> PromptCut | None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    read = tokenizer(text, return_offsets_mapping=True)
    tokens, places = len(read["input_ids"]), read["offset_mapping"]
    end = text.rfind(prompt.strip()) + len(prompt.strip())
    if tokens <= limit or places[limit - 1][1] >= end:
        return None
    return PromptCut(tokens, limit, text[places[limit - 1][1] : end].strip()[:TAIL_CHARACTERS])


def pixels_of(image: Any) -> Pixels:
    """The figures of a picture in RGB."""
    from PIL import ImageChops

    red, green, blue = image.split()
    brightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    black = brightest.histogram()[0] / (image.width * image.height)
    return Pixels(tuple(_channel(each.histogram()) for each in (red, green, blue)), round(black, 4))


def _channel(histogram: list[int]) -> Channel:
    count = sum(histogram)
    mean = sum(value * number for value, number in enumerate(histogram)) / count
    variance = sum((value - mean) ** 2 * number for value, number in enumerate(histogram)) / count
    return Channel(round(mean, 2), round(variance**0.5, 2), _at(histogram, 0.01), _at(histogram, 0.99))


def _at(histogram: list[int], share: float) -> int:
    """The value that this share of pixels does not exceed."""
    wanted, seen = share * sum(histogram), 0
    for value, number in enumerate(histogram):
        seen += number
        if seen >= wanted:
            return value
    return 255
