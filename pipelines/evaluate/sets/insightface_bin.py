"""Reads InsightFace verification sets (`lfw.bin` and others): pickles, read without running code.

A pickle names functions and calls them, so reading an untrusted one can run anything. Here a pickle
can only give plain containers. The few functions that rebuild NumPy arrays and byte strings are
replaced by small stand-ins; every other name is refused before it is imported.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mhe_dist.errors import RunError, UserError
from pipelines.data.decode import ImageDecodeError, decode_image
from pipelines.embedding.stack import stack_images
from pipelines.storage.urls import RangeReader

_TYPES: Final = ("u1", "i1", "b1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8")
_MAX_ITEM: Final = 1 << 26  # bytes of an image: more than any image has, and still little memory


@dataclass(frozen=True)
class VerificationBin:
    """A verification set of P pairs; pair i is images 2i and 2i + 1.

    Attributes:
        url: where it was read from.
        images: 2P encoded images.
        same: bool `[P]`: of one class.
        first: number of the first image in the file, of a part of it.
    """

    url: str
    images: Sequence[bytes]
    same: npt.NDArray[np.bool_]
    first: int = 0

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    def read(self, start: int, stop: int, image_size: int) -> Tensor:
        """The images `[start, stop)`, uint8 `[n, 3, image_size, image_size]`, RGB.

        Raises:
            RunError: one of them cannot be decoded; an evaluation leaves nothing out.
        """
        return stack_images(self._image, start, stop, image_size)

    def part(self, start: int, stop: int) -> VerificationBin:
        """See `embeddings.Images.part`: the images, without the pairs."""
        return VerificationBin(self.url, self.images[start:stop], self.same[:0], self.first + start)

    def findings(self) -> None:
        """Nothing: reading tells no more than the pixels."""

    def add_findings(self, start: int, findings: None) -> None:
        """See `findings`."""

    def _image(self, number: int, image_size: int) -> npt.NDArray[np.uint8]:
        try:
            return decode_image(self.images[number], image_size)
        except ImageDecodeError as error:
            name = f"{self.url}: image {self.first + number}"
            raise RunError(f"{name} cannot be decoded: {error}") from error


def read_verification_bin(url: str) -> VerificationBin:
    """Read a set from a path or URL.

    Raises:
        UserError: there is no such file, it is not such a set, or it names something that a set
            does not need (the message says what); no code of the file was run.
    """
    with RangeReader(url) as reader:
        data = reader.read(0, reader.size)
    content = _restricted(url, data)
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise _not_a_set(url, f"it holds {_short(content)}, not (images, same)")
    images, same = (_plain(part) for part in content)
    if not isinstance(images, list | tuple) or not isinstance(same, list | tuple):
        raise _not_a_set(url, "its two parts are not lists")
    if len(images) != 2 * len(same) or not same:
        raise _not_a_set(url, f"{len(images)} images do not make {len(same)} pairs")
    flags = [_plain(flag) for flag in same]
    if any(flag not in (0, 1) for flag in flags):
        raise _not_a_set(url, "a pair is neither same nor different")
    return VerificationBin(
        url, [_encoded(url, n, item) for n, item in enumerate(images)], np.array(flags, bool)
    )


def _restricted(url: str, data: bytes) -> Any:
    """Read the content of the pickle."""
    try:
        # Python 2 wrote byte strings as text; other pickles ignore the encoding.
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _Refused as error:
        raise UserError(
            f"{url}: refused: the pickle asks for {error}, which a verification set does not need "
            f"and which could run code; nothing was run. Get the file from a source that you trust"
        ) from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise _not_a_set(url, f"{type(error).__name__}: {error}") from error


class _Refused(Exception):
    """A name that a pickle may not use."""


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows the names of `_STAND_INS` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a known name; refuse all others."""
        known = _STAND_INS.get(f"{module}.{name}")
        if known is None:
            raise _Refused(f"{module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        """Refuse: nothing outside the file is read."""
        raise _Refused(f"the persistent object {_short(pid)}")


class _Type:
    """Stand-in for `numpy.dtype`: a name, and the byte order that its state adds."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else str(name)
        self.order = ""

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def resolve(self) -> np.dtype[Any]:
        """The NumPy type; only integers, floats and booleans are allowed."""
        name = self.name.lstrip("<>|=")
        if name not in _TYPES:
            raise ValueError(f"an array of {self.name}")
        return np.dtype((">" if ">" in (self.order or self.name) else "<") + name)


class _Array:
    """Stand-in for an array while it is rebuilt; `value` is the array."""

    def __init__(self, *_: Any) -> None:
        self.value: npt.NDArray[Any] = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.value = _array(data, kind, shape, "F" if fortran else "C")


def _array(data: Any, kind: Any, shape: Any, order: str = "C") -> npt.NDArray[Any]:
    """Build an array of plain numbers; an array of objects is an error."""
    if isinstance(data, str):
        data = data.encode("latin-1")
    if not isinstance(kind, _Type) or not isinstance(data, bytes | bytearray):
        raise ValueError("an array of objects")
    flat = np.frombuffer(data, kind.resolve())
    order = order.decode() if isinstance(order, bytes) else order
    return flat.reshape([int(length) for length in shape], order="F" if order == "F" else "C")


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    """Stand-in for `numpy.core.numeric._frombuffer`."""
    made = _Array()
    made.value = _array(bytes(data), kind, shape, order)
    return made


def _scalar(kind: Any, data: Any) -> Any:
    """Stand-in for `numpy.core.multiarray.scalar`."""
    return _array(data, kind, (1,))[0].item()


def _latin_1(text: Any, encoding: Any) -> bytes:
    """Stand-in for `_codecs.encode`, with which old protocols write bytes."""
    if encoding not in ("latin1", "latin-1", b"latin1", b"latin-1"):
        raise _Refused("_codecs.encode to something else than latin-1")
    return str(text).encode("latin-1")


def _bytes(*arguments: Any) -> bytes:
    """Stand-in for `bytes` and `bytearray`; refuses a number, which would allocate memory."""
    if not arguments:
        return b""
    if isinstance(arguments[0], int):
        raise ValueError("bytes by number")
    if isinstance(arguments[0], str):
        return _latin_1(*arguments)
    return bytes(arguments[0])


_STAND_INS: Final[dict[str, Callable[..., Any]]] = {
    **{
        f"numpy.{package}.{name}": stand_in
        for package in ("core", "_core")
        for name, stand_in in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
    **{"numpy.ndarray": _Array, "numpy.dtype": _Type, "_codecs.encode": _latin_1},
    **{
        f"{module}.{name}": _bytes
        for module in ("builtins", "__builtin__")
        for name in ("bytes", "bytearray")
    },
}


def _plain(item: Any) -> Any:
    """Replace a stand-in by its array, and an array of flags by a list."""
    value = item.value if isinstance(item, _Array) else item
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype != np.uint8 else value


def _encoded(url: str, number: int, item: Any) -> bytes:
    """The bytes of one image."""
    item = _plain(item)
    # OpenCV's imencode gave a column, `[N, 1]`, for years.
    if isinstance(item, np.ndarray) and (item.ndim == 1 or item.shape[1:] == (1,)):
        item = item.tobytes()
    if not isinstance(item, bytes | bytearray) or not 0 < len(item) <= _MAX_ITEM:
        raise _not_a_set(url, f"image {number} is {_short(item)}, not encoded bytes")
    return bytes(item)


def _not_a_set(url: str, why: str) -> UserError:
    return UserError(f"{url}: not an InsightFace verification set (.bin): {why}")


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} {shape if shape is not None else ''}".strip()
