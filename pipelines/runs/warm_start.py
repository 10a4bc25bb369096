"""What a run takes over from another: its class centres, or all of it, grown.

Class centres are found again by their class, whatever the number of classes, of groups or of
workers was, and whichever seed placed them (mhe_dist/bank/repartition.py).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mhe_dist.bank.repartition import move_rows
from mhe_dist.checkpoint.reader import Checkpoint, open_step_folder
from mhe_dist.checkpoint.retention import RetentionPolicy
from mhe_dist.checkpoint.step_folder import step_of
from mhe_dist.checkpoint.store import CheckpointStore, CheckpointWarning
from mhe_dist.config.schema import Config
from mhe_dist.config.stored import stored_config
from mhe_dist.distributed.failures import decided_by_first, failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.base import Head
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec, RowHead
from pipelines.shards.index import ShardIndex

HEAD_PREFIX = "head/"
NO_DATA_DIGEST = ""  # the digest in a checkpoint that was grown and trained on no data yet


def find_checkpoint(
    url: str,
    topology: Topology | None = None,
    select: Callable[[str], bool] | None = None,
) -> Checkpoint:
    """The checkpoint that a `step_*` folder is, or the newest one of a run.

    Of a run all files are read, to compare their checksums, and of a folder none; where `select`
    is given, what it accepts is checked.

    Args:
        url: of the run, or of the folder.
        topology: the ranks that share this reading, which must all call; None: this process.
        select: names of the tensors that will be read; None: any.

    Raises:
        UserError: there is none, or the folder is damaged.
    """
    url, topology = url.rstrip("/"), topology or Topology()
    if step_of(url) is None:
        found = CheckpointStore(f"{url}/checkpoints", topology).newest(select)
        if found is None:
            raise UserError(f"{url} has no complete checkpoint yet: mhe train goes on with it")
        return found
    checkpoint = decided_by_first(lambda: open_step_folder(url), topology)
    if select is not None:
        with failing_together(topology):
            _refuse_damaged(checkpoint, select)
    return checkpoint


@contextmanager
def trained_head(checkpoint: Checkpoint, topology: Topology) -> Iterator[Head]:
    """The head of a checkpoint, to predict with; all ranks must call, each loads its share.

    What is loaded is checked before. Rows whose `head.bank.memory` is "file" are in a temporary
    folder for the length of the block.

    Args:
        checkpoint: written on any number of ranks.
        topology: the ranks that share the rows.

    Raises:
        UserError: a tensor of the head is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="mhe-rows-") as folder:
        head = head_of_checkpoint(checkpoint, topology, folder)
        refuse_damaged_head(head, checkpoint)
        load_head_state(head, checkpoint)
        yield head


def refuse_damaged_head(head: Head, checkpoint: Checkpoint) -> None:
    """Refuse rows that are not as they were written, of those that a rank's head loads.

    Raises:
        UserError: names the tensor.
    """
    _refuse_damaged(checkpoint, lambda name: _is_loaded(name, head))


def _refuse_damaged(checkpoint: Checkpoint, select: Callable[[str], bool]) -> None:
    if damaged := checkpoint.first_damaged_tensor(filter(select, checkpoint.names())):
        raise UserError(
            f"{checkpoint.path}: {damaged}; name an older step_* folder of the run instead"
        )


def load_head_state(head: Head, checkpoint: Checkpoint) -> None:
    """Load what a rank's head owns or replicates; nothing else is read."""
    head.load_state(read_head_state(head, checkpoint))


def read_head_state(head: Head, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint that a rank's head owns or replicates, by their names in it."""
    rows = checkpoint.load(lambda name: _is_loaded(name, head))
    return {name.removeprefix(HEAD_PREFIX): rows[name] for name in rows}


def _is_loaded(name: str, head: Head) -> bool:
    """Whether a rank's head loads the tensor of that name in a checkpoint."""
    return name.startswith(HEAD_PREFIX) and head.loads(name.removeprefix(HEAD_PREFIX))


def load_initial_rows(config: Config, head: Head, topology: Topology) -> None:
    """Begin a new run with the rows that `head.init_from` names; all ranks must call.

    Rows keep their state. (The backbone: `mhe_dist.backbone.pretrained`.)

    Raises:
        UserError: they do not fit, or are not there.
    """
    if config.head.init_from:
        copy_rows(head, find_checkpoint(config.head.init_from, topology), topology)


def copy_rows(head: Head, checkpoint: Checkpoint, topology: Topology) -> None:
    """Give each class of `head` the row and the state that it has in a checkpoint.

    A class that the checkpoint does not know, or never met, keeps its first row. All ranks must
    call; the touched rows are in memory twice meanwhile.

    Raises:
        UserError: the heads are of different makes.
    """
    with tempfile.TemporaryDirectory(prefix="mhe-rows-") as folder:
        before = head_of_checkpoint(checkpoint, topology, folder)
        refuse_incompatible_heads(before, head, checkpoint.path)
        load_head_state(before, checkpoint)
        assert isinstance(before, RowHead) and isinstance(head, RowHead)
        move_rows(before.bank, head.bank, before.layout, head.layout, topology)
        head.norms.running = before.norms.running


def head_of_checkpoint(
    checkpoint: Checkpoint, topology: Topology, folder: str, **changes: Any
) -> Head:
    """An empty head like that of a checkpoint, or with another `num_classes`."""
    config = stored_config(checkpoint.run["config"])
    if "classes" not in checkpoint.run:
        raise UserError(f"{checkpoint.path} was written before checkpoints told their classes")
    # As many micro-batches as any number of ranks wants: nothing is trained here.
    spec = {
        "config": config.head,
        "num_classes": checkpoint.run["classes"],
        "width": config.model.embedding_dim,
        "seed": config.run.seed,
        "micro_batches": topology.world_size,
        "folder": folder,
        "epoch_steps": checkpoint.run["samples"] / config.train.global_batch,
    }
    return build_head(HeadSpec(**(spec | changes)), topology)


def refuse_other_num_classes(classes: int, index: ShardIndex, config: Config) -> None:
    """Refuse data that a grown checkpoint was not grown for.

    Raises:
        UserError: names both numbers.
    """
    if classes != index.num_classes:
        raise UserError(
            f"data.shards={config.data.shards} has {index.num_classes} classes, the checkpoint of "
            f"{config.run.path} was grown to {classes}"
        )


def refuse_incompatible_heads(before: Head, after: Head, path: str) -> None:
    """Refuse heads whose rows mean different things.

    Raises:
        UserError: names what differs.
    """
    if not isinstance(before, RowHead) or not isinstance(after, RowHead):
        raise UserError(
            f"{path}: rows of head.kind mhs, full and partial_fc can be taken over; those of mhp "
            "and mhc mean digits of a class, not classes"
        )
    if before.spec.num_classes > after.spec.num_classes:
        old, new = before.spec.num_classes, after.spec.num_classes
        raise UserError(f"{path} has {old} classes, this run {new}: it needs as many or more")
    pairs: dict[str, tuple[object, object]] = {
        "model.embedding_dim": (before.spec.width, after.spec.width),
        "head.optim.kind": (before.spec.config.optim.kind, after.spec.config.optim.kind),
    }
    if before.margin.normalised != after.margin.normalised:
        kinds = before.spec.config.margin.kind, after.spec.config.margin.kind
        pairs["head.margin.kind"] = kinds
    for what, values in pairs.items():
        if values[0] != values[1]:
            raise UserError(f"{path} has {what} {values[0]}, this run {values[1]}")


def grow_checkpoint(checkpoint: Checkpoint, num_classes: int, root: str) -> str:
    """Write a checkpoint that goes on with more classes, in one process; its folder.

    Old rows and their state stay, new ones are drawn like those of any class; the backbone and its
    optimizer are untouched. It takes any data of that many classes.

    Args:
        checkpoint: what to grow.
        num_classes: the new C.
        root: folder or URL for the new `step_*` folder.

    Raises:
        UserError: fewer classes, or a head that cannot grow.
        RunError: it cannot be written.
    """
    topology = Topology()
    with tempfile.TemporaryDirectory(prefix="mhe-rows-") as folder:
        head = head_of_checkpoint(checkpoint, topology, folder, num_classes=num_classes)
        copy_rows(head, checkpoint, topology)
        state = head.state().with_prefix(HEAD_PREFIX)
        backbone: dict[str, Tensor] = checkpoint.load(lambda name: not name.startswith(HEAD_PREFIX))
        run = checkpoint.run | {
            "classes": num_classes,
            "data_digest": NO_DATA_DIGEST,
            "labels": {},
            "row_ranges": head.row_ranges(),
            "run_id": None,
            "grown_from": checkpoint.path,
        }
        store = CheckpointStore(root, topology, RetentionPolicy(last=1 << 30))
        store.save(checkpoint.step, backbone | state.replicated, state.owned, run)
        with warnings.catch_warnings():  # that a training goes on: there is none
            warnings.simplefilter("ignore", CheckpointWarning)
            saved = store.wait()
    if saved is None or saved.error is not None:
        raise UserError(f"{root}: {saved.error if saved else 'nothing was written'}")
    return saved.path
