"""A small IJB folder in the documented layout: 8 subjects, 4 templates each, photos and a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.evaluate.sets.align import REFERENCE_LANDMARKS

SUBJECTS, TEMPLATES = 8, 4


def write_ijb_set(root: Path, side: int = 40) -> Path:
    """Faces are coarse patterns, turned and shifted, with their landmarks; returns `root`."""
    rng = np.random.default_rng(0)
    (root / "loose_crop").mkdir(parents=True)
    (root / "meta").mkdir()
    points, groups, number = [], [], 0
    patterns = rng.integers(0, 256, (SUBJECTS, 4, 4, 3))
    for subject in range(SUBJECTS):
        for template in range(TEMPLATES):
            for medium, frames in enumerate((1, 1 + template)):  # a photo, and a video
                for _ in range(frames):
                    number += 1
                    noisy = patterns[subject] + rng.normal(0, 90, (4, 4, 3))
                    small = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
                    image = small.resize((side, side)).rotate(rng.uniform(-10, 10))
                    image.save(root / "loose_crop" / f"{number}.jpg", quality=95)
                    marks = REFERENCE_LANDMARKS * side / 112 + rng.normal(0, 0.3, (5, 2))
                    score = rng.uniform(0.6, 1.0)
                    points.append([f"{number}.jpg", *marks.ravel().round(3), round(score, 4)])
                    identity = 100 + subject * TEMPLATES + template
                    groups.append([f"{number}.jpg", identity, 1000 + 2 * identity + medium])
    _write(root / "meta" / "ijbc_name_5pts_score.txt", points, " ")
    _write(root / "meta" / "ijbc_face_tid_mid.txt", groups, " ")
    _protocols(root / "meta")
    return root


def _protocols(meta: Path) -> None:
    """All pairs of templates 1:1; half of the subjects in each gallery."""
    every = [(100 + t, t // TEMPLATES) for t in range(SUBJECTS * TEMPLATES)]
    pairs = [(a, b, int(s == r)) for i, (a, s) in enumerate(every) for b, r in every[:i]]
    _write(meta / "ijbc_template_pair_label.txt", pairs, " ")
    head = [["TEMPLATE_ID", "SUBJECT_ID", "FILENAME"]]
    for name, half in (("G1", 0), ("G2", 1)):
        rows = [[t, s, "x.jpg"] for t, s in every[::TEMPLATES] if s % 2 == half]
        _write(meta / f"ijbc_1N_gallery_{name}.csv", head + rows + rows[:1], ",")
    rows = [[t, s, "x.jpg"] for n, (t, s) in enumerate(every) if n % TEMPLATES]
    _write(meta / "ijbc_1N_probe_mixed.csv", head + rows, ",")


def _write(path: Path, rows: list, separator: str) -> None:
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
