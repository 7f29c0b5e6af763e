"""The pipeline: one module per DVC stage, each run as `python -m pipeline.<stage>`."""

import atexit
import gc
import sys

# By default Python looks for cycles among each 700 new objects that stay, a sixth of the time of our imports, and among
# all of them when it ends, thrice, which takes as long again. It leaves out frozen ones; but what triton, which torch's
# compiler loads, then leaves behind it reports as leaks: there it looks twice.
gc.set_threshold(50_000)
atexit.register(lambda: gc.disable() if "triton" in sys.modules else gc.freeze())
