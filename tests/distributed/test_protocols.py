"""Face protocols over ranks: the same figures, to the last bit, for any number of ranks."""

from __future__ import annotations

import torch

from mhe_dist.distributed.topology import Topology
from pipelines.evaluate.ijb import evaluate_ijb
from pipelines.evaluate.pair_sets import read_bin_sets, verify_pair_sets
from pipelines.evaluate.sets.ijb_files import load_ijb
from tests.support import tiny
from tests.support.data.ijb_set import write_ijb_set


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(392, 12)
    ).eval()


def figures(topology: Topology, bin_file: str, root: str) -> list[dict[str, float]]:
    """What this rank knows of both protocols."""
    net = network()

    def embed(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return net(images.float() / 255 - 0.5)

    sets = read_bin_sets([bin_file])
    results = verify_pair_sets(embed, sets, topology, 16, flip=True, with_intervals=False)
    found = [each.named_metrics() for each in results]
    result = evaluate_ijb(embed, load_ijb(root), topology, 16)
    return found if result is None else [*found, result.named_metrics()]


def test_any_number_of_ranks_gives_the_same_bits(run_distributed, tmp_path) -> None:
    bin_file = tiny.write_bin(tmp_path / "lfw.bin", pairs=100)  # 200 images: two blocks
    root = str(write_ijb_set(tmp_path / "IJBC"))
    alone = figures(Topology(), bin_file, root)
    assert [len(found) for found in alone] == [5, 17]
    assert run_distributed(figures, 2, bin_file, root) == [alone, []]
