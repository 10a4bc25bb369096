"""The rules of docs/formats.md section 7: one test a row, through everything that reads images."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from mhe_dist.errors import RunError
from pipelines.data.decode import ImageDecodeError, decode_full_size, decode_image
from pipelines.data.sample import BadSampleError, decode_sample, load_sample, read_span
from pipelines.data.sequential import read_in_order, spans_in_order
from pipelines.embedding.image_files import list_images
from pipelines.evaluate.sets.insightface_bin import read_verification_bin
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from tests.support.data.images import encoded

SIDE = 16
Pixels = npt.NDArray[np.uint8]
RAMP = np.arange(256).reshape(SIDE, SIDE)
GREY = RAMP.astype(np.uint8)
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=2)


def oriented(orientation: int) -> bytes:
    """A JPEG whose Exif block stands behind a long comment."""
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(COLOUR), 95, colorsubsampling="444")
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = [(0xFE, b"c" * 5000), (0xE1, exif.tobytes())]
    segments = b"".join(
        struct.pack(">BBH", 0xFF, kind, len(block) + 2) + block for kind, block in blocks
    )
    return data[:2] + segments + data[2:]


def turned(orientation: int) -> Pixels:
    """What Exif's definition makes of the image: rows and columns of the first pixel's corner."""
    flips = {2: "h", 3: "hv", 4: "v", 5: "t", 6: "vt", 7: "hvt", 8: "ht"}[orientation]
    pixels = simplejpeg.decode_jpeg(
        simplejpeg.encode_jpeg(np.ascontiguousarray(COLOUR), 95, colorsubsampling="444")
    )
    for flip in flips:
        pixels = {"h": pixels[:, ::-1], "v": pixels[::-1], "t": pixels.swapaxes(0, 1)}[flip]
    return pixels


def half_transparent(mode: str) -> Image.Image:
    """Black; the lower half is transparent."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[: SIDE // 2, :, 3] = 255
    return Image.fromarray(pixels).convert(mode)


LOWER_WHITE = np.repeat(np.where(np.arange(SIDE) < SIDE // 2, 0, 255)[:, None], SIDE, 1)
PALETTE = Image.fromarray(COLOUR).quantize(8)
FRAMES = [Image.fromarray(np.full((SIDE, SIDE, 3), grey, np.uint8)) for grey in (255, 0)]
LONG = np.zeros((1, 20_001, 3), np.uint8)
LONG[:, 10_000] = 255
JPEG = simplejpeg.encode_jpeg(np.ascontiguousarray(COLOUR), 95)
PNG = encoded(COLOUR, "png")
BOMB = encoded(Image.new("1", (20_000, 10_000)), "png")

# Row of the table -> images, and what they are decoded to; None: a bad sample.
ROWS: dict[str, list[tuple[bytes, npt.NDArray[np.generic] | None]]] = {
    "orientation": [(oriented(number), turned(number)) for number in range(2, 9)],
    "long image": [(encoded(LONG, "png"), np.full((SIDE, SIDE), 255))],
    "too many pixels": [(BOMB, None)],
    "transparency": [
        (encoded(half_transparent("RGBA"), "png"), LOWER_WHITE),
        (encoded(half_transparent("LA"), "png"), LOWER_WHITE),
        (encoded(Image.new("P", (SIDE, SIDE)), "png", transparency=0), np.full((SIDE, SIDE), 255)),
        (
            encoded(RAMP.astype(np.uint16) << 8, "png", transparency=0),
            np.where(RAMP == 0, 255, RAMP),
        ),
    ],
    "16 bits": [
        (encoded((RAMP.astype(np.uint16) << 8) + 17, kind), RAMP) for kind in ("png", "tiff")
    ],
    "int32": [
        (encoded(RAMP.astype(np.int32), "tiff"), RAMP),
        (encoded((RAMP * 257).astype(np.int32), "tiff"), RAMP),
        (encoded((RAMP * 1_000_000 - 5_000_000).astype(np.int32), "tiff"), RAMP),
    ],
    "float": [
        (encoded((RAMP / 255).astype(np.float32), "tiff"), RAMP),
        (encoded(RAMP.astype(np.float32), "tiff"), RAMP),
        (encoded((RAMP / 127.5 - 1).astype(np.float32), "tiff"), RAMP),
        (encoded(np.full((SIDE, SIDE), np.nan, np.float32), "tiff"), None),
    ],
    "CMYK": [
        (
            encoded(Image.fromarray(np.full((SIDE, SIDE, 3), 200, np.uint8)).convert("CMYK"), kind),
            np.full((SIDE, SIDE), 200),
        )
        for kind in ("jpeg", "tiff")
    ],
    "palette": [(encoded(PALETTE, kind), np.asarray(PALETTE.convert("RGB"))) for kind in ("png",)],
    "animation": [
        (
            encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:]),
            np.full((SIDE, SIDE), 255),
        )
        for kind in ("gif", "png", "webp")
    ],
    "cut off": [
        (JPEG[:-2], None),
        (JPEG[: len(JPEG) // 2], None),
        (PNG[:-12], None),
        (PNG[: len(PNG) // 2], None),
    ],
}
CASES = [(row, *case) for row, cases in ROWS.items() for case in cases]


def by_training(data: bytes, folder: Path) -> Pixels | None:
    with ShardWriter(str(folder), "one") as writer:
        writer.write([Sample("0", {"png": data, "cls": b"0"})])
        writer.finish(1)
    index = ShardIndex.load(str(folder))
    (span,) = spans_in_order(index, 0, 1)
    try:
        return load_sample(index, 0, 0, read_span(index, span)[0], SIDE).image
    except BadSampleError:
        return None


def by_evaluation(data: bytes, folder: Path) -> Pixels | None:
    by_training(data, folder)
    try:
        images = read_in_order(ShardIndex.load(str(folder)), 0, 1, SIDE)[0]
    except RunError:
        return None
    return images[0].permute(1, 2, 0).numpy()


def by_embed(data: bytes, folder: Path) -> Pixels | None:
    (folder / "a.png").write_bytes(data)
    files = list_images(str(folder), skip_bad=True)
    images = files.read(0, 1, SIDE)
    return None if files.bad[0] else images[0].permute(1, 2, 0).numpy()


def by_bin(data: bytes, folder: Path) -> Pixels | None:
    (folder / "a.bin").write_bytes(pickle.dumps(([data, data], [True])))
    try:
        images = read_verification_bin(str(folder / "a.bin")).read(0, 1, SIDE)
    except RunError:
        return None
    return images[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("read", [by_training, by_evaluation, by_embed, by_bin])
@pytest.mark.parametrize(("row", "data", "expected"), CASES, ids=[case[0] for case in CASES])
def test_every_reader_keeps_the_rule(
    row: str,
    data: bytes,
    expected: npt.NDArray[np.generic] | None,
    read: Callable[[bytes, Path], Pixels | None],
    tmp_path: Path,
) -> None:
    found = read(data, tmp_path)
    if expected is None:
        assert found is None, row
        return
    assert found is not None
    wanted = expected if expected.ndim == found.ndim else expected[:, :, None]
    if row == "long image":  # the one white pixel, scaled to a line
        assert found.max() > 200
        return
    found = found if found.ndim >= wanted.ndim else found[:, :, None]
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= (3 if row == "CMYK" else 0), row


def test_the_table_has_these_rows() -> None:
    page = (Path(__file__).parents[4] / "docs" / "formats.md").read_text()
    table = page.partition("Pictures\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| \*(.*?)\* \|", table, re.MULTILINE) == list(ROWS)


def test_a_long_image_is_cut_before_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = []
    resize = Image.Image.resize

    def record(
        image: Image.Image, size: tuple[int, int], resample: Image.Resampling
    ) -> Image.Image:
        scaled.append(max(*size, *image.size))
        return resize(image, size, resample)

    monkeypatch.setattr(Image.Image, "resize", record)
    decode_image(encoded(np.zeros((1, 2000, 3), np.uint8), "png"), SIDE)
    decode_image(encoded(np.zeros((2000, 1, 3), np.uint8), "png"), SIDE)
    assert max(scaled) <= 4 * SIDE


def test_ordinary_images_are_scaled_as_ever() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 120, 3), dtype=np.uint8)
    whole = Image.fromarray(pixels).resize((48, SIDE), Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((16, 0, 32, SIDE)))
    assert np.array_equal(decode_image(encoded(pixels, "png"), SIDE), expected)


@pytest.mark.parametrize("data", [JPEG, PNG])
def test_the_bound_on_pixels_is_the_configs(data: bytes) -> None:
    decode_image(data, SIDE, max_pixels=SIDE * SIDE)
    for reader in (
        lambda: decode_image(data, SIDE, max_pixels=SIDE * SIDE - 1),
        lambda: decode_full_size(data, max_pixels=SIDE * SIDE - 1),
    ):
        with pytest.raises(ImageDecodeError, match=r"16 x 16 .* data\.max_pixels=255 allows"):
            reader()


def test_a_sample_of_too_many_pixels_is_bad(tmp_path: Path) -> None:
    by_training(PNG, tmp_path)
    index = ShardIndex.load(str(tmp_path))
    (span,) = spans_in_order(index, 0, 1)
    raw = read_span(index, span)[0]
    with pytest.raises(BadSampleError, match=r"data\.max_pixels=100 "):
        decode_sample(raw, len(raw), SIDE, 1, max_pixels=100)


@pytest.mark.filterwarnings("ignore:.*EXIF.*", "ignore:Truncated File Read")
def test_a_damaged_exif_block_states_no_orientation() -> None:
    block = b"Exif\0\0garbage"
    data = JPEG[:2] + struct.pack(">BBH", 0xFF, 0xE1, len(block) + 2) + block + JPEG[2:]
    assert np.array_equal(decode_image(data, SIDE), simplejpeg.decode_jpeg(JPEG))
