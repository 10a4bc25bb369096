"""In what precision a GPU computes the matrix products of a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def products_in(tf32: bool | None) -> Iterator[None]:
    """float32 products inside are computed in TF32 (10 bits), or not; None: as the process says."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = before if tf32 is None else tf32
    try:
        yield
    finally:
        settings.allow_tf32 = before


def in_tf32() -> bool:
    """Whether a GPU computes float32 products in TF32 now."""
    return torch.backends.cuda.matmul.allow_tf32


def with_chosen_products(method: Method) -> Method:
    """A method of a head whose products are computed as its `spec.tf32` says."""

    @wraps(method)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        with products_in(self.spec.tf32):
            return method(self, *args, **kwargs)

    return cast(Method, chosen)
