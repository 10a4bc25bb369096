"""What the paths of a config mean in a pod: only what lies on the claim outlives it."""

from __future__ import annotations

import posixpath
from typing import NamedTuple

from fsspec.core import split_protocol

from launcher.kubernetes.manifests import CLAIM_FOLDER, HOME_FOLDER, TMP_FOLDER
from launcher.ray_cluster.code_package import map_paths
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError

_SCRATCH_KEYS = ("data.remote.cache_dir", "head.bank.path")
_SCRATCH = (TMP_FOLDER, HOME_FOLDER)
_URL = "s3://BUCKET/FOLDER"


class PlacedConfig(NamedTuple):
    """A config for pods.

    Attributes:
        config: with the paths that hold in a pod.
        moved: (key, path before, path on the claim) of each relative path.
        on_claim: keys with a path on the claim.
    """

    config: Config
    moved: list[tuple[str, str, str]]
    on_claim: list[str]


def place_on_claim(config: Config, claim: str) -> PlacedConfig:
    """Give every relative path its place on the claim, and refuse paths that a pod does not keep.

    Args:
        config: of the run.
        claim: PersistentVolumeClaim that is mounted at `/data`; empty: none.

    Raises:
        UserError: a path is relative and there is no claim, or it lies outside the claim; names
            every key with its cure.
    """
    placed = PlacedConfig(config, [], [])
    wrong: list[str] = []

    def pod_path(key: str, path: str) -> str:
        """Where the pods find the path of this key; notes what was placed, and what is wrong."""
        protocol, plain = split_protocol(path)
        if protocol not in (None, "file", "local"):
            return path
        target = posixpath.normpath(posixpath.join(CLAIM_FOLDER, plain))
        relative = not posixpath.isabs(plain)
        if _is_below(target, CLAIM_FOLDER) and (claim or not relative):
            placed.on_claim.append(key)
            if relative:
                placed.moved.append((key, path, target))
            return target
        if key in _SCRATCH_KEYS and any(_is_below(target, each) for each in _SCRATCH):
            return target
        wrong.append(f"{key}={path}: {_cure(key, plain, relative, claim)}")
        return path

    made = map_paths(config, pod_path)
    if wrong:
        raise UserError(
            "\n  ".join(["a pod keeps nothing but what is on its claim or at a URL:", *wrong])
        )
    return placed._replace(config=made)


def require_claim(placed: PlacedConfig, claim: str) -> None:
    """Refuse paths on a claim that no pod mounts.

    Raises:
        UserError: names the keys.
    """
    if placed.on_claim and not claim:
        raise UserError(
            f"{', '.join(placed.on_claim)}: in {CLAIM_FOLDER}, where nothing is mounted without a "
            "claim: --claim NAME of a PersistentVolumeClaim, or give URLs"
        )


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def _cure(key: str, plain: str, relative: bool, claim: str) -> str:
    if key in _SCRATCH_KEYS:
        return f"give a folder of the pod in {TMP_FOLDER}, or one on a claim in {CLAIM_FOLDER}"
    if relative and not claim:
        target = posixpath.normpath(posixpath.join(CLAIM_FOLDER, plain))
        return (
            f"is relative, and the pod's own folders end with it: with --claim NAME it becomes "
            f"{target}; or give a URL, {key}={_URL}"
        )
    name = posixpath.basename(plain.rstrip("/"))
    return (
        f"is in no pod: put it on a PersistentVolumeClaim (--claim NAME, "
        f"{key}={CLAIM_FOLDER}/{name}), or give a URL, {key}={_URL}"
    )
