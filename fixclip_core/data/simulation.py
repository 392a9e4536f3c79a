"""A dry run of the sampler: which rank would read which sample and which shard, for any number of both.

Nothing is read. The positions come from the loader's own functions (`order.EpochOrder`, `order.apart_positions`), an
epoch of 30 million samples takes seconds a pass, and memory is one byte a sample.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fixclip_core.data.config import DataConfig
from fixclip_core.data.order import EpochOrder, History, apart_positions

RANKS_OF_A_NODE = 8
PROBES = 16  # moments of the epoch at which the shards that are open are looked at


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Attributes:
        samples, shard_size: of the data; the last shard holds what is left.
        ranks: training processes.
        batch_size: samples a step of each.
        shuffle_shards: see `DataConfig`.
        resume_ranks: go on with so many from the middle of the epoch.
        seed: of the order.

    Raises:
        ValueError: a batch that does not divide among `resume_ranks`, or too few samples for one step.
    """

    samples: int
    shard_size: int
    ranks: int
    batch_size: int
    shuffle_shards: int
    resume_ranks: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.global_batch % self.resume_ranks:
            raise ValueError(
                f"{self.resume_ranks} ranks to go on with: the step of {self.ranks} x {self.batch_size} = "
                f"{self.global_batch} samples must be a multiple of it"
            )
        if self.batches < 2:
            raise ValueError(f"{self.samples} samples make {self.batches} steps of {self.global_batch}: at least 2")

    @property
    def global_batch(self) -> int:
        return self.ranks * self.batch_size

    @property
    def batches(self) -> int:
        """Steps of an epoch."""
        return self.samples // self.global_batch

    def order(self) -> EpochOrder:
        sizes = [self.shard_size] * (self.samples // self.shard_size)
        if rest := self.samples % self.shard_size:
            sizes.append(rest)
        config = DataConfig(
            source="simulated", batch_size=self.batch_size, seed=self.seed, shuffle_shards=self.shuffle_shards
        )
        return EpochOrder(sizes, config)


@dataclass(frozen=True)
class Reading:
    """What an epoch is read like.

    Attributes:
        steps, unread: steps, and samples that fill no step (others in every epoch).
        shards_of_rank: shards that a rank reads from, mean and most.
        fetched_by_rank, fetched_by_node: samples in the shards that ranks, or nodes of 8 ranks with one cache, fetch in
            all, divided by those that the data holds: 1 is every shard once.
        open_shards: the most shards that a rank mixes at one of the moments looked at.
        foreign_shards: share of the shards open at a moment that ranks of more than one node have open; each of
            these nodes fetches its own copy.
    """

    steps: int
    unread: int
    shards_of_rank: tuple[float, int]
    fetched_by_rank: float
    fetched_by_node: float
    open_shards: int
    foreign_shards: float


def simulate(cluster: Cluster, epoch: int = 0) -> Reading:
    """Walk through an epoch of all ranks, and once more with another number of ranks from the middle on.

    Raises:
        ValueError: a sample would be read twice, or not at all though it fills a step.
    """
    order = cluster.order()
    middle = cluster.batches // 2
    _check_once(cluster, order, epoch, [(0, cluster.ranks)])
    _check_once(cluster, order, epoch, [(0, cluster.ranks), (middle, cluster.resume_ranks)])
    return _shards(cluster, order, epoch)


def _passes(cluster: Cluster, history: History) -> Iterator[tuple[int, np.ndarray]]:
    """(rank, positions of all its batches) of each part of the history."""
    ends = [step for step, _ in history[1:]] + [cluster.batches]
    for part, ((begin, ranks), end) in enumerate(zip(history, ends, strict=True), 1):
        for rank in range(ranks):
            number_N = np.arange(begin, end)
            yield rank, apart_positions(rank, number_N, cluster.batches, cluster.global_batch, history[:part]).ravel()


def _check_once(cluster: Cluster, order: EpochOrder, epoch: int, history: History) -> None:
    count_S = np.zeros(cluster.samples, np.uint8)
    for _, position_N in _passes(cluster, history):
        np.add.at(count_S, order.indices(epoch, position_N), 1)
    most, read = int(count_S.max()), int((count_S == 1).sum())
    wanted = cluster.batches * cluster.global_batch
    if most > 1 or read != wanted:
        raise ValueError(
            f"ranks {[ranks for _, ranks in history]}: {read} samples are read once instead of {wanted}, one of them "
            f"{most} times, e.g. sample {int(count_S.argmax())}"
        )


def _shards(cluster: Cluster, order: EpochOrder, epoch: int) -> Reading:
    history = [(0, cluster.ranks)]
    sizes = np.minimum(cluster.shard_size, cluster.samples - np.arange(len(order.sizes)) * cluster.shard_size)
    own = [
        np.unique(order.indices(epoch, position_N) // cluster.shard_size) for _, position_N in _passes(cluster, history)
    ]
    nodes = [np.unique(np.concatenate(own[r : r + RANKS_OF_A_NODE])) for r in range(0, len(own), RANKS_OF_A_NODE)]
    most, foreign = 0, []
    for number in np.linspace(0, cluster.batches - 1, PROBES).astype(int):
        opened = [_open_at(cluster, order, epoch, rank, int(number)) for rank in range(cluster.ranks)]
        most = max(most, *map(len, opened))
        by_node = [set().union(*opened[r : r + RANKS_OF_A_NODE]) for r in range(0, len(opened), RANKS_OF_A_NODE)]
        nodes_of = Counter(shard for node in by_node for shard in node)
        foreign.append(sum(number > 1 for number in nodes_of.values()) / len(nodes_of))
    return Reading(
        steps=cluster.batches,
        unread=cluster.samples - cluster.batches * cluster.global_batch,
        shards_of_rank=(float(np.mean([len(shards) for shards in own])), max(map(len, own))),
        fetched_by_rank=sum(int(sizes[shards].sum()) for shards in own) / cluster.samples,
        fetched_by_node=sum(int(sizes[shards].sum()) for shards in nodes) / cluster.samples,
        open_shards=most,
        foreign_shards=float(np.mean(foreign)),
    )


def _open_at(cluster: Cluster, order: EpochOrder, epoch: int, rank: int, number: int) -> set[int]:
    """The shards of the windows that a rank's batch lies in."""
    history = [(0, cluster.ranks)]
    found = apart_positions(rank, np.array([number]), cluster.batches, cluster.global_batch, history)[0]
    return {int(shard) for position in found[[0, -1]] for shard in order.groups_at(epoch, int(position))[2]}
