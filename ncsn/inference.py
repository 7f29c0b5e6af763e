"""A score network made ready for many evaluations, as samplers make them, and how many images it takes at once."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRECISIONS = ("fp32", "tf32", "bf16")
SHARE = 0.5  # of free memory for activations: the rest is for convolutions' workspaces, noise and what fragments leave


class Evaluator:
    """The score s(x, sigma) of a network, without gradients, as fast as the switches allow.

    The network goes into evaluation mode and into the memory format channels_last, in which images are given to it.
    Nothing in a call waits for the device.

    Args:
        network: s(x, sigma), on its device.
        precision: "fp32", "tf32" (GPUs: products of factors with 10 bits) or "bf16" (autocast: products of factors with
            7 bits; the weights stay and what is returned is of the dtype of x).
        compile: By torch.compile, once for each shape of x.
        cuda_graph: Launch all kernels at once, recorded once for each shape of x. What is returned is overwritten by
            the next call.

    Raises:
        ValueError: If there is no such precision, or a graph is asked for without CUDA.
    """

    def __init__(
        self, network: nn.Module, *, precision: str = "fp32", compile: bool = False, cuda_graph: bool = False
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"expected a precision of {', '.join(PRECISIONS)}, got {precision!r}")
        self.device = next(network.parameters()).device
        if cuda_graph and self.device.type != "cuda":
            raise ValueError(f"expected cuda_graph=False on {self.device}: only CUDA devices have graphs")
        self.precision, self.cuda_graph = precision, cuda_graph
        self.network = network.eval().to(memory_format=torch.channels_last)
        self.forward: Callable[..., Tensor] = torch.compile(network, dynamic=False) if compile else network
        self.graphs: dict[tuple[int, ...], tuple[Any, Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The score at x, shape (B, C, H, W), for noise levels sigma, shape (B,)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self._replay(x, sigma) if self.cuda_graph else self._evaluate(x, sigma)

    @torch.no_grad()
    def _evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        # No cache of weights in bfloat16: it would have to outlive a recorded graph. To cast them at each call costs
        # about as much as to read them once, next to nothing beside what is done with them.
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False)
        with half, torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.precision != "fp32"):
            return self.forward(x, sigma).to(x.dtype)

    def _replay(self, x: Tensor, sigma: Tensor) -> Tensor:
        if tuple(x.shape) not in self.graphs:
            self.graphs[tuple(x.shape)] = self._record(x.clone(), sigma.clone())
        graph, its_x, its_sigma, score = self.graphs[tuple(x.shape)]
        its_x.copy_(x)
        its_sigma.copy_(sigma)
        graph.replay()
        return score

    def _record(self, x: Tensor, sigma: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """A graph of one evaluation, its inputs and its output; the first evaluations choose kernels and compile."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._evaluate(x, sigma)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            score = self._evaluate(x, sigma)
        return graph, x, sigma, score


def activation_bytes(network: nn.Module, shape: Sequence[int], level: float = 1.0) -> int:
    """The most bytes that one image's activations take at the same time in an evaluation in float32, without one.

    Args:
        network: s(x, sigma), on any device; on "meta" nothing is computed.
        shape: Of an image, (C, H, W).
        level: A noise level that the network knows.
    """
    device = next(network.parameters()).device
    x, sigma = torch.zeros(1, *shape, device=device), torch.full((1,), level, device=device)
    with torch.no_grad(), _Live([*network.parameters(), *network.buffers(), sigma]) as live:
        network.eval()(x, sigma)
    return live.peak + x.nbytes


def micro_batch(free: int, image: int, most: int) -> int:
    """How many images at once: as many as fit into half of the free memory, from 8 on a multiple of 8, at most `most`.

    Args:
        free: Bytes.
        image: Bytes that each takes, `activation_bytes`.
        most: At least 1.
    """
    fit = max(1, int(SHARE * free) // image)
    return min(most, fit if fit < 8 else fit - fit % 8)


class _Live(TorchDispatchMode):
    """Follows how many bytes of storage are alive that operations have made."""

    def __init__(self, others: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known = {id(other.untyped_storage()): other.untyped_storage() for other in others}
        self.alive: set[int] = set(self.known)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to keep torch.compile out of the counting torch would import it, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and id(storage := value.untyped_storage()) not in self.alive:
                self.alive.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size
