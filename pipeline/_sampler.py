"""What determines an image, and the network that draws it."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load
from torch import Tensor

from ncsn import images, random, samplers
from ncsn.inference import Evaluator, activation_bytes, micro_batch
from ncsn.losses import Score
from ncsn.networks.ncsn import TOLERANCE
from ncsn.noise import edm_sigmas, refined, snr_rule
from ncsn.sde import SDE, VE
from pipeline import _params, prepare, schedule, train
from pipeline._stage import StageError, log
from pipeline._store import code_digest, fingerprint

LEVELS = ("spacing", "sigma_1", "sigma_L", "L", "steps_per_level", "epsilon")  # of a schedule, in manifests
CODE = (
    *("ncsn/networks", "ncsn/samplers.py", "ncsn/random.py", "ncsn/noise.py", "ncsn/images.py", "ncsn/inference.py"),
    *("ncsn/ode.py", "ncsn/sde.py", "pipeline/_sampler.py"),
)
SOLVED = (*samplers.SOLVERS, "rk45")  # methods that lead from level to level
T_MIN = 1e-5  # where the reverse of VE ends


@dataclass(frozen=True)
class Sampler:
    """Everything that determines image i; a plain value.

    Args:
        network: As in model.json.
        space: What the network sees: a key of images.SPACES.
        shape: Of an image, (C, H, W).
        weights: "ema" or "initial".
        weights_sha256: Of their file.
        step: Of the checkpoint.
        method: Of the section `sample`.
        schedule: As in schedule.json: sigmas, epsilon, steps_per_level, and what they come from; or as `route` has it.
        denoise: Whether the final denoising step is taken.
        precision: "fp32", "tf32" or "bf16", of the network's products.
        seed: Of all noise.
        snr: Of each step of annealed Langevin dynamics, in place of the schedule's epsilon, or of a corrector; see
            `ncsn.noise.snr_rule`.
        predictor: Of predictor_corrector.
        tolerance: Of rk45, absolute and relative.
    """

    network: dict[str, Any]
    space: str
    shape: tuple[int, ...]
    weights: str
    weights_sha256: str
    step: int
    method: str
    schedule: dict[str, Any]
    denoise: bool
    precision: str
    seed: int
    snr: float | None = None
    predictor: str | None = None
    tolerance: float | None = None

    @property
    def nfe(self) -> int | None:
        """Network evaluations an image; None where each image has its own number."""
        return evaluations(self.method, self.schedule, self.denoise)

    @property
    def steps_per_level(self) -> int:
        """Steps that are observed, of each level."""
        return int(self.schedule["steps_per_level"]) if self.method in ("annealed_langevin", "consistent") else 1

    @property
    def steps(self) -> int:
        """Steps that are observed: all of Langevin dynamics, else one to each level that x comes to."""
        levels = self.schedule["L"] - (self.method not in ("annealed_langevin", "predictor_corrector"))
        return int(levels * self.steps_per_level)

    @property
    def settings(self) -> dict[str, Any]:
        """What manifests and passports say of it."""
        levels = {key: self.schedule[key] for key in LEVELS}
        if self.snr is not None:
            levels = levels | {"epsilon": None, "snr": self.snr}
        if self.predictor is not None:
            levels = levels | {"predictor": self.predictor}
        if self.tolerance is not None:
            levels = levels | {"tolerance": self.tolerance}
        return {"name": self.method, **levels, "denoise": self.denoise, "precision": self.precision}

    @property
    def name(self) -> str:
        """Of the folder of its images; it hashes all that determines them."""
        identity = {
            "network": self.network,
            "space": self.space,
            "shape": list(self.shape),
            "weights": self.weights_sha256,
            "schedule": {key: self.schedule[key] for key in ("sigmas", "epsilon", "steps_per_level")},
            "sde": self.schedule.get("sde") if self.predictor else None,
            "sample": {
                "method": self.method,
                "snr": self.snr,
                "predictor": self.predictor,
                "tolerance": self.tolerance,
                "denoise": self.denoise,
                "precision": self.precision,
                "seed": self.seed,
            },
            "code": code_digest(*CODE),
        }
        return f"sample-{fingerprint(identity)}"


def evaluations(method: str, levels: Mapping[str, Any], denoise: bool) -> int | None:
    """Of the network, for an image: one a step, and one to denoise; some steps lead from level to level, those of Heun
    with two, and without its noise the last step of a predictor is one that denoises. None of rk45, which chooses."""
    if method == "rk45":
        return None
    L, T = levels["L"], levels["steps_per_level"]
    if method in samplers.SOLVERS:
        return int((L - 1) * (2 if method == "heun" else 1) + denoise)
    return int((L - (method == "consistent")) * T + (denoise and method != "predictor_corrector"))


def by_langevin(sample: _params.Sample) -> _params.Sample:
    """The section; with annealed Langevin dynamics where its method has no epsilon, which settings could vary."""
    if sample.method in ("annealed_langevin", "consistent"):
        return sample
    return dataclasses.replace(sample, method="annealed_langevin", steps=None, sigma_1=None, snr=None)


def route(
    levels: Mapping[str, Any],
    method: str,
    steps: int | None = None,
    *,
    sigma_1: float | None = None,
    corrector: bool = False,
) -> dict[str, Any]:
    """The schedule that a method goes through: `levels`, or between their ends as many levels as `steps` says.

    Of solvers, in the spacing of arXiv:2206.00364, equation 5, from sigma_1 on if it is given; of predictor_corrector,
    those of the SDE at equal times, with two evaluations at each where there is a corrector. They have no epsilon.
    """
    if steps is None:
        return {**levels, "steps_per_level": 1, "epsilon": None} if method in SOLVED else dict(levels)
    if method == "predictor_corrector":
        reverse = Reverse.of(levels)
        times = torch.linspace(1, reverse.t_min, steps, dtype=torch.float64)
        spacing, sigmas = levels["spacing"], reverse.unit * reverse.sde.noise_level(times)
    else:
        spacing, sigmas = "edm", edm_sigmas(sigma_1 or levels["sigma_1"], levels["sigma_L"], steps)
    own = {
        "spacing": spacing,
        "sigma_1": float(sigmas[0]),
        "L": steps,
        "sigmas": sigmas.tolist(),
        "steps_per_level": 1 + corrector,
        "epsilon": None,
    }
    return {**levels, **own}


def of_section(sample: _params.Sample, levels: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule that the method of the section goes through."""
    if sample.sigma_1 is not None and not levels["sigma_L"] < sample.sigma_1 <= levels["sigma_1"]:
        raise _params.ParamsError(
            f"sample.sigma_1={sample.sigma_1:g}: expected more than sigma_L={levels['sigma_L']:.4g} and at most "
            f"sigma_1={levels['sigma_1']:.4g}, the levels of training"
        )
    return route(levels, sample.method, sample.steps, sigma_1=sample.sigma_1, corrector=sample.snr is not None)


def of_model(params: _params.Params, model: dict[str, Any], weights: str, sha256: str, step: int, seed: int) -> Sampler:
    """The sampler of the section `sample` with weights of the network in model.json.

    Raises:
        StageError: If the network cannot draw such images, or not at these levels.
    """
    levels, shape = of_section(params.sample, schedule.load()), prepare.manifest()["shape"]
    train.check(model["network"], shape)
    own = model["network"].get("sigmas", levels["sigmas"])
    if not same_levels(own, levels["sigmas"]):
        steps, given = params.sample.steps, params.sample.steps is not None
        where, fix = (f"sample.steps={steps}", "set sample.steps=null") if given else ("out/schedule", "set noise.* so")
        raise StageError(
            f"{where} has {levels['L']} levels from {levels['sigma_1']:.6g} to {levels['sigma_L']:.6g}, but the "
            f"{model['network']['name']} in out/train knows none but its own {len(own)} from {own[0]:.6g} to "
            f"{own[-1]:.6g}: {fix}, or train it anew"
        )
    if params.sample.method == "rk45" and "sigmas" in model["network"]:
        name = model["network"]["name"]
        raise StageError(
            f"sample.method=rk45 asks for any level, but the {name} in out/train knows none but its own: draw by "
            "sample=heun with sample.steps=null, or train another network"
        )
    if params.sample.method == "consistent" and "sigmas" in model["network"] and levels["steps_per_level"] > 1:
        raise StageError(
            f"sample.method=consistent with noise.steps_per_level={levels['steps_per_level']} puts levels between "
            f"those of the {model['network']['name']}, which knows none but its own: set noise.steps_per_level=1"
        )
    return Sampler(
        network=model["network"],
        space=model["space"],
        shape=tuple(shape),
        weights=weights,
        weights_sha256=sha256,
        step=step,
        method=params.sample.method,
        schedule=levels,
        denoise=params.sample.denoise,
        precision=params.sample.precision,
        seed=seed,
        snr=params.sample.snr,
        predictor=params.sample.predictor if params.sample.method == "predictor_corrector" else None,
        tolerance=params.sample.tolerance if params.sample.method == "rk45" else None,
    )


@dataclass(frozen=True)
class Reverse:
    """The SDE whose reverse a schedule's network can draw by, and where it lies in the network's space.

    Args:
        sde: VP or sub-VP as the schedule has it, else VE between its ends.
        unit: x = shift + unit X for images X as the SDE has them.
        shift: 0.5 for VP and sub-VP of pixels in [0, 1].
        t_min: Where it ends.
    """

    sde: SDE
    unit: float
    shift: float
    t_min: float

    @classmethod
    def of(cls, levels: Mapping[str, Any]) -> "Reverse":
        """That of a schedule."""
        sde = levels.get("sde")
        if sde is None or sde["name"] == "ve":
            return cls(VE(levels["sigma_L"], levels["sigma_1"]), 1.0, 0.0, T_MIN)
        return cls(schedule.process(sde), sde["unit"], 1 - sde["unit"] if sde["unit"] < 1 else 0.0, sde["t_min"])

    def outside(self, x: Tensor) -> Tensor:
        """In the network's space."""
        return self.shift + self.unit * x

    def inside(self, x: Tensor) -> Tensor:
        """As the SDE has it."""
        return (x - self.shift) / self.unit

    def score(self, score: Score) -> Score:
        """The score of images as the SDE has them, from that in the network's space."""
        return lambda x, sigma: self.unit * score(self.outside(x), self.unit * sigma)

    def draw(self, score: Score, x: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """`samplers.predictor_corrector` from a start in the network's space, in which the result is."""
        project, observe = settings["project"], settings["observe"]
        given = dict(settings)
        if project is not None:
            given["project"] = lambda x, sigma, k: self.inside(project(self.outside(x), self.unit * sigma, k))
        if observe is not None:
            given["observe"] = lambda x, k, sigma: observe(self.outside(x), k, self.unit * sigma)

        drawn = samplers.predictor_corrector(self.score(score), self.inside(x), self.sde, t_min=self.t_min, **given)
        return self.outside(drawn)


def same_levels(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two ladders are one, up to what NCSN tolerates."""
    return len(a) == len(b) and np.allclose(a, b, rtol=TOLERANCE, atol=0)


class Model:
    """A score network on this machine's device, and how many images it takes at once.

    Args:
        network: As in model.json.
        weights: The content of their file.
        precision: Of a `Sampler`.
        runtime: Its compile, cuda_graphs, micro_batch and gpus_per_actor.
    """

    def __init__(self, network: dict[str, Any], weights: bytes, precision: str, runtime: _params.Runtime) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network, self.precision, self.runtime = network, precision, runtime
        self.module = train.build(network)
        self.module.load_state_dict(load(weights))
        self.score = Evaluator(
            self.module.to(self.device), precision=precision, compile=runtime.compile, cuda_graph=runtime.cuda_graphs
        )
        self.most = runtime.micro_batch

    def __call__(self, draw: Callable[[Tensor], Tensor], index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """draw(index) for images of this shape, in parts of one size as far as memory demands."""
        self.most = self.most or self._room(len(index), shape)
        while True:
            parts = index.tensor_split(-(-len(index) // self.most))
            try:
                return torch.cat([draw(part) for part in parts])
            except RuntimeError as error:
                if not train.out_of_memory(error):
                    raise
                if self.most == 1:
                    raise StageError("out of memory with one image at a time: take a smaller model") from error
            # Here, where the error and what its traceback holds are gone
            self.most = -(-self.most // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning("out of memory: going on with runtime.micro_batch=%d, the same images", self.most)

    def _room(self, n: int, shape: tuple[int, ...]) -> int:
        """How many of n images at once: workers that share a GPU, or this machine's memory, share its room."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0] * self.runtime.gpus_per_actor
        else:
            free = psutil.virtual_memory().available / (self.runtime.actors or len(os.sched_getaffinity(0)))
        level = self.network.get("sigmas", [1.0])[0]
        return micro_batch(int(free), activation_bytes(self.module, shape, level), n)


class Drawer:
    """A sampler with its network.

    Attributes:
        evaluations: Of the network, those for each of the images that were drawn last added up.
    """

    def __init__(self, sampler: Sampler, model: Model) -> None:
        self.sampler, self.model, self.device = sampler, model, model.device
        self.sigmas = torch.tensor(sampler.schedule["sigmas"], dtype=torch.float64)
        self.to_space, self.to_pixels = images.SPACES[sampler.space]
        self.evaluations = 0

    @classmethod
    def of(cls, sampler: Sampler, weights: Path, runtime: _params.Runtime) -> "Drawer":
        """With the weights of a file."""
        return cls(sampler, Model(sampler.network, weights.read_bytes(), sampler.precision, runtime))

    def draw(self, index: Tensor) -> Tensor:
        """Images with these numbers, uint8, shape (B, C, H, W), on the CPU; as many at once as memory allows."""
        counts: list[int] = []

        def draw(part: Tensor) -> Tensor:
            if part[0] == index[0]:  # the first part, perhaps of another try in smaller ones
                counts.clear()
            x = images.to_uint8(self.pixels(part)).cpu()
            counts.append(self.evaluations)
            return x

        x = self.model(draw, index, self.sampler.shape)
        self.evaluations = sum(counts)
        return x

    def start(self, index: Tensor, noise: samplers.Noise) -> Tensor:
        """Where the chains of these images start, in the network's space: uniform, as in the papers; at the noise level
        sigma_1 where a sampler needs it.

        All need it but annealed Langevin dynamics; and so do its steps of a fixed signal-to-noise ratio: nearer to the
        data than the level says scores are short, so the first step is too long by far, and from far away the following
        ones are short. A solver of the flow has no other noise than that of the start, so it comes from `noise`.
        """
        s = self.sampler
        x = self.to_space(random.start_images(s.seed, index, s.shape))
        if s.method in (*samplers.DETERMINISTIC, "rk45"):
            return x + float(self.sigmas[0]) * noise(x, 0)
        if s.method != "annealed_langevin" or s.snr:
            x += float(self.sigmas[0]) * random.normal(s.seed, random.START, index, 1, s.shape)
        return x

    def pixels(
        self,
        index: Tensor,
        *,
        score: Score | None = None,
        noise: samplers.Noise | None = None,
        project: samplers.Project | None = None,
        observe: samplers.Observe | None = None,
    ) -> Tensor:
        """Images with these numbers in pixel units, not clamped, float32, shape (B, C, H, W), on the drawer's device.

        Nothing in it waits for the device until all is drawn.

        Args:
            index: Image numbers, shape (B,).
            score: In place of the network's, in its space: one that is guided.
            noise: In place of that of (seed, number); see `ncsn.samplers`.
            project: Puts in what is known, in the network's space (`to_space`).
            observe: Sees the images in pixel units.

        Raises:
            StageError: If an image is not finite.
        """
        s = self.sampler
        index = index.to(self.device)
        noise = noise or random.seeded_noise(s.seed, index)
        score, start, epsilon = score or self.model.score, self.start(index, noise), s.schedule["epsilon"]
        settings: dict[str, Any] = {
            "denoise": s.denoise,
            "project": project,
            "observe": observe and (lambda x, step, sigma: observe(self.to_pixels(x), step, sigma)),
        }
        self.evaluations = (s.nfe or 0) * len(index)
        if s.method == "rk45":
            assert s.tolerance is not None
            try:
                x, each = samplers.adaptive_probability_flow(
                    score, start, self.sigmas, rtol=s.tolerance, atol=s.tolerance, **settings
                )
            except ArithmeticError as error:
                raise StageError(f"{error}: raise sample.tolerance={s.tolerance:g}, then dvc repro") from error
            self.evaluations = int(each.sum())
        elif s.method in samplers.SOLVERS:
            x = samplers.probability_flow(score, start, self.sigmas, solver=s.method, noise=noise, **settings)
        elif s.method == "predictor_corrector":
            settings |= {"predictor": s.predictor, "corrector": snr_rule(s.snr) if s.snr else None}
            settings |= {"steps": s.schedule["L"], "noise": noise}
            x = Reverse.of(s.schedule).draw(score, start, settings)
        elif s.method == "consistent":
            sigmas, settings["epsilon"] = refined(self.sigmas, s.schedule["steps_per_level"]), epsilon
            try:
                x = samplers.consistent_annealed_langevin(score, start, sigmas, noise=noise, **settings)
            except ValueError as error:
                raise StageError(f"sample.method=consistent: {error}: set noise.epsilon, or noise.L") from error
        else:
            settings |= {"step_rule": snr_rule(s.snr)} if s.snr else {"epsilon": epsilon}
            T = s.schedule["steps_per_level"]
            x = samplers.annealed_langevin(score, start, self.sigmas, steps_per_level=T, noise=noise, **settings)
        if not x.isfinite().all():
            raise StageError(f"images are not finite with {self._suspect()}, then dvc repro")
        return self.to_pixels(x)

    def _suspect(self) -> str:
        """What to change where images are not finite."""
        s = self.sampler
        if s.snr:
            return f"sample.snr={s.snr:.4g}: lower it"
        if s.schedule["epsilon"] is None:
            return f"sample.method={s.method} in {s.schedule['L']} levels: take more sample.steps"
        limit = 2 * float(self.sigmas[-1]) ** 2
        return (
            f"noise.epsilon={s.schedule['epsilon']:.4g} (Langevin steps diverge from 2 sigma_L^2 = {limit:.4g} on, or "
            "sooner): lower it"
        )
