"""Sampling whose workers and driver are killed, and which is stopped: real Ray processes, real signals."""

import io
import os
import signal

import numpy as np
import psutil
import pytest

from pipeline import _params, prepare, sample, schedule, select, train
from pipeline._stage import STOPPED
from pipeline._store import replacing_folder, sha256, write_json
from pipeline.compose import compose
from tests.stages import SETTINGS, Sampling

pytestmark = pytest.mark.graph

N, RANGES, SHARD = 40, 2, 5
IMAGES = [f"sample.n={N}", f"sample.ranges={RANGES}", f"sample.shard_size={SHARD}"]


@pytest.fixture(scope="module")
def trained(clone):
    """The clone with networks that were not trained, which takes as long to draw from, and many Langevin steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone)
        params, levels = _params.parse(compose(SETTINGS)), schedule.load() | {"steps_per_level": 40}
        write_json(schedule.OUT / "schedule.json", levels)
        network = train.describe(params.model, prepare.manifest()["shape"][0], levels)
        one, other = (train.initial_network(network, seed).state_dict() for seed in (0, 1))
        with replacing_folder(train.OUT) as out:
            train.write_model(out, one, other, {"network": network, "space": "pixels", "step": 9})
        select.main(params)
    return clone


def test_what_is_finished_is_never_drawn_again_whoever_dies(trained, inside):
    with Sampling(inside, *IMAGES, name="broken") as stage:
        stage.until(lambda: len(stage.shards()) >= 1)
        stage.workers("ray::_Actor")[0].kill()
        stage.until(lambda: len(stage.shards()) >= 3)
        os.kill(stage.process.pid, signal.SIGTERM)
        stage.ends(STOPPED)
        assert "stopped by SIGTERM: what is done is saved, and the same command goes on from there" in stage.printed()
        stopped = stage.shards()
        assert 3 <= len(stopped) < N * RANGES / SHARD
    with stage:
        stage.until(lambda: len(stage.shards()) > len(stopped))
        workers = stage.workers("ray::_Actor")
        stage.kill()
        psutil.wait_procs(workers)  # which may yet finish a shard
    finished = stage.shards()
    assert len(finished) < N * RANGES / SHARD
    assert stopped.items() <= finished.items()
    damaged = min(finished)
    path = (stage.place() / damaged).with_suffix(".npy")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with stage:
        stage.ends()
    assert stage.printed().count("is damaged and drawn again") == 1
    assert f"ema: {N * RANGES} images, 161 NFE each, {SHARD * (len(finished) - 1)} there already" in stage.printed()
    now = stage.shards()
    assert {name for name in finished if now[name] != finished[name]} == {damaged}
    again = np.load(path).astype(int) - np.load(io.BytesIO(good)).astype(int)
    assert np.abs(again).max() <= 1
    manifest = sample.manifest()
    assert (manifest["n"], manifest["ranges"], len(manifest["shards"])) == (N, RANGES, len(now))
    assert all(sha256(sample.OUT / "ema" / shard["file"]) == shard["sha256"] for shard in manifest["shards"])
    assert sample.load().shape == (N * RANGES, 1, 8, 8)
    assert len(np.unique(sample.load(), axis=0)) == N * RANGES
    stage.command += ["--verify", "5"]
    with stage:
        stage.ends()
    assert "ema: 5 of 80 images drawn again" in stage.printed()
    assert "untrained: 5 of 40 images drawn again" in stage.printed()
