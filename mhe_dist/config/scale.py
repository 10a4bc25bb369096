"""The block of the config that says how many workers there are and what each one gets."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeGuard

from pydantic import Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mhe_dist.config.section import OWN_WORDS, ConfigSection, PositiveFloat, PositiveInt

_WORKERS = {
    "anyOf": [
        {"type": "integer", "exclusiveMinimum": 0},
        {
            "type": "object",
            "properties": {
                name: {"type": "integer", "exclusiveMinimum": 0} for name in ("min", "max")
            },
            "required": ["min", "max"],
            "additionalProperties": False,
        },
    ]
}


def _is_range(workers: Any) -> TypeGuard[dict[str, int]]:
    return (
        isinstance(workers, dict)
        and workers.keys() == {"min", "max"}
        and all(type(number) is int and number > 0 for number in workers.values())
    )


class ScaleConfig(ConfigSection):
    """The workers and what each one gets."""

    workers: Annotated[PositiveInt, WithJsonSchema(_WORKERS)] = Field(
        1, description="W: number of workers (ranks); {min: a, max: b} sets min_workers, too."
    )
    min_workers: int = Field(
        0,
        ge=0,
        description="Fewest workers that the run goes on with when some are lost, until there is "
        "room for more again; 0: exactly scale.workers.",
    )
    gpu: bool = Field(False, description="One GPU and NCCL for each worker.")
    cpus_per_worker: PositiveInt = Field(1, description="CPUs, and compute threads, of a worker.")
    resources: dict[str, PositiveFloat] = Field(
        {}, description="Further Ray resources of a worker, by name: memory (bytes), your own."
    )
    accelerator_type: str = Field(
        "", description="Kind of accelerator as Ray names it, such as H100; empty: any."
    )
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack", description="pack: few nodes, so that samples travel a short way; spread: many."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage of the backbone.")
    max_failures: int = Field(3, ge=-1, description="Restarts without progress; -1: no limit.")
    timeout_s: PositiveFloat = Field(600.0, description="Longest wait inside a collective.")

    @model_validator(mode="before")
    @classmethod
    def _range_of_workers(cls, values: Any) -> Any:
        """`workers: {min: a, max: b}` is `workers: b` with `min_workers: a`."""
        if not isinstance(values, dict) or not _is_range(found := values.get("workers")):
            return values
        if (fewest := values.get("min_workers", found["min"])) != found["min"]:
            raise PydanticCustomError(
                OWN_WORDS,
                "workers={range} says the fewest workers, too: leave min_workers={fewest} out",
                {"range": f"{{min: {found['min']}, max: {found['max']}}}", "fewest": fewest},
            )
        return {**values, "workers": found["max"], "min_workers": found["min"]}

    @field_validator("workers", mode="before")
    @classmethod
    def _is_number_or_range(cls, value: Any) -> Any:
        """Refuse a block that is no range in the words of a range."""
        if isinstance(value, dict):
            raise PydanticCustomError(
                OWN_WORDS,
                "must be a whole number greater than 0, or {min: a, max: b} with two such numbers",
            )
        return value

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return 0 < self.min_workers < self.workers

    @property
    def fewest(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.min_workers or self.workers
