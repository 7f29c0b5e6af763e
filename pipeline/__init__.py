"""The pipeline: one module per DVC stage, each run as `python -m pipeline.<stage>`."""
