"""Captioned images -> batches, the same ones for every number of workers, and from any point of an epoch.

Every source can read any sample by its number, so order, ranks, workers and resuming are arithmetic on numbers:
batch `n` of epoch `e` is a function of (config, e, n) alone. Shards stay cheap to read because only a few of them
are shuffled together; remote ones are fetched whole, once, into a cache.

Shape letters: B samples of this rank, C channels, H height, W width, T tokens.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fixclip_core.data.captions import caption_pair, clean_caption
from fixclip_core.data.config import DataConfig
from fixclip_core.data.order import EpochOrder, History, apart_positions, epoch_history, sample_range, sample_seeds
from fixclip_core.data.samples import (
    FILTER_REASONS,
    BadSampleError,
    Sample,
    Skipped,
    check_captions,
    decode_image,
    describe_skipped,
    picture_digest,
)
from fixclip_core.data.sources import Source, open_source
from fixclip_core.device import loading_workers

logger = logging.getLogger(__name__)

PAD_ID = 0  # open_clip's padding, with which DeBias-CLIP pads before a text
_MAX_REPLACEMENTS = 64
_PREFETCHED = 2  # batches that a loading process holds ready


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        image: (B, C, H, W) float, as the transform gives it.
        long_ids, short_ids: (B, T) int64; with `num_short` K above 1 short_ids are (K, B, T).
        seeds: (B,) int64, one per sample, for the model's masks.
        keys: B names for reports.
        skipped: samples that were to stand here and could not; others were taken in their place.
        plain_ids: (B, T') of the long captions' plain wordings (`Sample.plain`), which are the long captions themselves
            where the data have none; None where no caption of the batch has one.
        pictures: B digests, the same for the very same picture; none unless they are asked for (`build_loader`).
        sizes: (B, K) float, what the transform says of each picture besides, such as its size before it was cropped;
            None where it gives pictures alone.
    """

    image: Tensor
    long_ids: Tensor
    short_ids: Tensor
    seeds: Tensor
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)
    plain_ids: Tensor | None = None
    sizes: Tensor | None = None
    pictures: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {name: function(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


# A picture (C, H, W), and on demand what is said of it besides (K,); see `Batch.sizes`.
Picture = Tensor | tuple[Tensor, Tensor]
# picture, long caption, short caption, mask seed, key, plain wording of the long caption, and the picture's digest
# where it is asked for, else ""
LoadedSample = tuple[Picture, str, str, int, str, str, str]


def stack_pictures(pictures: Sequence[Picture]) -> tuple[Tensor, Tensor | None]:
    """Pictures as (B, C, H, W), and what is said of them besides as (B, K), or None."""
    images = torch.stack([picture if isinstance(picture, Tensor) else picture[0] for picture in pictures])
    sizes = [picture[1] for picture in pictures if not isinstance(picture, Tensor)]
    return images, torch.stack(sizes) if sizes else None


class Batches(Dataset):
    """Item (epoch, number) is a batch; nothing else decides what it holds, but for `history` where shards are remote.

    Attributes:
        history: from which step of the run on how many ranks shared it, see `order.apart_positions`.
        digests: whether a batch tells which of its pictures are the very same.
    """

    history: History
    digests = False

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        transform: Callable[[Image.Image], Picture],
        tokenizer: Callable[[list[str]], Tensor],
        rank: int,
        world_size: int,
        draft_size: int | None,
    ) -> None:
        self.source, self.config, self.transform, self.tokenizer = source, config, transform, tokenizer
        self.rank, self.world_size, self.draft_size = rank, world_size, draft_size
        self.history = [(0, world_size)]
        self.order = EpochOrder(source.sizes, config)
        self.end_id = int(tokenizer([""])[0, 1]) if config.pad_short else None  # [start, end, padding ...]
        self.short_captions, self.filters = config.short_captions(), config.caption_filters()
        if config.last_batch == "keep" and world_size > 1:
            raise ValueError("last_batch='keep' needs a single rank, as ranks must agree in size: drop or wrap")
        if not len(self):
            raise ValueError(
                f"{len(self.order)} samples do not fill one batch of {config.batch_size} on {world_size} rank(s): "
                "use a smaller batch size (in a recipe train.batch_size), or more samples"
            )

    def __len__(self) -> int:
        """Batches in an epoch, the same for every rank."""
        whole, rest = divmod(len(self.order), self.config.batch_size * self.world_size)
        return whole if self.config.last_batch == "drop" else whole + bool(rest)

    def positions(self, number: int, epoch: int = 0) -> tuple[list[int], range]:
        """The epoch's positions that form a batch, and the range of positions that no replacement may come from.

        Ranks share each global batch, so that what is trained on does not depend on their number. Where shards
        are remote, each rank has its own part of the epoch instead, so that each node fetches its own shards.
        """
        size = self.config.batch_size
        if self.source.remote:
            history = epoch_history(self.history, epoch, len(self))
            found = apart_positions(self.rank, np.array([number]), len(self), size * self.world_size, history)
            begin, positions = int(found[0, 0]), found[0].tolist()
            taken = range(begin, begin + size)
        else:
            begin = (number * self.world_size + self.rank) * size
            positions = list(range(begin, begin + size))
            taken = range(begin - self.rank * size, begin + (self.world_size - self.rank) * size)
        if self.config.last_batch == "keep":
            return positions[: len(self.order) - begin], taken
        return [position % len(self.order) for position in positions], taken

    def __getitem__(self, item: tuple[int, int]) -> Batch | list[Skipped]:
        """The batch, or what was tried in vain to fill it: an error raised here would reach the user garbled."""
        epoch, number = item
        skipped: list[Skipped] = []
        positions, taken = self.positions(number, epoch)
        loaded = [self._usable_sample(epoch, position, taken, skipped) for position in positions]
        samples = [sample for sample in loaded if sample is not None]
        if len(samples) < len(loaded):
            return skipped
        images, longs, shorts, seeds, keys, plains, digests = map(list, zip(*samples, strict=True))
        image_BCHW, sizes = stack_pictures(images)
        number = self.config.num_short
        shorts += [self.further_short(*row, k) for k in range(1, number) for row in zip(longs, seeds, strict=True)]
        ids_BT = self.tokenizer(longs + shorts)
        short_BT = ids_BT[len(longs) :]
        if self.end_id is not None:
            shares = [random.Random(seed + k).random() for k in range(number) for seed in seeds]
            short_BT = pad_before(short_BT, shares, self.end_id)
        if number > 1:
            short_BT = short_BT.unflatten(0, (number, len(longs)))
        return Batch(
            image=image_BCHW,
            long_ids=ids_BT[: len(longs)],
            short_ids=short_BT,
            seeds=torch.tensor(seeds, dtype=torch.int64),
            keys=keys,
            skipped=skipped,
            plain_ids=None if plains == longs else self.tokenizer(plains),
            sizes=sizes,
            pictures=digests if self.digests else [],
        )

    def further_short(self, long: str, seed: int, k: int) -> str:
        """The k-th further short caption of an image, of the sentences of its long one."""
        return caption_pair(long, None, self.short_captions, random.Random(f"{seed}/{k}"))[1]

    def sample_bytes(self) -> int:
        """About what a batch holds of a sample: its picture, beside which captions are small."""
        with seeded(0):
            images, sizes = stack_pictures([self.transform(Image.new("RGB", (64, 64)))])
        return images.nbytes + (0 if sizes is None else sizes.nbytes)

    def _usable_sample(self, epoch: int, position: int, taken: range, skipped: list[Skipped]) -> LoadedSample | None:
        """The sample at a position, or another in its place: a batch keeps its size whatever happens."""
        for attempt in range(_MAX_REPLACEMENTS):
            index = self.order.index(epoch, position)
            if attempt:
                index = self.order.index(epoch, self.order.replacement(epoch, position, attempt, taken))
            try:
                return self.load(epoch, index)
            except BadSampleError as error:
                skipped.append(replace(error.skipped, index=index))
        return None

    def load(self, epoch: int, index: int) -> LoadedSample:
        """Sample number `index` as it is in an epoch; raises BadSampleError if it cannot be used."""
        sample, long, short = self.captions(epoch, index)
        picture = decode_image(sample, self.draft_size)
        _, augmentation_seed, mask_seed = sample_seeds(self.config.seed, epoch, index)
        with seeded(augmentation_seed):
            image = self.transform(picture)
        digest = picture_digest(sample) if self.digests else ""
        return image, long, short, mask_seed, sample.key, plain_wording(sample, long), digest

    def captions(self, epoch: int, index: int) -> tuple[Sample, str, str]:
        """The sample, its picture not yet decoded, and its long and short captions; raises BadSampleError."""
        sample = self.source.read(index)
        long, short = check_captions(sample, self.filters)
        if self.short_captions.policy == "given" and not short:
            raise BadSampleError("no_short_caption", sample.file, sample.key)
        caption_seed, _, _ = sample_seeds(self.config.seed, epoch, index)
        return sample, *caption_pair(long, short, self.short_captions, random.Random(caption_seed))


def plain_wording(sample: Sample, long: str) -> str:
    """The plain wording of a sample's long caption; `long` where it has none, or where `long` is a part of it."""
    whole = isinstance(sample.plain, str) and long == clean_caption(sample.long)
    return clean_caption(sample.plain) if whole else long


def some_captions(loaded: Batches, looked_at: int = 256) -> list[tuple[Sample, str]]:
    """A few hundred samples, their pictures not decoded, and their long captions."""
    total = len(loaded.order)
    found = []
    for position in range(0, total, max(1, total // looked_at)):
        try:
            found.append(loaded.captions(0, loaded.order.index(0, position))[:2])
        except BadSampleError:
            continue  # counted and reported when its turn comes
    return found


def any_plain_wording(captions: Sequence[tuple[Sample, str]]) -> bool:
    """Whether one of these samples and long captions has a plain wording of its own, or there are none to look at."""
    return not captions or any(plain_wording(sample, long) != long for sample, long in captions)


def check_wordings(captions: Sequence[tuple[Sample, str]], name: str, source: str) -> None:
    """Refuse a loss about plain wordings where no caption has one.

    Args:
        captions: samples and their long captions, see `some_captions`.
        name: of the loss's weight in the recipe.
        source: of the samples.

    Raises:
        ValueError: there is none.
    """
    if not any_plain_wording(captions):
        raise ValueError(
            f"{name}: none of {len(captions)} captions in {source} has a plain wording (`plain`), so this loss would "
            f"be 0; give captions that have one (docs/training.md, State alignment), or set {name}=0"
        )


def pad_before(ids_BT: Tensor, shares: Sequence[float], end_id: int) -> Tensor:
    """Move each text to the right, with padding between its start token and the rest of it (DeBias-CLIP).

    For example [start, a, end, 0, 0] with a share of 0.4 becomes [start, 0, a, end, 0]: of 0 to 2 places, 1. Before a
    text the padding is always 0, open_clip's. Behind it there may be another one: transformers' tokenizers of CLIP pad
    with the end-of-text token, before which a text tower would take the text for ended, so that
    [start, a, end, end, end] becomes [start, 0, a, end, end].

    Args:
        ids_BT: token ids, (B, T).
        shares: how far each text moves, from 0 to below 1: not at all to up to the end of the row.
        end_id: the end-of-text token; a text ends with its first one.
    """
    moved_BT = ids_BT.clone()
    for row, share in zip(moved_BT, shares, strict=True):
        length = int(row.eq(end_id).int().argmax()) + 1
        places = int(share * (len(row) - length + 1))
        row[1 + places : length + places] = row[1:length].clone()
        row[1 : 1 + places] = PAD_ID
    return moved_BT


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators that image transforms draw from, and put them back afterwards."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


class Loader:
    """Epochs of batches for one rank; see `build_loader`.

    Attributes:
        skipped: every sample that could not be used so far, by its number.
    """

    def __init__(self, batches: Batches, pin_memory: bool) -> None:
        self.batches, self.config, self.pin_memory = batches, batches.config, pin_memory
        self.skipped: dict[int, Skipped] = {}
        self.seen = 0

    def __len__(self) -> int:
        """Batches in an epoch, the same for every rank."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`.. of an epoch; starting late costs nothing and gives the batches it would have given.

        Raises:
            ValueError: `start` is beyond the epoch, or more than `max_bad_share` of the samples are bad.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start={start}: an epoch has {len(self)} batches")
        workers = loading_workers(self.config.workers)  # batches do not depend on their number
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=[(epoch, number) for number in range(start, len(self))],
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.config.seed),  # leaves the global one alone
        )
        for batch in loader:
            self._account(batch)
            yield batch

    def waiting_bytes(self) -> int:
        """Bytes of shared memory that batches wait in, at most; 0 where the process loads them itself."""
        batches = min(_PREFETCHED * loading_workers(self.config.workers), len(self))
        return batches * self.config.batch_size * self.batches.sample_bytes()

    def _account(self, batch: Batch | list[Skipped]) -> None:
        skipped = batch if isinstance(batch, list) else batch.skipped
        for sample in skipped:
            if sample.index not in self.skipped and sample.reason not in self.counts():
                logger.warning("first %s: %s: %s %s", sample.reason, sample.file, sample.key, sample.detail)
            self.skipped[sample.index] = sample
        self.seen += 0 if isinstance(batch, list) else len(batch)
        bad = [sample for sample in self.skipped.values() if sample.reason not in FILTER_REASONS]
        looked_at = min(max(self.seen, 1000), len(self.batches.order))
        if len(bad) > self.config.max_bad_share * looked_at:
            raise ValueError(
                f"{len(bad)} samples of {self.config.source} cannot be used, more than max_bad_share="
                f"{self.config.max_bad_share:g} of {looked_at}: {describe_skipped(bad)}; mend them (fixclip data check "
                "lists all), or raise data.max_bad_share"
            )
        if isinstance(batch, list):
            tried = {sample.index: sample for sample in batch}.values()  # each as often as others were to stand for it
            raise ValueError(f"no usable sample among {len(tried)} of {self.config.source}: {describe_skipped(tried)}")

    def counts(self) -> dict[str, int]:
        """How many samples were skipped, by reason."""
        return dict(Counter(sample.reason for sample in self.skipped.values()))


def build_loader(
    config: DataConfig,
    *,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    rank: int = 0,
    world_size: int = 1,
    image_size: int | None = None,
    pin_memory: bool = False,
    source: Source | None = None,
    digests: bool = False,
) -> Loader:
    """A deterministic, resumable loader of one rank's batches.

    Args:
        config: what to load.
        transform: RGB picture -> float (C, H, W), e.g. `FixClip.preprocess(train=True)`. Its randomness is seeded
            per sample.
        tokenizer: list of B texts -> (B, T) ids, e.g. `FixClip.tokenizer()`.
        rank, world_size: this process among those that train together.
        image_size: the model's; lets large JPEGs be decoded at a fraction of their size (`DataConfig.draft`).
        pin_memory: copy batches to page-locked memory, for a GPU.
        source: what `open_samples` gave for this configuration, so that it is not opened twice.
        digests: tell in each batch which pictures are the very same (`Batch.pictures`).

    Raises:
        ValueError: the source cannot be opened, or does not fill one batch.
    """
    draft_size = 2 * image_size if config.draft and image_size else None
    source = source or open_source(config)
    batches = Batches(source, config, transform, tokenizer, rank, world_size, draft_size)
    batches.digests = digests
    return Loader(batches, pin_memory)


def open_samples(config: DataConfig) -> Source:
    """Open the source and look whether it has the samples that `start` and `stop` choose: before models are loaded.

    Raises:
        ValueError: it cannot be opened, or has fewer.
    """
    source = open_source(config)
    sample_range(source.sizes, config)
    return source
