"""A look at captioned images: one HTML file, paged: images, captions, where encoders cut them, filters' verdicts."""

import base64
import html
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from fixclip_core.data.captions import CaptionFilters, rejection
from fixclip_core.data.config import DataConfig
from fixclip_core.data.order import sample_range
from fixclip_core.data.samples import BadSampleError, Sample, check_captions, decode_image
from fixclip_core.data.sources import open_source
from fixclip_core.files import write_atomically

CONTEXT_LENGTHS = (77, 248)
_THUMBNAIL = 256  # pixels


@dataclass(frozen=True)
class Card:
    """What the page shows of a sample.

    Attributes:
        key: the sample's name.
        image: a small JPEG as a data URL; empty if it cannot be decoded.
        long: the long caption, cleaned.
        cuts: characters of it that an encoder of 77 tokens reads, and one of 248.
        tokens: of the long caption, start and end token included.
        short: the short caption; empty if there is none.
        short_tokens: of the short caption.
        reason: why the sample is left out: damage, or the name of a filter; empty if it is used.
        detail: more on the reason.
        origin: further fields, e.g. the model and the prompt that wrote the caption.
    """

    key: str
    image: str = ""
    long: str = ""
    cuts: tuple[int, ...] = ()
    tokens: int = 0
    short: str = ""
    short_tokens: int = 0
    reason: str = ""
    detail: str = ""
    origin: dict[str, str] = field(default_factory=dict)


def write_preview(config: DataConfig, file: Path, filters: CaptionFilters, limit: int = 200) -> int:
    """Write the page for up to `limit` samples, evenly spread over a source; gives how many it shows.

    Args:
        config: its source, image_root, start and stop.
        file: the page; everything is inside, about 15 KB a sample.
        filters: whose verdicts are shown.
        limit: most samples.

    Raises:
        ValueError: the source cannot be opened, the limit is not positive, or the file cannot be written.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: it must be at least 1")
    source = open_source(config)
    samples = sample_range(source.sizes, config)
    measure = token_counter()
    cards = []
    for index in tqdm(samples[:: -(-len(samples) // limit)], "reading", unit="sample"):
        try:
            cards.append(make_card(source.read(index), filters, measure))
        except BadSampleError as error:
            skipped = error.skipped
            cards.append(Card(skipped.key, reason=skipped.reason, detail=f"{skipped.file} {skipped.detail}"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, render(cards, config.source, len(samples)).encode("utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be written: {error}") from None
    return len(cards)


def make_card(sample: Sample, filters: CaptionFilters, measure: Callable[[str], list[int]]) -> Card:
    """The card of a sample; raises BadSampleError if it has no caption or no image."""
    long, short = check_captions(sample)
    ends = measure(long)
    return Card(
        key=sample.key,
        image=_thumbnail(sample),
        long=long,
        cuts=tuple(_cut(long, ends, length) for length in CONTEXT_LENGTHS),
        tokens=len(ends) + 2,
        short=short or "",
        short_tokens=len(measure(short)) + 2 if short else 0,
        reason=rejection(long, filters) or "",
        origin={str(name): str(value) for name, value in sample.extra.items() if name != "image"},
    )


def _cut(text: str, ends: list[int], context_length: int) -> int:
    """Characters that an encoder reads: as many tokens as its context holds besides the start and end token."""
    read = context_length - 2
    return len(text) if len(ends) <= read else ends[read - 1]


def token_counter() -> Callable[[str], list[int]]:
    """A function from a text to the character at which each of its CLIP tokens ends.

    Tokens of one word all end where the word does, so a cut never falls inside a word.
    """
    from open_clip.tokenizer import SimpleTokenizer  # slow to import

    tokenizer = SimpleTokenizer(clean="whitespace")

    def measure(text: str) -> list[int]:
        found = tokenizer.pat.finditer(text)
        return [match.end() for match in found for _ in tokenizer.encode(match.group().lower())]

    return measure


def _thumbnail(sample: Sample) -> str:
    image = decode_image(sample, draft_size=_THUMBNAIL)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def render(cards: list[Card], source: str, total: int) -> str:
    """The page. Captions and keys are data in it, never markup, whatever they hold."""
    data: list[dict[str, Any]] = [asdict(card) for card in cards]
    # In a script element "</script>" and "<!--" would end or change it; < only occurs inside JSON's strings.
    embedded = json.dumps(data).replace("<", "\\u003c")
    title = html.escape(f"{source}: {len(cards):,} of {total:,} samples")
    return _PAGE.replace("@TITLE@", title).replace("@DATA@", embedded)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; color: #222; }
  h1 { font-size: 1.25rem; overflow-wrap: anywhere; }
  nav { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: 1rem 0; }
  article { display: grid; grid-template-columns: minmax(6rem, 16rem) 1fr; gap: 1rem; padding: 1rem 0;
            border-top: 1px solid #ccc; }
  article > * { min-width: 0; overflow-wrap: anywhere; }
  img { max-width: 100%; min-width: 6rem; }
  p { margin: 0 0 .5rem; white-space: pre-line; }
  .facts { font-size: .875rem; color: #555; }
  .to248 { background: #d9e8ff; }
  .beyond { text-decoration: line-through; color: #666; }
  .reason { font-weight: 600; color: #a01010; }
  @media (max-width: 40rem) { article { grid-template-columns: 1fr; } }
  @media (prefers-color-scheme: dark) {
    body { background: #181818; color: #ddd; } .facts, .beyond { color: #aaa; } .to248 { background: #1f3d66; }
    .reason { color: #ff8a80; } article { border-color: #444; }
  }
</style>
<h1>@TITLE@</h1>
<p>An encoder of 77 tokens reads the plain text; <span class="to248">one of 248 reads this too</span>;
  <span class="beyond">this is cut</span>.</p>
<nav>
  <label>Show <select id="show"></select></label>
  <button id="before">Previous</button> <span id="where" aria-live="polite"></span> <button id="after">Next</button>
</nav>
<main id="cards"></main>
<script type="application/json" id="data">@DATA@</script>
<script>
  const cards = JSON.parse(document.getElementById("data").textContent), size = 20;
  const choices = {
    "all": () => true,
    "used": card => !card.reason,
    "left out": card => card.reason !== "",
    "over 77 tokens": card => card.tokens > 77,
    "over 248 tokens": card => card.tokens > 248,
  };
  const byId = id => document.getElementById(id);
  let page = 0;
  function element(name, text, style) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (style) made.className = style;
    return made;
  }
  function long(card) {
    const made = element("p"), text = Array.from(card.long), [first, second] = card.cuts;
    made.append(text.slice(0, first).join(""));
    if (text.length > first) made.append(element("span", text.slice(first, second).join(""), "to248"));
    if (text.length > second) made.append(element("span", text.slice(second).join(""), "beyond"));
    return made;
  }
  function show(card) {
    const made = element("article"), left = element("div"), right = element("div");
    if (card.image) { const image = element("img"); image.src = card.image; image.alt = card.key; left.append(image); }
    left.append(element("p", card.key, "facts"));
    if (card.reason) right.append(element("p", `left out: ${card.reason} ${card.detail}`, "reason"));
    if (card.long) right.append(long(card), element("p", `${card.tokens} tokens`, "facts"));
    if (card.short) right.append(element("p", card.short), element("p", `short, ${card.short_tokens} tokens`, "facts"));
    const origin = Object.entries(card.origin).map(([name, value]) => `${name}: ${value}`).join(" \\u00b7 ");
    if (origin) right.append(element("p", origin, "facts"));
    made.append(left, right);
    return made;
  }
  function draw() {
    const chosen = cards.filter(choices[byId("show").value]), pages = Math.max(1, Math.ceil(chosen.length / size));
    page = Math.min(page, pages - 1);
    byId("cards").replaceChildren(...chosen.slice(page * size, (page + 1) * size).map(show));
    byId("where").textContent = `page ${page + 1} of ${pages}, ${chosen.length} samples`;
    byId("before").disabled = page === 0;
    byId("after").disabled = page === pages - 1;
  }
  for (const name of Object.keys(choices)) byId("show").append(new Option(name, name));
  byId("show").onchange = () => { page = 0; draw(); };
  byId("before").onclick = () => { page--; draw(); scrollTo(0, 0); };
  byId("after").onclick = () => { page++; draw(); scrollTo(0, 0); };
  draw();
</script>
</html>
"""
