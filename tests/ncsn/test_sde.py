"""SDEs: rates are derivatives of scales, the official coefficients, losses, steps, trajectories and likelihoods."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp

from ncsn import likelihood, losses, noise, ode, samplers
from ncsn.networks import NCSN, NCSNv2
from ncsn.sde import VE, VP, SubVP, at_nearest_level, noise_prediction
from ncsn.toy import Mixture
from tests.ncsn.golden import FOLDER, recorded

SDES = {"ve": VE(), "vp": VP(), "subvp": SubVP()}
each_sde = pytest.mark.parametrize("name", SDES)


@pytest.fixture(scope="module")
def golden():
    return torch.load(FOLDER / "sde_lib.pt", weights_only=True)


def their_score(sde, levels=None):
    """The score of the made-up networks of the golden data."""
    if isinstance(sde, VE):
        return lambda x, sigma: -x / (0.25 + sigma**2).view(-1, 1, 1, 1)
    return noise_prediction(lambda x, label: x * (0.1 + 0.9 * label / 999).view(-1, 1, 1, 1), sde, levels=levels)


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@each_sde
def test_rates_are_the_derivatives_of_scales(name):
    """f = alpha' / alpha and g^2 = (sigma^2)' - 2 f sigma^2, by differences of order 4."""
    sde, t, h = SDES[name], torch.linspace(0.02, 0.98, 25, dtype=torch.float64), 1e-4

    def derivative(of):
        return (8 * (of(t + h) - of(t - h)) - (of(t + 2 * h) - of(t - 2 * h))) / (12 * h)

    f, g = sde.rates(t)
    assert torch.allclose(f, derivative(lambda t: sde.scales(t)[0].log()), atol=1e-9)
    variance = sde.scales(t)[1].square()
    assert torch.allclose(g**2, derivative(lambda t: sde.scales(t)[1].square()) - 2 * f * variance, rtol=1e-7)


@each_sde
def test_time_is_the_inverse_of_the_noise_level(name):
    t = torch.linspace(1e-5, 1, 101, dtype=torch.float64)
    assert torch.allclose(SDES[name].time(SDES[name].noise_level(t)), t, atol=1e-12)


@each_sde
def test_official_coefficients(golden, name):
    sde, theirs, x, t = SDES[name], golden[name], golden["x"], golden["t"].double()
    shape = (-1, 1, 1, 1)
    (f, g), (alpha, sigma) = sde.rates(t), sde.scales(t)
    assert torch.allclose((f.view(shape) * x).float(), theirs["drift"], rtol=1e-5)
    close(g, theirs["diffusion"])
    close(alpha.view(shape) * x, theirs["mean"])
    # theirs has it in float32, where 1 - exp(-B) at t = 1e-5 has lost its digits
    close(sigma, theirs["std"], 1e-4)
    c, gain = sde.discretised(t, 1000)
    assert torch.allclose(((c.view(shape) - 1) * x).float(), theirs["disc_f"], rtol=1e-5, atol=1e-6)
    close(gain, theirs["disc_G"])
    close(sde.prior_log_prob(x), theirs["prior_logp"])
    close(sde.prior_std * theirs["prior_z"], theirs["prior_sample"])


def test_chains_are_those_of_smld_and_ddpm(golden):
    close(VE().levels(1000).flip(0), golden["ve"]["discrete_sigmas"])
    close(VP().betas(1000), golden["vp"]["discrete_betas"])
    remains = golden["vp"]["alphas_cumprod"].double()
    close(VP().levels(1000).flip(0), ((1 - remains) / remains).sqrt())


@each_sde
def test_official_scores(golden, name):
    """Times the standard deviation, of which theirs has lost digits near t = 0."""
    sde, x, t = SDES[name], golden["x"], golden["t"].double()
    alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in sde.scales(t))
    ours = their_score(sde)(x / alpha, sde.noise_level(t).float()) / alpha
    close(sigma * ours, golden[name]["std"].view(-1, 1, 1, 1) * golden[name]["score_cont"])


@each_sde
@pytest.mark.parametrize("weighted", [False, True])
def test_official_losses(golden, name, weighted):
    sde, theirs, x = SDES[name], golden["losses"], golden["batch"]
    t = theirs["u"].double() * (1 - 1e-5) + 1e-5
    ours = losses.continuous_score_matching(their_score(sde), sde, x, t, theirs["z"], likelihood_weighting=weighted)
    for mean, factor in ((0, 1), (1, 2 / x[0].numel())):  # theirs: half the sum, or the mean without the half
        assert float(factor * ours.mean()) == pytest.approx(theirs[f"{name}_lw{int(weighted)}_mean{mean}"], rel=1e-4)


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_official_losses_of_chains(golden, name):
    """The same function at the levels of the chain."""
    theirs, x, chain = golden["losses"], golden["batch"], {"ve": "smld", "vp": "ddpm"}[name]
    if name == "ve":
        score, sigma = their_score(VE()), VE().levels(1000)[theirs["labels"]]
    else:
        levels = VP().levels(1000)
        score, sigma = their_score(VP(), levels), levels.flip(0)[theirs["labels"]]
    ours = losses.denoising_score_matching(score, x, sigma.float(), theirs[f"{chain}_z"])
    for mean, factor in ((0, 1), (1, 2 / x[0].numel())):
        assert float(factor * ours.mean()) == pytest.approx(theirs[f"{chain}_mean{mean}"], rel=1e-4)


@each_sde
@pytest.mark.parametrize("predictor", samplers.PREDICTORS)
def test_official_steps_of_predictors(golden, name, predictor):
    """The coefficients of each time of the golden data, before they are moved to the next time."""
    sde, x, t = SDES[name], golden["x"], golden["t"].double()
    case = golden["updates"].get(f"{name}_{predictor}" + ("_sampling" if predictor == "ancestral" else ""))
    if case is None:
        with pytest.raises(ValueError, match="expected VE or VP for ancestral sampling"):
            samplers.predictor_steps(sde, predictor, t)
        return
    steps = torch.linspace(1, 0, 1000, dtype=torch.float64)
    for i, time in enumerate(t):
        at = steps.clone()
        at[500] = time
        at[501] = time  # so that the coordinates stay
        sigma, keep, pull, gain = samplers.predictor_steps(sde, predictor, at)[500].tolist()
        alpha = float(sde.scales(time)[0])
        xi = x[i : i + 1] / alpha
        s = their_score(sde)(xi, torch.tensor([sigma], dtype=torch.float32))
        mean = alpha * (keep * xi + pull * s)
        close(mean, case["x_mean"][i : i + 1], 1e-4)
        close(mean + alpha * gain * case["z"][i : i + 1], case["x"][i : i + 1], 1e-4)


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_official_steps_of_correctors(golden, name, corrector):
    """Theirs takes the mean of the norms over the batch, whose images are at one time here."""
    sde, case = SDES[name], golden["updates"][f"{name}_{corrector}"]
    x, t = golden["x"], golden["t"].double()
    alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in sde.scales(t))
    level = sde.noise_level(t).float()
    factor = torch.ones_like(t) if name == "ve" else 1 - VP().betas(1000)[(t * 999).long()]
    factor = factor.view(-1, 1, 1, 1).float()
    rule = noise.batch_snr_rule(case["snr"])
    lost = sigma / golden[name]["std"].view(
        -1, 1, 1, 1
    )  # near t = 0 theirs has lost digits, which the score is divided by
    for z in case["z"]:
        s = lost * their_score(sde)(x / alpha, level) / alpha
        size = rule(1.0, s, z) if corrector == "langevin" else noise.annealed_rule(case["snr"])(sigma, s, z)
        mean = x + factor * size * s
        x = mean + (2 * factor * size).sqrt() * z
    close(x, case["x"])
    close(mean, case["x_mean"])


def at_the_prior(sde, z):
    """Where chains start: x_1 / alpha."""
    return sde.prior_std * z / float(sde.scales(torch.tensor(1.0, dtype=torch.float64))[0])


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("how", ["reverse_diffusion_langevin", "euler_maruyama_none", "ancestral_sampling_none"])
def test_official_trajectories(golden, name, how):
    case = golden["pc_runs"][f"{name}_{how}"]
    *args, steps = case["args"].values()
    sde = type(SDES[name])(*args)
    start, *draws = case["draws"]
    x = samplers.predictor_corrector(
        their_score(sde),
        at_the_prior(sde, start),
        sde,
        steps=steps,
        predictor=how.rpartition("_")[0].removesuffix("_sampling"),
        corrector=noise.batch_snr_rule(case["snr"]) if how.endswith("langevin") else None,
        t_min=case["eps"],
        noise=recorded(draws),
    )
    close((x + 1) / 2 if name == "vp" else x, case["sample"])


@each_sde
def test_official_ode(golden, name):
    """Theirs has one step for all pixels of the batch, over t; z is x_1, x the last x_t."""
    sde, case = SDES[name], golden["ode"][f"{name}_ode"]
    ends = torch.tensor([1.0, case["eps"]], dtype=torch.float64)
    first, last = sde.scales(ends)[0].tolist()
    levels = sde.noise_level(ends)
    x, _ = samplers.adaptive_probability_flow(their_score(sde), case["z"] / first, levels, denoise=False)
    close(last * x, case["x"], 1e-3)


@each_sde
@pytest.mark.parametrize("probes", ["Rademacher", "Gaussian"])
def test_official_likelihoods(golden, name, probes):
    sde, case = SDES[name], golden["ode"][f"{name}_bpd_{probes}"]
    data, v = case["data"], case["eps_hutch"]
    log_prob, latent, _ = likelihood.log_likelihood(their_score(sde), data, sde, v)
    dim = data[0].numel()
    if name != "ve":  # theirs probes the linear part of the drift, too, whose trace is known
        first, last = sde.integral(torch.tensor([1e-5, 1.0], dtype=torch.float64)).tolist()
        log_prob = log_prob - (last - first) / 2 * (v.flatten(1).square().sum(1) - dim)
    bits = likelihood.bits_per_dim(log_prob, dim, width=1 if name == "ve" else 2)
    close(bits.float(), case["bpd"].float(), 1e-3)
    close(latent, case["z"], 1e-3)


def gaussian(mean, std):
    """The score of N(mean, std^2 I)."""
    return lambda x, sigma: (mean - x) / (std**2 + sigma.view(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp", 2)])
def test_order_of_the_solvers(solver, order):
    """Errors against the exact flow of a Gaussian fall by 2^order when the steps are halved."""
    score = gaussian(0.4, 0.3)
    x = 5 * torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = 0.4 + (x - 0.4) * math.hypot(0.3, 0.05) / math.hypot(0.3, 5.0)
    errors = []
    for steps in (40, 80, 160):
        got = samplers.probability_flow(score, x, noise.edm_sigmas(5.0, 0.05, steps + 1), solver=solver, denoise=False)
        errors.append(float((got - end).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_a_solver_with_noise_keeps_the_variance():
    """In 200 levels mean and deviation of Gaussian data come out within four standard errors; the last step takes the
    noise of sigma_L away."""
    score, n = gaussian(0.4, 0.3), 20_000
    rng = torch.Generator().manual_seed(3)
    x = 0.4 + math.hypot(5.0, 0.3) * torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=rng)
    got = samplers.probability_flow(
        score,
        x,
        noise.edm_sigmas(5.0, 0.02, 201),
        solver="dpmpp_sde",
        noise=lambda x, step: torch.randn(x.shape, dtype=x.dtype, generator=rng),
    )
    assert abs(float(got.mean()) - 0.4) < 4 * 0.3 / math.sqrt(n)
    assert abs(float(got.std()) - 0.3**2 / math.hypot(0.3, 0.02)) < 4 * 0.3 / math.sqrt(2 * n)


@pytest.mark.parametrize("solver", samplers.DETERMINISTIC)
def test_solvers_agree_with_small_steps_on_a_mixture(solver):
    """The reference is the adaptive solver at a tolerance of 1e-10; points end in the components of the mixture."""
    weights, means = torch.tensor([0.3, 0.7]).double(), torch.tensor([[1.0, 1.0], [-1.0, 0.0]]).double()
    mixture = Mixture(weights, means, 0.2)
    x = 10 * torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference, _ = samplers.adaptive_probability_flow(
        mixture.score, x, torch.tensor([10.0, 0.01]), rtol=1e-10, atol=1e-10
    )
    errors = []
    for steps in (100, 200):
        got = samplers.probability_flow(mixture.score, x, noise.edm_sigmas(10.0, 0.01, steps + 1), solver=solver)
        errors.append(float((got - reference).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1 if solver == "euler" else 2, abs=0.35)
    nearest = (reference[:, None] - means).norm(dim=2).min(1).values
    assert float(nearest.max()) < 5 * 0.2


@each_sde
def test_order_of_euler_maruyama(name):
    """The variance of Gaussian data after N steps: its error halves when N doubles. No randomness, by the coefficients:
    v <- (keep - pull / (std^2 + sigma^2))^2 v + gain^2."""
    sde, std, errors = SDES[name], 0.5, []
    end = std**2 + float(sde.noise_level(torch.tensor(0.0, dtype=torch.float64))) ** 2
    for n in (4000, 8000, 16000):
        t = torch.linspace(1, 1e-9, n, dtype=torch.float64)
        variance = float(sde.noise_level(t[0])) ** 2 + std**2
        for sigma, keep, pull, gain in samplers.predictor_steps(sde, "euler_maruyama", t).tolist():
            variance = (keep - pull / (std**2 + sigma**2)) ** 2 * variance + gain**2
        errors.append(abs(variance / end - 1))
    assert [math.log2(coarse / fine) for coarse, fine in pairwise(errors)] == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2"])
def test_networks_of_2019_and_2020_train_and_draw_under_ve(name):
    """As they are, NCSN told its nearest level: the loss in continuous time falls well below a zero score's, D / 2, and
    what the samplers of 2021 draw is nearer to the one image there is than a grey one is, 0.3."""
    torch.manual_seed(0)
    sde, image = VE(0.1, 2.0), torch.tensor([[0.2, 0.8], [0.8, 0.2]]).repeat(2, 2)[None]
    sigmas = noise.geometric_sigmas(2.0, 0.1, 12)
    network = NCSN(channels=1, width=8, sigmas=sigmas) if name == "ncsn" else NCSNv2(channels=1, width=8)
    score = at_nearest_level(network, sigmas) if name == "ncsn" else network
    optimizer = torch.optim.Adam(network.parameters(), lr=8e-3)
    x, found = image.expand(64, 1, 4, 4), []
    for _ in range(100):
        t = torch.rand(64, dtype=torch.float64)
        loss = losses.continuous_score_matching(score, sde, x, t, torch.randn(x.shape)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[0] > 6
    assert sum(found[-20:]) / 20 < 3
    network.eval()
    start = image + 2.0 * torch.randn(16, 1, 4, 4)
    drawn = {
        "pc": samplers.predictor_corrector(score, start, sde, steps=50, corrector=noise.snr_rule(0.1)),
        "heun": samplers.probability_flow(score, start, noise.edm_sigmas(2.0, 0.1, 15)),
        "dpmpp_sde": samplers.probability_flow(score, start, noise.edm_sigmas(2.0, 0.1, 15), solver="dpmpp_sde"),
    }
    for how, got in drawn.items():
        assert float((got - image).square().mean().sqrt()) < 0.3, how


def test_between_levels_the_expected_image_is_that_of_the_nearest():
    sigmas = torch.tensor([1.0, 0.1], dtype=torch.float64)
    x, sigma = torch.rand(3, 1, 2, 2), torch.tensor([0.9, 0.35, 0.11])
    seen = []

    def network(x, sigma):
        seen.append(sigma)
        return -x / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)

    s, level = at_nearest_level(network, sigmas)(x, sigma), torch.tensor([1.0, 1.0, 0.1]).view(-1, 1, 1, 1)
    assert seen[0].tolist() == pytest.approx([1, 1, 0.1])
    assert torch.allclose(sigma.view(-1, 1, 1, 1) ** 2 * s, level**2 * network(x, level.flatten()))


@each_sde
def test_images_do_not_depend_on_their_batch(name):
    sde = SDES[name]
    x = at_the_prior(sde, torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(2)))
    score = gaussian(0.4, 0.3)
    levels = sde.noise_level(torch.tensor([1.0, 0.5, 1e-3], dtype=torch.float64))
    (together, theirs), (alone, own) = (samplers.adaptive_probability_flow(score, some, levels) for some in (x, x[1:2]))
    assert torch.equal(together[1:2], alone)
    assert theirs[1] == own[0]


def test_what_is_known_stays_known(golden):
    """Inpainting of a predictor-corrector run under VP, whose coordinates the projection does not see."""
    sde, x = VP(), torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(4) < 2
    score = gaussian(0.5, 0.2)
    z = torch.Generator().manual_seed(4)

    def draw(like, step):
        return torch.randn(like.shape, generator=z)

    got = samplers.predictor_corrector(
        score,
        at_the_prior(sde, torch.randn(x.shape, generator=z)),
        sde,
        steps=50,
        noise=draw,
        corrector=noise.snr_rule(0.1),
        t_min=1e-3,
        project=samplers.inpainting(x, mask, draw),
    )
    assert (got - x)[..., mask].abs().max() < 0.05
    assert (got - x)[..., ~mask].abs().max() > 0.05


@each_sde
def test_likelihood_of_gaussian_data(name):
    """With Rademacher probes exact, as the Jacobian is a multiple of the identity: the flow is known, and its density
    is that of the data but for the prior, which is not quite the distribution of x_1."""
    sde, mean, std = SDES[name], 0.2, 0.4
    x = mean + std * torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    v = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(6)) < 0.5, -1.0, 1.0).double()
    log_prob, latent, evaluations = likelihood.log_likelihood(gaussian(mean, std), x, sde, v, rtol=1e-8, atol=1e-8)
    alpha, sigma = sde.scales(torch.tensor([1e-5, 1.0], dtype=torch.float64))
    spread = (alpha * std).hypot(sigma)
    grown = float(spread[1] / spread[0])
    assert torch.allclose(latent, alpha[1] * mean + (x - alpha[0] * mean) * grown, atol=1e-5)
    assert torch.allclose(log_prob, sde.prior_log_prob(latent) + 16 * math.log(grown), atol=1e-4)
    exact = torch.distributions.Normal(alpha[0] * mean, spread[0]).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(log_prob, exact, atol=0.04)
    assert evaluations.max() < 150


def test_gaussian_probes_are_unbiased():
    """Over 2,000 probes the mean of log p is within four standard errors of the exact one."""
    covariance, unit = torch.tensor([[1.0, 0.6], [0.6, 0.5]]).double(), torch.eye(2).double()

    def score(x, sigma):
        return -torch.linalg.solve(covariance + sigma.double().view(-1, 1, 1) ** 2 * unit, x[..., None])[..., 0]

    x, sde = torch.tensor([[0.7, -0.3]]).double(), VE(0.01, 100.0)
    v = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found, _, _ = likelihood.log_likelihood(score, x.expand(2000, 2), sde, v)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance + 1e-4 * unit).log_prob(x)
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - exact) < 4 * error
    assert error < 0.25


def test_bits():
    """Uniform images have 8 bits a value, in either range."""
    assert float(likelihood.bits_per_dim(torch.tensor(0.0), 12)) == pytest.approx(8)
    assert float(likelihood.bits_per_dim(torch.tensor(-12 * math.log(2)), 12, width=2)) == pytest.approx(8)


def test_rk45_takes_the_steps_of_scipy():
    """Oscillators of other frequencies in one batch: each has steps of its own, as many as it has alone."""
    frequency = torch.tensor([1.0, 10.0, 40.0]).double()

    def slope(t, y):
        return torch.stack((y[:, 1], -(frequency**2) * y[:, 0]), 1)

    start = torch.tensor([[1.0, 0.0]]).double().repeat(3, 1)
    y, evaluations = ode.rk45(slope, start, 0.0, 2.0, rtol=1e-8, atol=1e-8)
    for k, w in enumerate(frequency.tolist()):
        theirs = solve_ivp(lambda t, y: [y[1], -(w**2) * y[0]], (0, 2), [1.0, 0.0], rtol=1e-8, atol=1e-8)  # noqa: B023
        assert abs(float(y[k, 0]) - theirs.y[0, -1]) < 1e-9
        assert abs(int(evaluations[k]) - theirs.nfev) <= 12  # another first step
    back, _ = ode.rk45(slope, y, 2.0, 0.0, rtol=1e-8, atol=1e-8)
    assert torch.allclose(back, start, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: VE(50, 0.01), "expected 0 < sigma_min < sigma_max, got sigma_min=50, sigma_max=0.01"),
        (lambda: VP(0, 20), "expected 0 < beta_min <= beta_max, got beta_min=0, beta_max=20"),
        (lambda: VP().betas(20), "expected more steps than beta_max=20 under VP, got steps=20"),
        (lambda: SubVP().levels(10), "expected VE or VP, which have the chains SMLD"),
        (lambda: pc(SubVP(), corrector=noise.snr_rule(0.1)), "expected VE or VP for a corrector"),
        (lambda: pc(SubVP(), predictor="ancestral"), "expected VE or VP for ancestral sampling"),
        (lambda: pc(VE(), predictor="best"), "expected a predictor of euler_maruyama, reverse_diffusion, ancestral"),
        (lambda: pc(VE(), corrector=noise.snr_rule(0.1), corrections=0), "expected corrections >= 1 with a corrector"),
        (
            lambda: samplers.probability_flow(None, None, torch.tensor([1.0]), solver="best"),
            "expected a solver of euler",
        ),
        (lambda: noise.edm_sigmas(1, 0.1, 5, rho=0), "expected 0 < rho < inf, got 0"),
        (lambda: ode.rk45(None, torch.zeros(1), 0, 1, rtol=0), "expected rtol > 0 and atol > 0, got rtol=0"),
        (lambda: likelihood.log_likelihood(None, torch.zeros(2, 3), VE(), torch.zeros(3)), "expected probes of shape"),
    ],
)
def test_what_cannot_be_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def pc(sde, **options):
    return samplers.predictor_corrector(gaussian(0, 1), torch.zeros(1, 1, 2, 2), sde, steps=50, **options)


def test_a_solution_that_explodes_is_said():
    with pytest.raises(ArithmeticError, match="not finite"):
        ode.rk45(lambda t, y: y**2, torch.ones(1, 1), 0.0, 2.0)
