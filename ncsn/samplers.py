"""Samplers: a start in, samples out; randomness, constraints and observation are arguments.

`noise(x, step)` returns standard normal values shaped like x for draw number `step` = 0, 1, ... of the whole
trajectory: `ncsn.random.seeded_noise` makes one, `interpolated` mixes two.
`project(x, sigma, step)` returns x with what is known about it put in, at the noise level sigma. It is called before
each step, and once more after the last one with that step's sigma and number: so the final denoising step, or where
there is none the result, is projected too. `inpainting` and `colourisation` make one.
`observe(x, step, sigma)` is called after each step.

x is an image plus noise throughout, and sigma the noise's level, as a score network sees them; so it is for every SDE,
see `ncsn.sde`.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ncsn import ode
from ncsn.losses import Score
from ncsn.noise import StepRule, epsilon_rule, given_sigmas
from ncsn.sde import SDE, VE, VP

Noise = Callable[[Tensor, int], Tensor]
Project = Callable[[Tensor, float, int], Tensor]
Observe = Callable[[Tensor, int, float], None]


def torch_noise(x: Tensor, step: int) -> Tensor:
    """Noise from torch's global generator."""
    return torch.randn_like(x)


@torch.no_grad()
def langevin(
    score: Score,
    x: Tensor,
    *,
    epsilon: float,
    steps: int,
    sigma: float,
    noise: Noise = torch_noise,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by Langevin dynamics with a constant step, x <- x + epsilon s(x, sigma) + sqrt(2 epsilon) z.

    arXiv:1907.05600, equation 4, where epsilon is twice as large: x + epsilon / 2 s + sqrt(epsilon) z.

    Args:
        score: s(x, sigma).
        x: Start, shape (B, ...).
        epsilon: Step size, pixel units squared, > 0.
        steps: T >= 1.
        sigma: Noise level that the score is told, pixel units. There is no default, though plain Langevin dynamics has
            no levels: every score takes one. 0 is the data's own score, which an exact score has; a network that is
            conditioned on noise, or divides by sigma, needs one of its levels.
        noise: Standard normal values, see the module.
        observe: Watches; must not change x.

    Returns:
        Samples, shape and dtype of x.

    Raises:
        ValueError: If epsilon is not positive or T < 1.
    """
    if not (epsilon > 0 and steps >= 1):
        raise ValueError(f"expected epsilon > 0 and steps >= 1, got {epsilon} and {steps}")
    return _steps(score, x, sigma, range(steps), lambda *_: epsilon, noise, None, observe)


@torch.no_grad()
def annealed_langevin(
    score: Score,
    x: Tensor,
    sigmas: Tensor,
    *,
    epsilon: float | None = None,
    steps_per_level: int,
    denoise: bool = True,
    step_rule: StepRule | None = None,
    noise: Noise = torch_noise,
    project: Project | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by annealed Langevin dynamics (arXiv:1907.05600, Algorithm 1; step convention of the official code).

    At each sigma_i, T times: x <- x + alpha s(x, sigma_i) + sqrt(2 alpha) z, with alpha = epsilon (sigma_i / sigma_L)^2
    or of another step rule.
    At the end, with `denoise`: x <- x + sigma_L^2 s(x, sigma_L), the posterior mean (arXiv:2006.09011, Algorithm 1).

    Args:
        score: s(x, sigma).
        x: Start, shape (B, ...); uniform in [0, 1] in the papers.
        sigmas: Noise levels, shape (L,), strictly decreasing, pixel units.
        epsilon: Step size at the last level, pixel units squared, > 0.
        steps_per_level: T >= 1.
        denoise: Take the final denoising step.
        step_rule: In place of epsilon; see `ncsn.noise`.
        noise: Standard normal values, see the module.
        project: Puts in what is known, see the module.
        observe: Watches; must not change x.

    Returns:
        Samples, shape and dtype of x. They are not clamped to [0, 1].

    Raises:
        ValueError: If the levels do not strictly decrease, epsilon is not positive, T < 1, or both or neither of
            epsilon and step_rule are given.
    """
    if steps_per_level < 1:
        raise ValueError(f"expected steps_per_level >= 1, got {steps_per_level}")
    levels = given_sigmas(sigmas).tolist()
    if epsilon is not None and step_rule is None:
        step_rule = epsilon_rule(epsilon, levels[-1])
    elif epsilon is not None or step_rule is None:
        raise ValueError(f"expected one of epsilon and step_rule, got {epsilon} and {step_rule}")
    for i, sigma in enumerate(levels):
        numbers = range(i * steps_per_level, (i + 1) * steps_per_level)
        x = _steps(score, x, sigma, numbers, step_rule, noise, project, observe)
    return _last(score, x, sigma, numbers[-1], denoise, project)


@torch.no_grad()
def consistent_annealed_langevin(
    score: Score,
    x: Tensor,
    sigmas: Tensor,
    *,
    epsilon: float,
    denoise: bool = True,
    noise: Noise = torch_noise,
    project: Project | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by consistent annealed sampling (arXiv:2009.05475, Algorithm 2).

    Once for each i < L, with eta = epsilon / sigma_L^2:

        x <- x + eta sigma_i^2 s(x, sigma_i) + beta_i sigma_{i+1} z,  beta_i^2 = 1 - ((1 - eta) sigma_i / sigma_{i+1})^2

    The step takes away the share eta of the noise that is in x, (1 - eta) sigma_i is left, and z fills it up to
    sigma_{i+1}: if x starts as data plus sigma_1 z, it is at the noise level that the score is told at each step, which
    with annealed Langevin dynamics it never quite is. At the end, with `denoise`: x <- x + sigma_L^2 s(x, sigma_L).

    Args:
        score: s(x, sigma).
        x: Start at noise level sigma_1, shape (B, ...).
        sigmas: Noise levels, shape (L,), strictly decreasing, pixel units; more steps are more levels, `noise.refined`.
        epsilon: Step size at the last level, pixel units squared; sigma_L^2 eta with 1 - sigma_{i+1} / sigma_i <= eta
            <= 1 for all i. At the lower end no noise is added, at the upper end all of it is new.
        denoise: Take the final denoising step.
        noise: Standard normal values, see the module.
        project: Puts in what is known, see the module.
        observe: Watches, is told the level that x has come to; must not change x.

    Returns:
        Samples, shape and dtype of x. They are not clamped to [0, 1].

    Raises:
        ValueError: If the levels do not strictly decrease or epsilon is out of that range.
    """
    levels = given_sigmas(sigmas).tolist()
    eta = epsilon / levels[-1] ** 2
    least = 1 - min(following / sigma for sigma, following in pairwise(levels))
    if not least * (1 - 1e-9) <= eta <= 1 + 1e-9:
        square = levels[-1] ** 2
        raise ValueError(
            f"expected epsilon from {least * square:.4g} to {square:.4g} for these levels (a share of sigma_L^2 from "
            f"{least:.4g} to 1), got {epsilon:.4g}; more levels lower the first of these"
        )
    for step, (sigma, following) in enumerate(pairwise(levels)):
        if project is not None:
            x = project(x, sigma, step)
        beta = max(0.0, 1 - ((1 - eta) * sigma / following) ** 2) ** 0.5
        s, z = score(x, _level(x, sigma)).to(x.dtype), noise(x, step)
        x = x + eta * sigma**2 * s + beta * following * z
        if observe is not None:
            observe(x, step, following)
    return _last(score, x, levels[-1], len(levels) - 1, denoise, project)


@torch.no_grad()
def predictor_corrector(
    score: Score,
    x: Tensor,
    sde: SDE,
    *,
    steps: int,
    predictor: str = "reverse_diffusion",
    corrector: StepRule | None = None,
    corrections: int = 1,
    t_min: float = 1e-5,
    denoise: bool = True,
    noise: Noise = torch_noise,
    project: Project | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by a predictor of the reverse SDE and Langevin steps between (arXiv:2011.13456, Algorithms 2 to 5).

    At each of N times from 1 to t_min: `corrections` steps x_t <- x_t + a s + sqrt(2 a) z by the corrector's rule, and
    a step of the predictor, x_t <- m + G z with the mean m, s being the score of x_t:

        euler_maruyama     m = x_t - (f x_t - g^2 s) / N             G^2 = g^2 / N
        reverse_diffusion  m = (2 - c) x_t + G^2 s                   c, G of `SDE.discretised`
        ancestral, VE      m = x_t + (v_k - v_{k-1}) s, v = sigma^2  G^2 = v_{k-1} (v_k - v_{k-1}) / v_k
        ancestral, VP      m = (x_t + beta_k s) / sqrt(1 - beta_k)   G^2 = beta_k

    That is the order of the official code; in the paper the predictor comes first. So are 1 / N and the times, which
    are (1 - t_min) / (N - 1) apart. It reports two evaluations a step, with or without a corrector.

    Args:
        score: s(x, sigma).
        x: Start, shape (B, ...): sde.noise_level(1) times standard normal values.
        sde: Of which the network was trained.
        steps: N.
        predictor: One of PREDICTORS.
        corrector: Gives a, which under VP is multiplied by 1 - beta_k: `noise.snr_rule` for Langevin's,
            `noise.annealed_rule` for the annealed Langevin corrector. None: no corrector.
        corrections: Steps of the corrector at each time.
        t_min: Where the reverse SDE ends.
        denoise: Without the noise of the last step.
        noise: Standard normal values, see the module; the numbers go on over correctors and predictors.
        project: Puts in what is known, see the module.
        observe: Watches, after each step of a predictor, with its number and noise level; must not change x.

    Returns:
        Samples, shape and dtype of x. They are not clamped.

    Raises:
        ValueError: If there is no such predictor under the SDE, no corrector's factor (sub-VP), or too few steps.
    """
    if corrector is not None and corrections < 1:
        raise ValueError(f"expected corrections >= 1 with a corrector, got {corrections}")
    t = torch.linspace(1, t_min, steps, dtype=torch.float64)
    table = predictor_steps(sde, predictor, t).tolist()
    factors = _corrector_factors(sde, t).tolist() if corrector else []
    number = 0
    for i, (sigma, keep, pull, gain) in enumerate(table):
        if corrector is not None:
            rule = _scaled(corrector, factors[i])
            x = _steps(score, x, sigma, range(number, number + corrections), rule, noise, project, None)
            number += corrections
        if project is not None:
            x = project(x, sigma, number)
        x = keep * x + pull * score(x, _level(x, sigma)).to(x.dtype)
        if i + 1 < len(table) or not denoise:
            x = x + gain * noise(x, number)
        number += 1
        if observe is not None:
            observe(x, i, sigma)
    return x


PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral")


def predictor_steps(sde: SDE, predictor: str, t: Tensor) -> Tensor:
    """What the predictor does at each time.

    Args:
        sde: Of the network.
        predictor: One of PREDICTORS.
        t: Times, decreasing, shape (N,), float64.

    Returns:
        sigma, keep, pull, gain of x <- keep x + pull s(x, sigma) + gain z, shape (N, 4), float64; x is x_t / alpha(t)
        at the step's time before it, at the next time after it, at time 0 after the last.

    Raises:
        ValueError: As of `predictor_corrector`.
    """
    n = len(t)
    alpha, _ = sde.scales(t)
    following = torch.cat((alpha[1:], alpha.new_ones(1)))
    if predictor == "euler_maruyama":
        f, g = sde.rates(t)
        keep, pull, gain = 1 - f / n, g**2 / n, g / math.sqrt(n)
    elif predictor == "reverse_diffusion":
        c, gain = sde.discretised(t, n)
        keep, pull = 2 - c, gain**2
    elif predictor == "ancestral" and isinstance(sde, VE):
        levels = sde.levels(n).flip(0).square()
        k = (t * (n - 1)).long()
        variance, below = levels[k], torch.cat((levels.new_zeros(1), levels[:-1]))[k]
        keep, pull, gain = torch.ones_like(t), variance - below, (below * (variance - below) / variance).sqrt()
    elif predictor == "ancestral" and isinstance(sde, VP):
        c, gain = sde.discretised(t, n)
        keep, pull = 1 / c, gain**2 / c
    elif predictor == "ancestral":
        raise ValueError(
            f"expected VE or VP for ancestral sampling, got {sde}: use reverse_diffusion or euler_maruyama"
        )
    else:
        raise ValueError(f"expected a predictor of {', '.join(PREDICTORS)}, got {predictor!r}")
    moved = alpha / following
    return torch.stack((sde.noise_level(t), keep * moved, pull / (alpha * following), gain / following), 1)


def _corrector_factors(sde: SDE, t: Tensor) -> Tensor:
    """By which a corrector's steps are multiplied at each time: 1 under VE, 1 - beta_k under VP."""
    if isinstance(sde, VE):
        return torch.ones_like(t)
    if isinstance(sde, VP):
        return sde.discretised(t, len(t))[0].square()
    raise ValueError(f"expected VE or VP for a corrector, whose steps need alpha_k, got {sde}: draw without one")


DETERMINISTIC = ("euler", "heun", "dpmpp")
SOLVERS = (*DETERMINISTIC, "dpmpp_sde")


@torch.no_grad()
def probability_flow(
    score: Score,
    x: Tensor,
    sigmas: Tensor,
    *,
    solver: str = "heun",
    denoise: bool = True,
    noise: Noise = torch_noise,
    project: Project | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by the probability flow ODE, dx / dsigma = -sigma s(x, sigma), in steps from level to level.

    It is the ODE of VE, VP and sub-VP alike, since x is x_t / alpha (arXiv:2011.13456, equation 13; arXiv:2206.00364,
    equation 4); with D = x + sigma^2 s the image that x is expected to be, and sigma' the next level:

        euler   x <- x + (sigma - sigma') sigma s                 one evaluation a level, order 1 (DDIM)
        heun    the mean of the slopes at sigma and sigma'        two, order 2 (arXiv:2206.00364, Algorithm 1)
        dpmpp   x <- q x + (1 - q) (D + h / (2 h_0) (D - D_0)),   one, order 2 (DPM-Solver++(2M), arXiv:2211.01095,
                q = sigma' / sigma, h = -log q; D_0, h_0 those    Algorithm 2), exact in the linear part
                of the step before, none at the first
        dpmpp_sde  the same with q^2 in place of q, and noise:    one, of the reverse SDE in place of the flow: noise
                + sigma' sqrt(1 - q^2) z                          forgets errors of the score

    At the end, with `denoise`: x <- D at sigma_L, an Euler step to sigma = 0.

    Args:
        score: s(x, sigma).
        x: Start at noise level sigma_1, shape (B, ...).
        sigmas: Noise levels, shape (L,), strictly decreasing: `noise.edm_sigmas`, or those of training.
        solver: One of SOLVERS.
        denoise: Take the final denoising step.
        noise: Standard normal values, see the module; of dpmpp_sde alone.
        project: Puts in what is known, see the module.
        observe: Watches, is told the level that x has come to; must not change x.

    Returns:
        Samples, shape and dtype of x: but for dpmpp_sde a function of the start alone. They are not clamped to [0, 1].

    Raises:
        ValueError: If the levels do not strictly decrease or there is no such solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"expected a solver of {', '.join(SOLVERS)}, got {solver!r}")
    levels = given_sigmas(sigmas).tolist()
    previous: tuple[Tensor, float] | None = None
    for step, (sigma, following) in enumerate(pairwise(levels)):
        if project is not None:
            x = project(x, sigma, step)
        s = score(x, _level(x, sigma)).to(x.dtype)
        if solver.startswith("dpmpp"):
            mean, h = x + sigma**2 * s, math.log(sigma / following)
            ahead = mean if previous is None else mean + h / (2 * previous[1]) * (mean - previous[0])
            previous = mean, h
            q = (following / sigma) ** (2 if solver == "dpmpp_sde" else 1)
            x = q * x + (1 - q) * ahead
            if solver == "dpmpp_sde":
                x = x + following * (1 - q) ** 0.5 * noise(x, step)
        else:
            there = x + (sigma - following) * sigma * s
            if solver == "heun":
                slope = score(there, _level(x, following)).to(x.dtype)
                x = x + (sigma - following) / 2 * (sigma * s + following * slope)
            else:
                x = there
        if observe is not None:
            observe(x, step, following)
    return _last(score, x, levels[-1], len(levels) - 1, denoise, project)


@torch.no_grad()
def adaptive_probability_flow(
    score: Score,
    x: Tensor,
    sigmas: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    denoise: bool = True,
    project: Project | None = None,
    observe: Observe | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw samples by the probability flow ODE with steps as long as an error allows: `ode.rk45` of `ode.flow_slope`.

    It halts at each of the levels: two are enough, but for what is to be projected or observed in between. Each image
    has steps of its own, so it does not depend on the others of its batch (with the official code's solver, one for all
    pixels of a batch, it does).

    Args:
        score: s(x, sigma).
        x: Start at noise level sigma_1, shape (B, ...).
        sigmas: Noise levels, shape (L,), strictly decreasing.
        rtol: Of `ode.rk45`.
        atol: Of `ode.rk45`.
        denoise: Take the final denoising step, x <- x + sigma_L^2 s(x, sigma_L).
        project: Puts in what is known, see the module.
        observe: Watches, is told the level that x has come to; must not change x.

    Returns:
        Samples, shape and dtype of x, not clamped; and how often the score was evaluated for each, shape (B,).

    Raises:
        ValueError: If the levels do not strictly decrease or a tolerance is not positive.
        ArithmeticError: As `ode.rk45`.
    """
    levels, slope = given_sigmas(sigmas).tolist(), partial(ode.flow_slope, score)
    evaluations = torch.full((len(x),), int(denoise), device=x.device)
    for step, (sigma, following) in enumerate(pairwise(levels)):
        if project is not None:
            x = project(x, sigma, step)
        start, end = ode.flow_time(sigma), ode.flow_time(following)
        y, more = ode.rk45(slope, x / math.cosh(start), start, end, rtol=rtol, atol=atol)
        x, evaluations = math.cosh(end) * y, evaluations + more
        if observe is not None:
            observe(x, step, following)
    return _last(score, x, levels[-1], len(levels) - 1, denoise, project), evaluations


def inpainting(reference: Tensor, mask: Tensor, noise: Noise, *, steps_per_draw: int = 1) -> Project:
    """The `project` that keeps the known pixels of an image: x <- m (reference + sigma z) + (1 - m) x.

    With steps_per_draw = T this is Algorithm 2 of arXiv:1907.05600: one z for each level. (There the known part is
    pasted after each step; that is before the next, and a paste of the next level overwrites the last.) With 1 it is
    the 2020 code, a fresh z before each step. (What that code returns, not pasted at the end, is what `observe` sees
    last.) Without the denoising step the result's known part is reference + sigma_L z; that step adds sigma_L^2 s, as
    it does everywhere. `torch.where(mask, reference, result)` has the reference itself.

    Args:
        reference: Images in [0, 1], broadcastable to x.
        mask: True where the reference is known, bool, broadcastable to x.
        noise: z, of another stream than the steps' own: `seeded_noise(seed, index, random.KNOWN)`.
        steps_per_draw: Steps that share one draw; draw number k serves the steps k steps_per_draw and on.

    Raises:
        ValueError: If the mask is not bool or steps_per_draw < 1.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a mask of bool, got {mask.dtype}: use mask > 0.5")
    return _known(lambda x, y: torch.where(mask, y, x), reference, noise, steps_per_draw)


def colourisation(grey: Tensor, noise: Noise, *, steps_per_draw: int = 1) -> Project:
    """The `project` that keeps the grey part of an image, the mean of its channels: x <- x + mean_C(y - x).

    Inpainting, of y = grey + sigma z, in an orthonormal basis of the channels whose first vector is (1, ..., 1) /
    sqrt(C), with that coordinate known (the idea of arXiv:2011.13456, appendix I.4).

    Args:
        grey: Images in [0, 1], shape (B, 1, H, W); of (B, C, H, W) the mean of the channels counts.
        noise: z, shaped like x; as in `inpainting`.
        steps_per_draw: As in `inpainting`.

    Raises:
        ValueError: If steps_per_draw < 1.
    """
    return _known(lambda x, y: x + (y - x).mean(1, keepdim=True), grey, noise, steps_per_draw)


def interpolated(p: Noise, q: Noise, angle: Tensor) -> Noise:
    """The `noise` of an interpolation: cos(angle) p + sin(angle) q, standard normal at each angle (arXiv:2006.09011).

    Chains that share start, p and q, with angles from 0 to pi / 2, end in images that lead from one to another.

    Args:
        p: Noise at the angle 0; rows of one interpolation get equal values, as of `seeded_noise` with equal numbers.
        q: Noise at the angle pi / 2, independent of p: `seeded_noise(seed, index, random.OTHER_END)`.
        angle: Of each row, radians, shape (B,), on the device of x.
    """

    def noise(x: Tensor, step: int) -> Tensor:
        theta = angle.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return theta.cos() * p(x, step) + theta.sin() * q(x, step)

    return noise


def _steps(
    score: Score,
    x: Tensor,
    sigma: float,
    numbers: range,
    rule: StepRule,
    noise: Noise,
    project: Project | None,
    observe: Observe | None,
) -> Tensor:
    """Langevin steps with these numbers at one level."""
    level = _level(x, sigma)
    for step in numbers:
        if project is not None:
            x = project(x, sigma, step)
        s, z = score(x, level).to(x.dtype), noise(x, step)
        alpha = rule(sigma, s, z)
        x = x + alpha * s + (2 * alpha) ** 0.5 * z
        if observe is not None:
            observe(x, step, sigma)
    return x


def _last(score: Score, x: Tensor, sigma: float, step: int, denoise: bool, project: Project | None) -> Tensor:
    """The end of a trajectory: what is known put in, and with `denoise` the posterior mean."""
    if project is not None:
        x = project(x, sigma, step)
    return x + sigma**2 * score(x, _level(x, sigma)).to(x.dtype) if denoise else x


def _scaled(rule: StepRule, factor: float) -> StepRule:
    return lambda sigma, s, z: factor * rule(sigma, s, z)


def _level(x: Tensor, sigma: float) -> Tensor:
    """What the score is told, shape (B,): at least float32, since half precision would take sigma off its level."""
    return torch.full((len(x),), sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _known(paste: Callable[[Tensor, Tensor], Tensor], reference: Tensor, noise: Noise, steps_per_draw: int) -> Project:
    """The `project` that pastes into x the known part of y = reference + sigma z."""
    if steps_per_draw < 1:
        raise ValueError(f"expected steps_per_draw >= 1, got {steps_per_draw}")
    return lambda x, sigma, step: paste(x, reference + sigma * noise(x, step // steps_per_draw))
