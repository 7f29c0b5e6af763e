"""What the official code computed, and our networks with its weights."""

from pathlib import Path

import torch

from ncsn.networks import MLP, NCSN, DDPMpp, NCSNpp, NCSNv2, NCSNv2Deeper, NCSNv2Deepest

FOLDER = Path(__file__).parent.parent / "golden"
NETWORKS = {
    "ncsn_16": NCSN,
    "ncsn_32": NCSN,
    "ncsnv2_16": NCSNv2,
    "ncsnv2_32": NCSNv2,
    "ncsnv2deeper_16": NCSNv2Deeper,
    "ncsnv2deepest_16": NCSNv2Deepest,
}


def official(name):
    """The golden data of one of NETWORKS, and the network with its weights."""
    golden = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    arguments = {"sigmas": golden["sigmas"]} if NETWORKS[name] is NCSN else {}
    network = NETWORKS[name](channels=3, width=8, **arguments)
    weights = {key: value for key, value in golden["state_dict"].items() if key != "sigmas"}
    assert list(network.state_dict()) == list(weights)
    network.load_state_dict(weights)
    return golden, network


def toy():
    """The golden data of the toy network, and the network with its weights."""
    golden = torch.load(FOLDER / "toy_ssm.pt", weights_only=True)
    network = MLP()
    assert list(network.state_dict()) == list(golden["mlp_state_dict"])
    network.load_state_dict(golden["mlp_state_dict"])
    return golden, network


def recorded(draws):
    """The noise of a sampler, as it was recorded."""
    return lambda x, step: draws[step]


def diffusion(name):
    """The golden data of one of the small networks of the SDE family, and the network as it is built for them."""
    golden = torch.load(FOLDER / "sde_ncsnpp_tiny.pt", weights_only=True)[name]
    config = golden["model_config"]
    arguments = {
        "channels": 3,
        "width": config["nf"],
        "multipliers": config["ch_mult"],
        "blocks": config["num_res_blocks"],
        "attention": (1,),  # at 8 of 16
        "dropout": config["dropout"],
        "rescale": not golden["centered"],
    }
    if name == "vp_cont_ddpmpp":
        return golden, DDPMpp(**arguments)
    return golden, NCSNpp(**arguments, sigmas=None if golden["continuous"] else golden["state_dict"]["sigmas"])
