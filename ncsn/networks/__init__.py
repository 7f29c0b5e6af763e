"""Score networks: `score(x, sigma)` with x of shape (B, C, H, W) and one noise level an image, shape (B,)."""

from ncsn.networks.base import ScoreNetwork
from ncsn.networks.mlp import MLP
from ncsn.networks.ncsn import NCSN, NCSNDeeper
from ncsn.networks.ncsnpp import DDPM, DDPMpp, NCSNpp
from ncsn.networks.ncsnv2 import NCSNv2, NCSNv2Deeper, NCSNv2Deepest
from ncsn.networks.refinenet import RefineNet
from ncsn.networks.resscore import ResScore
from ncsn.networks.unet import UNet

NETWORKS: dict[str, type[ScoreNetwork]] = {
    "ddpm": DDPM,
    "ddpmpp": DDPMpp,
    "ncsn": NCSN,
    "ncsn_deeper": NCSNDeeper,
    "ncsnpp": NCSNpp,
    "ncsnv2": NCSNv2,
    "ncsnv2_deeper": NCSNv2Deeper,
    "ncsnv2_deepest": NCSNv2Deepest,
    "refinenet": RefineNet,
    "resscore": ResScore,
    "unet": UNet,
}

__all__ = [
    "DDPM",
    "MLP",
    "NCSN",
    "NETWORKS",
    "DDPMpp",
    "NCSNDeeper",
    "NCSNpp",
    "NCSNv2",
    "NCSNv2Deeper",
    "NCSNv2Deepest",
    "RefineNet",
    "ResScore",
    "ScoreNetwork",
    "UNet",
]
