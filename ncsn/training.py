"""What training keeps between steps, and one step of it."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ncsn import random
from ncsn.losses import Score, denoising_score_matching


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
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, ema_decay: float) -> None:
        self.model = model
        self.ema = EMA(model, ema_decay)
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
        seed: Of the run.
        first: Global number of the first sample.
        count: Samples wanted.

    Returns:
        Image numbers, int64, shape (count,).
    """
    parts = []
    for epoch in range(first // n, -(-(first + count) // n)):
        permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed << 32 | epoch))
        parts.append(permutation[max(first - epoch * n, 0) : max(first + count - epoch * n, 0)])
    return torch.cat(parts)


def train_draws(sigmas: Tensor, shape: torch.Size, *, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """The random draws of training for the samples with these global numbers.

    Args:
        sigmas: Noise levels, shape (L,).
        shape: Of an image, (C, H, W).
        seed: Of the run.
        index: Global sample numbers, int64, shape (B,).

    Returns:
        Level numbers, uniform over 0..L-1, int64, shape (B,); and standard normal z, float32, shape (B, C, H, W).
    """
    level = (random.uniform(seed, random.TRAIN_LEVEL, index, 0, (1,))[:, 0].double() * len(sigmas)).long()
    return level, random.normal(seed, random.TRAIN_NOISE, index, 0, shape)


def train_step(state: TrainState, x: Tensor, sigma: Tensor, z: Tensor, *, forward: Score | None = None) -> Tensor:
    """One update of the weights and of their average by denoising score matching.

    Args:
        state: Changed in place.
        x: Images in [0, 1], shape (B, C, H, W).
        sigma: Noise levels, shape (B,).
        z: Standard normal values, shape of x.
        forward: What to call in place of the network itself, such as a wrapper that averages gradients over workers.

    Returns:
        Loss of each example, shape (B,), detached.

    Raises:
        NonFiniteLossError: Before the weights are touched.
    """
    loss = denoising_score_matching(forward or state.model, x, sigma, z)
    finite = loss.isfinite()
    if not finite.all():
        k = int((~finite).nonzero()[0])
        raise NonFiniteLossError(state.step, float(sigma[k]), float(loss.detach()[k]))
    state.optimizer.zero_grad()
    loss.mean().backward()
    state.optimizer.step()
    state.ema.update(state.model)
    state.step += 1
    return loss.detach()


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy in the parameter's memory format, as the optimizer would have made it; counters stay on the CPU."""
    return value.clone() if value.ndim == 0 else torch.empty_like(parameter).copy_(value)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
