"""The drawings of docs/explanations: `python docs/scripts/draw_figures.py` writes them to docs/images."""

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from fixclip_diffusion.conditioning import CONDITIONINGS, Break, Context, Layout, PromptTokens

IMAGES = Path(__file__).parents[1] / "images"
BLUE, GREEN, ORANGE, GREY = "#8fb7df", "#1f6d46", "#d9822b", "#6b7280"


# -- conditionings: drawn from the layouts that the pipeline uses -------------------------------------------


def example_prompt(num_tokens: int = 158, sentence: int = 18) -> PromptTokens:
    """Tokens of sentences of `sentence` tokens each; with start and end a prompt of `num_tokens` + 2."""
    ends = [Break.SENTENCE if (number + 1) % sentence == 0 else Break.WORD for number in range(num_tokens)]
    spans = tuple((2 * number, 2 * number + 1) for number in range(num_tokens))
    return PromptTokens("w " * num_tokens, (320,) * num_tokens, spans, tuple(ends), (1.0,) * num_tokens)


def kept_and_read(layout: Layout) -> list[tuple[list[int], list[int]]]:
    """For each pass the prompt's tokens whose hidden states become rows, and all tokens that it reads."""
    length = layout.ids_NP.shape[1]
    found = []
    for number, token_P in enumerate(layout.token_NP.tolist()):
        rows = [source % length for source in layout.source_L.tolist() if source // length == number]
        kept = [token_P[position] for position in rows if token_P[position] >= 0]
        found.append((kept, [token for token in token_P if token >= 0]))
    return found


def draw_conditionings() -> Figure:
    tokens, context = example_prompt(), Context(248, 77, 49406, 49407, 49407)
    layouts = {name: conditioning.lay_out(tokens, context) for name, conditioning in CONDITIONINGS.items()}
    figure, axes = plt.subplots(figsize=(8, 4.6))
    row, ticks = 0.0, {}
    for name, layout in layouts.items():
        passes = kept_and_read(layout)
        ticks[row + (len(passes) - 1) / 2] = f"{name}\n{len(layout)} rows"
        for kept, read in passes:
            axes.broken_barh([(min(read), len(read))], (row - 0.36, 0.72), color=BLUE, alpha=0.55)
            axes.broken_barh([(min(kept), len(kept))], (row - 0.36, 0.72), color=GREEN)
            row += 1
        row += 0.7
    axes.axvline(75, color=ORANGE, linewidth=1.5)
    axes.text(75, -0.75, "token 77 ", color=ORANGE, ha="center", va="bottom")
    axes.set(xlim=(0, len(tokens)), ylim=(row - 0.8, -0.8), xlabel="token of the prompt")
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    return figure


# -- the method ---------------------------------------------------------------------------------------------

# (left, bottom, width, height), colour, whether it is an addition of this project, text
BOXES = [
    ((0.1, 5.6, 2.3, 1.2), GREY, False, "picture\nlong branch: whole\nshort: 75 % masked"),
    ((0.1, 2.3, 2.3, 1.2), GREY, False, "captions\nlong: up to 248 tokens\nshort"),
    (
        (3.2, 5.2, 4.0, 1.9),
        GREEN,
        False,
        "image tower\n\nCLS reads prompts and patches\nprompt j reads its region\npatches read CLS and patches",
    ),
    ((3.2, 2.1, 4.0, 1.6), BLUE, False, "text tower\n\npositions: 20 kept,\n57 stretched by 4 = 248"),
    ((8.3, 6.0, 3.5, 1.0), ORANGE, False, "long and short loss\nCLS with end of text"),
    ((8.3, 4.0, 3.5, 1.2), ORANGE, False, "hierarchical losses\ngroups K to G of layers,\na projection each"),
    ((8.3, 1.9, 3.5, 1.2), ORANGE, True, "state alignment\nall tokens' hidden states\nwith those of the base"),
    ((3.2, 0.1, 4.0, 1.1), GREY, True, "frozen base CLIP\noverlapping windows of 77"),
]
# start, end, whether it is an addition
ARROWS = [
    ((2.45, 6.2), (3.12, 6.2), False),
    ((2.45, 2.9), (3.12, 2.9), False),
    ((7.25, 6.5), (8.22, 6.5), False),
    ((7.25, 5.6), (8.22, 4.9), False),
    ((7.25, 3.4), (8.22, 4.3), False),
    ((6.6, 3.75), (8.22, 6.2), False),
    ((7.25, 2.6), (8.22, 2.6), True),
    ((7.25, 0.7), (8.22, 2.0), True),
    ((1.25, 2.25), (3.12, 0.7), True),
]


def draw_method() -> Figure:
    figure, axes = plt.subplots(figsize=(9, 5.4))
    axes.set(xlim=(0, 12), ylim=(0, 7.2))
    axes.axis("off")
    for (left, bottom, width, height), colour, added, text in BOXES:
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom),
                width,
                height,
                boxstyle="round,pad=0.02,rounding_size=0.12",
                facecolor="#ffffff" if added else colour + "22",
                edgecolor=colour,
                linestyle="--" if added else "-",
                linewidth=1.4,
            )
        )
        axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", linespacing=1.35)
    for start, end, added in ARROWS:
        style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.3, "linestyle": "--" if added else "-"}
        axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})
    figure.tight_layout()
    return figure


FIGURES = {"conditionings": draw_conditionings, "method": draw_method}


def main(folder: Path = IMAGES) -> None:
    """Write every drawing as NAME.svg, the same bytes each time."""
    with mpl.rc_context({"svg.hashsalt": "fixclip", "font.family": "sans-serif", "font.size": 10}):
        for name, draw in FIGURES.items():
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where to write [docs/images]")
    main(parser.parse_args().folder)
