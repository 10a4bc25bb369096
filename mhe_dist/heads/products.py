"""In what precision a GPU computes the matrix products of a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


_MATMUL = torch.backends.cuda.matmul
# torch 2.9 has names of precisions, and refuses to read its switch where a name was set.
_NAMED = hasattr(_MATMUL, "fp32_precision")


@contextmanager
def products_in(tf32: bool | None) -> Iterator[None]:
    """float32 products inside are computed in TF32 (10 bits), or not; None: as the process says."""
    if tf32 is None or tf32 == in_tf32():
        yield
        return
    switch = "fp32_precision" if _NAMED else "allow_tf32"
    precision = "tf32" if tf32 else "ieee"
    before = getattr(_MATMUL, switch)
    setattr(_MATMUL, switch, precision if _NAMED else tf32)
    try:
        yield
    finally:
        setattr(_MATMUL, switch, before)


def in_tf32() -> bool:
    """Whether a GPU computes float32 products in TF32 now."""
    return _MATMUL.fp32_precision == "tf32" if _NAMED else _MATMUL.allow_tf32


def with_chosen_products(method: Method) -> Method:
    """A method of a head whose products are computed as its `spec.tf32` says."""

    @wraps(method)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        with products_in(self.spec.tf32):
            return method(self, *args, **kwargs)

    return cast(Method, chosen)
