"""Draws a `kleinctl.bench/1` document: `<python> -I chart.py BENCH.json CHART.png`, with Pillow in that Python.

Each line of the document is a row with two bars, the seconds of a picture and the VRAM it took; a mark on a bar is what
was predicted, and the model card's path is grey.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

GIB = 2**30
#: Everything is drawn twice as large as it is meant to be seen, in pixels.
SCALE = 2
WIDTH, MARGIN, ROW, BAR, LABEL, GAP = 960 * SCALE, 24 * SCALE, 30 * SCALE, 18 * SCALE, 250 * SCALE, 70 * SCALE
INK, FAINT, PAPER = (31, 35, 40), (110, 118, 129), (255, 255, 255)
COLOURS = {"diffusers": (160, 166, 173), "comfyui": (214, 132, 48)}
OWN = (48, 104, 196)
#: Times the median that a bar shows at most.
CUT = 3


def main(source: str, target: str) -> None:
    document = json.loads(Path(source).read_text(encoding="utf-8"))
    draw(document).save(target, "PNG", optimize=True)


def draw(document: dict) -> Image.Image:
    """The chart as a picture."""
    groups = panels(document["lines"])
    rows = sum(len(lines) for lines in groups.values())
    height = 2 * MARGIN + 92 * SCALE + len(groups) * 44 * SCALE + rows * ROW + 34 * SCALE
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(picture)
    machine = document["machine"]
    top = MARGIN
    pen.text((MARGIN, top), f"{document['model']} on {machine['card'] or machine['cpu']}", INK, font(20))
    job = f"{document['steps']} steps, median of {document['runs']} new prompts, PNG written; {document['date'][:10]}"
    pen.text((MARGIN, top + 30 * SCALE), job, FAINT, font(13))
    pen.text((MARGIN, top + 50 * SCALE), "the line across a bar is what kleinctl predicted", FAINT, font(13))
    top += 92 * SCALE
    for (width, tall), lines in groups.items():
        top = panel(pen, top, f"{width} x {tall}", lines)
    legend(pen, top + 8 * SCALE, document["lines"])
    return picture


def panels(lines: list) -> dict:
    """The lines of each size, small sizes and large budgets first, in whatever order they were measured."""
    groups: dict = {}
    for line in sorted(lines, key=lambda line: (line["width"] * line["height"], -(line["free_bytes"] or math.inf))):
        groups.setdefault((line["width"], line["height"]), []).append(line)
    return groups


def panel(pen: ImageDraw.ImageDraw, top: int, title: str, lines: list) -> int:
    """The rows of one size; where the next begins."""
    left = MARGIN + LABEL
    room = (WIDTH - left - 2 * GAP - MARGIN) // 2
    seconds = [amounts(line, "seconds_next") for line in lines]
    memory = [[value / GIB for value in amounts(line, "vram_bytes")] for line in lines]
    pen.text((MARGIN, top), title, INK, font(15))
    pen.text((left, top), "seconds a picture", FAINT, font(13))
    with_memory = any(pair[0] for pair in memory)
    if with_memory:
        pen.text((left + room + GAP, top), "GiB of VRAM", FAINT, font(13))
    top += 28 * SCALE
    for line, time, space in zip(lines, seconds, memory, strict=True):
        pen.text((MARGIN, top + 2 * SCALE), label(line), INK, font(13))
        if line["measured"]:
            bar(pen, left, top, room, time, most(seconds), colour(line), "{:.2f}")
            if with_memory:
                bar(pen, left + room + GAP, top, room, space, most(memory), colour(line), "{:.1f}")
        else:
            pen.text((left, top + 2 * SCALE), line["problem"]["what"][:80], FAINT, font(13))
        top += ROW
    return top + 16 * SCALE


def amounts(line: dict, key: str) -> list:
    """What was measured and what was predicted; zero for what is not known."""
    return [(line[kind] or {}).get(key, 0) for kind in ("measured", "predicted")]


def most(pairs: list) -> float:
    """What a whole bar stands for: the largest value, but not so large that the others cannot be told apart."""
    measured = [pair[0] for pair in pairs if pair[0]]
    return min(max(map(max, pairs)), CUT * statistics.median(measured)) if measured else 1.0


def bar(
    pen: ImageDraw.ImageDraw, left: int, top: int, room: int, values: list, whole: float, fill: tuple, form: str
) -> None:
    """A bar for what was measured, a line across it for what was predicted, and the figure behind it.

    A bar that would be longer than its room has a cut in it.
    """
    end = left + min(room, max(SCALE, round(room * values[0] / whole)))
    pen.rectangle((left, top, end, top + BAR), fill)
    if values[0] > whole:
        slant, at = 6 * SCALE, left + room * 7 // 8
        pen.polygon((at, top + BAR, at + slant, top, at + 2 * slant, top, at + slant, top + BAR), PAPER)
    if 0 < values[1] <= whole:
        at = left + round(room * values[1] / whole)
        pen.rectangle((at - SCALE // 2, top - 3 * SCALE, at + SCALE // 2, top + BAR + 3 * SCALE), INK)
        end = max(end, at)
    pen.text((end + 6 * SCALE, top + 2 * SCALE), form.format(values[0]), INK, font(13))


def label(line: dict) -> str:
    """Who drew, and in how much free VRAM."""
    free = line["free_bytes"]
    return line["who"] if free is None else f"{line['who']}, {free / GIB:.3g} GiB free"


def colour(line: dict) -> tuple:
    """Grey for the model card's path, so that kleinctl's own stand out."""
    return COLOURS.get(line["who"], OWN)


def legend(pen: ImageDraw.ImageDraw, top: int, lines: list) -> None:
    """One square for each kind of bar."""
    at = MARGIN
    kinds = dict.fromkeys(line["who"] if line["who"] in COLOURS else "kleinctl" for line in lines)
    for kind in kinds:
        pen.rectangle((at, top, at + 12 * SCALE, top + 12 * SCALE), COLOURS.get(kind, OWN))
        text = {"diffusers": "the model card's path (diffusers)", "comfyui": "ComfyUI"}.get(kind, kind)
        pen.text((at + 18 * SCALE, top - 2 * SCALE), text, FAINT, font(13))
        at += round(pen.textlength(text, font(13))) + 46 * SCALE


def font(size: int) -> Any:
    """Pillow's own font in a size of points."""
    return ImageFont.load_default(size * SCALE)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
