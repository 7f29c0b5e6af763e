"""What score networks of images share: ranges of their arguments, the check of inputs, the range of the pixels."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": partial(F.leaky_relu, negative_slope=0.2),
    "swish": F.silu,
}


class ScoreNetwork(nn.Module, ABC):
    """A score network `score(x, sigma)` of images; a subclass gives `multiple` and `_score`.

    Args:
        channels: Of the image, C.
        width: Channels of the first stage (`ngf` in the official code).
        act: "elu" as published, or "relu", "lrelu", "swish".
        rescale: Map pixels from [0, 1] to [-1, 1] first, h = 2 x - 1; False if the data are rescaled or logits already.

    Raises:
        ValueError: If an argument is out of its range.
    """

    multiple = 1  # height and width must be multiples of this

    def __init__(self, *, channels: int, width: int, act: str, rescale: bool) -> None:
        super().__init__()
        if channels < 1 or width < 2:
            raise ValueError(f"expected channels >= 1 and width >= 2, got channels={channels}, width={width}")
        if act not in ACTIVATIONS:
            raise ValueError(f"expected act to be one of {', '.join(ACTIVATIONS)}, got {act!r}")
        self.channels, self.width, self.rescale = channels, width, rescale
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The score of the data perturbed by sigma.

        Args:
            x: Images in [0, 1] (as they are without `rescale`) plus noise, shape (B, C, H, W), H and W multiples of
                `multiple`.
            sigma: Noise levels (values, not indices) in the units of x, shape (B,).

        Returns:
            s(x, sigma), shape and dtype of x.

        Raises:
            ValueError: If x or sigma has another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected images of shape (B, {self.channels}, H, W), got {tuple(x.shape)}")
        if any(n == 0 or n % self.multiple for n in x.shape[2:]):
            raise ValueError(f"expected height and width to be multiples of {self.multiple}, got {tuple(x.shape[2:])}")
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"expected one sigma an image, shape ({len(x)},), got {tuple(sigma.shape)}")
        return self._score(2 * x - 1 if self.rescale else x, sigma).to(x.dtype)

    @abstractmethod
    def _score(self, h: Tensor, sigma: Tensor) -> Tensor:
        """The score of checked images whose range is the network's own, shapes as in `forward`."""


def divided(f: Tensor, sigma: Tensor) -> Tensor:
    """f(x) / sigma, the form of Technique 3 (arXiv:2006.09011): f (B, C, H, W), sigma (B,); at least float32."""
    return f / sigma[:, None, None, None]
