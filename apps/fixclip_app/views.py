"""What the page shows as HTML. Whatever a visitor wrote is escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from PIL import Image

from fixclip_core.scenes import Check, annotate_caption, check, read_caption
from fixclip_diffusion import TokenReport
from fixclip_diffusion.token_report import ADAPTED

from .jobs import Picture

STYLE = """
/* Whole pictures: Gradio's gallery cuts off as much at the bottom as its label takes at the top. */
#gallery .grid-wrap, #sheet .grid-wrap { max-height: none; }
#gallery .grid-container, #sheet .grid-container { height: auto; }
.fc-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; max-height: 30em; overflow-y: auto;
  border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; }
.fc-text span, .fc-key span { padding: 2px 0; border-radius: 3px; }
.fc-key { display: flex; flex-wrap: wrap; gap: 6px; }
.fc-key span { padding: 2px 8px; white-space: nowrap; }
.fc-stock { background: rgba(59, 130, 246, .22); }
.fc-long { background: rgba(34, 160, 70, .25); border-bottom: 2px solid rgba(34, 160, 70, .9); }
.fc-odd { background: rgba(245, 140, 20, .25); border-bottom: 2px dotted rgba(245, 140, 20, .95); }
.fc-even { background: rgba(190, 80, 200, .25); border-bottom: 2px dashed rgba(190, 80, 200, .95); }
.fc-text .fc-cut { background: #b91c1c; color: white; padding: 1px 6px; border-radius: 4px; font-size: .8em;
  white-space: nowrap; user-select: none; }
.fc-table { overflow-x: auto; }
.fc-table table { border-collapse: collapse; width: 100%; min-width: 38em; table-layout: fixed; font-size: .78em; }
.fc-table th:first-child { width: 24%; }
.fc-table th, .fc-table td { text-align: left; vertical-align: top; padding: 5px 6px; overflow-wrap: anywhere;
  hyphens: auto; border-bottom: 1px solid var(--border-color-primary); }
.fc-right { background: rgba(34, 160, 70, .22); }
.fc-wrong { background: rgba(220, 60, 50, .2); }
.fc-missing { background: rgba(130, 130, 130, .22); }
.fc-pictures { display: flex; flex-wrap: wrap; gap: 12px; }
.fc-pictures figure { position: relative; margin: 0; flex: 1 1 240px; max-width: 512px; }
.fc-pictures img { width: 100%; display: block; image-rendering: pixelated; }
.fc-pictures img.fc-map { position: absolute; inset: 0; height: 100%; opacity: 0; transition: opacity .15s;
  image-rendering: auto; }
.fc-maps fieldset { border: 0; padding: 0; margin: 8px 0 0; }
.fc-maps label { display: block; padding: 4px 8px; border-radius: 6px; cursor: pointer; }
.fc-maps input { appearance: auto; }
.fc-maps label:hover, .fc-maps label:has(:checked) { background: rgba(59, 130, 246, .22); }
.fc-maps label:focus-within { outline: 2px solid var(--color-accent); }
#notice { border-left: 4px solid #d97706; padding: 4px 12px; }
.fc-count { font-variant-numeric: tabular-nums; }
#generate-status, #compare-status { min-height: 90px; }
#generate-status .meta-text-center, #compare-status .meta-text-center { position: static; transform: none; }
/* What the last job left, while the next one runs: Gradio shows its bar, and after each preview a bare frame. */
#generate-status:has(.progress-text, .generating) .prose,
#compare-status:has(.progress-text, .generating) .prose { visibility: hidden; }
#gallery .thumbnail-lg, #sheet .thumbnail-lg { display: flex; flex-direction: column; height: auto;
  aspect-ratio: auto; }
#gallery .thumbnail-lg img, #sheet .thumbnail-lg img { height: auto; }
.caption-label { position: static !important; white-space: normal !important; max-width: 100% !important;
  font-size: .8em; border: 0 !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  #left { display: contents; }
  #right { order: 1; }
  #settings { order: 2; }
}
"""

CUT_MARK = '<span class="fc-cut">✂ a stock encoder stops here</span> '


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{escape(text)}</span>'


def token_view(report: TokenReport, most: int | None = None) -> str:
    """The text coloured by where it falls, with a mark where a stock encoder stops reading.

    Args:
        report: of the prompt.
        most: tokens that the page draws from; a longer prompt is told so.
    """
    text, stock_cut = report.text, report.stock_cut
    count = f'<p class="fc-count" role="status"><b id="fc-tokens">{report.num_tokens:,}</b> tokens. '
    if stock_cut is None:
        left = 77 - report.num_tokens
        count += f"A stock encoder reads all of it; {left} more tokens would fit.</p>"
        return count + (f'<div class="fc-text"><span class="fc-stock">{escape(text)}</span></div>' if text else "")
    unread = 100 * (len(text) - stock_cut) / len(text)
    read_until = len(text) if report.cut is None else report.cut
    how = "in one pass" if len(report.passes) == 1 else f"in {len(report.passes)} passes"
    count += f"A stock encoder stops after 77 and never reads the last {unread:.0f} % of the text. "
    if report.cut is None:
        adapted = "" if report.adapter is None else f"; {ADAPTED[report.adapter]}"
        count += f"Conditioning “{escape(report.conditioning)}” reads it {how}{adapted}."
    else:
        count += "So does this one."
    if most is not None and report.num_tokens > most:
        count += f" <b>This page draws from {most:,} tokens at most.</b>"
    beyond: list[str] = []  # behind the stock encoder's 77 tokens
    start = stock_cut
    for number, item in enumerate(report.passes):
        end = min(item.end, read_until)
        if end > start:
            kind = "fc-long" if not beyond else "fc-even" if number % 2 else "fc-odd"
            beyond.append(_span(kind, text[start:end]))
            start = end
    body = "".join([_span("fc-stock", text[:stock_cut]), CUT_MARK, *beyond, escape(text[start:])])
    key = '<span class="fc-stock">tokens 1 to 77</span>'
    if len(report.passes) == 1:
        key += f'<span class="fc-long">up to {report.context_length}</span>'
    else:
        key += '<span class="fc-even">read in</span><span class="fc-odd">further passes</span>'
    return f'{count}</p><div class="fc-text" tabindex="0">{body}</div><p class="fc-key">{key}</p>'


def heat_map_view(pictures: Sequence[Picture], name: str) -> str:
    """Pictures with one map per sentence over them; the radio button or the pointer on a sentence shows its map.

    Args:
        pictures: drawn from the same prompt, with maps.
        name: tells the radio buttons of this view from those of others on the page.
    """
    pictures = [picture for picture in pictures if picture.maps is not None]
    if not pictures:
        return ""
    sentences = pictures[0].sentences
    figures = []
    for picture in pictures:
        assert picture.maps is not None
        layers = "".join(
            f'<img class="fc-map fc-m{i}" alt="" src="{_data_uri(_heat(map_HW))}">'
            for i, map_HW in enumerate(picture.maps)
        )
        figures.append(f'<figure><img alt="{escape(picture.label)}" src="{_data_uri(picture.image)}">{layers}</figure>')
    rows = "".join(
        f'<label class="fc-s{i}"><input type="radio" name="{name}" value="{i}"> {escape(sentence)}</label>'
        for i, sentence in enumerate(sentences)
    )
    # Without scripts: what is pointed at wins over what is selected. Gradio scopes STYLE, which outweighs a <style>.
    selected = ".fc-maps:has(.fc-s{0} :checked) .fc-m{0} {{ opacity: .75 !important; }}"
    pointed = (
        ".fc-maps:has(.fc-s{0}:hover) .fc-m{0}, .fc-maps:not(:has(label:hover)):has(.fc-s{0} :checked) .fc-m{0} "
        "{{ opacity: .75 !important; }}"
    )
    rules = "".join(
        f"@media (hover: {hover}) {{ {''.join(rule.format(i) for i in range(len(sentences)))} }}"
        for hover, rule in (("none", selected), ("hover", pointed))
    )
    return (
        f'<div class="fc-maps"><style>{rules}</style><div class="fc-pictures">{"".join(figures)}</div>'
        f"<fieldset><legend>Point at a sentence, or select it, to see where the picture looked at it</legend>"
        f'<label class="fc-none"><input type="radio" name="{name}" checked> The picture alone</label>'
        f"{rows}</fieldset></div>"
    )


def _heat(map_HW: torch.Tensor) -> Image.Image:
    """Red where attention is high, clear where it is low; each map uses its whole range."""
    low, high = map_HW.aminmax()
    share_HW = ((map_HW - low) / (high - low).clamp(min=1e-12)).numpy()
    colour = np.zeros((*share_HW.shape, 4), np.uint8)
    colour[..., 0], colour[..., 1] = 255, (200 * (1 - share_HW)).astype(np.uint8)
    colour[..., 3] = (255 * share_HW).astype(np.uint8)
    return Image.fromarray(colour, "RGBA")


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def judge(prompt: str, pictures: Sequence[Picture]) -> tuple[list[tuple[str, str]], list[Check]]:
    """What the checker of the scenes world says: (place, sentence) of each object, and one check per picture.

    Raises:
        ValueError: the prompt does not describe a scene, or a picture has another shape than the world's.
    """
    scene = read_caption(prompt)
    spans = {span.place: prompt[span.start : span.end].strip() for span in annotate_caption(prompt).spans}
    rows = [(item.place, spans[item.place]) for item in scene.objects]
    order = {text: prompt.index(text) for _, text in rows}
    images = [torch.from_numpy(np.array(picture.image.convert("RGB"))).permute(2, 0, 1) for picture in pictures]
    checks = [check(image, scene) for image in images]
    return sorted(rows, key=lambda row: order[row[1]]), checks


def verdict_words(place: str, result: Check) -> str:
    """`drawn as asked`, what is wrong and was seen instead, or `missing`."""
    verdict = next(item for item in result.objects if item.place == place)
    if verdict.right:
        return "drawn as asked"
    if verdict.seen is None:
        return "missing"
    return f"{verdict.verdict}: {verdict.seen.colour} {verdict.seen.shape}"


def verdict_view(prompt: str, pictures: Sequence[Picture], stock_cut: int | None) -> str:
    """A table, a sentence a row and a system a column; says why where the checker has nothing to say."""
    try:
        rows, checks = judge(prompt, pictures)
    except ValueError as error:
        return f"<p>The checker of the scenes world cannot judge this: {escape(str(error))}</p>"
    head = "".join(f'<th scope="col">{escape(picture.system)}</th>' for picture in pictures)
    body = ""
    for place, sentence in rows:
        end = prompt.index(sentence) + len(sentence)
        after = "" if stock_cut is None or end <= stock_cut else " <i>(beyond 77 tokens)</i>"
        cells = "".join(_cell(verdict_words(place, result)) for result in checks)
        body += f'<tr><th scope="row">{escape(sentence)}{after}</th>{cells}</tr>'
    cells = "".join(
        _cell("drawn as asked" if result.background_right else f"wrong background: {result.background}")
        for result in checks
    )
    body += f'<tr><th scope="row">The background</th>{cells}</tr>'
    totals = "".join(
        f"<td><b>{sum(item.right for item in result.objects)} of {len(result.objects)}</b></td>" for result in checks
    )
    return (
        '<div class="fc-table" tabindex="0"><table><caption>What the checker of the scenes world found</caption>'
        f'<thead><tr><th scope="col">Sentence</th>{head}</tr></thead><tbody>{body}'
        f'<tr><th scope="row">Objects drawn as asked</th>{totals}</tr></tbody></table></div>'
    )


def _cell(words: str) -> str:
    kind, mark = ("fc-right", "✓") if words == "drawn as asked" else ("fc-wrong", "✗")
    if words == "missing":
        kind, mark = "fc-missing", "–"
    return f'<td class="{kind}">{mark} {escape(words)}</td>'
