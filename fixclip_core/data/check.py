"""A look at a source before training: what is damaged, how long captions are, what the filters would leave out."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from fixclip_core.data.captions import CaptionFilters, rejection
from fixclip_core.data.config import DataConfig
from fixclip_core.data.order import sample_range
from fixclip_core.data.samples import BadSampleError, Skipped, check_captions, decode_image
from fixclip_core.data.sources import open_source


@dataclass(frozen=True)
class CheckReport:
    """What a look at a source found.

    Attributes:
        samples: in the source.
        checked: of them, spread evenly over it.
        skipped: every one that could not be used, and why.
        filtered: how many captions each of the filters' reasons would leave out.
        tokens: CLIP tokens of each long caption, start and end token included.
        short_captions: how many samples bring a short caption.
        examples: a few (key, long caption).
    """

    samples: int
    checked: int
    skipped: list[Skipped]
    filtered: dict[str, int]
    tokens: np.ndarray
    short_captions: int
    examples: list[tuple[str, str]]

    def counts(self) -> dict[str, int]:
        return dict(Counter(sample.reason for sample in self.skipped).most_common())


def check_source(
    config: DataConfig, filters: CaptionFilters, *, limit: int | None = None, decode: bool = True, examples: int = 3
) -> CheckReport:
    """Read up to `limit` samples, evenly spread, and count what is in them.

    Raises:
        ValueError: the source cannot be opened, or the limit is not positive.
    """
    from open_clip.tokenizer import SimpleTokenizer  # slow to import, and packing does without

    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: it must be at least 1")
    source, encode = open_source(config), SimpleTokenizer().encode
    samples = sample_range(source.sizes, config)
    chosen = samples[:: -(-len(samples) // limit)] if limit else samples
    skipped: list[Skipped] = []
    filtered: Counter[str] = Counter()
    tokens: list[int] = []
    shown: list[tuple[str, str]] = []
    short_captions = 0
    for index in tqdm(chosen, "checking", unit="sample"):
        try:
            sample = source.read(index)
            long, short = check_captions(sample)
            if decode:
                decode_image(sample, draft_size=1)
        except BadSampleError as error:
            skipped.append(error.skipped)
            continue
        filtered.update(filter(None, [rejection(long, filters)]))
        tokens.append(len(encode(long)) + 2)
        short_captions += short is not None
        if len(shown) < examples:
            shown.append((sample.key, long))
    return CheckReport(
        len(samples), len(chosen), skipped, dict(filtered), np.array(tokens, np.int64), short_captions, shown
    )
