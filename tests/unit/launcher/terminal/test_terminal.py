"""Signals and file descriptors: tested in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.signals import SIGNALS, Interrupted, deferred, interruptible, undisturbed


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_becomes_an_exception_with_the_exit_code(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught, interruptible():
        signal.raise_signal(signum)
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) == before


def test_a_deferred_signal_is_raised_where_it_is_safe() -> None:
    with pytest.raises(Interrupted) as caught, deferred() as check:
        check()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        check()
        pytest.fail("the check should have raised")
    assert caught.value.exit_code == 128 + signal.SIGTERM
    with pytest.raises(Interrupted), deferred():
        signal.raise_signal(signal.SIGINT)


def test_sigterm_is_answered_gently_once_and_then_not() -> None:
    asked: list[int] = []
    with pytest.raises(Interrupted) as caught, deferred(lambda: asked.append(1), 60.0) as check:
        signal.raise_signal(signal.SIGTERM)
        check()
        check()
        assert asked == [1]
        signal.raise_signal(signal.SIGINT)
        check()
    assert caught.value.exit_code == 128 + signal.SIGINT
    with deferred(lambda: asked.append(2), 60.0):
        signal.raise_signal(signal.SIGTERM)
    assert asked == [1, 2], "also at the end of the block, which then ends well"
    with pytest.raises(Interrupted), deferred(lambda: asked.append(3), 0.0) as check:
        signal.raise_signal(signal.SIGTERM)
        check()
        check()


def test_tidying_up_is_not_interrupted() -> None:
    with interruptible():
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_only_our_own_output_reaches_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "driver.log"
    done = python(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from launcher import console\n"
        "with console.only_ours(Path(sys.argv[1])):\n"
        "    console.say('ours')\n"
        "    console.complain('ours too')\n"
        "    print('theirs')\n"
        "    os.write(2, b'native\\n')\n"
        "    os.system('echo child')\n"
        "print('after')\n"
        "console.say('again')\n",
        str(log),
    )
    assert done.stdout.split() == ["ours", "after", "again"]
    assert done.stderr == "error: ours too\n"
    assert sorted(log.read_text().split()) == ["child", "native", "theirs"]


def test_a_worker_writes_everything_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    script = (
        "import logging, os, sys\n"
        "from pathlib import Path\n"
        "from launcher.ray_cluster.worker import write_output_to\n"
        "write_output_to(Path(sys.argv[1]))\n"
        "print('printed', flush=True)\n"
        "logging.getLogger('some.library').info('logged')\n"
        "os.system('echo child')\n"
    )
    for _ in range(2):
        done = python(script, str(log))
        assert (done.stdout, done.stderr) == ("", "")
    text = log.read_text()
    assert text.count("printed") == text.count("child") == 2
    assert text.count("INFO some.library: logged") == 2
