"""InsightFace's `.bin` files: every way that they were written in, and none that runs code."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mhe_dist.errors import RunError, UserError
from pipelines.evaluate.sets.insightface_bin import read_verification_bin
from tests.support.data.images import encoded


def png(number: int) -> bytes:
    rng = np.random.default_rng(number)
    return encoded(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), "png")


IMAGES = [png(number) for number in range(6)]
SAME = [True, False, True]


def as_python_2_wrote_it() -> bytes:
    """Byte strings as STRING opcodes, which need an encoding."""
    images = b"".join(b"T" + len(i).to_bytes(4, "little") + i for i in IMAGES)
    return b"\x80\x02(" + b"(" + images + b"l" + b"(I01\nI00\nI01\nl" + b"t."


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["bytes", "arrays", "columns", "flags"])
def test_whatever_wrote_it(protocol: int, kind: str, tmp_path: Path) -> None:
    images: list[bytes] | list[npt.NDArray[np.uint8]] = IMAGES
    if kind in ("arrays", "columns"):
        arrays = [np.frombuffer(i, np.uint8) for i in IMAGES]
        images = [a[:, None] for a in arrays] if kind == "columns" else arrays
    same = list(np.array(SAME)) if kind == "flags" else SAME
    data = pickle.dumps((images, same), protocol)
    for content in (data, data.replace(b"numpy._core", b"numpy.core")) if protocol < 4 else (data,):
        (tmp_path / "a.bin").write_bytes(content)
        found = read_verification_bin(str(tmp_path / "a.bin"))
        assert list(found.images) == IMAGES
        assert found.same.tolist() == SAME


def test_python_2(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(as_python_2_wrote_it())
    found = read_verification_bin(str(tmp_path / "a.bin"))
    assert list(found.images) == IMAGES
    assert found.same.tolist() == SAME
    pixels = found.read(1, 3, 12)
    assert pixels.shape == (2, 3, 12, 12)
    expected = np.asarray(Image.open(io.BytesIO(IMAGES[1])))
    assert (pixels[0].permute(1, 2, 0).numpy() == expected).all()


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "builtins.eval"), (getattr, "builtins.getattr")],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_is_refused_by_name_and_does_not_run(
    function: object, name: str, protocol: int, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    line = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    (tmp_path / "a.bin").write_bytes(pickle.dumps((Evil(function, line), SAME), protocol))
    name = name if protocol > 2 else name.replace("builtins", "__builtin__")
    with pytest.raises(UserError, match=rf"a\.bin: refused: the pickle asks for {name}"):
        read_verification_bin(str(tmp_path / "a.bin"))
    assert not mark.exists()


def test_a_known_name_is_no_way_to_another(tmp_path: Path) -> None:
    """`numpy.ndarray.tofile`, an object array of commands, a codec that is none."""
    content = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"asks for numpy\.ndarray\.tofile"):
        read_verification_bin(str(tmp_path / "a.bin"))
    objects = np.array([b"a", b"b"], object)
    (tmp_path / "a.bin").write_bytes(pickle.dumps((objects, SAME), 2))
    with pytest.raises(UserError, match="not an InsightFace verification set"):
        read_verification_bin(str(tmp_path / "a.bin"))
    (tmp_path / "a.bin").write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.")
    with pytest.raises(UserError, match=r"asks for _codecs\.encode"):
        read_verification_bin(str(tmp_path / "a.bin"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"a": 1}, "it holds dict"),
        ((IMAGES, SAME[:2]), "6 images do not make 2 pairs"),
        (([], []), "0 images do not make 0 pairs"),
        (([*IMAGES[:5], 3], SAME), "image 5 is int, not encoded bytes"),
        (([*IMAGES[:5], np.zeros((2, 2), np.uint8)], SAME), r"image 5 is ndarray \(2, 2\)"),
        ((IMAGES, [True, False, 7]), "neither same nor different"),
        (("ab", SAME), "its two parts are not lists"),
    ],
)
def test_what_is_no_set_says_why(content: object, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=why):
        read_verification_bin(str(tmp_path / "a.bin"))


def test_damage_is_told(tmp_path: Path) -> None:
    whole = pickle.dumps((IMAGES, SAME))
    for content in (b"", whole[: len(whole) // 2], b"no pickle"):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.bin: not an InsightFace"):
            read_verification_bin(str(tmp_path / "a.bin"))
    with pytest.raises(UserError, match="cannot be opened"):
        read_verification_bin(str(tmp_path / "none.bin"))
    (tmp_path / "a.bin").write_bytes(pickle.dumps(([*IMAGES[:5], b"no image"], SAME)))
    with pytest.raises(RunError, match=r"a\.bin: image 5 cannot be decoded"):
        read_verification_bin(str(tmp_path / "a.bin")).read(4, 6, 12)
