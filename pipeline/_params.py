"""The parameters of every stage: params.yaml, checked once, as typed values.

`conf/` holds the choices; `dvc exp run -S group=option` or `python -m pipeline.compose` writes them out as
params.yaml; `load` reads that file. Every value has one default, in `conf/`, and one rule, here.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

SDE_NETWORKS = ("ncsnpp", "ddpmpp", "ddpm")
METHODS = "annealed_langevin", "consistent", "euler", "heun", "dpmpp", "dpmpp_sde", "rk45", "predictor_corrector"
OF_SDES = ("blocks", "attention", "dropout")  # what these alone have


class ParamsError(ValueError):
    """A parameter that cannot be used; the message is one line with the full key, the value and what is allowed."""


def _rule(allowed: str, holds: Callable[[Any], bool] = lambda value: True) -> Any:
    """A field whose values satisfy `holds`, described for people by `allowed`."""
    return dataclasses.field(metadata={"allowed": allowed, "holds": holds})


def _one_of(*names: str) -> Any:
    return _rule(f"one of {', '.join(names)}", lambda value: value in names)


def _whole(least: int) -> Any:
    return _rule(f"a whole number >= {least}", lambda value: value is None or value >= least)


def _seed() -> Any:
    return _rule("a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)


def _positive() -> Any:
    return _rule("a number > 0", lambda value: value is None or 0 < value < float("inf"))


def _workers() -> Any:
    return _rule(
        "a whole number >= 1, or a range as [1, 8]",
        lambda value: (
            all(type(n) is int and n >= 1 for n in value) and len(value) == 2 and value[0] <= value[1]
            if isinstance(value, tuple)
            else value >= 1
        ),
    )


def _list(allowed: str, holds: Callable[[Any], bool], kind: type = float) -> Any:
    """A list of values of one kind, each of which satisfies `holds`."""
    kinds = (int, float) if kind is float else (kind,)
    return _rule(f"a list of {allowed}", lambda values: all(type(each) in kinds and holds(each) for each in values))


def _multipliers() -> Any:
    return _rule(
        "whole numbers >= 1, as in [1, 2, 2]",
        lambda value: value is None or (value and all(type(m) is int and m >= 1 for m in value)),
    )


@dataclass(frozen=True)
class Data:
    """The data set and its split. `root` is the folder or archive it lies in; null means below the cache, data/."""

    name: str = _one_of(
        *("digits", "mnist", "fashion_mnist", "cifar10", "celeba32", "celeba64"),
        *("lsun_church96", "lsun_bedroom128", "lsun_tower128", "ffhq256", "image_folder", "patches"),
    )
    root: str | None = _rule("a path")
    resolution: int | None = _whole(2)
    channels: int | None = _rule("1 or 3", lambda value: value in (1, 3, None))
    test_fraction: float = _rule("a number between 0 and 1", lambda value: 0 < value < 1)
    seed: int = _seed()
    sigma_L: float = _positive()
    flip: bool = _rule("true or false")
    crop: int | None = _whole(2)


@dataclass(frozen=True)
class Model:
    """The score network; `multipliers` is of U-Nets alone, what follows it of those of the SDE family."""

    name: str = _one_of(
        *("ncsn", "ncsn_deeper", "ncsnv2", "ncsnv2_deeper", "ncsnv2_deepest", "unet", "ncsnpp", "ddpmpp", "ddpm")
    )
    width: int = _whole(2)
    act: str = _one_of("elu", "relu", "lrelu", "swish")
    multipliers: tuple[int, ...] | None = _multipliers()
    blocks: int | None = _whole(1)
    attention: tuple[int, ...] | None = _rule(
        "whole numbers >= 0, the sizes with attention, 0 the full one, as in [1]",
        lambda value: value is None or all(type(k) is int and k >= 0 for k in value),
    )
    dropout: float | None = _rule("a number from 0 to less than 1", lambda value: value is None or 0 <= value < 1)


@dataclass(frozen=True)
class Loss:
    """The objective: denoising score matching, or sliced score matching without or with reduced variance."""

    name: str = _one_of("dsm", "ssm", "ssm_vr")
    projections: int = _whole(1)


@dataclass(frozen=True)
class Noise:
    """The noise levels; null means: computed from the data (Techniques 1, 2 and 4). `epsilon_scale` multiplies that.

    With an SDE training takes any level, at times from 1 to where the level is sigma_L; the L levels are those of equal
    times. The largest level of vp and subvp follows from beta_min and beta_max.
    """

    sde: str = _one_of("none", "ve", "vp", "subvp")
    beta_min: float = _positive()
    beta_max: float = _positive()
    spacing: str = _one_of("geometric", "linear")
    sigma_1: float | None = _positive()
    sigma_L: float = _positive()
    L: int | None = _whole(2)
    overlap: float = _rule("a number between 0 and 0.997", lambda value: 0 < value < 0.997)
    steps_per_level: int = _whole(1)
    epsilon: float | None = _positive()
    epsilon_scale: float = _positive()


@dataclass(frozen=True)
class Features:
    """The classifier whose features FID, IS and KID are computed in."""

    steps: int = _whole(1)
    batch_size: int = _whole(2)
    learning_rate: float = _positive()
    seed: int = _seed()


@dataclass(frozen=True)
class Train:
    """How the objective is minimised."""

    steps: int = _whole(1)
    batch_size: int = _whole(1)
    learning_rate: float = _positive()
    warmup: int = _whole(0)
    decay: str = _one_of("constant", "linear")
    level_power: float = _positive()
    beta_2: float = _rule("a number from 0 to less than 1", lambda value: 0 <= value < 1)
    adam_eps: float = _positive()
    clip_norm: float | None = _positive()
    ema_decay: float = _rule("a number from 0 to less than 1", lambda value: 0 <= value < 1)
    ema_warmup: bool = _rule("true or false")
    dequantise: bool = _rule("true or false")
    space: str = _one_of("pixels", "centred", "logits")
    precision: str = _one_of("fp32", "tf32", "bf16")
    micro_batch: int | None = _whole(1)
    max_skipped: int = _whole(1)
    log_every: int = _whole(1)
    save_every: int = _rule("a whole number >= 1 and a multiple of train.log_every", lambda value: value >= 1)
    keep_every: int | None = _whole(1)
    preview_every: int = _rule("a whole number >= 1 and a multiple of train.log_every", lambda value: value >= 1)
    seed: int = _seed()


@dataclass(frozen=True)
class Select:
    """Which checkpoint is drawn from."""

    rule: str = _one_of("last", "fid")
    n: int = _whole(4)
    seed: int = _seed()


@dataclass(frozen=True)
class Sample:
    """How images are drawn, and how many: `ranges` times n of them, for the spread of what is measured.

    `steps` are the levels of a solver (null: those of `noise`), from `sigma_1` on (null: the largest level of `noise`),
    or the steps of predictor_corrector. `snr` holds the signal-to-noise ratio of each step of annealed_langevin, in
    place of noise.epsilon, or of a corrector; null: there is none. `tolerance` is of rk45.
    """

    n: int = _whole(1)
    ranges: int = _whole(1)
    shard_size: int = _whole(1)
    method: str = _one_of(*METHODS)
    steps: int | None = _whole(2)
    sigma_1: float | None = _positive()
    predictor: str = _one_of("euler_maruyama", "reverse_diffusion", "ancestral")
    tolerance: float = _positive()
    snr: float | None = _positive()
    denoise: bool = _rule("true or false")
    precision: str = _one_of("fp32", "tf32", "bf16")
    seed: int = _seed()


@dataclass(frozen=True)
class Evaluate:
    """The metrics."""

    extractor: str = _one_of("auto", "classifier", "inception-v3-compat")
    inception_weights: str | None = _rule("a path")
    seed: int = _seed()


@dataclass(frozen=True)
class Tune:
    """A sweep: of networks to train (sigma_1, sigma_L, L; an empty list means as `noise` has it), and for each of them
    of ways to draw with it. `epsilon` is in units of sigma_L^2."""

    search: str = _one_of("grid", "random", "tpe")
    scheduler: str = _one_of("none", "asha")
    trials: int = _whole(1)
    steps: int = _whole(1)
    seed: int = _seed()
    n: int = _whole(4)
    sigma_1: tuple[float, ...] = _list("numbers > 0", lambda value: 0 < value < float("inf"))
    sigma_L: tuple[float, ...] = _list("numbers > 0", lambda value: 0 < value < float("inf"))
    L: tuple[int, ...] = _list("whole numbers >= 2", lambda value: value >= 2, int)
    epsilon: tuple[float, ...] = _list("numbers > 0 and < 2, in units of sigma_L^2", lambda value: 0 < value < 2)
    snr: tuple[float, ...] = _list("numbers > 0", lambda value: 0 < value < float("inf"))
    steps_per_level: tuple[int, ...] = _list("whole numbers >= 1", lambda value: value >= 1, int)
    denoise: tuple[bool, ...] = _list("true or false", lambda value: True, bool)
    consistent: bool = _rule("true or false")


@dataclass(frozen=True)
class Ablation:
    """Of the schedules, with networks of `model`, and of the Techniques, with those of the papers: for each seed and
    each network so many steps of training, and n images for each FID. `snr` holds the step sizes that are tried."""

    model: Model
    steps: int = _whole(1)
    seeds: tuple[int, ...] = _list("whole numbers from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32, int)
    n: int = _whole(4)
    snr: tuple[float, ...] = _list("numbers > 0 and < 1", lambda value: 0 < value < 1)


@dataclass(frozen=True)
class Runtime:
    """Where and how wide it runs; no stage depends on it, so it never makes a result stale.

    `workers` is a number, or the fewest and the most of an elastic run.
    """

    workers: int | tuple[int, ...] = _workers()
    gpus_per_worker: float = _rule(
        "a number > 0, below 1 where several trainings share a GPU", lambda value: 0 < value <= 1
    )
    max_failures: int = _whole(0)
    resize_interval: float = _positive()
    save_interval: float = _positive()
    storage: str = _rule("a folder or s3://bucket/prefix", bool)
    keep: int = _whole(1)
    compile: bool = _rule("true or false")
    cuda_graphs: bool = _rule("true or false")
    actors: int | None = _whole(1)
    gpus_per_actor: float = _rule("a number > 0, below 1 where several share a GPU", lambda value: 0 < value <= 1)
    micro_batch: int | None = _whole(1)
    ray_address: str | None = _rule("host:port of a Ray cluster")
    tracking_uri: str = _rule("an MLflow tracking URI; the variable MLFLOW_TRACKING_URI takes precedence")
    experiment: str = _rule("a name", lambda value: bool(value))
    parent_run: str | None = _rule("the id of an MLflow run, whose child each run becomes", lambda value: value != "")
    trials: int | None = _whole(1)


@dataclass(frozen=True)
class Params:
    """Everything in params.yaml."""

    data: Data
    model: Model
    loss: Loss
    noise: Noise
    features: Features
    train: Train
    select: Select
    sample: Sample
    evaluate: Evaluate
    tune: Tune
    ablation: Ablation
    runtime: Runtime


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: On an unreadable file, an unknown or missing key, a wrong type or an impossible value.
    """
    try:
        tree = plain(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ParamsError(f"{path} does not exist: write it with `python -m pipeline.compose`") from error
    except YAMLError as error:
        raise ParamsError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return parse(tree)


def plain(config: Any) -> Any:
    """An OmegaConf tree, less Hydra's own node, as plain values; raises ParamsError if a reference leads nowhere."""
    if OmegaConf.is_dict(config):
        config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ParamsError(" ".join(str(error).split())) from error


def any_key(config: Any) -> AbstractContextManager[Any]:
    """Within it an OmegaConf tree takes keys that it does not have, so that `parse` can name them."""
    return open_dict(config)


def to_yaml(tree: Any) -> str:
    """Plain values as the text of params.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def parse(tree: Any) -> Params:
    """Turn nested dictionaries into checked `Params`; raises ParamsError as `load` does."""
    params: Params = _build(Params, tree, "")
    for name in ("save_every", "preview_every"):
        value = getattr(params.train, name)
        if value % params.train.log_every:
            raise ParamsError(f"train.{name}={value}: expected a multiple of train.log_every={params.train.log_every}")
    if (params.train.keep_every or 0) % params.train.save_every:
        raise ParamsError(
            f"train.keep_every={params.train.keep_every}: expected a multiple of "
            f"train.save_every={params.train.save_every}, or null"
        )
    workers = params.runtime.workers
    if isinstance(workers, int) and params.train.batch_size % workers:
        raise ParamsError(
            f"runtime.workers={workers}: expected a divisor of train.batch_size={params.train.batch_size}, or a range"
        )
    if isinstance(workers, tuple) and workers[1] > params.train.batch_size:
        raise ParamsError(
            f"runtime.workers={list(workers)}: expected no more than train.batch_size={params.train.batch_size}"
        )
    for key, model in (("model", params.model), ("ablation.model", params.ablation.model)):
        for field, owners in (("multipliers", ("unet", *SDE_NETWORKS)), *((field, SDE_NETWORKS) for field in OF_SDES)):
            value = getattr(model, field)
            if (value is None) == (model.name in owners):
                allowed = f"null but for {key}.name={', '.join(owners)}, which need them"
                raise ParamsError(f"{key}.{field}={value}: expected {allowed}; got {key}.name={model.name}")
    if params.runtime.compile and params.loss.name != "dsm":
        raise ParamsError(
            f"runtime.compile=True: expected false with loss={params.loss.name}: torch.compile does not take second "
            "derivatives"
        )
    if params.runtime.gpus_per_worker < 1 and params.runtime.workers != 1:
        raise ParamsError(
            f"runtime.gpus_per_worker={params.runtime.gpus_per_worker:g}: expected 1 with "
            f"runtime.workers={params.runtime.workers}: NCCL refuses workers of one training that share a GPU"
        )
    if params.data.crop is not None and params.data.name not in ("image_folder", "celeba32", "celeba64"):
        raise ParamsError(f"data.crop={params.data.crop}: expected null with data={params.data.name}")
    if params.noise.sigma_1 is not None and params.noise.sigma_1 <= params.noise.sigma_L:
        raise ParamsError(
            f"noise.sigma_1={params.noise.sigma_1}: expected more than noise.sigma_L={params.noise.sigma_L}"
        )
    _check_sample(params.sample)
    _check_sde(params)
    if params.noise.epsilon is not None and params.noise.epsilon >= (limit := 2 * params.noise.sigma_L**2):
        raise ParamsError(
            f"noise.epsilon={params.noise.epsilon}: expected less than 2 noise.sigma_L^2 = {limit:.4g}, from which on "
            "Langevin steps diverge"
        )
    _check_tune(params.tune, params.noise)
    for key, values in (("seeds", params.ablation.seeds), ("snr", params.ablation.snr)):
        if len(set(values)) < max(1, len(values)):
            raise ParamsError(f"ablation.{key}={list(values)}: expected at least one value, and each once")
    return params


def _check_sample(sample: Sample) -> None:
    """Raise ParamsError for settings that the method does not have."""
    if sample.snr is not None and sample.method not in ("annealed_langevin", "predictor_corrector"):
        raise ParamsError(
            f"sample.snr={sample.snr}: expected null with sample.method={sample.method}, which has no Langevin steps "
            "of a size to choose"
        )
    if sample.steps is not None and sample.method in ("annealed_langevin", "consistent"):
        raise ParamsError(
            f"sample.steps={sample.steps}: expected null with sample.method={sample.method}, whose steps follow from "
            "noise.L and noise.steps_per_level"
        )
    if sample.sigma_1 is not None and (sample.steps is None or sample.method == "predictor_corrector"):
        raise ParamsError(
            f"sample.sigma_1={sample.sigma_1:g}: expected null with sample.method={sample.method} and "
            f"sample.steps={sample.steps}: solvers with levels of their own alone may start elsewhere"
        )
    if sample.steps is None and sample.method == "predictor_corrector":
        raise ParamsError("sample.steps=None: expected a whole number >= 2 with sample.method=predictor_corrector")


def _check_sde(params: Params) -> None:
    """Raise ParamsError for what cannot be under an SDE, before anything is trained."""
    noise, model, sample = params.noise, params.model, params.sample
    if model.name in ("ddpmpp", "ddpm") and noise.sde not in ("vp", "subvp"):
        raise ParamsError(
            f"model.name={model.name}: expected noise.sde=vp or subvp, whose noise it predicts; got "
            f"noise.sde={noise.sde}"
        )
    if noise.sde == "none":
        return
    if model.name in ("ncsn", "ncsn_deeper"):
        raise ParamsError(
            f"noise.sde={noise.sde}: expected none with model.name={model.name}, which knows no levels between its own"
        )
    if noise.sde == "ve":
        if noise.spacing != "geometric":
            raise ParamsError(f"noise.spacing={noise.spacing}: expected geometric with noise.sde=ve")
        return
    if noise.sigma_1 is not None:
        raise ParamsError(
            f"noise.sigma_1={noise.sigma_1:g}: expected null with noise.sde={noise.sde}, where it follows from "
            "noise.beta_min and noise.beta_max"
        )
    if noise.L is None:
        raise ParamsError(f"noise.L=None: expected a whole number >= 2 with noise.sde={noise.sde}, as in noise.L=100")
    if noise.beta_min > noise.beta_max:
        raise ParamsError(f"noise.beta_min={noise.beta_min:g}: expected at most noise.beta_max={noise.beta_max:g}")
    if params.train.space == "logits":
        raise ParamsError(f"train.space=logits: expected pixels or centred with noise.sde={noise.sde}")
    if sample.method != "predictor_corrector":
        return
    if noise.sde == "subvp" and sample.snr is not None:
        raise ParamsError(
            f"sample.snr={sample.snr:g}: expected null with noise.sde=subvp: the steps of a corrector need alpha_k, "
            "which sub-VP does not have"
        )
    if noise.sde == "subvp" and sample.predictor == "ancestral":
        raise ParamsError(
            "sample.predictor=ancestral: expected reverse_diffusion or euler_maruyama with noise.sde=subvp, which has "
            "no chain"
        )
    if noise.sde == "vp" and sample.steps is not None and sample.steps <= noise.beta_max:
        raise ParamsError(
            f"sample.steps={sample.steps}: expected more than noise.beta_max={noise.beta_max:g} with noise.sde=vp: the "
            "variance beta_max / steps of a step must be below 1"
        )


def _check_tune(tune: Tune, noise: Noise) -> None:
    """Raise ParamsError for a sweep that has trials which cannot be."""
    if not tune.steps_per_level:
        raise ParamsError("tune.steps_per_level=[]: expected at least one whole number >= 1")
    if not tune.denoise:
        raise ParamsError("tune.denoise=[]: expected true, false or both")
    if not (tune.epsilon or tune.snr or tune.consistent):
        raise ParamsError("tune.epsilon=[]: expected a number at least, or tune.snr or tune.consistent")
    greatest = max(tune.sigma_L or (noise.sigma_L,))
    if tune.sigma_1 and min(tune.sigma_1) <= greatest:
        raise ParamsError(f"tune.sigma_1={list(tune.sigma_1)}: expected more than the greatest sigma_L, {greatest:g}")
    if tune.sigma_L and noise.sigma_1 is not None and not tune.sigma_1 and noise.sigma_1 <= greatest:
        raise ParamsError(f"tune.sigma_L={list(tune.sigma_L)}: expected less than noise.sigma_1={noise.sigma_1:g}")


def result(params: Params, *sections: str) -> dict[str, Any]:
    """`as_dict` without what changes no result: how many images at once, how much patience."""
    tree = as_dict(params, *sections)
    for key in ("micro_batch", "max_skipped"):
        tree.get("train", {}).pop(key, None)
    return tree


def as_dict(params: Params, *sections: str) -> dict[str, Any]:
    """The named sections (all by default) as nested dictionaries, for hashing and logging."""
    tree = dataclasses.asdict(params)
    return {name: tree[name] for name in sections or tree}


def _build(cls: Any, tree: Any, prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(tree, dict):
        raise ParamsError(f"{prefix.rstrip('.') or 'params.yaml'}={tree!r}: expected the keys {', '.join(fields)}")
    for key, value in tree.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            while isinstance(value, dict) and len(value) == 1:  # an override of an unknown section: name it whole
                ((last, value),) = value.items()
                key = f"{key}.{last}"
            raise ParamsError(f"{prefix}{key}={value!r}: unknown key, allowed are {', '.join(fields)}{hint}")
    values = {}
    for key, kind in typing.get_type_hints(cls).items():
        if key not in tree:
            raise ParamsError(f"{prefix}{key} is missing: write params.yaml anew with `python -m pipeline.compose`")
        values[key] = (
            _build(kind, tree[key], f"{prefix}{key}.")
            if dataclasses.is_dataclass(kind)
            else _value(kind, tree[key], f"{prefix}{key}", fields[key].metadata)
        )
    return cls(**values)


def _value(kind: Any, value: Any, key: str, rule: Any) -> Any:
    kinds = [
        typing.get_origin(each) or each
        for each in (typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,))
    ]
    if float in kinds and type(value) is int:
        value = float(value)
    if tuple in kinds and type(value) is list:
        value = tuple(value)
    if value == "???":
        raise ParamsError(f"{key} is not given: expected {rule['allowed']}, for instance -S {key}=...")
    if type(value) not in kinds or not rule["holds"](value):
        raise ParamsError(f"{key}={value!r}: expected {rule['allowed']}{' or null' * (type(None) in kinds)}")
    return value
