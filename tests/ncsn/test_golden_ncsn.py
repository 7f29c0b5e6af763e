"""The 2019 network under the official code's objective and samplers: sliced score matching, Langevin, inpainting."""

from pathlib import Path

import pytest
import torch

from ncsn import samplers
from ncsn.losses import annealed_sliced_score_matching
from ncsn.networks import NCSN

GOLDEN = Path(__file__).parent.parent / "golden"


def _official(name):
    golden = torch.load(GOLDEN / name, weights_only=True)
    network = NCSN(channels=3, width=8, sigmas=golden["sigmas"])
    network.load_state_dict(golden["state_dict"])
    return golden, network


def _recorded(draws):
    return lambda x, step: draws[step]


def test_sliced_score_matching_and_its_gradient():
    golden, network = _official("ncsn_16.pt")
    case = golden["ssm_vr_annealed"]
    v = case["v"].view(case["n_particles"], *case["x"].shape)
    loss = annealed_sliced_score_matching(network, case["x"], golden["sigmas"][case["labels"]], case["z"], v).mean()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    total = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert total.item() == pytest.approx(case["grad_norm_total"], rel=1e-3)


def test_trajectory_of_2019():
    """What that code returned is the state before each step, clamped."""
    golden, network = _official("ncsn_16.pt")
    case = golden["ald_2019"]
    states = [case["x_init"]]
    final = samplers.annealed_langevin(
        network,
        case["x_init"],
        golden["sigmas"],
        epsilon=case["step_lr"],
        steps_per_level=case["n_steps_each"],
        denoise=False,
        noise=_recorded(case["noises"]),
        observe=lambda x, step, sigma: states.append(x),
    )
    assert len(states) == 21
    returned = torch.stack(states[:-1]).clamp(0, 1)
    assert (returned - case["returned_images"]).abs().max() < 1e-5
    scale = case["x_final_unclamped"].abs().max()
    assert (final - case["x_final_unclamped"]).abs().max() < 1e-5 * scale


def test_trajectory_of_2020():
    golden, network = _official("ncsn_16.pt")
    case = golden["ald_v2"]
    states = []
    options = {
        "epsilon": case["step_lr"],
        "steps_per_level": case["n_steps_each"],
        "noise": _recorded(case["noises"]),
    }
    final = samplers.annealed_langevin(
        network,
        case["x_init"],
        golden["sigmas"],
        observe=lambda x, step, sigma: states.append(x),
        **options,
    )
    scale = case["images_after_each_step"].abs().max()
    assert (torch.stack(states) - case["images_after_each_step"]).abs().max() < 1e-5 * scale
    assert (states[-1] - case["final_no_denoise"]).abs().max() < 1e-5 * scale
    assert (final - case["final_denoise"]).abs().max() < 1e-5 * scale


def test_inpainting_of_2019():
    golden, network = _official("ncsn_32.pt")
    case = golden["inpaint_2019"]
    reference = case["refer_image"].repeat_interleave(2, 0)
    mask = torch.arange(32) < 16
    z = torch.nn.functional.pad(case["noises_half"], (0, 16))
    T = case["n_steps_each"]
    states = []
    project = samplers.inpainting(reference, mask, _recorded(z), steps_per_draw=T)
    final = samplers.annealed_langevin(
        network,
        case["x_init"].flatten(0, 1),
        golden["sigmas"],
        epsilon=case["step_lr"],
        steps_per_level=T,
        denoise=False,
        noise=_recorded(case["noises_full"]),
        project=project,
        observe=lambda x, step, sigma: states.append(x),
    )
    scale = case["x_final_unclamped"].abs().max()
    assert (final - case["x_final_unclamped"]).abs().max() < 1e-5 * scale
    last = project(states[-2], float(golden["sigmas"][-1]), len(states) - 1)
    assert (last.clamp(0, 1) - case["last_returned"]).abs().max() < 1e-5
