"""Choose the noise levels: sigma_1, L and epsilon from the data (Techniques 1, 2 and 4), or as given.

Reads out/data, the section `noise` and train.space; writes out/schedule/schedule.json and schedule.png.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch

from ncsn import images, noise
from ncsn.sde import SDE, SDES
from pipeline import _params, _stage, _track, prepare
from pipeline._stage import StageError, log
from pipeline._store import read_json, replacing_folder, write_json

OUT = Path("out/schedule")
UNITS = {"pixels": 0.5, "centred": 1.0}  # of vp and subvp, whose images are in [-1, 1], in those of a space


def main(params: _params.Params) -> None:
    with _track.run(params, later=True) as run:
        schedule = of_data(params.noise, params.train.space)
        for key in ("sigma_1", "L", "epsilon"):
            log.info("%s = %.6g (%s)", key, schedule[key], schedule["how"][key])
        with replacing_folder(OUT) as folder:
            write_json(folder / "schedule.json", schedule)
            plot(schedule, folder / "schedule.png")
        run.params({"schedule": {key: schedule[key] for key in ("sigma_1", "sigma_L", "L", "epsilon")}})
        run.artifact(OUT)


def load(folder: Path = OUT) -> dict[str, Any]:
    """The schedule that `main` wrote; its "sigmas" and "step_sizes" are lists.

    Raises:
        StageError: If it has not been written.
    """
    path = folder / "schedule.json"
    if not path.is_file():
        raise StageError(f"{path} does not exist: write it with `dvc repro schedule`")
    schedule: dict[str, Any] = read_json(path)
    return schedule


def of_data(given: _params.Noise, space: str) -> dict[str, Any]:
    """What `choose` says of the training images in out/data."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written
        x = torch.from_numpy(prepare.load("train")[0])
    return choose(given, x, space)


def choose(given: _params.Noise, x: torch.Tensor, space: str = "pixels") -> dict[str, Any]:
    """The schedule for images x, shape (N, C, H, W), float in [0, 1] or uint8: what is given is kept, what is null is
    computed. Technique 1 alone reads the images; the levels are in units of the space, a key of `images.SPACES`."""
    dim, T = x[0].numel(), given.steps_per_level
    sde: dict[str, Any] | None = None
    how = dict.fromkeys(("sigma_1", "L", "epsilon"), "given")
    sigma_1, L, epsilon = given.sigma_1, given.L, given.epsilon
    if given.sde in ("vp", "subvp"):
        sde = {"name": given.sde, "beta_min": given.beta_min, "beta_max": given.beta_max, "unit": UNITS[space]}
        sigma_1 = float(noise_levels(sde, torch.ones(1, dtype=torch.float64)))
        how["sigma_1"] = f"{given.sde}: the level at time 1"
    if sigma_1 is None:
        sigma_1 = noise.suggest_sigma_1(x, images.SPACES[space][0])
        how["sigma_1"] = "Technique 1: the largest distance between two training images"
        if len(x) > noise.PAIRWISE_LIMIT:
            how["sigma_1"] += f", among {noise.PAIRWISE_SAMPLE:,} of {len(x):,}"
    if sigma_1 <= given.sigma_L:
        raise _params.ParamsError(f"noise.sigma_L={given.sigma_L}: expected less than sigma_1={sigma_1:.4g}")
    if L is None and given.spacing != "geometric":
        raise _params.ParamsError(
            "noise.L is not given: Technique 2 counts geometric levels, "
            f"noise.spacing={given.spacing} needs -S noise.L=..."
        )
    if L is None:
        L = noise.suggest_levels(sigma_1, given.sigma_L, dim, given.overlap)
        how["L"] = f"Technique 2: neighbouring levels overlap by {given.overlap:g}"
    if given.sde == "ve":
        sde = {"name": "ve", "sigma_min": given.sigma_L, "sigma_max": sigma_1, "unit": 1.0}
    if sde is not None:
        sde["t_min"] = float(process(sde).time(torch.tensor(given.sigma_L / sde["unit"], dtype=torch.float64)))
    if sde is None or sde["name"] == "ve":
        ladder = noise.geometric_sigmas if given.spacing == "geometric" else noise.linear_sigmas
        sigmas = ladder(sigma_1, given.sigma_L, L)
    else:
        sigmas = noise_levels(sde, torch.linspace(1, sde["t_min"], L, dtype=torch.float64))
    if epsilon is None:
        epsilon = noise.suggest_epsilon(sigmas, T)
        how["epsilon"] = f"Technique 4 for T = {T} steps a level"
        if given.epsilon_scale != 1:
            # At sigma_L^2 a step leads to the posterior mean; at twice that Langevin steps diverge.
            epsilon = min(given.epsilon_scale * epsilon, max(epsilon, given.sigma_L**2))
            how["epsilon"] = f"{given.epsilon_scale:g} times {how['epsilon']}, at most sigma_L^2"
    return {
        "sde": sde,
        "spacing": given.spacing if sde is None else sde["name"],
        "sigma_1": sigma_1,
        "sigma_L": given.sigma_L,
        "L": L,
        "gamma": float(sigmas[0] / sigmas[1]) if given.spacing == "geometric" and sde is None else None,
        "steps_per_level": T,
        "epsilon": epsilon,
        "dim": dim,
        "how": how,
        "sigmas": sigmas.tolist(),
        "step_sizes": noise.langevin_step_sizes(sigmas, epsilon).tolist(),
    }


def process(sde: dict[str, Any]) -> SDE:
    """The SDE that a schedule describes, in its own units: `unit` times those are those of the levels."""
    arguments = {key: value for key, value in sde.items() if key not in ("name", "unit", "t_min")}
    return SDES[sde["name"]](**arguments)


def noise_levels(sde: dict[str, Any], t: torch.Tensor) -> torch.Tensor:
    """The noise levels of an SDE at these times, in the units of the schedule."""
    return sde["unit"] * process(sde).noise_level(t)


def at(schedule: dict[str, Any], position: torch.Tensor) -> torch.Tensor:
    """The noise levels at positions from 0, the largest, to 1, in continuous time; of a ladder that of the step."""
    sde = schedule.get("sde")
    if sde is None:
        return _ladder(tuple(schedule["sigmas"]), position.device)[(position * schedule["L"]).long()]
    return noise_levels(sde, 1 - position * (1 - sde["t_min"]))


@functools.lru_cache(maxsize=2)
def _ladder(sigmas: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """On the device, once: a copy to it at each step would wait for it."""
    return torch.tensor(sigmas, dtype=torch.float64, device=device)


def plot(schedule: dict[str, Any], path: Path) -> None:
    """Draw the levels with their step sizes, and the variance ratio that Technique 4 brings near 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = range(1, schedule["L"] + 1)
    left.semilogy(levels, schedule["sigmas"], "o-", ms=3, label=r"$\sigma_i$ (pixel units)")
    left.semilogy(levels, schedule["step_sizes"], "s-", ms=3, label=r"step size $\alpha_i$")
    left.set(
        xlabel="level i",
        title=f"{schedule['L']} {schedule['spacing']} levels, {schedule['steps_per_level']} steps each",
    )
    left.legend()
    gamma = (schedule["sigma_1"] / schedule["sigma_L"]) ** (1 / (schedule["L"] - 1))
    u = torch.logspace(-4, 0, 400, dtype=torch.float64)
    sigma_L = schedule["sigma_L"]
    right.semilogx(u * sigma_L**2, noise.variance_ratio(u, gamma, schedule["steps_per_level"]).sqrt())
    right.axvline(schedule["epsilon"], color="C1", label=rf"$\epsilon$ = {schedule['epsilon']:.3g}")
    right.axhline(1, color="0.7", lw=1)
    right.set(xlabel=r"$\epsilon$", ylabel=r"$s_T / \sigma_i$", title="noise left after a level, over the level's own")
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _stage.run("schedule", __doc__, main)
