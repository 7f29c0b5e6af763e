"""The toy network of arXiv:1907.05600 (Figure 2): points instead of images."""

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Two hidden layers with softplus; sigma is ignored, so it models the score at one noise level.

    Args:
        features: Dimension of a point, D.
        width: Of the hidden layers; 128 as published.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, *, features: int = 2, width: int = 128) -> None:
        super().__init__()
        if features < 1 or width < 1:
            raise ValueError(f"expected features >= 1 and width >= 1, got features={features}, width={width}")
        self.features = features
        for name, inputs, outputs in (("0", features, width), ("2", width, width), ("4", width, features)):
            self.add_module(name, nn.Linear(inputs, outputs))  # the official names

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The score at the points x, shape (B, D), result the same; sigma has the shape (B,).

        Raises:
            ValueError: If x or sigma has another shape.
        """
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"expected points of shape (B, {self.features}), got {tuple(x.shape)}")
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"expected one sigma a point, shape ({len(x)},), got {tuple(sigma.shape)}")
        first, second, third = self.children()
        return third(F.softplus(second(F.softplus(first(x))))).to(x.dtype)
