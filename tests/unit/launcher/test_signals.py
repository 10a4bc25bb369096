"""Signals: raised, deferred, ignored, and left alone off the main thread."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher import signals
from launcher.signals import (
    SIGNALS,
    Interrupted,
    interruptible,
    signals_deferred,
    signals_handled_by,
    signals_ignored,
)
from pipelines.data.decode import decode_image
from tests.support.waiting import Clock, wait_for

HANG_UP = """
import signal
from launcher.signals import interruptible, signals_deferred

with interruptible():
    signal.raise_signal(signal.SIGHUP)
    with signals_deferred() as check:
        signal.raise_signal(signal.SIGHUP)
        check()
print("goes on")
"""


@pytest.fixture(autouse=True)
def default_hang_up() -> Iterator[None]:
    """SIGHUP as a terminal starts programs, also where these tests run below `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Signals follow each other at once, however long this machine takes."""
    clock = Clock()
    monkeypatch.setattr(signals, "time", clock)
    return clock


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_becomes_an_exception_with_the_exit_code(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught, interruptible():
        signal.raise_signal(signum)
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) == before


class Finalized:
    """Something that a signal comes across while it is thrown away."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_during_a_finalizer_which_python_keeps_to_itself_comes_again() -> None:
    """The command went on, and did not hear who asked once more within three seconds."""
    before = sys.unraisablehook
    with pytest.raises(Interrupted) as caught, interruptible():
        Finalized()
        wait_for(lambda: False)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert sys.unraisablehook is before


def test_other_errors_of_finalizers_are_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)

    class Broken:
        def __del__(self) -> None:
            raise ValueError

    with interruptible():
        Broken()
    assert len(shown) == 1


def test_an_image_that_is_decoded_meanwhile_is_not_taken_for_a_damaged_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What stands for errors of any kind in other people's code does not stand for this."""

    def decode(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("pipelines.data.decode._by_pillow", decode)
    with pytest.raises(Interrupted), interruptible():
        decode_image(b"not decoded", 8)


def test_a_deferred_signal_is_raised_where_it_is_safe() -> None:
    with pytest.raises(Interrupted) as caught, signals_deferred() as check:
        check()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        check()
        pytest.fail("the check should have raised")
    assert caught.value.exit_code == 128 + signal.SIGTERM
    with pytest.raises(Interrupted), signals_deferred():
        signal.raise_signal(signal.SIGINT)


def test_the_first_sigterm_calls_a_function_and_the_next_signal_raises() -> None:
    calls: list[int] = []
    with (
        pytest.raises(Interrupted) as caught,
        signals_deferred(lambda: calls.append(1), 60.0) as check,
    ):
        signal.raise_signal(signal.SIGTERM)
        check()
        check()
        assert calls == [1]
        signal.raise_signal(signal.SIGINT)
        check()
    assert caught.value.exit_code == 128 + signal.SIGINT
    with signals_deferred(lambda: calls.append(2), 60.0):
        signal.raise_signal(signal.SIGTERM)
    assert calls == [1, 2], "also at the end of the block, which then ends well"
    with pytest.raises(Interrupted), signals_deferred(lambda: calls.append(3), 0.0) as check:
        signal.raise_signal(signal.SIGTERM)
        check()
        check()


def test_a_process_and_its_group_are_told_once(clock: Clock) -> None:
    """`timeout` and Slurm tell both; the second signal must not cut off what the first began."""
    with interruptible():
        for number in (signal.SIGTERM, signal.SIGINT):
            with pytest.raises(Interrupted):
                signal.raise_signal(number)
            signal.raise_signal(number)
    with signals_deferred(lambda: None, 60.0) as check:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            check()
    with pytest.raises(Interrupted) as caught, signals_deferred(lambda: None, 60.0) as check:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            check()
            clock.sleep(signals.REPEAT_S)
    assert caught.value.unsaved, "somebody asks again: it is not waited for"


@pytest.mark.parametrize(
    ("signum", "unsaved", "code"),
    [
        (signal.SIGTERM, False, 75),
        (signal.SIGTERM, True, 143),
        (signal.SIGINT, False, 130),
        (signal.SIGHUP, False, 129),
    ],
)
def test_a_run_that_lost_nothing_is_preempted(signum: int, unsaved: bool, code: int) -> None:
    assert Interrupted(signum, unsaved).run_exit_code == code


def test_a_command_below_nohup_outlives_its_terminal() -> None:
    words = ["nohup", sys.executable, "-c", HANG_UP]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "goes on"), ended.stderr


def test_a_background_job_whose_shell_had_it_ignore_ctrl_c_hears_sigint() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_handled_by(lambda number, frame: heard.append(number)):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_cleaning_up_is_not_interrupted() -> None:
    with interruptible():
        with signals_ignored():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_another_thread_leaves_the_handlers_as_they_are() -> None:
    def enter_all() -> list[object]:
        with interruptible(), signals_deferred() as check, signals_ignored():
            check()
            return [signal.getsignal(number) for number in SIGNALS]

    before: list[object] = [signal.getsignal(number) for number in SIGNALS]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter_all).result() == before
