"""Images with their captions, prepared for an encoder: samples of a data source, or the files of a benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from fixclip_core.data.samples import BadSampleError, Sample, Skipped, check_captions, decode_image, picture_digest
from fixclip_core.data.sources import Source
from fixclip_core.evaluation.benchmarks import Benchmark


@dataclass(frozen=True)
class Item:
    """One sample: its image (None if it could not be used), captions, and what tells its image from others."""

    image: Tensor | None
    captions: list[str]
    identity: str
    skipped: Skipped | None = None


class SourceItems(Dataset[Item]):
    """Samples of a data source; rows with the very same picture count as one image with several captions.

    Args:
        source: the data, see `data.open_source`.
        preprocess: PIL image to (C, H, W).
        caption: which caption to retrieve by.
        start, stop: samples start..stop-1 alone.

    Raises:
        ValueError: the source has fewer samples.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Callable[[Any], Tensor],
        caption: Literal["long", "short"] = "long",
        start: int = 0,
        stop: int | None = None,
    ):
        self.source, self.preprocess, self.caption = source, preprocess, caption
        total = sum(source.sizes)
        self.indices = range(start, total if stop is None else stop)
        if not self.indices or self.indices.stop > total:
            raise ValueError(f"samples {start} to {'the end' if stop is None else stop}: the data has {total}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        try:
            sample = self.source.read(self.indices[index])
            long, short = check_captions(sample)
            text = long if self.caption == "long" else short
            if text is None:
                raise BadSampleError("no_short_caption", sample.file, sample.key)
            image = self.preprocess(decode_image(sample))
        except BadSampleError as error:
            return Item(None, [], "", error.skipped)
        return Item(image, [text], picture_digest(sample))


class PictureFiles(Dataset[Item]):
    """Image files with their captions, none where classes are told apart; each file counts as an image of its own."""

    def __init__(self, images: Sequence[Path], captions: Sequence[list[str]], preprocess: Callable[[Any], Tensor]):
        self.images, self.captions, self.preprocess = images, captions, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return _read_picture(self.images[index], self.captions[index], self.preprocess)


class BenchmarkItems(PictureFiles):
    """The images of a benchmark, each with all of its captions."""

    def __init__(self, benchmark: Benchmark, preprocess: Callable[[Any], Tensor]):
        super().__init__(benchmark.images, benchmark.captions, preprocess)


def _read_picture(path: Path, captions: list[str], preprocess: Callable[[Any], Tensor]) -> Item:
    try:
        sample = Sample(str(path), path.name, path.read_bytes(), "", None)
        return Item(preprocess(decode_image(sample)), captions, str(path))
    except BadSampleError as error:
        return Item(None, [], str(path), error.skipped)
    except OSError as error:
        return Item(None, [], str(path), Skipped("unreadable", str(path), path.name, str(error.strerror)))
