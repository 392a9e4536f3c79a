"""The order of samples: which one stands at which position of an epoch, and its seeds."""

from collections.abc import Sequence

import numpy as np

from fixclip_core.data.config import DataConfig

_NEARBY_REPLACEMENTS = 8


def sample_range(sizes: Sequence[int], config: DataConfig) -> range:
    """The samples that `start` and `stop` choose.

    Raises:
        ValueError: the source has fewer.
    """
    total = sum(sizes)
    if not total:
        raise ValueError(f"{config.source} holds no samples")
    stop = total if config.stop is None else config.stop
    for name, value, most in (("stop", stop, total), ("start", config.start, total - 1)):
        if value > most:
            raise ValueError(
                f"{name}={value}: {config.source} has only {total} samples; "
                + ("start=0 begins with the first" if name == "start" else "leave stop out for all of them")
                + f" (in a recipe: data.{name} or eval.{name})"
            )
    return range(config.start, stop)


class EpochOrder:
    """Which sample stands at which position of an epoch, computed a window of groups at a time.

    Groups (shards) are put in random order, and the samples of `window` neighbours are mixed. Reading goes
    through few groups at a time, memory does not grow with the number of samples, and any position can be
    asked for without the ones before it.
    """

    def __init__(self, sizes: Sequence[int], config: DataConfig) -> None:
        chosen = sample_range(sizes, config)
        ends = np.minimum(np.cumsum(sizes, dtype=np.int64), chosen.stop)
        begins = np.maximum(np.concatenate([[0], ends[:-1]]), chosen.start)
        kept = ends > begins
        self.begins, self.sizes = begins[kept], (ends - begins)[kept]
        self.total = len(chosen)
        self.seed, self.shuffle, self.window = config.seed, config.shuffle, config.shuffle_shards
        self._cache: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.total

    def index(self, epoch: int, position: int) -> int:
        """Number of the sample at a position, 0..len-1, of an epoch."""
        begin, order = self.window_at(epoch, position)
        return int(order[position - begin])

    def indices(self, epoch: int, position_N: np.ndarray) -> np.ndarray:
        """`index` of many positions, (N,); quick where neighbours lie in the same window."""
        index_N = np.full(position_N.shape, -1, np.int64)
        while (left := np.flatnonzero(index_N < 0)).size:
            begin, order = self.window_at(epoch, int(position_N[left[0]]))
            inside = left[(position_N[left] >= begin) & (position_N[left] < begin + len(order))]
            index_N[inside] = order[position_N[inside] - begin]
        return index_N

    def window_at(self, epoch: int, position: int) -> tuple[int, np.ndarray]:
        """The window that holds a position: its first position, and its sample numbers in order."""
        for (cached_epoch, _), (begin, order) in self._cache.items():
            if cached_epoch == epoch and begin <= position < begin + len(order):
                return begin, order
        first, begin, chosen = self.groups_at(epoch, position)
        order = np.concatenate([np.arange(self.begins[g], self.begins[g] + self.sizes[g]) for g in chosen])
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, 1, first]).permutation(order)
        while len(self._cache) >= 3:
            self._cache.pop(next(iter(self._cache)))
        self._cache[epoch, first] = begin, order
        return begin, order

    def groups_at(self, epoch: int, position: int) -> tuple[int, int, np.ndarray]:
        """Of the window that holds a position: its first group's place, its first position, and its groups' numbers."""
        groups = self._group_order(epoch)
        ends = np.cumsum(self.sizes[groups])
        first = int(np.searchsorted(ends, position, "right")) // self.window * self.window
        return first, int(ends[first - 1]) if first else 0, groups[first : first + self.window]

    def _group_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.sizes))
        return np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.sizes))

    def replacement(self, epoch: int, position: int, attempt: int, taken: range) -> int:
        """Another position to take a sample from, outside `taken` where possible; nearby at first."""
        begin, size = 0, self.total
        if attempt < _NEARBY_REPLACEMENTS:
            begin, order = self.window_at(epoch, position)
            size = len(order)
        rng = np.random.default_rng([self.seed, epoch, 2, position, attempt])
        low, high = max(begin, taken.start), min(begin + size, taken.stop)
        free = size - max(0, high - low)
        if free <= 0:
            return begin + int(rng.integers(size))
        drawn = begin + int(rng.integers(free))
        return drawn if drawn < low or high <= low else drawn + high - low


History = Sequence[tuple[int, int]]  # (first step, number of ranks from there on), the first from step 0


def epoch_history(history: History, epoch: int, batches: int) -> list[tuple[int, int]]:
    """The part of a run's history that an epoch of `batches` steps sees, its steps counted from the epoch's first.

    For example [(0, 8), (250, 4)] is [(0, 8), (50, 4)] in epoch 2 of 100 steps, and [(0, 4)] in epoch 3.
    """
    begin = epoch * batches
    first = [ranks for step, ranks in history if step <= begin][-1]
    return [(0, first), *((step - begin, ranks) for step, ranks in history if begin < step < begin + batches)]


def apart_positions(
    rank: int, number_N: np.ndarray, batches: int, global_batch: int, history: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Positions of a rank's batches where each rank has a part of the epoch to itself, (N, samples of a rank's batch).

    The epoch's first batches * global_batch positions are cut into one part a rank, and a rank reads its part from
    front to back. Where the number of ranks changes in the middle of an epoch, what is left of all parts is laid end to
    end and cut again, so that every position is read once.

    Args:
        rank: of the ranks in the last entry of `history`.
        number_N: numbers of batches in the epoch, not before the last entry's.
        batches: in the epoch.
        global_batch: samples of all ranks, a multiple of every number of ranks.
        history: see `epoch_history`.
    """
    begin, ranks = history[-1]
    size = global_batch // ranks
    place = (rank * (batches - begin) + number_N[:, None] - begin) * size + np.arange(size)
    for (later, _), (earlier, ranks) in zip(history[:0:-1], history[-2::-1], strict=True):
        size = global_batch // ranks
        part, place = np.divmod(place, (batches - later) * size)
        place += part * (batches - earlier) * size + (later - earlier) * size
    return place


def sample_seeds(seed: int, epoch: int, index: int) -> tuple[int, int, int]:
    """Independent seeds of one sample's captions, augmentation and mask, each below 2**63."""
    words = np.random.SeedSequence([seed, epoch, index]).generate_state(3, np.uint64)
    captions, augmentation, mask = (int(word >> np.uint64(1)) for word in words)
    return captions, augmentation, mask
