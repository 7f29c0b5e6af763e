"""Draw by several samplers and settings with one network, and show what quality costs.

FID against network evaluations and against time, of annealed Langevin dynamics with several T and epsilon, with and
without the denoising step, with steps of a fixed signal-to-noise ratio, of consistent annealed sampling with several
refinements, and of solvers of the probability flow in few steps, all with the checkpoint that `select` has chosen.
Reads what `sample` reads, and out/features; writes out/frontier: frontier.json, frontier.png and frontier.txt, whose
last lines say which to pick.
Images are drawn into runtime.storage, each once: the same command goes on where it stopped.
"""

import argparse
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ncsn.metrics import Moments, frechet_distance
from pipeline import _extractors, _params, _ray, _reference, _shards, _stage, _track, evaluate, sample, select, train
from pipeline._pictures import STYLE
from pipeline._sampler import Sampler, by_langevin, route
from pipeline._stage import StageError, log
from pipeline._store import replacing_folder, write_json, write_text

OUT = Path("out/frontier")
CLOSE = 1.05  # FID that counts as no worse than the best: within 5 %
TITLES = {
    "annealed_langevin": "annealed Langevin",
    "snr": "annealed Langevin, SNR",
    "consistent": "consistent",
    "heun": "flow, Heun",
    "dpmpp": "flow, DPM-Solver++",
    "dpmpp_sde": "SDE, DPM-Solver++",
}
FLOWS = ("heun", "dpmpp", "dpmpp_sde")


def main(params: _params.Params, *, n: int, steps: list[int], factors: list[float], levels: list[int]) -> None:
    extractor = _extractors.choose(params.evaluate)
    if extractor is None:
        raise StageError(
            "a frontier needs features: the data has no labels to train a classifier on, and there are no Inception "
            "weights: name the file with evaluate.inception_weights=PATH"
        )
    base = sample.make_sampler(dataclasses.replace(params, sample=by_langevin(params.sample)), "ema")
    samplers = settings(base, steps, factors, levels)
    nfe = sum(each.nfe or 0 for each in samplers)
    log.info("%d settings, %d images each: %d network evaluations", len(samplers), n, n * nfe)
    with _track.run(params, afterwards=train.weights_sha256()) as run, replacing_folder(OUT) as out:
        with _ray.cluster(params.runtime):
            rows = draw(samplers, sample.weights("ema"), n, params)
            judge(rows, extractor, n, params)
        rows.sort(key=lambda each: (each["nfe"], each["fid"] or math.inf))
        told = table(rows) + "\n\n" + advice(rows)
        write_json(out / "frontier.json", record(rows, extractor, n, base))
        write_text(out / "frontier.txt", told + "\n")
        plot(rows, n, out / "frontier.png")
        run.artifact(out, "frontier")
    print(told)


def settings(base: Sampler, steps: list[int], factors: list[float], levels: list[int]) -> list[Sampler]:
    """The samplers: T by epsilon for annealed Langevin dynamics; for the sampler's own T without denoising and with the
    signal-to-noise ratios that answer to these epsilons; consistent sampling with so many steps from level to level, at
    both ends of what epsilon may be and between; and the flow with so many levels."""

    own, square = base.schedule["epsilon"], base.schedule["sigmas"][-1] ** 2
    T, snr = base.schedule["steps_per_level"], base.snr or math.sqrt(own / 2 / square)
    found = [variant(base, T=T, epsilon=own * factor) for T in steps for factor in factors]
    found += [variant(base, T=T, epsilon=own), variant(base, T=T, epsilon=own, denoise=False)]
    found += [variant(base, T=T, snr=snr * math.sqrt(factor)) for factor in factors]
    found += consistent(base, steps) + flows(base, levels)
    return list({each.name: each for each in found}.values())


def variant(
    base: Sampler,
    *,
    T: int,
    epsilon: float | None = None,
    snr: float | None = None,
    denoise: bool = True,
    method: str = "annealed_langevin",
) -> Sampler:
    """The sampler with other settings; of epsilon and snr one."""
    schedule = base.schedule | {"steps_per_level": T, "epsilon": epsilon or base.schedule["epsilon"]}
    return dataclasses.replace(base, method=method, schedule=schedule, denoise=denoise, snr=snr)


def consistent(base: Sampler, steps: list[int], denoise: bool = True) -> list[Sampler]:
    """Consistent sampling with so many steps from level to level, or with one where the network knows no others, at
    the upper end of what epsilon may be and half way to the lower one."""
    found, sigmas = [], base.schedule["sigmas"]
    ratio = min(b / a for a, b in itertools.pairwise(sigmas))
    for T in (1,) if "sigmas" in base.network else steps:
        for share in (math.sqrt(1 - ratio ** (1 / T)), 1.0):
            epsilon = sigmas[-1] ** 2 * share
            found.append(variant(base, T=T, epsilon=epsilon, denoise=denoise, method="consistent"))
    return found


def flows(base: Sampler, levels: list[int], denoise: bool = True) -> list[Sampler]:
    """Solvers with so many levels, or with those of training where the network knows no others; the one with noise also
    from half the largest level on."""
    half = base.schedule["sigma_1"] / 2
    if "sigmas" in base.network:
        routes = [(method, route(base.schedule, method)) for method in FLOWS]
    else:
        routes = [(method, route(base.schedule, method, n)) for n in levels for method in FLOWS]
        if half > base.schedule["sigma_L"]:
            routes += [("dpmpp_sde", route(base.schedule, "dpmpp_sde", n, sigma_1=half)) for n in levels]
    return [
        dataclasses.replace(base, method=method, schedule=schedule, denoise=denoise, snr=None, predictor=None)
        for method, schedule in routes
    ]


def draw(samplers: list[Sampler], weights: Path, n: int, params: _params.Params) -> list[dict[str, Any]]:
    """Draw the images of all settings with the weights of a file, within a cluster. The seconds are those of one worker
    for an image, whenever it drew it; settings that fail say why."""
    rows, orders = {}, {}
    for each in samplers:
        row = {"method": each.method, "T": each.schedule["steps_per_level"], "epsilon": each.schedule["epsilon"]}
        row |= {
            "levels": each.schedule["L"],
            "sigma_1": each.schedule["sigma_1"],
            "snr": each.snr,
            "denoise": each.denoise,
            "nfe": each.nfe,
            "settings": each.settings,
        }
        name = words(row)
        rows[name] = row
        orders[name] = _shards.Order(each, weights, n, params.sample.shard_size)
    drawn = _shards.draw(orders, params.runtime, tolerant=True)
    for name, row in rows.items():
        reason = drawn.failed.get(name)
        seconds = None if reason else _shards.seconds(orders[name], params.runtime) / n
        row |= {"seconds": seconds, "fid": None, "reason": reason, "order": orders[name]}
        if reason:
            log.warning("%s: %s", name, reason)
    return list(rows.values())


def judge(rows: list[dict[str, Any]], extractor: _extractors.Extractor, n: int, params: _params.Params) -> None:
    """Put the FID into each row whose images were drawn; within a cluster."""
    drawn = {str(k): each for k, each in enumerate(rows) if each["reason"] is None}
    sets = {k: _extractors.Pictures(n, _shards.load(each["order"], params.runtime)) for k, each in drawn.items()}
    reference, found = _reference.beside(extractor, sets, params)
    for k, each in drawn.items():
        each["fid"] = frechet_distance(Moments.of(found[k].layers[extractor.layer("fid")]), reference.moments)
        each["rank_deficient"] = n <= reference.features.shape[1]


def frontier(rows: list[dict[str, Any]], cost: str = "nfe") -> list[dict[str, Any]]:
    """The rows that no cheaper one is as good as, cheapest first; the cost is in "nfe" or in "seconds"."""
    best: list[dict[str, Any]] = []
    drawn = (each for each in rows if each["fid"] is not None)
    for each in sorted(drawn, key=lambda each: (each[cost], each["fid"])):
        if not best or each["fid"] < best[-1]["fid"]:
            best.append(each)
    return best


def advice(rows: list[dict[str, Any]]) -> str:
    """Which to pick."""
    best = frontier(rows)
    if not best:
        return "No setting drew images: see the reasons above."
    close = next(each for each in best if each["fid"] <= CLOSE * best[-1]["fid"])
    return (
        f"Best: {words(best[-1])}, FID {best[-1]['fid']:.4g} at {best[-1]['nfe']} evaluations an image.\n"
        f"Pick: {words(close)}, FID {close['fid']:.4g} at {close['nfe']}: the cheapest within {CLOSE - 1:.0%} of it."
    )


def words(each: dict[str, Any]) -> str:
    """A setting for people."""
    if each["method"] in FLOWS:
        how = f"{each['levels']} levels from {each['sigma_1']:.3g}"
    else:
        how = f"T = {each['T']}, {'SNR' if each['snr'] else 'epsilon'} = {size(each)}"
    return f"{TITLES[each['method']]}, {how}{'' if each['denoise'] else ', not denoised'}"


def kind(each: dict[str, Any]) -> str:
    """A key of `TITLES`."""
    return "snr" if each["snr"] else each["method"]


def size(each: dict[str, Any]) -> str:
    """Of a step, for people: epsilon, or the signal-to-noise ratio, or the levels."""
    return (
        f"{each['levels']} from {each['sigma_1']:.3g}"
        if each["method"] in FLOWS
        else f"{each['snr'] or each['epsilon']:.3g}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All settings, cheapest first; those on the frontier are marked."""
    best = frontier(rows)
    lines = [f"{'':2}{'method':<24}{'T':>3}{'epsilon, SNR':>14}{'denoise':>9}{'NFE':>6}{'s/image':>9}{'FID':>9}"]
    for each in rows:
        mark = "* " if any(each is other for other in best) else "  "
        seconds = "" if each["seconds"] is None else f"{each['seconds']:.3f}"
        value = "failed" if each["reason"] else f"{each['fid']:.4g}"
        lines.append(
            f"{mark}{TITLES[kind(each)]:<24}{each['T']:>3}{size(each):>14}"
            f"{'yes' if each['denoise'] else 'no':>9}{each['nfe']:>6}{seconds:>9}{value:>9}"
        )
    return "\n".join([*lines, *(f"{words(each)}: {each['reason']}" for each in rows if each["reason"])])


def record(rows: list[dict[str, Any]], extractor: _extractors.Extractor, n: int, base: Sampler) -> dict[str, Any]:
    """All that the numbers were computed from."""
    common = evaluate.provenance(extractor)
    return {
        "metric": "fid",
        "n": n,
        **common,
        "extractor": {**common["extractor"], "layer": extractor.layer("fid")},
        "seeds": {"seed": base.seed, "first": 0, "last": n - 1},
        "checkpoint": {"sha256": base.weights_sha256, "step": base.step, "selection": select.rule()},
        "rows": [{key: each[key] for key in each if key != "order"} for each in rows],
    }


def plot(rows: list[dict[str, Any]], n: int, path: Path) -> None:
    """Draw FID against evaluations an image and against the seconds that n images took."""
    drawn = [each for each in rows if each["fid"] is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 4.2), layout="constrained")
        for axes, key, below in zip(
            figure.subplots(1, 2, sharey=True),
            ("nfe", "seconds"),
            ("network evaluations an image", "seconds an image, of one worker"),
            strict=True,
        ):
            for k, (name, title) in enumerate(TITLES.items()):
                for denoise in (True, False):
                    some = [e for e in drawn if (kind(e), e["denoise"]) == (name, denoise)]
                    if some:
                        style = {
                            "mfc": f"C{k}" if denoise else "none",
                            "label": title + ("" if denoise else ", not denoised"),
                        }
                        axes.plot([e[key] for e in some], [e["fid"] for e in some], "o", ms=5, color=f"C{k}", **style)
            best = frontier(rows, key)
            axes.plot([e[key] for e in best], [e["fid"] for e in best], color="0.6", lw=1, zorder=0, label="frontier")
            for each in best:
                text = size(each) if each["method"] in FLOWS else f"T = {each['T']}, {size(each)}"
                axes.annotate(text, (each[key], each["fid"]), (4, 5), textcoords="offset points", fontsize=7)
            axes.set(xscale="log", yscale="log", xlabel=below)
            axes.margins(0.12)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
        figure.axes[0].set_ylabel(f"FID of {n:,} images")
        figure.axes[0].legend(fontsize=7)
        figure.savefig(path, dpi=130)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=500, help="images of each setting (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5], metavar="T", help="default: 1 2 5")
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[0.3, 0.6, 1.0], metavar="F", help="of epsilon; default: 0.3 0.6 1"
    )
    parser.add_argument(
        "--levels", type=int, nargs="+", default=[6, 10, 18], metavar="L", help="of the flow; default: 6 10 18"
    )


if __name__ == "__main__":
    from pipeline import frontier as this  # since what is defined in __main__ would travel to the workers by value

    _stage.run("frontier", __doc__, this.main, _options)
