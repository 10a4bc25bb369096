"""A save of rows on the device takes little of its memory, and one copy of them on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhe_dist.bank.saved_rows import SavedRows
from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.fake_cuda.device import fake_cuda

EXTRA_BYTES = 64 << 20  # that a save may add to the device's memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_save_goes_in_chunks_through_the_device(dtype: str) -> None:
    config = HeadConfig.model_validate(
        {"mhs": {"length": 128, "extra_heads": 8}, "bank": {"dtype": dtype}, "groups": 1}
    )
    with fake_cuda() as gpu:
        topology = Topology(device=torch.device("cuda", 0))
        head: Any = build_head(HeadSpec(config, 250_000, 512, 0, 1), topology)
        head.bank._touched[:] = True
        before, rows_on_host = gpu.allocated, 0
        gpu.clear()
        for entry in head.state().owned.values():
            if isinstance(entry, SavedRows):
                assert gpu.peak == before, "what is not copied yet takes nothing"
                rows_on_host += entry.nbytes
        for entry in head.state().owned.values():
            if isinstance(entry, SavedRows):
                # Without memory for the values: only where they are written matters.
                buffer = torch.empty(1, dtype=entry.dtype).expand(entry.shape)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(torch.Tensor, "copy_", lambda to, values: to)
                    entry.copy_to(buffer)
    assert rows_on_host == head.bank.bytes
    assert gpu.peak - before <= EXTRA_BYTES
    assert len(gpu.ledger.of("kernel")) >= head.bank.bytes // EXTRA_BYTES
