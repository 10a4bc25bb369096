"""What an audit is asked for, and the sizes that follow from it and never from the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from mhe_dist.errors import UserError

NEAREST: Final = 4  # other classes that an image is compared with
CANDIDATES: Final = 5  # other classes that a class is compared with
PER_CLASS: Final = 4096  # images of a class that its centre is made of, at most
SHOWN_TO_TEST: Final = 32  # images of each of two classes that are compared one by one, at most
FORMAT: Final = "mhe-audit-3"  # changes when the same embeddings would give other findings


@dataclass(frozen=True)
class AuditSettings:
    """What is asked for.

    Attributes:
        false_rate: of the images, or classes, that are right, the share that may be accused.
        seed: of every draw.
    """

    false_rate: float = 0.01
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return asdict(self)

    def validate(self) -> None:
        """Refuse what cannot be done.

        Raises:
            UserError: names the option and the cure.
        """
        if not 0 < self.false_rate < 0.5:
            raise UserError(
                f"--false-rate {self.false_rate}: this is the share of what is right that may be "
                "accused; give more than 0 and less than 0.5, such as 0.01"
            )
