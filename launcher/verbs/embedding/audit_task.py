"""What `mhe audit` examines, and whether an audit that is there is of the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.markup import escape

from launcher.terminal import console
from launcher.verbs.embedding.shared import MODEL_SUFFIX, find_model
from mhe_dist.errors import UserError
from pipelines.audit.findings import FIGURES_FILE
from pipelines.runs.trained import read_trained_config
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet

if TYPE_CHECKING:
    from pipelines.audit.settings import AuditSettings

MADE_OF: Final = "made_of"  # key of the figures: what they are of
MODEL: Final = "model"  # key of that: which one embedded


@dataclass(frozen=True)
class AuditTask:
    """What is audited.

    Attributes:
        run: whose backbone embeds.
        index: the data set.
        labels: label set that is examined; None: the index's labels.
        against: evaluation sets.
        out: folder of the audit.
        settings: what is asked for.
    """

    run: str
    index: ShardIndex
    labels: LabelSet | None
    against: Sequence[str]
    out: str
    settings: AuditSettings

    @property
    def num_classes(self) -> int:
        """C: classes of the labels."""
        return self.index.num_classes if self.labels is None else self.labels.num_classes

    @property
    def made_of(self) -> dict[str, Any]:
        """What tells this audit from others, without its embeddings: JSON-able."""
        return {
            "data": self.index.digest,
            "labels": self.labels.digest if self.labels else "",
            "against": [ShardIndex.load(url).digest for url in self.against],
            "settings": self.settings.as_dict(),
        }

    def read_labels(self, start: int, stop: int) -> Any:
        """int64 `[stop - start]`: classes of images; -1: none."""
        if self.labels is not None:
            return self.labels.single_labels(start, stop)
        return self.index.labels_of(np.arange(start, stop))

    def class_names(self, wanted: Any) -> dict[int, str]:
        """Names of some classes; those without one are left out."""
        from pipelines.data.mixture.class_list import names_of

        return names_of(self.labels.folder if self.labels else self.index.folder, wanted)


def open_task(
    run: str,
    shards: str,
    labels: str,
    against: Sequence[str],
    out: str,
    settings: AuditSettings,
) -> AuditTask:
    """Open what the options name; what is left out is what the run trained on.

    Raises:
        UserError: something is not there, or its labels cannot be examined.
    """
    run = find_model(run, f"{out}{MODEL_SUFFIX}", shards, option="")
    if not shards:
        data = read_trained_config(run).data
        if data.mix or data.classes or data.images_per_class:
            raise UserError(
                f"{run}: was trained on a mixture or a choice of classes; name one data set with "
                "--shards, and its label set, if it has one, with --labels"
            )
        shards, labels = data.shards, labels or data.labels
    index = ShardIndex.load(shards.rstrip("/"))
    found = LabelSet.load(labels) if labels else None
    if found is not None:
        found.require_index(index)
        if found.max_labels > 1:
            raise UserError(
                f"{labels}: gives images up to {found.max_labels} classes, and an audit examines "
                "one of each; give a label set with one class an image (--labels)"
            )
    elif not index.knows_labels:
        raise UserError(
            f"{index.folder}: its index holds no labels; make one that does (mhe data index), or "
            "name a label set with --labels"
        )
    sets = [url.rstrip("/") for url in against]
    for url in sets:  # before hours of embedding the data set, which comes first
        ShardIndex.load(url)
    return AuditTask(run, index, found, sets, out, settings)


def read_figures(task: AuditTask) -> dict[str, Any]:
    """The figures of the audit that is there."""
    figures: dict[str, Any] = json.loads(Path(f"{task.out}/{FIGURES_FILE}").read_text())
    return figures


def require_same_model(task: AuditTask) -> None:
    """Refuse findings of another model; a warning where the figures do not name it.

    Raises:
        UserError: another model than the task's embedded the images.
    """
    from pipelines.embedding.made_by import MadeBy
    from pipelines.runs.trained import load_trained_backbone

    before = read_figures(task).get(MADE_OF, {}).get(MODEL)
    if before is None:
        console.say(
            f"[yellow]warning:[/] {escape(task.out)}: an older mhe audit made it, and it does not "
            "say by which model"
        )
        return
    made_by, wanted = MadeBy(**before), MadeBy.of(load_trained_backbone(task.run))
    if made_by.model_digest != wanted.model_digest:
        raise UserError(
            f"--out {task.out}: is an audit by {made_by.model}, not by {wanted.model}: name that "
            "checkpoint as RUN, delete it, or choose another --out"
        )


def require_same(task: AuditTask) -> None:
    """Refuse findings of other data or settings.

    Raises:
        UserError: names what differs.
    """
    before = read_figures(task).get(MADE_OF, {})
    words = {
        "data": f"the data set {task.index.folder}",
        "labels": "the labels",
        "against": "the sets of --against",
        "settings": "--false-rate or --seed",
    }
    for key, value in task.made_of.items():
        if before.get(key) != value:
            raise UserError(
                f"--out {task.out}: is an audit of something else: {words[key]} differ; type what "
                "made it, delete it, or choose another --out"
            )
