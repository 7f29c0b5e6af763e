"""Launchers for clusters: what `ray up`, `ray submit` and batch systems need. Imports nothing of ncsn or pipeline."""
