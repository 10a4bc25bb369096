"""The record of a run: JSON lines, and several trackers as one."""

import errno
import json
import math
import os
import resource
import tempfile
import tracemalloc
from importlib import metadata
from io import FileIO

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mhe_dist.errors import RunError, StorageUnavailable, UserError
from mhe_dist.tracking import remote_file
from mhe_dist.tracking.base import CombinedTrackers, NullTracker, Tracker
from mhe_dist.tracking.factory import mlflow_uri, open_tracker, sqlite_uri
from mhe_dist.tracking.jsonl import JsonlTracker, read_records
from pipelines.pretrain.restarts import read_restart
from tests.support.config_sections import config


def steps(path):
    return [record["step"] for record in read_records(path)]


def test_every_tracker_fits_the_protocol(tmp_path):
    for tracker in (NullTracker(), JsonlTracker(str(tmp_path / "m")), CombinedTrackers([])):
        assert isinstance(tracker, Tracker)


def test_a_line_is_on_disk_when_log_returns_and_keeps_all_digits(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(str(path))
    tracker.start({}, {})
    tracker.log(3, {"loss": 0.1 + 0.2, "count": 7})
    (record,) = read_records(path)
    assert record["step"] == 3
    assert record["loss"] == 0.1 + 0.2
    assert record["count"] == 7
    assert record["time"] > 1e9


def test_what_is_not_finite_survives_as_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(str(path))
    tracker.start({}, {})
    tracker.log(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    assert '"nan"' in path.read_text()
    (record,) = read_records(path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_resumed_file_tells_one_story(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(str(path))
    first.start({}, {})
    for step in range(8):
        first.log(step, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while it wrote
    again = JsonlTracker(str(path))
    again.start({}, {}, step=5)
    assert steps(path) == [0, 1, 2, 3, 4]
    again.log(5, {"loss": 2.0})
    again.close()
    assert steps(path) == [0, 1, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_long_record_is_taken_up_line_by_line(tmp_path):
    """A million steps of twenty values are 0.5 GB in the file, and 2 GB as dicts."""
    path, lines = tmp_path / "metrics.jsonl", 5_000
    record = {f"some_metric_{number}": number + 0.125 for number in range(20)}
    with path.open("w") as file:
        for step in range(lines):
            file.write(json.dumps({"step": step, "time": 1.0 + step, "loss": 2.0, **record}) + "\n")
    tracemalloc.start()
    try:
        found = read_restart(str(path), lines - 10, 0.0)
        tracker = JsonlTracker(str(path))
        tracker.start({}, {}, step=lines - 10)
        peak = tracemalloc.get_traced_memory()[1]
        tracker.close()
        assert (found.lost_steps, found.count, found.last_record) == (10, 1, float(lines))
        assert peak < 1 << 20
        records = read_records(path)
        assert tracemalloc.get_traced_memory()[0] / len(records) < 2100, "names are kept once"
    finally:
        tracemalloc.stop()
    assert steps(path) == list(range(lines - 10))


def test_a_new_run_begins_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n')
    JsonlTracker(str(path)).start({}, {}, step=0)
    assert path.read_text() == ""


def test_a_spoiled_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nrubbish\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a record"):
        read_records(path)


def test_a_full_disk_costs_no_record_and_is_told_once(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(str(path))
    tracker.start({}, {})
    tracker.log(0, {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 1.0})
        assert steps(path) == [0]
        assert path.read_text().endswith("\n"), "no half of a line stays"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert steps(path) == [0, 1, 2, 3]
    assert caplog.text.count("cannot be written, will go on trying") == 1
    assert "3 lines came late" in caplog.text and not tracker.problem


def test_a_disk_that_loses_the_open_file_costs_no_record(tmp_path, caplog):
    """As NFS does (ESTALE): nothing more can be done with such a file, and the run goes on."""
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(str(path))
    tracker.start({}, {})
    tracker.log(0, {"loss": 1.0})

    class Stale(FileIO):
        def write(self, data):
            FileIO.write(self, data[:5])
            raise OSError(errno.ESTALE, "Stale file handle")

        def truncate(self, size=None):
            raise OSError(errno.ESTALE, "Stale file handle")

    tracker._file.close()
    tracker._file = Stale(path, "ab")
    tracker.log(1, {"loss": 1.0})
    assert steps(path) == [0] and "Stale file handle" in tracker.problem
    tracker.log(2, {"loss": 1.0})
    assert steps(path) == [0, 1, 2] and not tracker.problem
    tracker._file = Stale(path, "ab")
    tracker.log(3, {"loss": 1.0})
    path.rename(tmp_path / "away")
    tracker.close()
    assert "1 lines are lost" in tracker.problem and tracker.problem in caplog.text


def test_a_record_at_a_url_goes_on_where_it_was(tmp_path, monkeypatch):
    url = "memory://bucket/runs/r/metrics.jsonl"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(remote_file, "_EVERY_S", 0.0)
    first = JsonlTracker(url)
    first.start({}, {})
    for step in range(4):
        first.log(step, {"loss": 1.0})
    first.close()
    assert steps(url) == [0, 1, 2, 3]
    again = JsonlTracker(url)
    again.start({}, {}, step=2)
    again.log(2, {"loss": 2.0})
    again.close()
    assert [(r["step"], r["loss"]) for r in read_records(url)] == [(0, 1.0), (1, 1.0), (2, 2.0)]
    assert list(tmp_path.iterdir()) == [], "nothing is left in the temporary folder"


def sent_bytes(monkeypatch):
    """Bytes of each upload to a store in memory, as they come."""
    sent, put, pipe = [], MemoryFileSystem.put_file, MemoryFileSystem.pipe_file

    def counted_put(self, local, remote, *args, **kwargs):
        sent.append(os.path.getsize(local))
        return put(self, local, remote, *args, **kwargs)

    def counted_pipe(self, path, value, *args, **kwargs):
        sent.append(len(value))
        return pipe(self, path, value, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", counted_put)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", counted_pipe)
    return sent


def names_in(folder):
    return sorted(n.rsplit("/", 1)[1] for n in fsspec.filesystem("memory").ls(folder, detail=False))


def test_an_upload_of_a_long_record_sends_its_end_alone(tmp_path, monkeypatch):
    """A whole one each minute would be 1 GB a minute at the end of a month, 20 TB in all."""
    url = "memory://long/r/metrics.jsonl"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(remote_file, "PART_BYTES", 2000)
    sent = sent_bytes(monkeypatch)
    tracker = JsonlTracker(url)
    tracker.start({}, {})
    for step in range(400):
        tracker.log(step, {"loss": 1.0})
        assert tracker._copy._upload()
        if step % 50 == 0:
            assert steps(url) == list(range(step + 1))
    line = len(read_records_text(url)) / 400
    tracker.close()
    assert max(sent) <= 2000 + 2 * line
    assert steps(url) == list(range(400))
    assert names_in("/long/r")[:2] == ["metrics-00001.jsonl", "metrics-00002.jsonl"]


def read_records_text(url):
    filesystem, path = fsspec.core.url_to_fs(url)
    return b"".join(map(filesystem.cat_file, remote_file.iter_parts(filesystem, path)))


@pytest.mark.parametrize("cut", [0, 1, 57, 100, 399, 400])
@pytest.mark.parametrize("part_bytes", [2000, 1 << 20])
def test_a_long_record_at_a_url_is_cut_back_and_goes_on(cut, part_bytes, tmp_path, monkeypatch):
    folder = f"/cut{cut}-{part_bytes}"
    url = f"memory:/{folder}/metrics.jsonl"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(remote_file, "PART_BYTES", part_bytes)
    first = JsonlTracker(url)
    first.start({}, {})
    for step in range(400):
        first.log(step, {"loss": 1.0})
        first._copy._upload()
    first.close()
    monkeypatch.setattr(remote_file, "PART_BYTES", 2000)  # the other one: as earlier versions
    again = JsonlTracker(url)
    again.start({}, {}, step=cut)
    assert steps(url) == list(range(400)), "what is there stays until the next upload"
    for step in range(cut, 420):
        again.log(step, {"loss": 2.0})
        again._copy._upload()
        assert steps(url) == list(range(step + 1))
    again.close()
    losses = [record["loss"] for record in read_records(url)]
    assert losses == [1.0] * cut + [2.0] * (420 - cut)


@pytest.mark.usefixtures("prompt_retries")
@pytest.mark.parametrize("method", ["info", "cat_file"])
def test_a_store_that_fails_for_a_moment_is_no_record_without_lines(method, tmp_path, monkeypatch):
    """What was recorded before was lost: the new lines took the place of the first part."""
    url = "memory://moment/metrics.jsonl"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(3))
    fsspec.filesystem("memory").pipe_file("/moment/metrics.jsonl", lines.encode())
    real, left = getattr(MemoryFileSystem, method), [TimeoutError(), ConnectionResetError()]

    def failing(self, path, **more):
        if left:
            raise left.pop()
        return real(self, path, **more)

    monkeypatch.setattr(MemoryFileSystem, method, failing)
    tracker = JsonlTracker(url)
    tracker.start({}, {}, step=3)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert steps(url) == [0, 1, 2, 3]
    left += [TimeoutError() for _ in range(99)]
    with pytest.raises(StorageUnavailable):
        JsonlTracker(url).start({}, {}, step=3)


@pytest.mark.usefixtures("prompt_retries")
def test_the_last_lines_wait_a_moment_out(tmp_path, monkeypatch):
    """Whoever goes on with the run on another machine did not find them."""
    url = "memory://last/metrics.jsonl"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real, left = MemoryFileSystem.pipe_file, [TimeoutError(), ConnectionResetError()]

    def failing(self, *args, **more):
        if left:
            raise left.pop()
        real(self, *args, **more)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", failing)
    tracker = JsonlTracker(url)
    tracker.start({}, {})
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert steps(url) == [0] and list(tmp_path.iterdir()) == []


def test_what_an_earlier_version_sent_in_one_piece_is_not_sent_again(tmp_path, monkeypatch):
    url = "memory://earlier/metrics.jsonl"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(remote_file, "PART_BYTES", 2000)
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(300))
    fsspec.filesystem("memory").pipe_file("/earlier/metrics.jsonl", lines.encode())
    sent = sent_bytes(monkeypatch)
    tracker = JsonlTracker(url)
    tracker.start({}, {}, step=300)
    tracker.log(300, {"loss": 2.0})
    tracker.close()
    assert steps(url) == list(range(301))
    assert sum(sent) < 200 < len(lines)


def test_a_store_that_fails_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tracker = JsonlTracker("memory://bucket/metrics.jsonl")
    tracker.start({}, {})
    tracker._copy._url = "file:///dev/null/metrics.jsonl"
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert "cannot be written" in caplog.text
    assert str(tracker._path) in caplog.text
    assert tracker._path.is_relative_to(tmp_path)
    assert steps(tracker._path) == [0]


class Recorder(NullTracker):
    def __init__(self, run_id=None, fails=False):
        self.run_id, self.fails, self.closed = run_id, fails, None

    def close(self, status="finished"):
        self.closed = status
        if self.fails:
            raise RunError("no")


def test_all_trackers_are_closed_even_when_one_fails():
    first, second = Recorder(fails=True), Recorder(run_id="abc")
    both = CombinedTrackers([first, second])
    assert both.run_id == "abc"
    with pytest.raises(RunError):
        both.close("failed")
    assert (first.closed, second.closed) == ("failed", "failed")


def test_only_the_first_rank_keeps_a_record(tmp_path):
    assert isinstance(open_tracker(config(run={"dir": str(tmp_path)}), is_first=False), NullTracker)


def test_the_tracking_uri_comes_from_config_then_environment_then_sqlite(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plain = config(run={"dir": str(tmp_path)})
    assert mlflow_uri(plain) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert mlflow_uri(plain) == "http://server:5000"
    plain.tracking.uri = "http://other:5000"
    assert mlflow_uri(plain) == "http://other:5000"


def test_sqlite_cannot_live_at_a_url(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"run\.dir='s3://bucket/runs' is a URL.*tracking.uri"):
        mlflow_uri(config(run={"dir": "s3://bucket/runs"}))


# Python 3.10 has no newer one; it decodes nothing in a URL.
OLD_SQLALCHEMY = metadata.version("sqlalchemy") < "2.1"


@pytest.mark.parametrize("name", ["runs", "a b", "ü#'\"", "50%20", "what?", "a%3Fb?uri=true&x=%"])
def test_a_database_lies_where_the_folder_is_called_so(name, tmp_path):
    from sqlalchemy.engine import make_url

    file = tmp_path / name / "mlflow.db"
    if OLD_SQLALCHEMY and "?" in name:
        with pytest.raises(UserError, match=r"cannot open a database with `\?`.*Python 3\.11"):
            sqlite_uri(file)
        return
    found = make_url(sqlite_uri(file))
    assert found.database == str(file)
    assert (found.get_backend_name(), dict(found.query)) == ("sqlite", {})


def test_a_usual_database_has_the_usual_uri(tmp_path):
    assert sqlite_uri(tmp_path / "mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
