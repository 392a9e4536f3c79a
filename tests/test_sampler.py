"""The sampler of remote shards: every sample once, whatever the ranks and whenever their number changes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fixclip_cli.main import app
from fixclip_core.data import simulation
from fixclip_core.data.order import apart_positions, epoch_history
from fixclip_core.data.simulation import Cluster, simulate
from fixclip_core.training.trainer import TrainState

GLOBAL_BATCH = 24
RANKS = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])


def read_by(history, batches):
    """Positions in the order of steps and ranks, of a run with this history."""
    ends = [step for step, _ in history[1:]] + [batches]
    for part, ((begin, ranks), end) in enumerate(zip(history, ends, strict=True), 1):
        for number in range(begin, end):
            for rank in range(ranks):
                yield apart_positions(rank, np.array([number]), batches, GLOBAL_BATCH, history[:part])[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), RANKS, st.lists(st.tuples(st.integers(1, 11), RANKS), max_size=3))
def test_every_position_is_read_once_whenever_the_ranks_change(batches, first, changes):
    history = [(0, first), *sorted({step: ranks for step, ranks in changes if step < batches}.items())]
    found = np.concatenate(list(read_by(history, batches)))
    assert sorted(found.tolist()) == list(range(batches * GLOBAL_BATCH))


def test_parts_by_hand():
    """Two ranks of 4 steps with 3 samples each; after one step three ranks go on with what is left of both parts."""
    positions = lambda rank, number, history: apart_positions(rank, np.array([number]), 4, 6, history)[0].tolist()  # noqa: E731
    assert positions(0, 0, [(0, 2)]) == [0, 1, 2]
    assert positions(1, 0, [(0, 2)]) == [12, 13, 14]
    history = [(0, 2), (1, 3)]  # left: 3..11 and 15..23, 18 places; each of three ranks has 6 of them, 2 a step
    assert [positions(rank, 1, history) for rank in range(3)] == [[3, 4], [9, 10], [18, 19]]
    assert positions(1, 2, history) == [11, 15]
    assert positions(1, 3, history) == [16, 17]


def test_an_epoch_sees_its_part_of_the_history():
    history = [(0, 8), (250, 4), (260, 2), (300, 16)]
    assert epoch_history(history, 0, 100) == [(0, 8)]
    assert epoch_history(history, 2, 100) == [(0, 8), (50, 4), (60, 2)]
    assert epoch_history(history, 3, 100) == [(0, 16)]


def test_a_run_notes_how_many_processes_took_its_steps():
    state = TrainState()
    state.share_among(8, 64)
    assert state.history == [(0, 8)]
    state.step = 50
    state.share_among(8, 64)
    assert state.history == [(0, 8)]
    state.share_among(4, 64)
    assert state.history == [(0, 8), (50, 4)]
    state.step = 30  # from an older checkpoint
    state.share_among(2, 64)
    assert state.history == [(0, 8), (30, 2)]
    state.share_among(2, 128)  # other steps than before: the old history says nothing about them
    assert state.history == [(0, 2)]
    old = TrainState()
    old.load_state_dict({"step": 7, "skipped": 0, "skipped_in_a_row": 0, "best": 0.5})  # of version 0.1
    old.share_among(2, 64)
    assert (old.step, old.history) == (7, [(0, 2)])


def test_a_dry_run_of_the_sampler():
    cluster = Cluster(samples=10_050, shard_size=100, ranks=16, batch_size=4, shuffle_shards=3, resume_ranks=32)
    found = simulate(cluster, epoch=1)
    assert (found.steps, found.unread) == (157, 10_050 - 157 * 64)
    # A part is 628 samples, 6.28 shards; it lies in two or three windows of three shards, clipped to what it holds.
    assert 7 <= found.shards_of_rank[0] <= found.shards_of_rank[1] <= 12
    assert 1 < found.fetched_by_node < found.fetched_by_rank < 2
    order = cluster.order()
    shards = [{order.index(1, position) // 100 for position in range(628 * r, 628 * r + 628)} for r in range(16)]
    nodes = [set().union(*shards[:8]), set().union(*shards[8:])]
    held = lambda parts: sum(50 if shard == 100 else 100 for part in parts for shard in part) / 10_050  # noqa: E731
    assert found.shards_of_rank == (sum(map(len, shards)) / 16, max(map(len, shards)))
    assert (found.fetched_by_rank, found.fetched_by_node) == (held(shards), held(nodes))
    assert 3 <= found.open_shards <= 6
    assert 0 <= found.foreign_shards < 0.5


def test_a_sampler_that_reads_twice_is_found_out(monkeypatch):
    """As it was before: after a change of ranks each rank took its part of the epoch as if it had never changed."""
    plain = apart_positions
    monkeypatch.setattr(simulation, "apart_positions", lambda *args: plain(*args[:-1], [(0, args[-1][-1][1])]))
    with pytest.raises(ValueError, match=r"ranks \[16, 8\]: \d+ samples are read once instead of 10048"):
        simulate(Cluster(10_050, 100, 16, 4, 3, 8))


def test_thirty_million_samples_on_256_ranks_as_the_docs_show():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("fixclip data sampler"))
    result = CliRunner().invoke(app, command.split()[1:])
    assert result.exit_code == 0, result.output
    assert "--samples 30000000 --ranks 256" in command
    assert f"```text\n{result.stdout}```" in text


def test_the_command():
    options = ["--samples", "5000", "--shard-size", "50", "--ranks", "16", "--batch-size", "4", "--resume-ranks", "4"]
    result = CliRunner().invoke(app, ["data", "sampler", *options])
    assert result.exit_code == 0, result.output
    assert "read once an epoch of 78 steps; 8 fill no step" in result.output
    assert "in the middle with 4 ranks instead of 16: every sample read once, too" in result.output
    result = CliRunner().invoke(app, ["data", "sampler", *options[:-1], "7"])
    assert result.exit_code != 0
    assert "7 ranks to go on with: the step of 16 x 4 = 64 samples must be a multiple of it" in result.output
