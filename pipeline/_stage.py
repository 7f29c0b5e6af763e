"""What every stage does at its edge: --help, params, logging, exit status."""

import argparse
import logging
import sys
import time
from collections.abc import Callable

from pipeline import _params

log = logging.getLogger("pipeline")


class StageError(RuntimeError):
    """A failure whose message tells the person all they need; printed without a traceback."""


def run(name: str, doc: str | None, main: Callable[[_params.Params], None]) -> None:
    """Run one stage as a program: parse the command line, load params.yaml, call main, exit non-zero on failure."""
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", default="params.yaml", help="the composed parameters (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(format=f"%(asctime)s {name}: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    log.setLevel(logging.INFO)
    start = time.monotonic()
    try:
        main(_params.load(args.params))
    except (_params.ParamsError, StageError) as error:
        sys.exit(f"error: {error}")
    log.info("done in %.1f s", time.monotonic() - start)
