"""The window of metrics over ranks: one all-reduce, every rank the same answer."""

import torch
import torch.distributed as dist

from mhe_dist.errors import RunError
from mhe_dist.train.metrics import MetricsAccumulator


def record(topology):
    """Rank r's values; the number of collectives that the drain needed."""
    window, rank = MetricsAccumulator(topology), topology.rank
    for step in (4, 5):
        for micro_batch in range(2):
            window.add_loss(step, torch.tensor(float(100 * step + 10 * rank + micro_batch)))
    window.add({"mean": torch.tensor(float(rank))}, weight=rank + 1.0)
    window.add({"empty": torch.tensor(float("nan")) if rank else 5.0}, weight=0.0 if rank else 1.0)
    window.add({"sum": 2.0 * rank}, kind="sum")
    window.add({"peak": torch.tensor(-1.0 - rank), "other": float(rank)}, kind="max")
    calls = 0
    reduce = dist.all_reduce

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counted
    losses, metrics = window.drain()
    return [list(loss) for loss in losses], metrics, calls, mismatch(topology)


def mismatch(topology):
    """What a rank is told when the others recorded another name."""
    window = MetricsAccumulator(topology)
    window.add({f"rank{topology.rank}": 1.0})
    try:
        window.drain()
    except RunError as error:
        return str(error)
    return ""


def test_a_window_over_ranks(run_distributed):
    for losses, metrics, calls, message in run_distributed(record, 3):
        assert calls == 1
        assert losses == [[step, 100.0 * step + 10.5] for step in (4, 5)]
        assert metrics == {
            "mean": (0 * 1 + 1 * 2 + 2 * 3) / 6,
            "empty": 5.0,
            "sum": 6.0,
            "peak": -1.0,
            "other": 2.0,
        }
        assert "the ranks recorded different metrics" in message
