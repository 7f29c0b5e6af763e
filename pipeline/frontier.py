"""Draw by several samplers and settings with one network, and show what quality costs.

FID against network evaluations and against time, of annealed Langevin dynamics with several T and epsilon, with and
without the denoising step, and of consistent annealed sampling with several refinements, all with the checkpoint that
`select` has chosen. Reads what `sample` reads, and
out/features; writes out/frontier: frontier.json, frontier.png and frontier.txt, whose last lines say which to pick.
Images are drawn into runtime.storage, each once: the same command goes on where it stopped.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ncsn.metrics import Moments, frechet_distance
from pipeline import _extractors, _params, _ray, _reference, _shards, _stage, _track, evaluate, sample, select, train
from pipeline._pictures import STYLE
from pipeline._sampler import Sampler
from pipeline._stage import StageError, log
from pipeline._store import replacing_folder, write_json, write_text

OUT = Path("out/frontier")
CLOSE = 1.05  # FID that counts as no worse than the best: within 5 %
TITLES = {"annealed_langevin": "annealed Langevin", "consistent": "consistent"}


def main(params: _params.Params, *, n: int, steps: list[int], factors: list[float]) -> None:
    extractor = _extractors.choose(params.evaluate)
    if extractor is None:
        raise StageError(
            "a frontier needs features: the data has no labels to train a classifier on, and there are no Inception "
            "weights: name the file with evaluate.inception_weights=PATH"
        )
    base = sample.make_sampler(params, "ema")
    samplers = settings(base, steps, factors)
    log.info("%d settings, %d images each: %d network evaluations", len(samplers), n, n * sum(s.nfe for s in samplers))
    with _track.run(params, afterwards=train.weights_sha256()) as run, replacing_folder(OUT) as out:
        with _ray.cluster(params.runtime):
            rows = draw(samplers, n, params)
            judge(rows, extractor, n, params)
        rows.sort(key=lambda each: (each["nfe"], each["fid"] or math.inf))
        told = table(rows) + "\n\n" + advice(rows)
        write_json(out / "frontier.json", record(rows, extractor, n, base))
        write_text(out / "frontier.txt", told + "\n")
        plot(rows, n, out / "frontier.png")
        run.artifact(out, "frontier")
    print(told)


def settings(base: Sampler, steps: list[int], factors: list[float]) -> list[Sampler]:
    """The samplers: T by epsilon for annealed Langevin dynamics, without denoising for the sampler's own T, and
    consistent sampling with so many steps from level to level, at both ends of what epsilon may be and between."""

    def changed(method: str, T: int, epsilon: float, denoise: bool = True) -> Sampler:
        schedule = base.schedule | {"steps_per_level": T, "epsilon": epsilon}
        return dataclasses.replace(base, method=method, schedule=schedule, denoise=denoise)

    own, square = base.schedule["epsilon"], base.schedule["sigmas"][-1] ** 2
    T = base.schedule["steps_per_level"]
    found = [changed("annealed_langevin", T, own * factor) for T in steps for factor in factors]
    found += [changed("annealed_langevin", T, own), changed("annealed_langevin", T, own, denoise=False)]
    for T in (1,) if "sigmas" in base.network else steps:
        ratio = min(b / a for a, b in zip(base.schedule["sigmas"], base.schedule["sigmas"][1:], strict=False))
        least = 1 - ratio ** (1 / T)
        found += [changed("consistent", T, square * share) for share in (math.sqrt(least), 1.0)]
    return list({each.name: each for each in found}.values())


def draw(samplers: list[Sampler], n: int, params: _params.Params) -> list[dict[str, Any]]:
    """Draw the images of all settings, within a cluster. The seconds are those of one worker for an image, whenever it
    drew it; settings that fail say why."""
    rows, orders = {}, {}
    for each in samplers:
        row = {"method": each.method, "T": each.schedule["steps_per_level"], "epsilon": each.schedule["epsilon"]}
        row |= {"denoise": each.denoise, "nfe": each.nfe, "settings": each.settings}
        name = words(row)
        rows[name] = row
        orders[name] = _shards.Order(each, sample.weights("ema"), n, params.sample.shard_size)
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
    sets = {
        k: _extractors.Pictures(n, _ray.put(_shards.load(each["order"], params.runtime))) for k, each in drawn.items()
    }
    reference, found = _reference.beside(extractor, sets, params)
    for k, each in drawn.items():
        each["fid"] = frechet_distance(Moments.of(found[k].layers[extractor.layer("fid")]), reference.moments)


def frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows in the order of their evaluations those that no cheaper one is as good as."""
    best: list[dict[str, Any]] = []
    for each in rows:
        if each["fid"] is not None and (not best or each["fid"] < best[-1]["fid"]):
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
    end = "" if each["denoise"] else ", not denoised"
    return f"{TITLES[each['method']]}, T = {each['T']}, epsilon = {each['epsilon']:.3g}{end}"


def table(rows: list[dict[str, Any]]) -> str:
    """All settings, cheapest first; those on the frontier are marked."""
    best = frontier(rows)
    lines = [f"{'':2}{'method':<19}{'T':>3}{'epsilon':>11}{'denoise':>9}{'NFE':>6}{'s/image':>9}{'FID':>9}"]
    for each in rows:
        mark = "* " if any(each is other for other in best) else "  "
        seconds = "" if each["seconds"] is None else f"{each['seconds']:.3f}"
        value = "failed" if each["reason"] else f"{each['fid']:.4g}"
        lines.append(
            f"{mark}{TITLES[each['method']]:<19}{each['T']:>3}{each['epsilon']:>11.3g}"
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
    drawn, best = [each for each in rows if each["fid"] is not None], frontier(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 4.2), layout="constrained")
        for axes, key, below in zip(
            figure.subplots(1, 2, sharey=True),
            ("nfe", "seconds"),
            ("network evaluations an image", "seconds an image, of one worker"),
            strict=True,
        ):
            for k, (method, title) in enumerate(TITLES.items()):
                for denoise in (True, False):
                    some = [e for e in drawn if (e["method"], e["denoise"]) == (method, denoise)]
                    if some:
                        style = {
                            "mfc": f"C{k}" if denoise else "none",
                            "label": title + ("" if denoise else ", not denoised"),
                        }
                        axes.plot([e[key] for e in some], [e["fid"] for e in some], "o", ms=5, color=f"C{k}", **style)
            axes.plot([e[key] for e in best], [e["fid"] for e in best], color="0.6", lw=1, zorder=0, label="frontier")
            for each in best:
                text = f"T = {each['T']}, {each['epsilon']:.2g}"
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


if __name__ == "__main__":
    from pipeline import frontier as this  # since what is defined in __main__ would travel to the workers by value

    _stage.run("frontier", __doc__, this.main, _options)
