"""What the tests of this room embed: a set of four shards, with a run that was trained on it."""

from __future__ import annotations

import pytest

from tests.support import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: str) -> str:
    return tiny.trained_run(tmp_path_factory.mktemp("runs"), shards).run.path
