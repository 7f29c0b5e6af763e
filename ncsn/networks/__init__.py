"""Score networks: `score(x, sigma)` with x of shape (B, C, H, W) and one noise level an image, shape (B,)."""

from ncsn.networks.ncsnv2 import NCSNv2

__all__ = ["NCSNv2"]
