"""Noise-conditional score networks: noise levels, networks, objectives, samplers. Needs torch and numpy alone."""
