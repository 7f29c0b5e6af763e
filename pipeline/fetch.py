"""Get what a later run without network needs; or take an official checkpoint as the product of the stage `train`.

Without --checkpoint: the published files of the data set that params.yaml names (docs/data.md), checked by their
digests, and the Inception weights if evaluate.extractor is inception-v3-compat. What is there already is left as it is.
A download that broke off goes on where it stopped.

With --checkpoint FILE, a checkpoint of the papers' code (ncsn, ncsnv2, score_sde_pytorch): reads out/data,
out/schedule and the sections `model` and `train`, which must describe what is in the file; writes out/train: the file's
averaged weights (the last ones, where it has no average), random ones as a yardstick, and model.json with the file's
hash. No code in the file is run. Before it, name the file's settings and make the rest:

    python -m pipeline.compose experiment=ncsnv2_cifar10
    dvc repro schedule features
"""

import argparse
import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ncsn import official
from ncsn.networks import NCSN, NETWORKS
from pipeline import _extractors, _params, _sources, _stage, prepare, schedule, train
from pipeline._sampler import same_levels
from pipeline._stage import StageError, log
from pipeline._store import replacing_folder, sha256

NEXT = """next:
    dvc commit -f train    # let out/train count as up to date
    dvc repro              # draw, judge and report, without training
    dvc freeze train       # keep these weights when noise.* or train.* change later; undone by dvc unfreeze train"""


def main(
    params: _params.Params,
    checkpoint: Path | None = None,
    rescaled: bool = False,
    logit_transform: bool = False,
    step: int | None = None,
) -> None:
    """Download what params.yaml needs, or write out/train from a checkpoint.

    Raises:
        StageError: If something can neither be found nor downloaded; if the checkpoint is none, or does not suit
            params.yaml, the data or the schedule.
    """
    if checkpoint is not None:
        take(params, checkpoint, rescaled, logit_transform, step)
    elif rescaled or logit_transform or step is not None:
        raise StageError(
            "--rescaled, --logit-transform and --step describe a checkpoint: expected --checkpoint FILE, too"
        )
    else:
        download(params)


def download(params: _params.Params) -> None:
    """Download what a later run needs; raises StageError, after trying all, if something cannot be had."""
    data, judge = params.data, params.evaluate
    what: list[tuple[str, Callable[[], list[Path]]]] = [(f"data={data.name}", partial(_sources.fetch, data))]
    if judge.extractor == "inception-v3-compat":
        what.append((judge.extractor, partial(inception, judge.inception_weights)))
    errors = []
    for name, get in what:
        try:
            paths = get()
        except StageError as error:
            errors.append(str(error))
        else:
            log.info("%s: %s", name, f"in place, {', '.join(map(str, paths))}" if paths else "nothing to download")
    if errors:
        raise StageError("; ".join(errors))


def inception(given: str | None) -> list[Path]:
    """The weights of torch-fidelity's Inception, downloaded if they are missing."""
    source = _sources.Source(
        _extractors.INCEPTION_FILE,
        95_628_359,
        f"sha256:{_extractors.INCEPTION_SHA256}",
        (_extractors.INCEPTION_URL,),
    )
    hint = ", or name a copy with evaluate.inception_weights=PATH"
    return [_sources.download(source, _extractors.inception_path(given), hint)]


def take(params: _params.Params, checkpoint: Path, rescaled: bool, logit_transform: bool, step: int | None) -> None:
    """Write out/train from the file; raises StageError as `main` does."""
    shape, levels = prepare.manifest()["shape"], schedule.load()
    space = "centred" if rescaled else "logits" if logit_transform else "pixels"
    network = train.describe(params.model, shape[0], levels) | {"rescale": space == "pixels"}
    try:
        if params.model.name in _params.SDE_NETWORKS:
            # the levels that it holds in any case are not those that a network of continuous time was trained at
            found = dataclasses.replace(official.load_diffusion(checkpoint, train.build(network)), sigmas=None)
        else:
            found = official.load(
                checkpoint,
                sigmas=network.get("sigmas"),
                nonlinearity=params.model.act,
                rescaled=rescaled,
                logit_transform=logit_transform,
            )
    except (OSError, ValueError) as error:
        here = f"model.name={params.model.name}, and out/schedule has {levels['L']} noise levels"
        raise StageError(f"{checkpoint}: {error} (here {here})") from error
    expect_same(checkpoint, found, network, levels)
    train.check(network, shape)
    step = step or found.step or step_in(checkpoint.name)
    if step is None:
        raise StageError(f"{checkpoint} does not tell how many steps it was trained for: give them, as --step 200000")
    kept = found.ema_network or found.network
    if isinstance(kept, NCSN):
        network["norm"] = "instance++" if kept.normalizer.plus else "instance"
    digest = sha256(checkpoint)
    kind = "averaged" if found.ema_network else "of the last step, for want of averaged ones"
    with replacing_folder(train.OUT) as out:
        train.write_model(
            out,
            kept.state_dict(),
            train.initial_network(network, params.train.seed).state_dict(),
            {
                "network": network,
                "space": space,
                "step": step,
                "ema_decay": None if found.ema_network else 0.0,  # files do not tell
                "seed": params.train.seed,
                "fingerprint": digest[:12],
                "source": {"file": checkpoint.name, "sha256": digest, "weights": kind},
            },
        )
    log.info("%s after %s steps, weights %s, written to %s", params.model.name, f"{step:,}", kind, train.OUT)
    print(NEXT)


def expect_same(
    checkpoint: Path, found: official.OfficialCheckpoint, network: dict[str, Any], levels: dict[str, Any]
) -> None:
    """Raise StageError if the network or the noise levels in a file are not those of params.yaml and the data."""
    names = {kind: name for name, kind in NETWORKS.items()}
    held = {"name": names[type(found.network)], "channels": found.network.channels, "width": found.network.width}
    here = {key: network[key] for key in held}
    if held != here:
        text = "a {name} of width {width} for images with {channels} channels"
        raise StageError(
            f"{checkpoint} holds {text.format(**held)}, but data.* and model.* make {text.format(**here)}: write "
            "params.yaml anew with the file's own, as `python -m pipeline.compose model=... model.width=... data=...`"
        )
    if found.sigmas is not None and not same_levels(own := found.sigmas.tolist(), levels["sigmas"]):
        raise StageError(
            f"{checkpoint} was trained with {len(own)} noise levels from {own[0]:.6g} to {own[-1]:.6g}, but "
            f"out/schedule has {levels['L']} from {levels['sigma_1']:.6g} to {levels['sigma_L']:.6g}: write "
            f"params.yaml anew with noise=manual noise.sigma_1={own[0]:.6g} noise.sigma_L={own[-1]:.6g} "
            f"noise.L={len(own)} noise.epsilon=..., and run `dvc repro schedule`"
        )


def step_in(name: str) -> int | None:
    """200000, of checkpoint_200000.pth; files of 2019 tell it in their name alone."""
    number = re.search(r"_(\d+)\.\w+$", name)
    return int(number[1]) if number else None


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="the file, checkpoint_{step}.pth")
    parser.add_argument("--rescaled", action="store_true", help="its configuration has data.rescaled: true")
    parser.add_argument("--logit-transform", action="store_true", help="... data.logit_transform: true")
    parser.add_argument("--step", type=int, help="steps it was trained for, where file and name do not tell")


if __name__ == "__main__":
    _stage.run("fetch", __doc__, main, options)
