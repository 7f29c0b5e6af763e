"""Checkpoints of one run in a store: step_00000260/state.safetensors, then step_00000260/meta.json, which commits it.

A checkpoint without its meta.json was never finished and does not count; one whose bytes differ from what meta.json
says is reported and passed over.
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


def steps(run: Store) -> list[int]:
    """The steps of all finished checkpoints, newest first."""
    found = (re.fullmatch(rf"step_(\d+)/{META}", name) for name in run.names())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def write(run: Store, tensors: dict[str, Tensor], about: dict[str, Any], *, keep: int) -> None:
    """Write the checkpoint of about["step"]; of all keep the initial one, the best, and the `keep` newest.

    Args:
        run: Where.
        tensors: By name.
        about: JSON; "step", and "test_loss", of which the lowest is the best.
        keep: At least 1.

    Raises:
        FloatingPointError: If a tensor of the state is not finite; nothing is written.
        StageError: If it cannot be written, for want of room for instance.
    """
    bad = [name for name, value in tensors.items() if name.partition(".")[2] and not value.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{bad[0]} is not finite at step {about['step']}: lower train.learning_rate")
    content = save({name: value.contiguous() for name, value in tensors.items()})
    place = run / _name(about["step"])
    meta = about | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    try:
        place.write(STATE, content)
        place.write(META, (json.dumps(meta, indent=2, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise StageError(
            f"checkpoint {place.uri} of {len(content):,} bytes cannot be written: {error.strerror}: make room, or "
            "set runtime.storage; the earlier ones are whole"
        ) from error
    _prune(run, keep)


def newest(run: Store) -> tuple[int, dict[str, Tensor]] | None:
    """The step and the tensors of the newest sound checkpoint; each damaged one is reported. None if there is none."""
    for step in steps(run):
        try:
            return step, read(run, step)
        except StageError as error:
            log.warning("%s, so it is passed over", error)
    return None


def read(run: Store, step: int) -> dict[str, Tensor]:
    """The tensors of one checkpoint; raises StageError if it is damaged."""
    place = run / _name(step)
    try:
        meta, content = about(run, step), place.read(STATE)
    except FileNotFoundError as error:
        raise StageError(f"checkpoint {place.uri} is damaged: a file is missing") from error
    if len(content) != meta["bytes"] or hashlib.sha256(content).hexdigest() != meta["sha256"]:
        found = f"{len(content):,} bytes" if len(content) != meta["bytes"] else "other bytes of this number"
        raise StageError(
            f"checkpoint {place.uri} is damaged: {found} in place of the {meta['bytes']:,} that were saved"
        )
    return load(content)


def about(run: Store, step: int) -> dict[str, Any]:
    """What meta.json says of a checkpoint; raises StageError if it is damaged."""
    place = run / _name(step)
    try:
        meta: dict[str, Any] = json.loads(place.read(META))
        _ = meta["bytes"], meta["sha256"], meta["test_loss"]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"checkpoint {place.uri} is damaged: {META} cannot be read") from error
    return meta


def _prune(run: Store, keep: int) -> None:
    found = steps(run)
    losses = {}
    for step in found:
        try:
            losses[about(run, step)["test_loss"]] = step
        except StageError:
            continue  # damaged: not the best
    kept = {*found[:keep], found[-1], losses[min(losses)]}
    for step in set(found) - kept:
        place = run / _name(step)
        place.remove(META)  # first: what is half removed does not count
        run.remove(_name(step))


def _name(step: int) -> str:
    return f"step_{step:08d}"
