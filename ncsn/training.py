"""What training keeps between steps, and one step of it."""

import copy
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ncsn import random
from ncsn.losses import Score, denoising_score_matching

SHOWN = 3  # names in a message

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # (phi - 1) 2^64, as an int64

Objective = Callable[..., Tensor]  # objective(score, x, sigma, *draws) -> (B,)


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
        """Every tensor by name: model.*, ema.*, optimizer.KIND.PARAMETER and how many of these; the counters.

        A parameter that has had no gradient has nothing of the optimizer.
        """
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.model.state_dict().items()}
        kept = {
            f"optimizer.{kind}.{name}": value
            for name, parameter in self.model.named_parameters()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }
        counters = {"step": self.step, "ema_updates": self.ema.updates, "optimizer_tensors": len(kept)}
        return tensors | kept | {name: torch.tensor(value) for name, value in counters.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: If tensors are missing, unknown or of the wrong shape; nothing is taken up then.
        """
        parameters = dict(self.model.named_parameters())
        parts = {key: key.split(".", 2) for key in tensors if key.startswith("optimizer.")}
        kinds = {part[1] for part in parts.values()}
        shapes = {key: value.shape for key, value in self.state_dict().items() if not key.startswith("optimizer.")}
        named = [name for name in parameters if any(part[-1] == name for part in parts.values())]
        for kind in sorted(kinds):
            counter = all(tensors[key].ndim == 0 for key, part in parts.items() if part[1] == kind)
            shapes |= {
                f"optimizer.{kind}.{name}": torch.Size() if counter else parameters[name].shape for name in named
            }
        check_tensors(tensors, shapes, "a training state")
        if len(parts) != (count := int(tensors["optimizer_tensors"])):
            raise ValueError(f"expected the {count} tensors of the optimizer, got {len(parts)}")
        self.model.load_state_dict(_below(tensors, "model."))
        self.ema.model.load_state_dict(_below(tensors, "ema."))
        self.optimizer.state.clear()
        fused = bool(self.optimizer.defaults.get("fused"))
        for name in named:
            self.optimizer.state[parameters[name]] = {
                kind: _laid_out(tensors[f"optimizer.{kind}.{name}"], parameters[name], fused) for kind in sorted(kinds)
            }
        self.step, self.ema.updates = int(tensors["step"]), int(tensors["ema_updates"])


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], owner: str) -> None:
    """Raise ValueError, which names them, if tensors of `owner` are missing, unknown or not of these shapes."""
    problems = {
        "missing": [key for key in shapes if key not in tensors],
        "unknown": [key for key in tensors if key not in shapes],
        "of the wrong shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(shape)}"
            for key, shape in shapes.items()
            if key in tensors and tensors[key].shape != shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {what}: {first_of(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"expected the {len(shapes)} tensors of {owner}, got {told}")


def first_of(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def data_order(n: int, *, seed: int, first: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """Which image each sample of training is: sample k is entry k mod n of the permutation of epoch k div n.

    A function of (seed, k) alone, so any number of workers and any resumed run sees one order.

    Args:
        n: Images in the training set.
        seed: Of the run, in [0, 2^32).
        first: Global number of the first sample.
        count: Samples wanted.
        device: Where the numbers are made; the same ones on every device.

    Returns:
        Image numbers, int64, shape (count,).

    Raises:
        ValueError: If seed or epoch is not in [0, 2^32).
    """
    parts = []
    for epoch in range(first // n, -(-(first + count) // n)):
        permutation = _permutation(n, seed, epoch, torch.device(device or "cpu"))
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
    level = (train_positions(seed=seed, index=index, power=level_power) * len(sigmas)).long()
    return level, random.normal(seed, random.TRAIN_NOISE, index, 0, shape)


def train_positions(*, seed: int, index: Tensor, power: float = 1.0) -> Tensor:
    """u_k^power of `train_draws`, where a sample is between the largest level, 0, and the smallest, 1; float64, (B,).

    In continuous time 1 - u is its time (arXiv:2011.13456, equation 7), in [0, 1] of what the SDE is trained at.
    """
    shift = random.uniform(seed, random.TRAIN_LEVEL, index.new_zeros(1), 0, (1,)).double()[0]
    turns = (index * _GOLDEN >> 32 & 0xFFFFFFFF).double() * 2.0**-32  # k phi mod 1: int64 wraps, which is the mod
    position: Tensor = ((turns + shift) % 1) ** power
    return position


def train_step(
    state: TrainState,
    x: Tensor,
    sigma: Tensor,
    *draws: Tensor,
    objective: Objective = denoising_score_matching,
    forward: Score | None = None,
    micro_batch: int | None = None,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """One update of the weights and of their average; the loss is the mean of the objective over the batch.

    `accumulate_gradients`, which has the arguments, then `update`.

    Returns:
        Loss of each example, shape (B,), and the norm of the gradient, shape (), both detached. If the norm is not
        finite, the weights have stayed as they were.
    """
    loss = accumulate_gradients(
        state, x, sigma, *draws, objective=objective, forward=forward, micro_batch=micro_batch, threads=threads
    )
    return loss, update(state, loss)


def accumulate_gradients(
    state: TrainState,
    x: Tensor,
    sigma: Tensor,
    *draws: Tensor,
    objective: Objective = denoising_score_matching,
    forward: Score | None = None,
    total: int | None = None,
    micro_batch: int | None = None,
    threads: int = 1,
) -> Tensor:
    """Set the gradients of the parameters to those of sum_b loss_b / total, in place of any earlier ones.

    With several threads each takes a part of the batch through the network and back, in the precision (autocast) of
    the caller. On a CPU this beats as many threads inside every small operation, which wait for each other thousands
    of times a step; so have torch.set_num_threads(cores // threads). A parameter that is frozen, or that the objective
    does not reach, has no gradient and stays.

    Args:
        state: Its parameters' gradients change.
        x: Images in [0, 1], shape (B, C, H, W).
        sigma: Noise levels, shape (B,).
        *draws: What else the objective takes, each with B rows: z of denoising score matching.
        objective: objective(score, x, sigma, *draws) gives one loss an example, shape (B,).
        forward: What to call in place of the network itself, such as its compiled form; with one thread only.
        total: Examples of the whole batch, where this is one worker's share; None means B.
        micro_batch: Most examples that go through the network at once; None means B. A smaller one needs less memory
            and gives the same gradients but for the order of the sums.
        threads: Parts of a micro batch at the same time, 1 to its size. Another number changes the sums' order, so the
            last bits.

    Returns:
        Loss of each example, shape (B,), detached.

    Raises:
        ValueError: If threads is not in 1 to the micro batch, or a forward is given and threads > 1.
    """
    most = min(micro_batch or len(x), len(x))
    if not 1 <= threads <= most:
        raise ValueError(f"expected 1 <= threads <= {most}, the examples of the batch, got threads={threads}")
    if threads > 1 and forward is not None:
        raise ValueError(f"expected threads=1 with a forward of your own, got threads={threads}")
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def backward(part: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        # its cache of cast weights is one for all threads: none, so that their graphs stay apart
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            loss = objective(state.model, *part)
        return loss.detach(), torch.autograd.grad(loss.sum() / (total or len(x)), parameters, allow_unused=True)

    losses: list[Tensor] = []
    state.optimizer.zero_grad()
    for micro in zip(*(tensor.split(most) for tensor in (x, sigma, *draws)), strict=True):
        if threads == 1:
            loss = objective(state.model if forward is None else forward, *micro)
            (loss.sum() / (total or len(x))).backward()
            losses.append(loss.detach())
            continue
        parts = zip(*(tensor.tensor_split(min(threads, len(micro[0]))) for tensor in micro), strict=True)
        some, gradients = zip(*_pool(threads).map(backward, parts), strict=True)
        losses.extend(some)
        for parameter, *terms in zip(parameters, *gradients, strict=True):
            # in the order of the parts: the same bits each time
            for term in terms:
                if term is not None:
                    parameter.grad = term if parameter.grad is None else parameter.grad + term
    return torch.cat(losses)


def update(
    state: TrainState,
    loss: Tensor,
    reduce: Callable[[list[Tensor]], None] | None = None,
    *,
    clip_norm: float | None = None,
) -> Tensor:
    """One step of the optimizer and of the average with the gradients that are there, unless they are not finite.

    A loss or a gradient that is NaN or infinite leaves the weights and the optimizer as they are; the step is counted.
    With a fused optimizer the decision is made on the device, so that nothing waits for it.

    Args:
        state: Changed in place.
        loss: Of the examples that the gradients are of.
        reduce: Called first with all gradients and the sum of the losses: sums them over the workers, in place.
        clip_norm: Most that the norm of the gradient may be: a longer one is shortened to it (arXiv:1211.5063).

    Returns:
        Norm of the gradient, shape (), before it is shortened; not finite if the loss is not.
    """
    gradients = []
    for parameter in state.model.parameters():
        if parameter.grad is None:
            continue
        if parameter.grad.stride() != parameter.stride():  # torch's fused Adam reads both as they lie in memory
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        gradients.append(parameter.grad)
    total = loss.sum()
    if reduce is not None:
        reduce([*gradients, total])
    norm = torch.where(total.isfinite(), nn.utils.get_total_norm(gradients), total)
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), clip_norm, norm)
    if state.optimizer.defaults.get("fused"):
        state.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # as GradScaler tells it
        state.optimizer.step()
    elif norm.isfinite():
        state.optimizer.step()
    state.ema.update(state.model)
    state.step += 1
    return norm


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch or two
def _permutation(n: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The image numbers 0..n-1 in the order of 64 random bits of each."""
    high, low, *_ = random.words(seed, random.TRAIN_ORDER, torch.arange(n, device=device), epoch, 1)
    return (high << 32 | low)[:, 0].argsort(stable=True)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _laid_out(value: Tensor, parameter: Tensor, fused: bool) -> Tensor:
    """A copy laid out as the optimizer makes it: in the parameter's memory format; counters on the CPU unless fused."""
    if value.ndim == 0:
        return value.to(parameter.device if fused else "cpu", copy=True)
    return torch.empty_like(parameter).copy_(value)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
