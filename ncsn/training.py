"""What training keeps between steps, and one step of it."""

import copy
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ncsn import random
from ncsn.losses import Score, denoising_score_matching

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # (phi - 1) 2^64, as an int64

Objective = Callable[..., Tensor]  # objective(score, x, sigma, *draws) -> (B,)


class NonFiniteLossError(FloatingPointError):
    """A loss that is not a number; the weights are still those of the last good step."""

    def __init__(self, step: int, sigma: float, value: float) -> None:
        self.step, self.sigma, self.value = step, sigma, value
        super().__init__(f"loss {value} at step {step}, noise level sigma={sigma:.4g}: lower the learning rate")

    def __reduce__(self) -> tuple[type, tuple[int, float, float]]:
        return type(self), (self.step, self.sigma, self.value)  # travels between processes


class EMA:
    """Exponential moving average of the weights (Technique 5): theta' <- m theta' + (1 - m) theta after each update.

    With the warm-up (of the score-SDE code) m is min(decay, (1 + n) / (10 + n)) after n updates, so that the average
    forgets the initial weights early. Buffers are copied, not averaged.

    Args:
        model: The network whose weights are followed.
        decay: m, in [0, 1).
        warmup: False keeps m = decay from the first update on, as the official code of 2020 does.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`."""
        self.updates += 1
        m = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - m)
        for mine, other in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(other)


class TrainState:
    """Network, average, optimizer and step: all that a run needs to go on.

    Args:
        model: The score network.
        optimizer: Of all its parameters, in one group.
        ema_decay: Of `EMA`.
        ema_warmup: Of `EMA`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, ema_decay: float, ema_warmup: bool = True
    ) -> None:
        self.model = model
        self.ema = EMA(model, ema_decay, warmup=ema_warmup)
        self.optimizer = optimizer
        self.step = 0

    @property
    def learning_rate(self) -> float:
        """What the next step takes."""
        return float(self.optimizer.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.optimizer.param_groups[0]["lr"] = value

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name: model.*, ema.*, and optimizer.KIND.PARAMETER; `step` for the counters."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{kind}.{name}"] = value
        return tensors | {"step": torch.tensor(self.step), "ema_updates": torch.tensor(self.ema.updates)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned; raises RuntimeError or KeyError if names or shapes differ."""
        self.model.load_state_dict(_below(tensors, "model."))
        self.ema.model.load_state_dict(_below(tensors, "ema."))
        kinds = {key.split(".")[1] for key in tensors if key.startswith("optimizer.")}
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                kind: _laid_out(tensors[f"optimizer.{kind}.{name}"], parameter) for kind in sorted(kinds)
            }
        self.step, self.ema.updates = int(tensors["step"]), int(tensors["ema_updates"])


def data_order(n: int, *, seed: int, first: int, count: int) -> Tensor:
    """Which image each sample of training is: sample k is entry k mod n of the permutation of epoch k div n.

    A function of (seed, k) alone, so any number of workers and any resumed run sees one order.

    Args:
        n: Images in the training set.
        seed: Of the run, in [0, 2^32).
        first: Global number of the first sample.
        count: Samples wanted.

    Returns:
        Image numbers, int64, shape (count,).

    Raises:
        ValueError: If seed or epoch is not in [0, 2^32).
    """
    parts = []
    for epoch in range(first // n, -(-(first + count) // n)):
        permutation = _permutation(n, seed, epoch)
        parts.append(permutation[max(first - epoch * n, 0) : max(first + count - epoch * n, 0)])
    return torch.cat(parts)


def train_draws(
    sigmas: Tensor, shape: torch.Size, *, seed: int, index: Tensor, level_power: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The random draws of training for the samples with these global numbers.

    The level of sample k is floor(L u_k^power) with u_k = (k phi + shift) mod 1, phi the golden ratio and a shift drawn
    by the seed. With power 1 each level is as likely as with the papers' independent uniform draws; a smaller one
    favours the small levels, where a score is hardest to learn. Any run of samples, so any batch, has its even share
    of all levels (the additive recurrence is a sequence of low discrepancy): gradients vary less from step to step.

    Args:
        sigmas: Noise levels, shape (L,).
        shape: Of an image, (C, H, W).
        seed: Of the run.
        index: Global sample numbers, int64, shape (B,).
        level_power: > 0; level i of 0..L-1 has probability ((i + 1) / L)^(1 / power) - (i / L)^(1 / power).

    Returns:
        Level numbers, 0..L-1, int64, shape (B,); and standard normal z, float32, shape (B, C, H, W).

    Raises:
        ValueError: If the seed is not in [0, 2^32).
    """
    shift = random.uniform(seed, random.TRAIN_LEVEL, index.new_zeros(1), 0, (1,)).double()[0]
    turns = (index * _GOLDEN >> 32 & 0xFFFFFFFF).double() * 2.0**-32  # k phi mod 1: int64 wraps, which is the mod
    level = (((turns + shift) % 1) ** level_power * len(sigmas)).long()
    return level, random.normal(seed, random.TRAIN_NOISE, index, 0, shape)


def train_step(
    state: TrainState,
    x: Tensor,
    sigma: Tensor,
    *draws: Tensor,
    objective: Objective = denoising_score_matching,
    forward: Score | None = None,
    threads: int = 1,
) -> Tensor:
    """One update of the weights and of their average; the loss is the mean of the objective over the batch.

    With several threads each takes a part of the batch through the network and back. On a CPU this beats as many
    threads inside every small operation, which wait for each other thousands of times a step.

    Args:
        state: Changed in place.
        x: Images in [0, 1], shape (B, C, H, W).
        sigma: Noise levels, shape (B,).
        *draws: What else the objective takes, each with B rows: z of denoising score matching.
        objective: objective(score, x, sigma, *draws) gives one loss an example, shape (B,).
        forward: What to call in place of the network itself, such as a wrapper that averages gradients over workers;
            with one thread only.
        threads: Parts of the batch, at most B. Another number changes the sums' order, so the last bits.

    Returns:
        Loss of each example, shape (B,), detached.

    Raises:
        NonFiniteLossError: Before the weights are touched.
        ValueError: If a forward is given and threads > 1.
    """
    if threads > 1 and forward is not None:
        raise ValueError(f"expected threads=1 with a forward of your own, got threads={threads}")
    parameters = list(state.model.parameters())

    def backward(part: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = objective(state.model, *part)
        return loss.detach(), torch.autograd.grad(loss.sum() / len(x), parameters)

    state.optimizer.zero_grad()
    if threads == 1:
        values = objective(forward or state.model, x, sigma, *draws)
        values.mean().backward()
        loss = values.detach()
    else:
        parts = zip(*(tensor.tensor_split(threads) for tensor in (x, sigma, *draws)), strict=True)
        losses, gradients = zip(*_pool(threads).map(backward, parts), strict=True)
        for parameter, *terms in zip(parameters, *gradients, strict=True):
            parameter.grad = sum(terms[1:], terms[0])  # in the order of the parts: the same bits each time
        loss = torch.cat(losses)
    finite = loss.isfinite()
    if not finite.all():
        k = int((~finite).nonzero()[0])
        raise NonFiniteLossError(state.step, float(sigma[k]), float(loss[k]))
    state.optimizer.step()
    state.ema.update(state.model)
    state.step += 1
    return loss


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch or two
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The image numbers 0..n-1 in the order of 64 random bits of each."""
    high, low, *_ = random.words(seed, random.TRAIN_ORDER, torch.arange(n), epoch, 1)
    return (high << 32 | low)[:, 0].argsort(stable=True)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy in the parameter's memory format, as the optimizer would have made it; counters stay on the CPU."""
    return value.clone() if value.ndim == 0 else torch.empty_like(parameter).copy_(value)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
