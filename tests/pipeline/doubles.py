"""What stands in for an MLflow run, and for a data set of torch-fidelity's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline import _params


@dataclass
class Recorder:
    """Stands where an MLflow run would, whose database takes seconds to make; keeps what it is given."""

    values: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @contextmanager
    def run(
        self, params: _params.Params, *, later: bool = False, afterwards: str | None = None
    ) -> Iterator["Recorder"]:
        yield self

    def metrics(self, values: dict[str, float]) -> None:
        self.values |= values

    def artifact(self, path: Path, folder: str) -> None:
        self.files += sorted(Path(folder, file.name) for file in (path.iterdir() if path.is_dir() else [path]))

    def trained(self, weights: str) -> None:
        assert len(weights) == 64

    def tables(self, *paths: str) -> None:
        assert {Path(path) for path in paths} <= set(self.files)


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """Images as torch-fidelity wants them: uint8, 3 channels."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = torch.from_numpy(np.array(x)).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> torch.Tensor:
        return self.x[k]
