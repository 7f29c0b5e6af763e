"""The 2019 network under the official code's objective and samplers: sliced score matching, Langevin, inpainting."""

import pytest
import torch

from ncsn import samplers
from ncsn.losses import annealed_sliced_score_matching
from tests.ncsn.golden import official, recorded


def test_sliced_score_matching_and_its_gradient():
    golden, network = official("ncsn_16")
    case = golden["ssm_vr_annealed"]
    v = case["v"].view(case["n_particles"], *case["x"].shape)
    loss = annealed_sliced_score_matching(network, case["x"], golden["sigmas"][case["labels"]], case["z"], v).mean()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    total = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert total.item() == pytest.approx(case["grad_norm_total"], rel=1e-3)


def test_trajectory_of_2019():
    """What that code returned is the state before each step, clamped."""
    golden, network = official("ncsn_16")
    case = golden["ald_2019"]
    states = [case["x_init"]]
    final = samplers.annealed_langevin(
        network,
        case["x_init"],
        golden["sigmas"],
        epsilon=case["step_lr"],
        steps_per_level=case["n_steps_each"],
        denoise=False,
        noise=recorded(case["noises"]),
        observe=lambda x, step, sigma: states.append(x),
    )
    assert len(states) == 21
    returned = torch.stack(states[:-1]).clamp(0, 1)
    assert (returned - case["returned_images"]).abs().max() < 1e-5
    scale = case["x_final_unclamped"].abs().max()
    assert (final - case["x_final_unclamped"]).abs().max() < 1e-5 * scale


def test_inpainting_of_2019():
    golden, network = official("ncsn_32")
    case = golden["inpaint_2019"]
    reference = case["refer_image"].repeat_interleave(2, 0)
    mask = torch.arange(32) < 16
    z = torch.nn.functional.pad(case["noises_half"], (0, 16))
    T = case["n_steps_each"]
    states = []
    project = samplers.inpainting(reference, mask, recorded(z), steps_per_draw=T)
    final = samplers.annealed_langevin(
        network,
        case["x_init"].flatten(0, 1),
        golden["sigmas"],
        epsilon=case["step_lr"],
        steps_per_level=T,
        denoise=False,
        noise=recorded(case["noises_full"]),
        project=project,
        observe=lambda x, step, sigma: states.append(x),
    )
    scale = case["x_final_unclamped"].abs().max()
    assert (final - case["x_final_unclamped"]).abs().max() < 1e-5 * scale
    last = project(states[-2], float(golden["sigmas"][-1]), len(states) - 1)
    assert (last.clamp(0, 1) - case["last_returned"]).abs().max() < 1e-5
