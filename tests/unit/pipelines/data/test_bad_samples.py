"""The record of bad samples; tests/distributed/test_pretrain.py has whole runs with some."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mhe_dist.config.data import DataConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from pipelines.data.bad_samples import BAD_SAMPLES_FILE, MAX_NAMED, BadSamples, BadSampleTally
from pipelines.shards.index import Fault


def lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / BAD_SAMPLES_FILE).read_text().splitlines()]


def test_names_are_bounded_and_counts_are_not() -> None:
    one, other = BadSampleTally(), BadSampleTally()
    one.add(5000, [Fault(f"a{number}", "") for number in range(MAX_NAMED + 5)])
    other.add(5000, [Fault("b", ""), Fault("a0", ""), Fault("a0", "")])
    assert (one.count, len(one.samples)) == (MAX_NAMED + 5, MAX_NAMED)
    other.merge(one)
    assert (other.seen, other.count, len(other.samples)) == (10_000, MAX_NAMED + 8, MAX_NAMED)
    assert list(other.samples)[:3] == ["b", "a0", "a1"]


def test_a_process_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    first, tally = BadSamples(Topology(), str(tmp_path), None), BadSampleTally()
    tally.add(10, [Fault("a", "broken")])
    first.gather(tally)
    state = json.loads(json.dumps(first.state()))
    tally.add(10, [Fault("lost", "seen after the checkpoint")])
    first.gather(tally)
    assert [line["place"] for line in lines(tmp_path)] == ["a", "lost"]

    second, tally = BadSamples(Topology(), str(tmp_path), state), BadSampleTally()
    tally.add(10, [Fault("b", "Ünlesbar\n"), Fault("a", "broken")])
    for _ in range(2):  # what was gathered before is not added again
        second.gather(tally)
    assert (second.total.seen, second.total.count) == (20, 3)
    assert lines(tmp_path) == [
        {"place": "a", "reason": "broken"},
        {"place": "b", "reason": "Ünlesbar\n"},
    ]


def test_secrets_of_urls_are_in_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A presigned tar is a place, too; two signatures of one file are one place."""
    tally, samples = BadSampleTally(), BadSamples(Topology(), str(tmp_path), None)
    url = "https://user:hunter22@h/x/a.tar?X-Amz-Signature"
    tally.add(9, [Fault(f"sample 3 of {url}={sign}", f"{url}={sign}") for sign in ("s1", "s2")])
    samples.gather(tally)
    clean = "https://***@h/x/a.tar?X-Amz-Signature=***"
    assert lines(tmp_path) == [{"place": f"sample 3 of {clean}", "reason": clean}]
    assert samples.state()["samples"] == {f"sample 3 of {clean}": clean}
    assert samples.total.count == 2 and "hunter22" not in caplog.text and clean in caplog.text


def test_a_run_without_any_says_so(tmp_path: Path) -> None:
    BadSamples(Topology(), str(tmp_path), None).gather(BadSampleTally(seen=5))
    assert lines(tmp_path) == []


def test_the_share_of_bad_samples_is_that_of_an_epoch_or_of_all_that_were_drawn() -> None:
    """A sample counts each time it is drawn, so what an epoch allows, two allow twice."""
    data = DataConfig(shards="x", max_bad_fraction=0.02)
    tally = BadSampleTally()
    tally.check(data, 100)
    tally.add(1, [Fault("a", "broken"), Fault("b", "broken")])
    tally.check(data, 100)  # two of the hundred of an epoch, which has only begun
    tally.add(99, [Fault("c", "torn")])
    with pytest.raises(RunError, match=r"3 bad samples, .*=0.02 of 100; the last named: c: torn"):
        tally.check(data, 100)
    tally.add(50, [])
    tally.check(data, 100)  # three of 150
    with pytest.raises(RunError, match=r"c: torn; data.on_bad_sample=skip would go on"):
        tally.check(data.model_copy(update={"on_bad_sample": "fail"}), 100)


def test_a_disk_that_refuses_the_names_ends_no_run(tmp_path: Path) -> None:
    refusing, tally = tmp_path / "run", BadSampleTally(seen=5, count=1, samples={"a": "damaged"})
    refusing.write_text("a file where the folder should be")
    samples = BadSamples(Topology(), str(refusing), None)
    samples.gather(tally)
    assert samples.state()["samples"] == {"a": "damaged"}
    refusing.unlink()
    samples.gather(tally)
    assert (refusing / BAD_SAMPLES_FILE).exists(), "it is tried again"


@pytest.mark.usefixtures("prompt_retries")
def test_a_store_that_refuses_the_names_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    url, left = "memory://names/run", [TimeoutError("slow") for _ in range(6)]
    real = MemoryFileSystem.put_file

    def failing(self: MemoryFileSystem, *paths: str) -> None:
        if left:
            raise left.pop()
        real(self, *paths)

    monkeypatch.setattr(MemoryFileSystem, "put_file", failing)
    samples = BadSamples(Topology(), url, None)
    tally = BadSampleTally(seen=5, count=1, samples={"a": "damaged"})
    samples.gather(tally)
    store = fsspec.filesystem("memory")
    assert not left and not store.exists(f"{url}/{BAD_SAMPLES_FILE}")
    samples.gather(tally)
    assert b"damaged" in store.cat_file(f"{url}/{BAD_SAMPLES_FILE}"), "it is tried again"
