"""What Triton's interpreter needs beside this project's NumPy."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def mend_interpreter() -> None:
    """Let kernels loop up to one of their arguments, with NumPy 2.4 and Triton before 3.8, too.

    There the interpreter holds an argument as an array of one element, and makes the bound of a
    loop from it with `int`, which NumPy 2.4 does for arrays without axes alone. Triton 3.8 does
    the same as here. Call it before the first launch; kernels on a GPU never come here.
    """
    mend_language: Any = interpreter._patch_lang_tensor
    if getattr(mend_language, "is_mended", False):
        return

    def mended(tensor: Any, *scope: Any) -> None:
        mend_language(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    mended.is_mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = mended
