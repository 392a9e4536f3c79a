"""The picture of the node *Token report*: the prompt, coloured by who reads it."""

import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fixclip_diffusion.token_report import TokenReport

WIDTH, MARGIN, SIZE, LINE = 960, 24, 20, 30
READ_BY_STOCK, READ_BY_US, DROPPED = (31, 78, 176), (20, 122, 68), (150, 150, 150)
LEGEND = ((READ_BY_STOCK, "within 77 tokens"), (READ_BY_US, "behind token 77, read"), (DROPPED, "dropped"))


def draw_report(report: TokenReport) -> Tensor:
    """(1, H, W, 3) in 0..1, ComfyUI's IMAGE: blue up to token 77, green behind it, grey where nothing is read."""
    font = ImageFont.load_default(SIZE)
    pieces = _pieces(report)
    place, line = MARGIN, 1
    drawn: list[tuple[int, int, str, tuple[int, int, int]]] = []
    for text, colour in pieces:
        for word in text.split():
            for part in textwrap.wrap(word, 60):
                width = round(font.getlength(part + " "))
                if place + width > WIDTH - MARGIN and place > MARGIN:
                    place, line = MARGIN, line + 1
                drawn.append((place, line, part, colour))
                place += width
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + (line + 2) * LINE), "white")
    pen = ImageDraw.Draw(image)
    title = f"{report.num_tokens} tokens, {report.conditioning}, {report.num_states} rows"
    pen.text((MARGIN, MARGIN), title, "black", font)
    x = MARGIN + round(font.getlength(title + "     "))
    for colour, text in LEGEND:
        if any(found == colour for _, found in pieces):
            pen.text((x, MARGIN), text, colour, font)
            x += round(font.getlength(text + "    "))
    for x, line, text, colour in drawn:
        pen.text((x, MARGIN + (line + 0.5) * LINE), text, colour, font)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, image.height, image.width, 3) / 255


def _pieces(report: TokenReport) -> list[tuple[str, tuple[int, int, int]]]:
    end = len(report.text)
    cut = end if report.cut is None else report.cut
    stock = min(cut, end if report.stock_cut is None else report.stock_cut)
    found = [(report.text[:stock], READ_BY_STOCK), (report.text[stock:cut], READ_BY_US), (report.text[cut:], DROPPED)]
    return [(text, colour) for text, colour in found if text.strip()]
