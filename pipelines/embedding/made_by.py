"""Which model made embeddings, and how: those of two models cannot be compared."""

from __future__ import annotations

from typing import NamedTuple

from mhe_dist.backbone.model import digest_model
from mhe_dist.errors import UserError
from pipelines.runs.trained import TrainedBackbone
from pipelines.storage.urls import resolve_url, to_url


class MadeBy(NamedTuple):
    """What embeddings must have in common to be compared.

    Attributes:
        checkpoint: absolute path or URL of the model's checkpoint, for messages.
        step: its completed steps, for messages.
        model_digest: see `digest_model`.
        image_size: width and height of the images.
        flip: the embedding of the mirrored image is added.
    """

    checkpoint: str
    step: int
    model_digest: str
    image_size: int
    flip: bool

    @staticmethod
    def of(backbone: TrainedBackbone, flip: bool = False) -> MadeBy:
        """What a backbone makes."""
        checkpoint = to_url(*resolve_url(backbone.checkpoint))
        digest, side = digest_model(backbone.model), backbone.config.data.image_size
        return MadeBy(checkpoint, backbone.step, digest, side, flip)

    @property
    def model(self) -> str:
        """The model in words."""
        return f"{self.checkpoint} (step {self.step}, {self.model_digest[:19]})"

    def refuse_other(self, made: MadeBy, where: str) -> None:
        """Raise UserError, which names what differs, if embeddings cannot be compared with these.

        Args:
            made: of the others.
            where: file or folder that holds them.
        """
        if made.model_digest != self.model_digest:
            raise UserError(
                f"{where}: holds embeddings of {made.model}, not of {self.model}: name that "
                "checkpoint as RUN, or embed again"
            )
        for name in ("image_size", "flip"):
            before, now = getattr(made, name), getattr(self, name)
            if before != now:
                raise UserError(
                    f"{where}: was embedded with {name} {before}, not {now}: embed again so"
                )
