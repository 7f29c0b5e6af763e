"""The pipeline: one module per DVC stage, each run as `python -m pipeline.<stage>`."""

import gc

# By default each 700 new objects that stay are looked through for cycles: a sixth of the time of our imports.
gc.set_threshold(50_000)
