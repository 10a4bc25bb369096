"""IJB: templates and protocols, against docs/formats.md written out in plain NumPy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from pipelines.evaluate.ijb import FARS, evaluate_ijb, verify_templates
from pipelines.evaluate.metrics import templates
from pipelines.evaluate.metrics.templates import pool_templates, template_scores
from pipelines.evaluate.sets import ijb_files
from pipelines.evaluate.sets.ijb_files import load_ijb
from tests.support.data.ijb_set import SUBJECTS, TEMPLATES, write_ijb_set

EXACT = 1e-12


def reference_pool(rows, weights, ids, media) -> dict[int, np.ndarray]:
    """docs/formats.md section 3: a template's mean per media, the sum over media, L2-normalise."""
    found = {}
    for template in sorted(set(ids.tolist())):
        total = np.zeros(rows.shape[1])
        for medium in sorted(set(media[ids == template].tolist())):
            chosen = (ids == template) & (media == medium)
            total += (rows[chosen].astype(np.float64) * weights[chosen, None]).mean(axis=0)
        found[template] = total / np.sqrt((total**2).sum())
    return found


@pytest.fixture
def pooled():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 40, 400) * 3 + 5
    media = rng.integers(0, 4, 400)  # templates share media numbers, and do not share media
    rows = (3 * rng.standard_normal((400, 16))).astype(np.float32)
    weights = rng.uniform(0.5, 1, 400)
    return rows, weights, ids, media


@pytest.mark.parametrize("rows_per_chunk", [1 << 14, 30, 1])
def test_templates_are_as_written(pooled, rows_per_chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(templates, "_ROWS", rows_per_chunk)
    expected = reference_pool(*pooled)
    ids, rows = pool_templates(*pooled)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(rows, list(expected.values()), atol=EXACT, rtol=0)
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, len(ids), (2, 200))
    wanted = [expected[ids[a]] @ expected[ids[b]] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(template_scores(rows, first, second), wanted, atol=EXACT, rtol=0)


def test_a_template_by_hand() -> None:
    """A photo of norm 2 counts as much as a video of two frames of norm 1 and score 1/2."""
    rows = np.array([[2, 0], [0, 4], [0, 4]], np.float32)
    ids, found = pool_templates(
        rows, np.array([1, 0.5, 0.5]), np.array([7, 7, 7]), np.array([1, 2, 2])
    )
    assert ids.tolist() == [7]
    np.testing.assert_allclose(found, [[math.sqrt(0.5), math.sqrt(0.5)]], atol=EXACT)


def test_what_is_not_finite_counts_as_zeros(pooled, caplog: pytest.LogCaptureFixture) -> None:
    """One such image of a gallery was the nearest of every probe, and a probe's left the count."""
    rows, weights, ids, media = pooled
    broken, zeros = rows.copy(), rows.copy()
    broken[[3, 17]], zeros[[3, 17]] = [[np.nan], [np.inf]], 0
    _, found = pool_templates(broken, weights, ids, media)
    _, expected = pool_templates(zeros, weights, ids, media)
    assert np.array_equal(found, expected)
    assert caplog.messages == ["2 of 400 embeddings are not finite"]


def embed(images: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(3 * 28 * 28, 12, generator=torch.Generator().manual_seed(0))
    return (images.float().flatten(1) / 127.5 - 1) @ weights


def reference_figures(root: Path, rows: dict[int, np.ndarray]) -> dict[str, float]:
    """Both protocols from the files, with loops."""
    meta, found = root / "meta", {}
    table = [line.split() for line in (meta / "ijbc_template_pair_label.txt").open()]
    same = np.array([line[2] == "1" for line in table])
    scores = np.array([rows[int(a)] @ rows[int(b)] for a, b, _ in table])
    limits = np.append(np.unique(scores), np.inf)
    points = [(np.mean(scores[~same] >= t), np.mean(scores[same] >= t)) for t in limits]
    for far in FARS:
        name = f"tar@far={far:.0e}".replace("e-0", "e-")
        found[name] = max(tar for at, tar in points if at <= far)
        near = min(abs(at - far) for at, _ in points)
        found[f"{name}_nearest"] = max(p for p in points if abs(p[0] - far) <= near + 1e-15)[1]

    def subjects(name: str) -> dict[int, int]:
        lines = (meta / f"ijbc_1N_{name}.csv").read_text().split()[1:]
        return {int(a): int(b) for a, b, _ in (line.split(",") for line in lines)}

    ranks, hits = {1: [], 5: [], 10: []}, {1e-2: [], 1e-1: []}
    for gallery in (subjects("gallery_G1"), subjects("gallery_G2")):
        enrolled, strangers = [], []
        for probe, subject in subjects("probe_mixed").items():
            order = sorted(((rows[probe] @ rows[t], s) for t, s in gallery.items()), reverse=True)
            if subject in gallery.values():
                enrolled.append((1 + [s for _, s in order].index(subject), order[0][0]))
            else:
                strangers.append(order[0][0])
        for k, shares in ranks.items():
            shares.append(np.mean([rank <= k for rank, _ in enrolled]))
        for fpir, shares in hits.items():
            limit = sorted(strangers, reverse=True)[int(fpir * len(strangers))]
            shares.append(np.mean([rank == 1 and best > limit for rank, best in enrolled]))
    found |= {f"rank{k}": np.mean(shares) for k, shares in ranks.items()}
    names = {1e-2: "tpir@fpir=1e-2", 1e-1: "tpir@fpir=1e-1"}
    return found | {names[fpir]: np.mean(shares) for fpir, shares in hits.items()}


def test_a_whole_set(tmp_path: Path, monkeypatch) -> None:
    root = write_ijb_set(tmp_path / "IJBC")
    found = load_ijb(str(root))
    images = found.read(0, found.count, 28)
    rows = (embed(images) + embed(images.flip(-1))).numpy()
    pooled = reference_pool(rows, found.scores, found.templates, found.media)
    results = []
    for size in (1 << 20, 7):  # pairs of a chunk
        monkeypatch.setattr(ijb_files, "_PAIRS_PER_CHUNK", size)
        results.append(evaluate_ijb(embed, found, Topology(), 28))
    assert results[0].to_dict() == results[1].to_dict()
    expected = reference_figures(root, pooled)
    assert results[0].named_metrics().keys() == expected.keys()
    for name, value in expected.items():
        assert results[0].named_metrics()[name] == pytest.approx(value, abs=EXACT), name
    assert 0.1 < results[0].rank[1] < 1
    assert results[0].templates == SUBJECTS * TEMPLATES
    assert results[0].genuine + results[0].impostors == 32 * 31 // 2
    for part in (root / "meta").glob("*1N*"):
        part.unlink()
    assert evaluate_ijb(embed, load_ijb(str(root)), Topology(), 28).rank == {}


@pytest.mark.parametrize(
    ("table", "row", "said"),
    [
        ("template_pair_label.txt", None, "is missing"),
        ("template_pair_label.txt", "first second same", "cannot be read"),
        ("template_pair_label.txt", "100 101 0 7", "cannot be read"),
        ("template_pair_label.txt", "100 101", "cannot be read|3 values between single spaces"),
        ("template_pair_label.txt", "100 999 0", "template 999 is in a protocol"),
        ("1N_gallery_G1.csv", None, "is missing"),
        ("1N_gallery_G2.csv", ",,", "cannot be read"),
        ("1N_gallery_G2.csv", "999,1,x.jpg", "template 999 is in a protocol"),
        ("1N_probe_mixed.csv", "one,1,x.jpg", "cannot be read"),
        ("face_tid_mid.txt", "1.jpg one 2", "cannot be read"),
        ("name_5pts_score.txt", "1.jpg" + " x" * 11, "cannot be read"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_a_damaged_table_is_told_before_anything_is_embedded(
    table: str, row: str | None, said: str, chunk: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(ijb_files, "_PAIRS_PER_CHUNK", chunk)
    root = write_ijb_set(tmp_path / "IJBC")
    path = root / "meta" / f"ijbc_{table}"
    if row is None:
        path.unlink()
    else:
        path.write_text(path.read_text() + row + "\n")
    with pytest.raises(UserError, match=f"ijbc_{table}: .*({said})"):
        load_ijb(str(root))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither meta/ijbc_face_tid_mid\.txt"):
        load_ijb(str(tmp_path))
    root = write_ijb_set(tmp_path / "IJBC")
    meta = root / "meta"
    groups, points = (meta / f"ijbc_{n}.txt" for n in ("face_tid_mid", "name_5pts_score"))
    intact, whole = groups.read_text(), points.read_text()
    groups.write_text("\n".join(intact.splitlines()[::-1]) + "\n")
    with pytest.raises(UserError, match="do not name the same images"):
        load_ijb(str(root))
    groups.write_text("1.jpg 3\n" + intact)
    with pytest.raises(UserError, match=r"face_tid_mid\.txt"):
        load_ijb(str(root))
    groups.write_text(intact.replace("1.jpg", "../1.jpg", 1))
    points.write_text(whole.replace("1.jpg", "../1.jpg", 1))
    with pytest.raises(UserError, match="leaves the folder"):
        load_ijb(str(root))
    groups.write_text(intact)
    points.unlink()
    with pytest.raises(UserError, match=r"name_5pts_score\.txt: is missing"):
        load_ijb(str(root))
    points.write_text(whole)
    (root / "loose_crop" / "3.jpg").write_bytes(b"no image")
    found = load_ijb(str(root))
    with pytest.raises(RunError, match=r"3\.jpg: cannot be used"):
        found.read(0, 5, 28)
    with (meta / "ijbc_template_pair_label.txt").open("a") as file:
        file.write("100 999 0\n")
    rows = np.ones((found.count, 2), np.float32)
    with pytest.raises(UserError, match="template 999 is in a protocol, but it has no image"):
        verify_templates(found, *pool_templates(rows, found.scores, found.templates, found.media))
