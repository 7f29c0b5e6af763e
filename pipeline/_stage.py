"""What every stage does at its edge: --help, params, logging, exit status."""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from pipeline import _params

log = logging.getLogger("pipeline")
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
INTERRUPTED = 128 + signal.SIGINT  # as shells say it


class StageError(RuntimeError):
    """A failure whose message tells the person all they need; printed without a traceback."""


class StoppedError(BaseException):
    """A stop that was asked for; what was done is saved, and the same command goes on. Exit status `STOPPED`.

    No Exception, like KeyboardInterrupt: a signal's handler raises it wherever the program is.
    """


class StopSignals:
    """The first SIGTERM or SIGUSR1 raises StoppedError; or, while `held`, is noted alone, for one who saves first.

    Attributes:
        name: Of the signal that came, None before.
        held: Whether signals wait.
    """

    NUMBERS = signal.SIGTERM, signal.SIGUSR1

    def __init__(self) -> None:
        self.name: str | None = None
        self.held = False
        self._given_up = False

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.getsignal(number) for number in self.NUMBERS}
        for number in self.NUMBERS:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        # A call in C that ends with a result just as the handler raises becomes a SystemError.
        if isinstance(error, SystemError) and isinstance(error.__cause__, StoppedError):
            raise error.__cause__

    def give_up(self) -> None:
        """From any thread: let the main one raise StoppedError now, held or not, for the signal that has come."""
        self._given_up = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: object) -> None:
        if self.name is not None and not self._given_up:
            return  # on the way out
        self.name = self.name or signal.Signals(number).name
        if self._given_up or not self.held:
            self._given_up = False
            self.stop()

    def stop(self) -> None:
        """Raise StoppedError if a signal has come."""
        if self.name is not None:
            raise StoppedError(
                f"stopped by {self.name}: what is done is saved, and the same command goes on from there"
            )


def progress(total: int, unit: str, what: str, done: int = 0) -> "tqdm[Any]":
    """A progress bar with pace and time left; where there is no terminal, a line each half minute."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=what,
        smoothing=0.05,
        mininterval=pause,
        maxinterval=max(pause, 10.0),
        miniters=0,  # a sign of life, too, when nothing is done yet
    )


def run(
    name: str,
    doc: str | None,
    main: Callable[..., object],
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Run one stage as a program: parse the command line, load params.yaml, call main, exit non-zero on failure.

    Args:
        name: Of the module.
        doc: Its docstring, shown by --help.
        main: Takes the params, and what `options` adds by name.
        options: Adds arguments to the parser.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", default="params.yaml", help="the composed parameters (default: %(default)s)")
    options(parser)
    args = vars(parser.parse_args())
    logging.basicConfig(format=f"%(asctime)s {name}: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    log.setLevel(logging.INFO)
    start = time.monotonic()
    try:
        main(_params.load(args.pop("params")), **args)
    except StoppedError as error:
        log.warning("%s (exit status %d)", error, STOPPED)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        log.warning("stopped by Ctrl-C: what is saved stays, and the same command goes on from there")
        sys.exit(INTERRUPTED)
    except (_params.ParamsError, StageError) as error:
        sys.exit(f"error: {error}")
    log.info("done in %.1f s", time.monotonic() - start)
