"""Train the classifier whose features FID, KID, IS, precision and recall are computed in.

Reads out/data and the section `features`; writes out/features: classifier.safetensors and classifier.json (what it is,
its test accuracy, the weights' SHA-256). Without labels there is nothing to train: classifier.json says so.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ncsn import images
from ncsn.optim import AdamW
from pipeline import _params, _stage, _track, prepare
from pipeline._stage import StageError, log
from pipeline._store import read_json, replacing_folder, sha256, write_json

OUT = Path("out/features")
BATCH = 250  # images at a time where there are no gradients


class Classifier(nn.Module):
    """A small convolutional classifier.

    Blocks conv3x3 -> batch norm -> ReLU -> 2x2 max pooling until the image is about 8 pixels wide (two at least), a
    linear layer with batch norm: the features; then ReLU and a linear layer: the logits.

    The features are taken before the ReLU. FID compares Gaussians, and a rectified activation, with its mass at 0, is
    far from one; it may also be 0 for good, which leaves the covariance without full rank. After the batch norm each
    feature has unit variance over the training images, so that all count alike.

    Args:
        shape: (C, H, W) of the images.
        classes: Number of classes.
    """

    feature_dim = 64

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        depth = max(2, math.ceil(math.log2(max(height, width) / 8)))
        blocks: list[nn.Module] = []
        for k in range(depth):
            outputs = min(32 * 2**k, 64)
            blocks += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            blocks += [nn.MaxPool2d(2, ceil_mode=True)]
            channels = outputs
        places = math.ceil(height / 2**depth) * math.ceil(width / 2**depth)
        self.features = nn.Sequential(
            *blocks,
            nn.Flatten(),
            nn.Linear(channels * places, self.feature_dim, bias=False),
            nn.BatchNorm1d(self.feature_dim),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(self.feature_dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to logits (B, classes); `features` gives (B, d), `head` takes them on."""
        return self.head(self.features(x))


def main(params: _params.Params) -> None:
    data = prepare.manifest()
    if data["classes"] is None:
        log.warning("%s has no labels: no classifier is trained, so evaluate needs Inception weights", data["name"])
        with replacing_folder(OUT) as out:
            write_json(out / "classifier.json", {"labelled": False})
        return
    with _track.run(params, later=True) as run:
        network = train_classifier(*labelled("train"), len(data["classes"]), params.features)
        correct = accuracy(network, *labelled("test"))
        log.info("test accuracy %.4f on %d images", correct, data["splits"]["test"]["n"])
        with replacing_folder(OUT) as out:
            weights = out / "classifier.safetensors"
            save_file({key: value.cpu().contiguous() for key, value in network.state_dict().items()}, weights)
            write_json(
                out / "classifier.json",
                {
                    "labelled": True,
                    "extractor": f"{data['name']}-classifier",
                    "shape": data["shape"],
                    "classes": data["classes"],
                    "feature_dim": Classifier.feature_dim,
                    "test_accuracy": correct,
                    "steps": params.features.steps,
                    "sha256": sha256(weights),
                },
            )
        run.metrics({"features/test_accuracy": correct})


def manifest(folder: Path = OUT) -> dict[str, Any]:
    """The content of classifier.json.

    Raises:
        StageError: If it has not been written.
    """
    path = folder / "classifier.json"
    if not path.is_file():
        raise StageError(f"{path} does not exist: write it with `dvc repro features`")
    content: dict[str, Any] = read_json(path)
    return content


def load_classifier(path: Path = OUT / "classifier.safetensors") -> Classifier:
    """The classifier of a file that has classifier.json beside it, in evaluation mode, on the CPU.

    Raises:
        StageError: If the file is not the one that classifier.json describes.
    """
    info, found = manifest(path.parent), sha256(path)
    if found != info["sha256"]:
        raise StageError(
            f"{path} has SHA-256 {found}, but classifier.json says {info['sha256']}: "
            f"write both anew with `dvc repro --single-item --force features`"
        )
    network = Classifier(info["shape"], len(info["classes"]))
    network.load_state_dict(load_file(path))
    return network.eval()


def labelled(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split of a labelled data set."""
    x, labels = prepare.load(split)
    if labels is None:
        raise StageError(
            f"{prepare.OUT}/{split}_labels.npy does not exist: write it with `dvc repro --single-item --force prepare`"
        )
    return x, labels


def train_classifier(x: np.ndarray, labels: np.ndarray, classes: int, settings: _params.Features) -> Classifier:
    """Minimise the cross entropy by AdamW, with a learning rate that falls to 0 along a half cosine.

    Args:
        x: uint8 images, (N, C, H, W).
        labels: int64, (N,), from 0 to classes - 1.
        classes: Number of classes.
        settings: steps, batch_size, learning_rate, and the seed of initial weights and data order.

    Returns:
        The network, in evaluation mode.

    Raises:
        StageError: If the loss is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(settings.seed)
    network = Classifier(x.shape[1:], classes)
    initialise(network, generator)
    network.to(device).train()
    optimiser = AdamW(network.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    order = data_order(len(x), settings.steps, settings.batch_size, generator)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False)
    with one_thread(), exact, _stage.progress(settings.steps, "step", "classifier") as bar:
        for step, rows in enumerate(order):
            batch = images.to_float(torch.from_numpy(x[rows.numpy()])).to(device)
            loss = F.cross_entropy(network(batch), torch.from_numpy(labels[rows.numpy()]).to(device))
            if not loss.isfinite():
                raise StageError(
                    f"the classifier's loss is {loss.item()} at step {step}: "
                    f"lower features.learning_rate={settings.learning_rate}"
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            bar.update()
    return network.eval()


def initialise(network: Classifier, generator: torch.Generator) -> None:
    """He initialisation, drawn from a generator of our own: the weights do not depend on what ran before."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU core: so the weights do not depend on how many there are, which changes the order of sums.

    Layers this small gain little from a second core, and lose much where the cores are busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def data_order(n: int, steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Row numbers of each step's batch, (steps, batch_size): one random order of all n rows after the other."""
    epochs = -(-steps * batch_size // n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)


@torch.no_grad()
def accuracy(network: Classifier, x: np.ndarray, labels: np.ndarray) -> float:
    """The share of uint8 images (N, C, H, W) whose class is found."""
    device = next(network.parameters()).device
    correct = 0
    for first in range(0, len(x), BATCH):
        batch = images.to_float(torch.from_numpy(np.array(x[first : first + BATCH]))).to(device)
        found = network(batch).argmax(dim=1).cpu().numpy()
        correct += int((found == labels[first : first + BATCH]).sum())
    return correct / len(x)


if __name__ == "__main__":
    _stage.run("features", __doc__, main)
