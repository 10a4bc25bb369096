"""The blocks of the config that say where the images are and how they come."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from mhe_dist.config.section import ConfigSection, Fraction, PathText, PositiveFloat, PositiveInt

MAX_PIXELS: Final = 89_478_485
"""Most pixels of an image unless the config says otherwise: 256 MiB in RGB, Pillow's own bound."""
TRAIN, HELDOUT, KNOWN = "train", "heldout", "known"  # the sets of glyphs, folders of these names


class GlyphsConfig(ConfigSection):
    """Makes the glyph data set when `data.shards` does not exist yet."""

    fonts: PathText = Field(
        "", description="Folder of font files; empty: those that matplotlib ships."
    )
    heldout_fonts: list[str] = Field(
        ["STIXGeneral*"], description="Names (* and ?) of font files kept for the evaluation."
    )
    heldout_classes: PositiveInt = Field(500, description="Classes kept for the evaluation alone.")
    min_fonts: PositiveInt = Field(4, description="A class needs a glyph in this many font files.")
    max_classes: int = Field(
        0, ge=0, description="Most classes for training, drawn at random; 0: all there are."
    )
    known_classes: bool = Field(
        False,
        description="Also write the set `known`: the training classes in the held-out fonts, for "
        "evaluate.classification.",
    )
    image_size: PositiveInt = Field(32, description="Side of the written images in pixels.")

    @property
    def set_names(self) -> tuple[str, ...]:
        """The data sets that are made, the training set first."""
        return (TRAIN, HELDOUT, *((KNOWN,) if self.known_classes else ()))


class AugmentConfig(ConfigSection):
    """Random changes of a training image; each draw is keyed by (seed, epoch, sample)."""

    flip: Fraction = Field(0.0, description="Probability of a horizontal flip.")
    crop: Fraction = Field(0.0, description="Largest share of the side that a random crop removes.")
    rotate: float = Field(0.0, ge=0, le=180, description="Largest rotation in degrees.")
    brightness: Fraction = Field(0.0, description="Largest relative change of brightness.")
    contrast: Fraction = Field(0.0, description="Largest relative change of contrast.")
    saturation: Fraction = Field(0.0, description="Largest relative change of saturation.")
    blur: Fraction = Field(0.0, description="Probability of a Gaussian blur.")
    low_resolution: Fraction = Field(0.0, description="Probability of down- and upscaling.")
    erase: Fraction = Field(0.0, description="Probability of erasing a random rectangle.")
    fill: int = Field(0, ge=0, le=255, description="Grey value shown where no image is.")


class RemoteConfig(ConfigSection):
    """How shards are read that are not on this machine's disks."""

    retries: int = Field(5, ge=0, description="Further attempts after a transient fault.")
    read_ahead_mib: int = Field(256, ge=0, description="Most MiB a loader process reads ahead.")
    cache_dir: PathText = Field(
        "", description="Folder of a host's disk for whole shards; empty: none."
    )
    cache_gib: PositiveFloat = Field(100.0, description="Most GiB in cache_dir.")


class MixConfig(ConfigSection):
    """A further data set; its classes are others than those of the sets before it."""

    shards: PathText = Field(..., description="Folder or URL that holds index.json and the tars.")
    labels: PathText = Field(
        "", description="Folder or URL of a label set (docs/data.md); empty: the tars' labels."
    )
    weight: float = Field(
        1.0, gt=0, le=1000, description="Passes over it in an epoch; 0.5: a random half."
    )
    classes: PathText = Field(
        "", description="List of the classes to take (docs/data.md); empty: all."
    )


class DataConfig(ConfigSection):
    """Where the images are, in which order they come and how they are prepared."""

    shards: PathText = Field(..., description="Folder or URL that holds index.json and the tars.")
    labels: PathText = Field(
        "", description="Folder or URL of a label set (docs/data.md); empty: the tars' labels."
    )
    labels_per_sample: int = Field(
        0,
        ge=0,
        le=1024,
        description="K: most classes of an image in an epoch, drawn anew where it has more; 0: "
        "one, and label sets that give an image several are refused.",
    )
    classes: PathText = Field(
        "", description="List of the classes to take (docs/data.md); empty: all."
    )
    images_per_class: int = Field(
        0, ge=0, description="Most images of a class in an epoch, drawn anew each time; 0: all."
    )
    mix: list[MixConfig] = Field(
        [], description="Further data sets, each with shards, labels, weight and classes."
    )
    glyphs: GlyphsConfig | None = Field(
        None, description="If set, make the glyph data set there when it is missing."
    )
    image_size: PositiveInt = Field(112, description="Side of the training images in pixels.")
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=2 * MAX_PIXELS,
        description="An image of more pixels is a bad sample; it is not decoded.",
    )
    streams: PositiveInt = Field(64, description="S: parallel sample sequences, fixed for the run.")
    shuffle_window: PositiveInt = Field(
        1024, description="Consecutive samples of a stream that are permuted together."
    )
    loader_workers: int = Field(1, ge=0, description="Loader processes per rank; 0: in the rank.")
    prefetch: PositiveInt = Field(
        2, description="Micro-batches that each loader process keeps ready."
    )
    on_bad_sample: Literal["skip", "fail"] = Field(
        "skip", description="What to do with a sample that cannot be read."
    )
    max_bad_fraction: Fraction = Field(
        0.001, description="With skip: share of bad samples that ends the run."
    )
    remote: RemoteConfig = Field(RemoteConfig(), description="Shards behind a URL.")
    augment: AugmentConfig = Field(AugmentConfig(), description="Random changes of the images.")
