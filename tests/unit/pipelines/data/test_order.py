"""The order of samples: every sample once per epoch, the same for any cut of the streams."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.data.order import SampleOrder, stable_order, stable_permutation

Sample = tuple[int, int, int]  # epoch, shard, number in the shard


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    shards = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum))
    streams = draw(st.integers(1, min(16, sum(shards))))
    return SampleOrder(shards, streams, draw(st.integers(1, 50)), draw(st.integers(0, 2**40)))


def samples(order: SampleOrder, stream: int, start: int, stop: int) -> list[Sample]:
    """What a stream shows at the positions `[start, stop)`, without any memory of the past."""
    shown = []
    for window_slice in order.window_slices(stream, start, stop):
        inside = [
            (p.shard, i) for p in order.spans(window_slice.window) for i in range(p.start, p.stop)
        ]
        permuted = order.permutation(window_slice.window)
        assert len(inside) == len(permuted) == window_slice.window.size <= order.shuffle_window
        shown += [
            (window_slice.window.epoch, *inside[i])
            for i in permuted[window_slice.start : window_slice.stop]
        ]
    return shown


def global_batch(order: SampleOrder, step: int, per_stream: int, streams: range) -> list[Sample]:
    shown = []
    for stream in streams:
        shown += samples(order, stream, step * per_stream, (step + 1) * per_stream)
    return shown


@settings(deadline=None, max_examples=50)
@given(orders(), st.integers(0, 3))
def test_every_sample_comes_exactly_once_per_epoch(order: SampleOrder, epoch: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for stream in range(order.streams):
        length = order.stream_length(stream)
        shown = samples(order, stream, epoch * length, (epoch + 1) * length)
        assert {e for e, _, _ in shown} == {epoch}
        seen.update((shard, number) for _, shard, number in shown)
    everything = {(s, i) for s, n in enumerate(order.shard_samples) for i in range(n)}
    assert seen == Counter(everything)


@settings(deadline=None, max_examples=50)
@given(orders(), st.integers(0, 9), st.integers(1, 5))
def test_a_step_is_asked_for_at_once(order: SampleOrder, step: int, per_stream: int) -> None:
    shown = global_batch(order, step, per_stream, range(order.streams))
    expected = [(shard, number) for _, shard, number in shown]
    assert order.batch(step, per_stream * order.streams) == expected


@settings(deadline=None, max_examples=50)
@given(orders())
def test_streams_are_balanced_to_one_sample(order: SampleOrder) -> None:
    lengths = [order.stream_length(stream) for stream in range(order.streams)]
    assert sum(lengths) == order.samples
    assert max(lengths) - min(lengths) <= 1


@settings(deadline=None, max_examples=50)
@given(orders(), st.integers(1, 9), st.data())
def test_a_resume_is_the_tail_of_the_uninterrupted_sequence(
    order: SampleOrder, per_stream: int, data: st.DataObject
) -> None:
    steps = 2 * order.samples // (order.streams * per_stream) + 2
    start = data.draw(st.integers(0, steps))
    stream = data.draw(st.integers(0, order.streams - 1))
    whole = samples(order, stream, 0, steps * per_stream)
    fresh = pickle.loads(pickle.dumps(order))
    tail = [
        s
        for t in range(start, steps)
        for s in samples(fresh, stream, t * per_stream, (t + 1) * per_stream)
    ]
    assert tail == whole[start * per_stream :]


@settings(deadline=None, max_examples=50)
@given(orders(), st.integers(0, 5), st.integers(1, 4))
def test_ranks_and_loader_processes_cannot_be_seen(
    order: SampleOrder, step: int, per_stream: int
) -> None:
    whole = global_batch(order, step, per_stream, range(order.streams))
    for parts in range(1, order.streams + 1):
        cuts = [order.streams * i // parts for i in range(parts + 1)]
        joined = []
        for start, stop in pairwise(cuts):
            joined += global_batch(order, step, per_stream, range(start, stop))
        assert joined == whole


def test_epochs_seeds_and_streams_are_shuffled_differently() -> None:
    order = SampleOrder([50] * 8, streams=4, shuffle_window=32, seed=1)
    first, second = samples(order, 0, 0, 100), samples(order, 0, 100, 200)
    assert [s[1:] for s in first] != [s[1:] for s in second]
    assert samples(SampleOrder([50] * 8, 4, 32, seed=2), 0, 0, 100) != first
    # Not in reading order either.
    assert sorted(first) != first


def test_a_window_mixes_only_its_own_samples() -> None:
    order = SampleOrder([1000], streams=1, shuffle_window=100, seed=0)
    shown = [number for _, _, number in samples(order, 0, 0, 1000)]
    for start in range(0, 1000, 100):
        assert sorted(shown[start : start + 100]) == list(range(start, start + 100))


def test_streams_do_not_all_need_a_new_window_in_the_same_step() -> None:
    order = SampleOrder([6400], streams=64, shuffle_window=64, seed=0)
    ends = Counter(
        window_slice.window.start + window_slice.window.size
        for stream in range(64)
        for window_slice in order.window_slices(stream, 0, order.stream_length(stream))
        if window_slice.window.start + window_slice.window.size < order.stream_length(stream)
    )
    assert max(ends.values()) <= 2


def test_the_order_is_what_it_has_always_been() -> None:
    """A change here means that no old run can be resumed: it needs a very good reason."""
    order = SampleOrder([100, 7, 0, 93, 200], streams=8, shuffle_window=16, seed=42)
    shown = [global_batch(order, step, 4, range(8)) for step in range(40)]
    digest = hashlib.sha256(repr(shown).encode()).hexdigest()[:16]
    assert digest == "875148640cfab2da"


def test_permutation_is_one_and_does_not_depend_on_numpy_s_shuffle() -> None:
    drawn = stable_permutation(1000, np.random.Generator(np.random.Philox(key=5)))
    assert sorted(drawn) == list(range(1000))
    raw = np.random.Philox(key=5).random_raw(1000)
    assert list(drawn) == sorted(range(1000), key=lambda i: raw[i])


@pytest.mark.parametrize("distinct", [9, 2**63])
@pytest.mark.parametrize("count", [0, 1, 1000, 50_000])
@pytest.mark.parametrize("compared", [1, 1 << 14])
def test_equal_words_stay_in_their_order(
    distinct: int, count: int, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.data.order._COMPARED", compared)
    words = np.random.default_rng(0).integers(0, distinct, count, np.uint64)
    assert list(stable_order(words)) == sorted(range(count), key=lambda i: words[i])


def test_more_streams_than_samples_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.streams=9: an epoch has 8 samples"):
        SampleOrder([5, 3], streams=9, shuffle_window=4, seed=0)
