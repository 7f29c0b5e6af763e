"""Signals that come when a program may not be broken off."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from pipeline import _ray
from pipeline._stage import StoppedError, StopSignals


@contextmanager
def thread():
    """Another thread, which takes signals that the main one has blocked."""
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        yield
    finally:
        over.set()
        other.join()


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, StoppedError), (signal.SIGUSR1, StoppedError), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_while_ray_starts_is_answered_when_it_has_started(number, error):
    started = False
    with thread(), StopSignals() as signals:
        ours = signal.getsignal(number)
        with pytest.raises(error), _ray._signals_kept():
            signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("Ray's handler"))
            send(number)
            started = True
        assert started
        assert signal.getsignal(number) is ours
        assert signals.name == (None if number == signal.SIGINT else number.name)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_second_ctrl_c_does_not_wait():
    with thread(), pytest.raises(KeyboardInterrupt), _ray._signals_kept():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("it waited")


def test_ray_s_handler_stays_where_there_is_none():
    def theirs(number, frame):
        pass

    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with _ray._signals_kept():
            signal.signal(signal.SIGTERM, theirs)
        assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)
