"""A head and its row optimizer for somebody's own loop, under `DistributedDataParallel` or alone.

    head = create_head("mhs", num_classes=1_000_000, dim=512, margin="cosface")
    loss = head(embeddings, labels).loss
    loss.backward()
    optimizer.step()
    head.step(lr)

Scale of the loss: DDP averages the gradients over the W ranks, and `backward` adds them up over the
k micro-batches of a step. The loss of a micro-batch is therefore `W / N` times the sum of the
losses of the samples that this rank scores, where N is the number of samples of the step on all
ranks. So the network receives the gradient of the mean loss over the global batch: do not divide by
k. The rows receive that same gradient, whatever the loss is multiplied with afterwards. (The engine
divides by k itself, as DeepSpeed does; see `base.py` for the scale that it needs.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.config.auto.head_sizes import HeadDemand, choose_sizes, fill_sizes
from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.collectives import gather_rows
from mhe_dist.distributed.device import default_device, numbered_device
from mhe_dist.distributed.topology import Topology, connect
from mhe_dist.errors import UserError
from mhe_dist.heads.base import NO_SAMPLE, Head, HeadOutput, TopK
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec

_COMMON = ("groups", "objective", "on_bad_label", "matmul")
# `matmul` -> whether a GPU's products are in TF32; auto leaves what the process is set to.
_TF32 = {"auto": None, "float32": False, "tf32": True}
_ANGLES = "arcface, cosface or combined"
_MICRO_BATCH = 128  # for which sizes are chosen; the loop's own is not known yet
_MOST_RANKS = 8  # likewise: sizes are the same on any number of ranks up to it


def create_head(
    kind: str,
    *,
    num_classes: int,
    dim: int,
    margin: str | Mapping[str, Any] = "cosface",
    seed: int = 0,
    optim: str | Mapping[str, Any] = "sgd",
    bank: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    steps_per_epoch: float = 0.0,
    **options: Any,
) -> StandaloneHead:
    """A head over `num_classes` classes, sharded over the ranks; all ranks must call.

    The ranks are those of the default process group. Without one this process is alone.

    Args:
        kind: "mhs", "full", "partial_fc", "mhp" or "mhc".
        num_classes: C; labels are in `[0, C)`.
        dim: D of the embeddings.
        margin: its kind, or the block `head.margin` of the config: `{"kind": "arcface", "m": 0.5}`.
        seed: keys the first rows and every draw.
        optim: "sgd" or "adamw", or the block `head.optim` of the config.
        bank: the block `head.bank` of the config: where rows are stored, and in which type.
        dtype: type in which the head computes, float32 or float64.
        device: where it computes; by default this rank's GPU, or the CPU without one, or with gloo.
        steps_per_epoch: needed for the option `repartition_every` alone.
        **options: keys of the kind's own block of the config (`length`, `extra_heads`, `exchange`,
            ... of mhs; `rate` of partial_fc; `lengths` of mhp and mhc), and `groups`, `objective`,
            `on_bad_label` and `matmul` (auto: as torch is set). For what is "auto", or left out of
            sizes and groups, see `_with_sizes`.

    Raises:
        UserError: an option is unknown or does not fit; the message names it.
    """
    _refuse_half_precision(dtype)
    topology = _topology(None if device is None else torch.device(device))
    blocks = {"margin": _block(margin), "optim": _block(optim), "bank": dict(bank or {})}
    config = _config(kind, blocks, options)
    if wrong := config.validate_combinations(topology.world_size):
        raise UserError("; ".join(wrong))
    config = _with_sizes(config, num_classes, dim, topology.world_size)
    if config.mhs.repartition_every and steps_per_epoch <= 0:
        raise UserError("repartition_every counts epochs: give steps_per_epoch, too")
    if config.bank.memory == "file" and not config.bank.path:
        raise UserError('bank={"memory": "file"} needs a folder: bank={..., "path": FOLDER}')
    spec = HeadSpec(
        config,
        num_classes,
        dim,
        seed,
        topology.world_size,
        dtype=dtype,
        folder=config.bank.path or None,
        epoch_steps=steps_per_epoch,
        tf32=_TF32[config.matmul],
    )
    return StandaloneHead(build_head(spec, topology), spec, topology)


class StandaloneHead:
    """A head that gathers and plans the labels of each step by itself; see `create_head`.

    With one micro-batch per step and rank, `head(embeddings, labels)` alone is a step's forward
    pass. With more, the head must know all labels of the step before the first of them:

        head.plan([labels_1, labels_2])
        for images in (images_1, images_2):
            head(model(images)).loss.backward()
        head.step(lr)

    Ranks may have batches of different sizes, an empty one too, but the same number of them.

    Attributes:
        topology: this rank among the others.
        step_number: completed steps; it keys the draws of the next one.
    """

    def __init__(self, head: Head, spec: HeadSpec, topology: Topology) -> None:
        self.topology = topology
        self.step_number = 0
        self._head, self._spec = head, spec
        self._planned: list[Tensor] = []
        self._next = 0

    def plan(self, labels: Sequence[Tensor]) -> None:
        """Tell the labels of all micro-batches of the step; all ranks must call.

        A plan that was not finished by `step` is dropped.

        Args:
            labels: int64 `[B]` for each micro-batch of this rank, on the host or on the device
                (which is then waited for). For a head with several labels per sample `[B, K]`,
                padded with -1.

        Raises:
            LabelError: a label is outside `[0, C)`, on any rank; see `on_bad_label`.
            UserError: the ranks have different numbers of micro-batches.
        """
        parts = [part.detach().to("cpu", torch.int64) for part in labels]
        table = gather_labels(parts, self.topology)
        self._head.plan(self.step_number, table)
        self._planned, self._next = parts, 0

    def __call__(self, embeddings: Tensor, labels: Tensor | None = None) -> HeadOutput:
        """Loss of the next micro-batch of the step; all ranks must call, and `backward` too.

        Args:
            embeddings: `[B, D]` on the device.
            labels: `[B]`, or `[B, K]`. They may be left out after `plan`.

        Returns:
            The loss for `backward`, and metrics. Added up over the micro-batches of a step and
            averaged over the ranks, each is the mean over the global batch.

        Raises:
            UserError: the call does not fit the plan.
        """
        if not torch.is_grad_enabled():
            raise UserError("a head's loss is for training: use head.predict under torch.no_grad()")
        if not self._planned and labels is not None:
            self.plan([labels])
        planned = self._take(len(embeddings), labels)
        # Rows learn in the forward pass, but only where a gradient is wanted: a frozen network too.
        if not embeddings.requires_grad:
            embeddings = embeddings.detach().requires_grad_()
        with torch.autocast(embeddings.device.type, enabled=False):
            output = self._head(embeddings, planned)
        parts = len(self._planned)
        metrics = {name: value / parts for name, value in output.metrics.items()}
        return HeadOutput(output.loss / parts, metrics)

    def _take(self, count: int, labels: Tensor | None) -> Tensor:
        """The planned labels of the next micro-batch, which has `count` embeddings."""
        if self._next == len(self._planned):
            raise UserError(
                "no micro-batch is left in this step: call head.step(lr) after the backward pass; "
                "to accumulate, call head.plan([labels_1, labels_2, ...]) before the first one"
            )
        planned = self._planned[self._next]
        if len(planned) != count:
            raise UserError(f"{count} embeddings, but {len(planned)} labels were planned")
        on_host = labels if labels is not None and labels.device.type == "cpu" else None
        if on_host is not None and not torch.equal(on_host.to(torch.int64), planned):
            raise UserError("these are not the labels that head.plan was told for this micro-batch")
        self._next += 1
        return planned

    def step(self, lr: float) -> None:
        """Update the rows that the step touched; all ranks must call.

        Args:
            lr: learning rate of the rows, before `optim`'s `lr_scale`.

        Raises:
            UserError: a planned micro-batch was not computed.
        """
        if not self._planned or self._next < len(self._planned):
            raise UserError(
                f"head.step after {self._next} of {len(self._planned)} planned micro-batches: "
                "compute all of them first, or call head.plan to begin the step again"
            )
        self._head.step(lr)
        self.step_number += 1
        self._planned, self._next = [], 0

    @torch.no_grad()
    def predict(self, embeddings: Tensor, k: int = 1) -> TopK:
        """The k best of all classes for each of this rank's embeddings `[B, D]`.

        All ranks must call; the numbers of embeddings may differ.
        """
        count = len(embeddings)
        longest = int(gather_rows(torch.tensor([count]), self.topology).max())
        found = self._head.predict(F.pad(embeddings, (0, 0, 0, longest - count)), k)
        return TopK(found.classes[:count], found.scores[:count])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: this rank's rows with their optimizer state.

        Each rank saves its own. The tensors are on the host.
        """
        return {
            "step": self.step_number,
            "made_with": self._made_with(),
            "tensors": self._head.state().tensors,
        }

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            *states: this rank's own if the number of ranks is the same, else those of all ranks.

        Raises:
            UserError: the head was made differently, or a state is missing.
        """
        saved = states[0]["made_with"]
        for key, value in self._made_with().items():
            if key in saved and saved[key] != value:
                raise UserError(f"the saved head has {key}={saved[key]}, this one {key}={value}")
        tensors = {n: t for state in states for n, t in state["tensors"].items()}
        try:
            self._head.load_state({n: t for n, t in tensors.items() if self._head.loads(n)})
        except KeyError as error:
            raise UserError(
                f"{error.args[0]} is missing: another number of ranks saved this head; give the "
                "states of all of them"
            ) from None
        self.step_number = states[0]["step"]
        self._planned, self._next = [], 0

    def _made_with(self) -> dict[str, Any]:
        """What must be equal for rows to mean the same classes, and to have the same names."""
        spec, config = self._spec, self._spec.config
        margin = config.margin.kind
        own = getattr(config, config.kind, None)
        return {
            "kind": config.kind,
            "num_classes": spec.num_classes,
            "dim": spec.width,
            "seed": spec.seed,
            "groups": config.groups,
            "optim.kind": config.optim.kind,
            # Those of angles store the same; no margin has a bias, AdaFace running norms.
            "margin.kind": margin if margin in ("none", "adaface") else _ANGLES,
            **{key: getattr(own, key) for key in ("length", "lengths") if hasattr(own, key)},
        }


def gather_labels(parts: Sequence[Tensor], topology: Topology) -> Tensor:
    """Labels of the global batch `[W * k, B]`, or `[W * k, B, K]`, on the host.

    Args:
        parts: int64 `[b]` or `[b, K]` of each of this rank's k micro-batches, on the host; b and K
            may differ.
        topology: the ranks; all must call.

    Returns:
        `NO_SAMPLE` where a micro-batch is shorter than the longest one.

    Raises:
        UserError: k differs between the ranks.
    """
    widths = [part.shape[1] if part.dim() == 2 else 0 for part in parts]
    mine = torch.tensor([[len(parts), max(map(len, parts), default=0), max(widths, default=0)]])
    shapes = gather_rows(mine, topology)
    counts = shapes[:, 0].tolist()
    if len(set(counts)) > 1 or not counts[0]:
        raise UserError(f"each rank needs the same number of micro-batches, not {counts}, by rank")
    longest, columns = max(1, int(shapes[:, 1].max())), int(shapes[:, 2].max())
    table = torch.full((len(parts), longest, max(1, columns)), NO_SAMPLE)
    for row, part in zip(table, parts, strict=True):
        given = part if part.dim() == 2 else part.unsqueeze(1)
        row[: len(given)] = -1
        row[: len(given), : given.shape[1]] = given
    table = gather_rows(table, topology)
    return table if columns else table.squeeze(2)


def _refuse_half_precision(dtype: torch.dtype) -> None:
    """Cosines near 1, where a margin's slope is steepest, are all 1 in half precision."""
    if dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"create_head(dtype={dtype}): a head computes in torch.float32 or torch.float64; "
            'bank={"dtype": "bfloat16"} halves its rows, and autocast around it changes nothing'
        )


def _config(kind: str, blocks: dict[str, Any], options: dict[str, Any]) -> HeadConfig:
    """The config of a head from its blocks, and from options of its own block."""
    common = {key: options[key] for key in _COMMON if key in options}
    own = {key: value for key, value in options.items() if key not in _COMMON}
    try:
        # A kind without a block has no options of its own.
        block = {kind: own} if own else {}
        return HeadConfig.model_validate({"kind": kind, **blocks, **common, **block})
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(f"create_head({kind!r}): {'; '.join(wrong)}") from None


def _with_sizes(config: HeadConfig, num_classes: int, dim: int, ranks: int) -> HeadConfig:
    """Numbers instead of `auto`, by the rule of docs/choosing.md.

    They are those for 8 ranks (or 16, 24, ...) of a CPU with 128 images each, so that a head that
    was saved fits one that is made by the same call on fewer ranks.
    """
    workers = -(-ranks // _MOST_RANKS) * _MOST_RANKS
    demand = HeadDemand(num_classes, dim, workers, _MICRO_BATCH, workers, gpu=False)
    return fill_sizes(config, choose_sizes(config, demand))


def _block(value: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": value} if isinstance(value, str) else dict(value)


def _topology(device: torch.device | None) -> Topology:
    """The ranks of the process group that is there, or one rank alone.

    Raises:
        UserError: this process is one of several, but they have not met.
    """
    if dist.is_available() and dist.is_initialized():
        return connect(device=device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but there is no process group: call "
            "torch.distributed.init_process_group() or mhe_dist.connect() before create_head"
        )
    return Topology(device=numbered_device(device or default_device()))
