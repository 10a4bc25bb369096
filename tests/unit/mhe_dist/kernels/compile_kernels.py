"""Compiles every kernel for cards of two generations and compares its shared memory with theirs.

A process of its own, started by `test_kernels.py`: compiling needs no card. Triton's own `ptxas`
makes the code, so whatever a compiler can find wrong is found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhe_dist import noise
from mhe_dist.heads.routed.extra_gradient import FACTOR_WIDTH
from mhe_dist.kernels import (
    angular_margin,
    extra_softmax,
    first_rows,
    own_products,
    own_softmax,
    row_read,
    row_update,
)

# Compute capability -> bytes of shared memory that a block may have (CUDA programming guide).
CARDS = {86: 99 << 10, 90: 227 << 10}
OPTIONS = ("num_warps", "num_stages")  # of the compiler, among a kernel's constants
Case = tuple[Any, dict[str, str], dict[str, Any]]


def row_update_cases() -> Iterator[Case]:
    pointers = ("a_pointer", "e_pointer", "b_pointer", "g_pointer")
    gradients = (("has_g", "has_b"), ("has_b",), ("has_g", "of_normalised"))
    shared = (("shared", "of_normalised"), ("shared",))
    scalars = {name: "fp32" for name in ("lr", "momentum", "weight_decay")}
    keys = dict.fromkeys(("count", "first_unit", "weight_key", "velocity_key"), "i32")
    for rows in ("*fp32", "*bf16"):
        types = {"weight": rows, "velocity": rows, "local": "*i64", "places": "*i64"}
        types |= scalars | keys | dict.fromkeys(pointers, "*fp32")
        for chosen in gradients + shared:
            flags: dict[str, Any] = dict.fromkeys(("has_velocity", *chosen), True)
            for flag in ("has_g", "has_b", "of_normalised", "shared"):
                flags.setdefault(flag, False)
            # The widest rows need the most shared memory.
            width = FACTOR_WIDTH if "shared" in chosen else 512
            flags |= {"length": 128, "width": width}
            tile = row_update.sgd_tile(128, width, "shared" in chosen)
            yield row_update._sgd_kernel, types, flags | tile
    types = {"rows": "*fp32", "rounded": "*bf16", "units": "*i64", "key": "i32", "size": "i32"}
    yield row_update._round_kernel, types, {"block": 4096}


def row_read_cases() -> Iterator[Case]:
    for rows, scaled in (("*fp32", True), ("*bf16", False)):
        types = {"weight": rows, "local": "*i64", "rows": "*fp32", "inverses": "*fp32"}
        flags = {"length": 128, "width": 512, "block_rows": 8, "block_columns": 512}
        yield row_read._read_kernel, types, flags | {"scaled": scaled}


def first_rows_cases() -> Iterator[Case]:
    types = {"classes": "*i64", "rows": "*fp32", "key": "i64", "std": "fp32"}
    tables = {"log2": noise.LOG2, "sine": noise.SIN, "cosine": noise.COS}
    flags = {"width": 512, "columns": 513, "pairs": 256, "block": 1024}
    yield first_rows._first_rows_kernel, types, flags | tables


def margin_cases() -> Iterator[Case]:
    types = dict.fromkeys(("cosines", "phis", "slopes"), "*fp32") | {"count": "i32"}
    types |= dict.fromkeys(("cos_m", "sin_m", "m3", "drop", "limit"), "fp32")
    yield angular_margin._angular_kernel, types, {"block": 256}


def softmax_cases() -> Iterator[Case]:
    scalars = dict.fromkeys(("count", "widest", "rows", "stride"), "i32")
    scalars |= dict.fromkeys(("scale", "threshold", "share"), "fp32") | {"places": "*i64"}
    extra = {"length": 128, "block": 2048, "filtered": True, "corrected": True}
    own = {"length": 600, "block": 1024, "filtered": True}
    for kernel, flags in (
        (extra_softmax._extra_statistics_kernel, extra),
        (extra_softmax._extra_weights_kernel, extra),
        (own_softmax._own_statistics_kernel, own),
        (own_softmax._own_weights_kernel, own),
    ):
        pointers = dict.fromkeys(set(kernel.arg_names) - set(flags), "*fp32")
        yield kernel, pointers | scalars, flags


def own_products_cases() -> Iterator[Case]:
    flags = {"length": 128, "width": 512}
    for rows in ("*fp32", "*bf16"):
        types = {"weight": rows, "local": "*i64", "samples": "*i64"}
        types |= dict.fromkeys(("count", "stride"), "i32")
        types |= dict.fromkeys(("features", "products", "inverses"), "*fp32")
        types |= dict.fromkeys(("weights", "gradient"), "*fp32")
        yield own_products._products_kernel, types, flags | {"block_rows": 8, "block_columns": 512}
        yield own_products._sum_kernel, types, flags | {"block_rows": 32, "block_columns": 128}


def compiled(case: Case, capability: int) -> Any:
    kernel, types, constants = case
    options = {name: constants[name] for name in OPTIONS if name in constants}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={
            (names.index(name),): value for name, value in constants.items() if name not in OPTIONS
        },
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False} | options)


def main() -> None:
    rows = (*row_update_cases(), *row_read_cases(), *first_rows_cases())
    for case in (*rows, *margin_cases(), *softmax_cases(), *own_products_cases()):
        for capability, limit in CARDS.items():
            shared = compiled(case, capability).metadata.shared
            print(f"{case[0].__name__} sm_{capability}: {shared} bytes of shared memory")
            assert shared <= limit
    print("all compiled")


if __name__ == "__main__":
    main()
