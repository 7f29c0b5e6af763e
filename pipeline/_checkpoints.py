"""Checkpoints of one run in a store: step_00000260/state.safetensors, then step_00000260/meta.json, which commits it.

A checkpoint without its meta.json was never finished and does not count; one whose bytes differ from what meta.json
says is reported and passed over. A store that cannot be read is no damage: it ends what is done.
"""

import hashlib
import json
import re
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from pipeline._stage import StageError, log
from pipeline._store import Store

STATE, META = "state.safetensors", "meta.json"


class DamagedError(StageError):
    """A checkpoint that is not what was saved."""


def steps(run: Store) -> list[int]:
    """The steps of all finished checkpoints, newest first."""
    found = (re.fullmatch(rf"step_(\d+)/{META}", name) for name in run.names())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def write(
    run: Store, tensors: dict[str, Tensor], about: dict[str, Any], *, keep: int, keep_every: int | None = None
) -> None:
    """Write the checkpoint of about["step"]; of all keep the best, the `keep` newest and the multiples of keep_every.

    Args:
        run: Where.
        tensors: By name.
        about: JSON; "step", and "test_loss", of which the lowest is the best, or None.
        keep: At least 1.
        keep_every: Steps, or None.

    Raises:
        FloatingPointError: If a tensor of the state is not finite; nothing is written.
    """
    here = {}
    for name, value in tensors.items():
        if "." in name and not value.isfinite().all():
            raise FloatingPointError(f"{name} is not finite at step {about['step']}: lower train.learning_rate")
        here[name] = value.cpu().contiguous()
    content = save(here)
    place = run / _name(about["step"])
    meta = about | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    place.remove(META)  # of an earlier try, while the state is another
    place.write(STATE, content)
    place.write(META, (json.dumps(meta, indent=2, allow_nan=False) + "\n").encode())
    _prune(run, keep, keep_every)


def newest(run: Store) -> tuple[int, dict[str, Tensor]] | None:
    """The step and the tensors of the newest sound checkpoint; each damaged one is reported. None if there is none."""
    for step in steps(run):
        try:
            return step, read(run, step)
        except DamagedError as error:
            log.warning("%s, so it is passed over", error)
    return None


def read(run: Store, step: int) -> dict[str, Tensor]:
    """The tensors of one checkpoint; raises DamagedError."""
    place = run / _name(step)
    try:
        meta, content = about(run, step), place.read(STATE)
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint {place.uri} is damaged: a file is missing") from error
    if len(content) != meta["bytes"] or hashlib.sha256(content).hexdigest() != meta["sha256"]:
        found = f"{len(content):,} bytes" if len(content) != meta["bytes"] else "other bytes of this number"
        raise DamagedError(
            f"checkpoint {place.uri} is damaged: {found} in place of the {meta['bytes']:,} that were saved"
        )
    return load(content)


def about(run: Store, step: int) -> dict[str, Any]:
    """What meta.json says of a checkpoint; raises DamagedError."""
    place = run / _name(step)
    try:
        meta: dict[str, Any] = json.loads(place.read(META))
        _ = meta["bytes"], meta["sha256"], meta["test_loss"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"checkpoint {place.uri} is damaged: {META} cannot be read") from error
    return meta


def _prune(run: Store, keep: int, keep_every: int | None) -> None:
    found = steps(run)
    losses = {}
    for step in found:
        try:
            losses[step] = about(run, step)["test_loss"]
        except DamagedError:
            continue  # not the best
    judged = [step for step, loss in losses.items() if loss is not None]
    milestones = [step for step in found if keep_every and step and step % keep_every == 0]
    kept = {_name(step) for step in (*found[:keep], *milestones, *sorted(judged, key=losses.__getitem__)[:1])}
    there = {name.split("/")[0] for name in run.names() if name.startswith("step_")}
    for name in sorted(there - kept):  # old ones, and what a save left that was broken off
        (run / name).remove(META)  # first: what is half removed does not count
        run.remove(name)


def _name(step: int) -> str:
    return f"step_{step:08d}"
