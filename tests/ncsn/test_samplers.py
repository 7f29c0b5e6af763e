"""Langevin dynamics: the official code's trajectories, exact variances on Gaussian data, what projections keep."""

import math

import pytest
import torch

from ncsn import noise, random, samplers
from ncsn.networks import NCSN, NETWORKS, NCSNv2
from ncsn.sde import VP
from ncsn.toy import Mixture
from tests.ncsn.golden import official, recorded, toy


@pytest.mark.parametrize("name", ["ncsn_16", "ncsnv2_16", "ncsnv2_32", "ncsnv2deeper_16", "ncsnv2deepest_16"])
def test_trajectory_of_2020(name):
    golden, network = official(name)
    case = golden["ald_v2"]
    states = []
    final = samplers.annealed_langevin(
        network,
        case["x_init"],
        golden["sigmas"],
        epsilon=case["step_lr"],
        steps_per_level=case["n_steps_each"],
        noise=recorded(case["noises"]),
        observe=lambda x, step, sigma: states.append(x),
    )
    scale = case["images_after_each_step"].abs().max()
    assert (torch.stack(states) - case["images_after_each_step"]).abs().max() < 1e-5 * scale
    assert (states[-1] - case["final_no_denoise"]).abs().max() < 1e-5 * scale
    assert (final - case["final_denoise"]).abs().max() < 1e-5 * scale


def test_inpainting_of_the_official_code():
    """Ours pastes once more at the end; what is observed after the last step is what that code returns."""
    golden, network = official("ncsnv2_16")
    case = golden["inpaint_v2"]
    x = case["x_init"].flatten(0, 1)
    reference = case["refer_image"].repeat_interleave(2, 0)
    mask = torch.arange(16) < case["cols"]
    z = torch.nn.functional.pad(case["noises_half"], (0, 16 - case["cols"]))
    steps = []
    final = samplers.annealed_langevin(
        network,
        x,
        golden["sigmas"],
        epsilon=case["step_lr"],
        steps_per_level=case["n_steps_each"],
        denoise=False,
        noise=recorded(case["noises_full"]),
        project=samplers.inpainting(reference, mask, recorded(z)),
        observe=lambda x, step, sigma: steps.append(x),
    )
    scale = case["x_final"].abs().max()
    assert (steps[-1] - case["x_final"]).abs().max() < 1e-5 * scale
    before_last = samplers.inpainting(reference, mask, recorded(z))(steps[-2], float(golden["sigmas"][-1]), 19)
    assert (before_last - case["last_returned"]).abs().max() < 1e-5 * scale
    assert torch.equal(final[..., ~mask], steps[-1][..., ~mask])
    assert torch.equal(final[..., mask], (reference + float(golden["sigmas"][-1]) * z[-1])[..., mask])


def test_interpolation_of_the_official_code():
    golden, network = official("ncsnv2_16")
    case = golden["interpolation_v2"]
    n = case["n_interpolations"]
    final = samplers.annealed_langevin(
        network,
        case["x_init"].repeat_interleave(n, 0),
        golden["sigmas"],
        epsilon=case["step_lr"],
        steps_per_level=case["n_steps_each"],
        denoise=False,
        noise=samplers.interpolated(
            recorded(case["noises_p"].repeat_interleave(n, 1)),
            recorded(case["noises_q"].repeat_interleave(n, 1)),
            torch.linspace(0, math.pi / 2, n).repeat(2),
        ),
    )
    assert (final - case["final"]).abs().max() < 1e-5 * case["final"].abs().max()


def test_toy_trajectories_of_the_official_code():
    """Its step, x + a / 2 s + sqrt(a) z, is ours with epsilon = a / 2."""
    golden, _ = toy()
    mixture = Mixture(torch.tensor([0.8, 0.2]), torch.tensor([[5.0, 5.0], [-5.0, -5.0]]), 0.0)
    plain, annealed = golden["toy_langevin"], golden["toy_annealed_langevin"]
    x = samplers.langevin(
        mixture.score,
        plain["x_init"],
        epsilon=plain["lr"] / 2,
        steps=plain["step"],
        sigma=1.0,
        noise=recorded(plain["noises"]),
    )
    assert (x - plain["final"]).abs().max() < 1e-5 * plain["final"].abs().max()
    x = samplers.annealed_langevin(
        mixture.score,
        annealed["x_init"],
        annealed["sigmas"],
        epsilon=annealed["lr"] / 2,
        steps_per_level=annealed["n_steps_each"],
        denoise=False,
        noise=recorded(annealed["noises"]),
    )
    assert (x - annealed["final"]).abs().max() < 1e-5 * annealed["final"].abs().max()


def test_langevin_is_one_level_of_the_annealed():
    index, seen = torch.arange(5), []
    mixture = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 0.3)
    options = {"epsilon": 0.02, "noise": random.seeded_noise(1, index)}
    start = random.start_images(1, index, (2,))
    x = samplers.langevin(
        mixture.score, start, steps=7, sigma=0.2, observe=lambda x, step, sigma: seen.append((step, sigma)), **options
    )
    one = torch.tensor([0.2], dtype=torch.float64)
    annealed = samplers.annealed_langevin(mixture.score, start, one, steps_per_level=7, denoise=False, **options)
    assert torch.equal(x, annealed)
    assert seen == [(step, 0.2) for step in range(7)]
    assert x.isfinite().all()


@pytest.mark.parametrize("denoise", [False, True])
def test_variance_on_gaussian_data_follows_the_exact_recursion(denoise):
    """For data N(0, s^2) every step is linear: v <- (1 - a / (s^2 + sigma^2))^2 v + 2 a."""
    s, n = 0.5, 200_000
    sigmas = noise.geometric_sigmas(3.0, 0.05, 8)
    epsilon, T = noise.suggest_epsilon(sigmas, 5), 5
    v = 1 / 12
    for sigma, alpha in zip(sigmas.tolist(), noise.langevin_step_sizes(sigmas, epsilon).tolist(), strict=True):
        for _ in range(T):
            v = (1 - alpha / (s**2 + sigma**2)) ** 2 * v + 2 * alpha
    if denoise:
        v *= (1 - sigmas[-1].item() ** 2 / (s**2 + sigmas[-1].item() ** 2)) ** 2
    index = torch.arange(n)
    x = samplers.annealed_langevin(
        lambda x, sigma: -x / (s**2 + sigma[:, None] ** 2),
        random.start_images(0, index, (1,)) - 0.5,
        sigmas,
        epsilon=epsilon,
        steps_per_level=T,
        denoise=denoise,
        noise=random.seeded_noise(0, index),
    )
    assert abs(x.mean()) < 5 * math.sqrt(v / n)
    assert abs(x.var() - v) < 5 * v * math.sqrt(2 / n)


def test_annealing_finds_the_weights_of_the_modes():
    """Figure 3 of arXiv:1907.05600: 0.8 of the mass in one mode; chains at the smallest level alone would keep half."""
    mixture = Mixture(torch.tensor([0.8, 0.2]), torch.tensor([[5.0, 5.0], [-5.0, -5.0]]), 0.0)
    n, index = 4000, torch.arange(4000)
    start = 16 * random.start_images(0, index, (2,)) - 8
    options = {"epsilon": 0.05, "steps_per_level": 100, "denoise": False, "noise": random.seeded_noise(0, index)}
    annealed = samplers.annealed_langevin(mixture.score, start, noise.geometric_sigmas(20.0, 1.0, 10), **options)
    plain = samplers.annealed_langevin(mixture.score, start, torch.tensor([1.0]), **options)
    in_mode = lambda x: (x.sum(1) > 0).double().mean().item()  # noqa: E731
    assert 0.75 < in_mode(annealed) < 0.85
    assert abs(in_mode(plain) - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_a_sample_depends_on_its_number_alone():
    network = NCSNv2(channels=1, width=4).double()
    sigmas = noise.geometric_sigmas(2.0, 0.1, 3)

    def draw(index):
        return samplers.annealed_langevin(
            network,
            random.start_images(3, index, (1, 4, 4)).double(),
            sigmas,
            epsilon=1e-3,
            steps_per_level=2,
            noise=random.seeded_noise(3, index),
        )

    whole = draw(torch.arange(10))
    parts = torch.cat([draw(part) for part in torch.arange(10).split(3)])
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


def test_a_step_rule_takes_the_place_of_epsilon():
    sigmas = noise.geometric_sigmas(2.0, 0.1, 4)
    index = torch.arange(3)
    options = {"steps_per_level": 3, "noise": random.seeded_noise(0, index)}
    score, start = lambda x, sigma: -x / (1 + sigma[:, None] ** 2), random.start_images(0, index, (6,))
    by_epsilon = samplers.annealed_langevin(score, start, sigmas, epsilon=2e-3, **options)
    rule = noise.epsilon_rule(2e-3, float(sigmas[-1]))
    assert torch.equal(samplers.annealed_langevin(score, start, sigmas, step_rule=rule, **options), by_epsilon)


def test_snr_chains_are_independent_and_settle_on_gaussian_data():
    """For s = -x / c in many dimensions v <- (1 - 2 r^2 c / v)^2 v + 4 r^2 c^2 / v, which rests at v = c (1 + r^2)."""
    n, r, shape, sigmas = 16, 0.5, (3, 32, 32), noise.geometric_sigmas(3.0, 0.1, 8)
    score = lambda x, sigma: -x / (1 + sigma.view(-1, 1, 1, 1) ** 2)  # noqa: E731

    def draw(index, scale):
        start = 4 * scale.view(-1, 1, 1, 1) * random.normal(0, random.START, index, 0, shape)
        rule, seeded = noise.snr_rule(r), random.seeded_noise(0, index)
        return samplers.annealed_langevin(
            score, start, sigmas, step_rule=rule, steps_per_level=10, denoise=False, noise=seeded
        )

    index = torch.arange(n)
    whole = draw(index, torch.ones(n))
    mates = torch.ones(7)
    mates[1:] = 1e4
    assert torch.equal(draw(index[:7], mates)[0], whole[0])
    assert torch.equal(draw(index[:1], torch.ones(1)), whole[:1])
    v = (1 + 0.1**2) * (1 + r**2)
    assert abs(whole.var() - v) < 5 * v * math.sqrt(2 / whole.numel())


def _draw(project, start, *, denoise=False, steps_per_level=3, observe=None):
    sigmas = noise.geometric_sigmas(1.0, 0.05, 4)
    mixture = Mixture(torch.tensor([0.5, 0.5]), torch.rand(2, 48, generator=torch.Generator().manual_seed(5)), 0.1)
    return samplers.annealed_langevin(
        lambda x, sigma: mixture.score(x.flatten(1), sigma).view_as(x),
        start,
        sigmas,
        epsilon=1e-4,
        steps_per_level=steps_per_level,
        denoise=denoise,
        noise=random.seeded_noise(0, torch.arange(len(start))),
        project=project,
        observe=observe,
    )


def test_project_is_called_before_each_step_and_after_the_last():
    calls = []

    def project(x, sigma, step):
        calls.append((step, sigma))
        return x

    start = random.start_images(0, torch.arange(2), (3, 4, 4))
    x = _draw(project, start, observe=lambda x, step, sigma: calls.append((step, sigma, "observed")))
    levels = [sigma for sigma in noise.geometric_sigmas(1.0, 0.05, 4).tolist() for _ in range(3)]
    expected = [call for step, sigma in enumerate(levels) for call in ((step, sigma), (step, sigma, "observed"))]
    assert calls == [*expected, (11, levels[-1])]
    assert torch.equal(x, _draw(None, start))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_step_reads_values_back_from_the_device(name):
    """Tensors of the meta device have no values: what would wait for a GPU in the loop fails here."""
    sigmas = torch.tensor([1.0, 0.1])
    with torch.device("meta"):
        arguments = {"sigmas": sigmas} if issubclass(NETWORKS[name], NCSN) else {}
        network = NETWORKS[name](channels=3, width=8, **arguments).to("meta")
        x, index = torch.empty(4, 3, 8, 8), torch.empty(4, dtype=torch.int64)
    p = random.seeded_noise(0, index)
    out = samplers.annealed_langevin(network, x, sigmas, epsilon=1e-3, steps_per_level=1, noise=p)
    assert (out.shape, out.device.type) == (x.shape, "meta")


def test_nothing_beside_the_network_reads_values_back_either():
    """Likewise, with a score that costs nothing."""
    sigmas = torch.tensor([1.0, 0.5, 0.1])
    with torch.device("meta"):
        x, mask = torch.empty(4, 3, 8, 8), torch.empty(8, 8, dtype=torch.bool)
        index, angle = torch.empty(4, dtype=torch.int64), torch.empty(4)
    p, q, known = (random.seeded_noise(0, index, stream) for stream in (random.STEP, random.OTHER_END, random.KNOWN))

    def score(x, sigma):
        return -x / sigma.view(-1, 1, 1, 1) ** 2

    drawn = [samplers.langevin(score, x, epsilon=0.1, steps=2, sigma=0.1, noise=p)]
    options = {"noise": samplers.interpolated(p, q, angle)}
    for project in (samplers.inpainting(x, mask, known), samplers.colourisation(x, known)):
        options["project"] = project
        for size in ({"step_rule": noise.snr_rule(0.1)}, {"epsilon": 1e-3}):
            drawn.append(samplers.annealed_langevin(score, x, sigmas, steps_per_level=2, **size, **options))
        drawn.append(samplers.consistent_annealed_langevin(score, x, sigmas, epsilon=0.1**2, **options))
        drawn += [samplers.probability_flow(score, x, sigmas, solver=each, **options) for each in samplers.SOLVERS]
        for corrector in (None, noise.snr_rule(0.1)):
            sde = VP(beta_max=2.0)
            drawn.append(samplers.predictor_corrector(score, x, sde, steps=5, corrector=corrector, **options))
    assert {(each.shape, each.device.type) for each in drawn} == {(x.shape, "meta")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_score_is_told_its_level_in_float32_or_better(dtype):
    sigmas, seen = noise.geometric_sigmas(1.0, 0.01, 10), []
    network = NCSN(channels=1, width=4, sigmas=sigmas).to(dtype)

    def score(x, sigma):
        seen.append(sigma)
        return network(x, sigma)

    index = torch.arange(2)
    start = random.start_images(0, index, (1, 4, 4)).to(dtype)
    noises = random.seeded_noise(0, index)
    x = samplers.annealed_langevin(score, start, sigmas, epsilon=1e-5, steps_per_level=1, noise=noises)
    assert x.dtype == dtype
    assert x.isfinite().all()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(torch.stack(seen)[:, 0], sigmas[[*range(10), 9]].to(exact))


@pytest.mark.parametrize("steps_per_draw", [1, 3])
def test_inpainting_keeps_any_known_part(steps_per_draw):
    index = torch.arange(6)
    reference, start = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.rand(6, 3, 4, 4)
    mask = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    known = random.seeded_noise(0, index, random.KNOWN)
    project = samplers.inpainting(reference, mask, known, steps_per_draw=steps_per_draw)
    x, sigma_L = _draw(project, start), 0.05
    everywhere = mask.expand_as(x)
    z = known(x, 11 // steps_per_draw)
    torch.testing.assert_close(x[everywhere], (reference + sigma_L * z)[everywhere])
    free = _draw(None, start)
    assert not (x == free).any()  # the unknown part answers to the known one
    # without noise the reference itself; everything known, everything kept
    exact = _draw(samplers.inpainting(reference, mask, lambda x, step: torch.zeros_like(x)), start)
    assert torch.equal(exact[everywhere], reference[everywhere])
    nothing = samplers.inpainting(reference, torch.zeros_like(mask), known)
    assert torch.equal(_draw(nothing, start), free)


def test_inpainting_draws_once_a_level_or_once_a_step():
    numbers = []

    def known(x, step):
        numbers.append(step)
        return torch.zeros_like(x)

    start = torch.zeros(1, 3, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    _draw(samplers.inpainting(start, mask, known, steps_per_draw=3), start)
    assert numbers == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    numbers.clear()
    _draw(samplers.inpainting(start, mask, known), start)
    assert numbers == [*range(12), 11]


def test_colourisation_keeps_the_grey_part_and_is_inpainting_in_another_basis():
    index = torch.arange(6)
    colour, start = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.rand(6, 3, 4, 4)
    grey = colour.mean(1, keepdim=True)
    known = random.seeded_noise(0, index, random.KNOWN)
    x = _draw(samplers.colourisation(grey, known), start)
    expected = grey + 0.05 * known(x, 11).mean(1, keepdim=True)
    torch.testing.assert_close(x.mean(1, keepdim=True), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(_draw(samplers.colourisation(colour, known), start), x, rtol=1e-4, atol=1e-5)
    # the same with an explicit basis, the known coordinate pasted there
    basis, _ = torch.linalg.qr(torch.cat([torch.ones(3, 1), torch.eye(3)[:, :2]], 1).double())
    turn = lambda value: torch.einsum("ci,bchw->bihw", basis, value)  # noqa: E731
    paste = samplers.inpainting(
        turn(colour.double()), torch.tensor([True, False, False])[:, None, None], lambda x, step: turn(z)
    )
    x, z = start.double(), known(start, 4).double()
    by_basis = torch.einsum("ci,bihw->bchw", basis, paste(turn(x), 0.3, 4))
    direct = samplers.colourisation(colour.double(), lambda x, step: z)(x, 0.3, 4)
    torch.testing.assert_close(direct, by_basis, rtol=1e-12, atol=1e-12)


def test_interpolation_leads_from_one_noise_to_the_other_at_unit_variance():
    rows, n, shape = 3, 5, (1, 100, 100)
    index = torch.arange(rows).repeat_interleave(n)
    p, q = random.seeded_noise(0, index), random.seeded_noise(0, index, random.OTHER_END)
    angle = torch.linspace(0, math.pi / 2, n).repeat(rows)
    x = torch.zeros(rows * n, *shape)
    z = samplers.interpolated(p, q, angle)(x, 3)
    torch.testing.assert_close(z[::n], p(x, 3)[::n], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z[n - 1 :: n], q(x, 3)[n - 1 :: n], rtol=1e-6, atol=1e-6)
    variance, count = z.flatten(1).var(1), math.prod(shape)
    assert ((variance - 1).abs() < 5 * math.sqrt(2 / count)).all()
    # neighbours have the correlation cos of the angle between them
    correlation = (z[0] * z[1:n]).flatten(1).mean(1)
    assert ((correlation - angle[1:n].cos()).abs() < 5 * math.sqrt(2 / count)).all()
    part = torch.tensor([7, 2])
    again = samplers.interpolated(
        random.seeded_noise(0, index[part]), random.seeded_noise(0, index[part], random.OTHER_END), angle[part]
    )
    assert torch.equal(again(x[part], 3), z[part])


def test_bad_arguments_are_named():
    score, x = (lambda x, sigma: -x), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="sigma"):
        samplers.langevin(score, x, epsilon=0.1, steps=1)
    with pytest.raises(ValueError, match="steps_per_level >= 1, got 0"):
        samplers.annealed_langevin(score, x, torch.tensor([1.0, 0.1]), epsilon=1e-3, steps_per_level=0)
    with pytest.raises(ValueError, match="decrease strictly"):
        samplers.annealed_langevin(score, x, torch.tensor([0.1, 1.0]), epsilon=1e-3, steps_per_level=1)
    with pytest.raises(ValueError, match="epsilon > 0, got -1"):
        samplers.annealed_langevin(score, x, torch.tensor([1.0, 0.1]), epsilon=-1, steps_per_level=1)
    with pytest.raises(ValueError, match="one of epsilon and step_rule, got None and None"):
        samplers.annealed_langevin(score, x, torch.tensor([1.0, 0.1]), steps_per_level=1)
    with pytest.raises(ValueError, match=r"one of epsilon and step_rule, got 0\.1 and <function"):
        rule = noise.snr_rule(0.1)
        samplers.annealed_langevin(score, x, torch.tensor([1.0, 0.1]), epsilon=0.1, steps_per_level=1, step_rule=rule)
    with pytest.raises(ValueError, match=r"epsilon > 0 and steps >= 1, got 0\.1 and 0"):
        samplers.langevin(score, x, epsilon=0.1, steps=0, sigma=1.0)
    with pytest.raises(ValueError, match=r"mask of bool, got torch\.float32"):
        samplers.inpainting(x, torch.ones(2, 3), samplers.torch_noise)
    with pytest.raises(ValueError, match="steps_per_draw >= 1, got 0"):
        samplers.colourisation(x, samplers.torch_noise, steps_per_draw=0)


def _point(x, sigma):
    """The score of a single point, 0.4 in all pixels."""
    return (0.4 - x) / sigma.view(-1, 1, 1, 1) ** 2


@pytest.mark.parametrize("eta", [0.5, 0.8, 1.0])
def test_consistent_chains_are_at_the_level_that_the_score_is_told(eta):
    sigmas, index = noise.geometric_sigmas(10, 0.1, 8), torch.arange(200)
    seen = {}
    x = samplers.consistent_annealed_langevin(
        _point,
        random.noisy_images(3, index, torch.full((200, 1, 8, 8), 0.4), 10.0),
        sigmas,
        epsilon=eta * 0.1**2,
        denoise=False,
        noise=random.seeded_noise(3, index),
        observe=lambda x, step, sigma: seen.update({sigma: float((x - 0.4).std())}),
    )
    assert list(seen) == pytest.approx(sigmas[1:].tolist())
    for sigma, std in seen.items():  # 12,800 values
        assert std == pytest.approx(sigma, rel=5 / math.sqrt(2 * 12_800))
    assert float((x - 0.4).std()) == pytest.approx(0.1, rel=5 / math.sqrt(2 * 12_800))
    langevin = []
    samplers.annealed_langevin(
        _point,
        random.noisy_images(3, index, torch.full((200, 1, 8, 8), 0.4), 10.0),
        sigmas,
        epsilon=0.5 * 0.1**2,
        steps_per_level=1,
        noise=random.seeded_noise(3, index),
        observe=lambda x, step, sigma: langevin.append(float((x - 0.4).std()) / sigma),
    )
    assert min(langevin) > 1.05  # always above: what noise is left, and as much as for a longer stay


@pytest.mark.parametrize("eta", [0.1, 0.3])
def test_consistent_chains_on_gaussian_data_follow_the_exact_recursion(eta):
    """Of data with deviation 1 they lose eta / 2 of the variance, by the size of a step; of a point nothing."""
    data = Mixture(torch.tensor([1.0]), torch.zeros(1, 2), 1.0)
    sigmas, index = noise.refined(noise.geometric_sigmas(20, 0.05, 10), 8), torch.arange(20_000)
    first = random.normal(1, random.START, index, 1, (2,))
    seen = []
    samplers.consistent_annealed_langevin(
        data.score,
        random.noisy_images(1, index, first, 20.0),
        sigmas,
        epsilon=eta * 0.05**2,
        noise=random.seeded_noise(1, index),
        observe=lambda x, step, sigma: seen.append(float(x.var())),
    )
    variance, levels = 1 + 20.0**2, sigmas.tolist()
    for sigma, following, found in zip(levels, levels[1:], seen, strict=False):
        kept = 1 - eta * sigma**2 / (1 + sigma**2)
        variance = kept**2 * variance + following**2 - ((1 - eta) * sigma) ** 2
        assert found == pytest.approx(variance, rel=5 * math.sqrt(2 / 40_000))
    assert variance == pytest.approx(1 - eta / 2, rel=0.03)


def test_consistent_sampling_keeps_what_is_known_and_counts_its_steps():
    sigmas, index = noise.geometric_sigmas(1, 0.1, 5), torch.arange(3)
    calls, projected = [], []

    def score(x, sigma):
        calls.append(float(sigma[0]))
        return _point(x, sigma)

    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    reference = torch.rand(3, 1, 4, 4)
    known = samplers.inpainting(reference, mask, random.seeded_noise(0, index, random.KNOWN))

    def project(x, sigma, step):
        projected.append((round(sigma, 6), step))
        return known(x, sigma, step)

    x = samplers.consistent_annealed_langevin(
        score,
        torch.rand(3, 1, 4, 4),
        sigmas,
        epsilon=0.9 * 0.01,
        denoise=False,
        noise=random.seeded_noise(0, index),
        project=project,
    )
    z = random.seeded_noise(0, index, random.KNOWN)(x, 4)
    assert torch.allclose(x[..., :2], (reference + 0.1 * z)[..., :2])
    assert len(calls) == 4
    assert projected == [(round(float(sigma), 6), step) for step, sigma in enumerate(sigmas)]


def test_steps_that_cannot_keep_the_level_are_refused():
    sigmas = noise.geometric_sigmas(1, 0.1, 5)
    share = 1 - 0.1**0.25
    for epsilon in (0.9 * share * 0.01, 1.1 * 0.01):
        with pytest.raises(ValueError, match=rf"expected epsilon from {share * 0.01:.4g} to 0.01 for these levels"):
            samplers.consistent_annealed_langevin(_point, torch.rand(1, 1, 2, 2), sigmas, epsilon=epsilon)
    edge = samplers.consistent_annealed_langevin(
        _point, torch.rand(1, 1, 2, 2), sigmas, epsilon=share * 0.01, noise=lambda x, step: torch.full_like(x, 1e3)
    )
    assert (edge - 0.4).abs().max() < 1e-3  # no noise comes in
