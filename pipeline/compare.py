"""Compare the numbers of runs in one table, best first; numbers that are not alike are refused, not ranked.

A RUN is a passports.json, a folder that holds one (out/evaluate, or a whole clone), or a run of MLflow: its id, the
beginning of its id, or its name. Numbers are alike if they were measured alike: metric, number of images, settings,
reference images, extractor with its weights, and what happens to the pixels before. What is compared may differ, and is
shown beside the numbers where it does: checkpoint, sampler, network evaluations, seeds, code. Writes nothing.

python -m pipeline.compare out/evaluate ../other         FID, IS, KID, precision and recall of all samples
python -m pipeline.compare 6656cd 98705e --metric kid    of two runs of MLflow
python -m pipeline.compare A B --metric fid_digits_360.samples    one passport by its name: as many as the yardsticks
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import _params, _stage, _track
from pipeline._stage import StageError

FILE = "passports.json"
PLACES = (FILE, f"evaluate/{FILE}", f"out/evaluate/{FILE}")  # below a folder; the second one is MLflow's
BEST = {"fid": min, "is": max, "kid": min, "precision": max, "recall": max}
MEASURED = ("metric", "n", "reference", "extractor", "preprocessing", "settings")  # alike, or not to be compared
CHANCE = ("settings.seed",)  # may differ nevertheless
RESULTS = ("name", "value", "std", "rank_deficient", "extractor.test_accuracy")
NEEDED = {*MEASURED, "name", "set", "value", "std", "rank_deficient"}

Passport = dict[str, Any]
Fields = dict[str, Any]  # by name, as extractor.layer


@dataclass(frozen=True)
class Judged:
    """A run, as it is called in the table, and its passports."""

    label: str
    passports: list[Passport]

    def find(self, wanted: str) -> Passport | None:
        """The passport of this name, or that of all samples for this metric."""
        for each in self.passports:
            all_samples = each["set"] == "samples" and not each["name"].endswith(".samples")
            if wanted == each["name"] or (wanted == each["metric"] and all_samples):
                return each
        return None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        label: Of the run.
        passports: By metric, as it was asked for.
        unlike: By metric, the fields that differ from the first run's: (its value, this one's).
        places: By metric, 1 for the best; none where the number is unlike.
    """

    label: str
    passports: dict[str, Passport]
    unlike: dict[str, dict[str, tuple[Any, Any]]]
    places: dict[str, int]


def main(
    params: _params.Params,
    runs: list[str],
    metrics: list[str] | None,
    tracking_uri: str | None,
    force: bool,
    as_json: bool,
) -> None:
    uri = tracking_uri or _track.tracking_uri(params)
    judged = [read(run, uri) for run in runs]
    metrics = choose(judged, metrics)
    rows = rank(judged, metrics)
    if not force:
        refuse_unlike(judged, rows, metrics)
    differing = differences(rows)
    print(json.dumps(as_dict(rows, metrics, differing), indent=2) if as_json else table(rows, metrics, differing))


def read(run: str, uri: str) -> Judged:
    """The passports of a file, a folder, or a run of the MLflow at `uri`.

    Raises:
        StageError: If there is no such thing, or there are no numbers in it.
    """
    path = Path(run)
    if not path.exists():
        label, content = _track.read_artifact(uri, run, f"evaluate/{FILE}")
        return Judged(label, parse(label, content))
    places = [path / place for place in PLACES] if path.is_dir() else [path]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise StageError(f"{run} holds no {', no '.join(PLACES)}: `dvc repro evaluate` writes the last one")
    return Judged(run, parse(run, file.read_bytes()))


def parse(label: str, content: bytes) -> list[Passport]:
    """The passports in a file's content; raises StageError if it is another file, or if there are none."""
    try:
        tree = json.loads(content)
        passports: list[Passport] = tree["passports"]
        missing = [field for each in passports for field in sorted(NEEDED - each.keys())]
        reason = tree["reason"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StageError(f"{label} is no {FILE} as the stage evaluate writes it: expected that file") from None
    if missing:
        raise StageError(f"{label} has a passport without {missing[0]!r}: write it anew with `dvc repro evaluate`")
    if not passports:
        raise StageError(f"{label} has no numbers: {reason}")
    return passports


def choose(judged: list[Judged], wanted: list[str] | None) -> list[str]:
    """The metrics to be shown, the first of which orders the table: those asked for, or else all that all runs have."""
    for name in wanted or ():
        for run in judged:
            passport = run.find(name)
            if passport is None or passport["metric"] not in BEST:
                names = ", ".join(each["name"] for each in run.passports if each["metric"] in BEST)
                raise StageError(f"--metric {name}: expected {', '.join(BEST)}, or, for {run.label}, {names}")
    chosen = list(dict.fromkeys(wanted or [name for name in BEST if all(run.find(name) for run in judged)]))
    if not chosen:
        raise StageError(f"{', '.join(run.label for run in judged)} have none of {', '.join(BEST)} in common")
    return chosen


def rank(judged: list[Judged], metrics: list[str]) -> list[Row]:
    """The rows of the table, best first by the first metric; what is unlike the first run comes last."""
    found = [{metric: passport for metric in metrics if (passport := run.find(metric))} for run in judged]
    unlike = [{metric: unlike_fields(found[0][metric], each[metric]) for metric in metrics} for each in found]
    ranked: dict[str, list[float]] = {}
    for metric in metrics:
        values = [each[metric]["value"] for each, fields in zip(found, unlike, strict=True) if not fields[metric]]
        ranked[metric] = sorted(values, reverse=BEST[found[0][metric]["metric"]] is max)
    rows = []
    for run, passports, fields in zip(judged, found, unlike, strict=True):
        # index: equal numbers share a place
        places = {
            metric: ranked[metric].index(passports[metric]["value"]) + 1 for metric in metrics if not fields[metric]
        }
        rows.append(Row(run.label, passports, fields, places))
    return sorted(rows, key=lambda row: row.places.get(metrics[0], len(rows) + 1))


def unlike_fields(first: Passport, other: Passport) -> dict[str, tuple[Any, Any]]:
    """The fields in which two numbers were not measured alike, with both values."""
    one, two = ({k: v for k, v in flat(each).items() if is_measured(k)} for each in (first, other))
    names = sorted(dict.fromkeys([*one, *two]), key=lambda name: MEASURED.index(name.partition(".")[0]))
    return {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}


def is_measured(field: str) -> bool:
    """Whether numbers that differ in this field are not to be compared."""
    return field.partition(".")[0] in MEASURED and field not in CHANCE


def flat(passport: Passport) -> Fields:
    """The passport's fields without results, those within others as extractor.layer."""
    return {name: value for name, value in _track.flatten(passport) if name not in RESULTS}


def refuse_unlike(judged: list[Judged], rows: list[Row], metrics: list[str]) -> None:
    """Raise StageError if a number is unlike the first run's."""
    for metric in metrics:
        for row in rows:
            if found := row.unlike[metric]:
                field, *more = found
                one, two = map(shown, found[field])
                also = f"; so do {', '.join(more)}" if more else ""
                raise StageError(
                    f"{metric} cannot be ranked: {field} differs, it is {one} in {judged[0].label} and {two} in "
                    f"{row.label}{also}; --force shows them marked{other_way(judged, row.passports[metric]['metric'])}"
                )


def other_way(judged: list[Judged], metric: str) -> str:
    """How to compare this metric nevertheless: by a passport of the samples that all have, and alike."""
    for passport in judged[0].passports:
        if (passport["metric"], passport["set"]) == (metric, "samples"):
            found = [run.find(passport["name"]) for run in judged]
            if all(each is not None and not unlike_fields(passport, each) for each in found):
                return f", --metric {passport['name']} ranks what is alike in all"
    return ""


def differences(rows: list[Row]) -> dict[str, list[Any]]:
    """What is compared: the fields beside the numbers that differ, each with a value for each row."""
    fields: list[Fields] = []
    for row in rows:
        found = [flat(passport) for passport in row.passports.values()]
        fields.append({name: value for each in found for name, value in each.items() if not is_measured(name)})
    names = dict.fromkeys(name for each in fields for name in each)
    columns = {name: [each.get(name) for each in fields] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def table(rows: list[Row], metrics: list[str], differing: dict[str, list[Any]]) -> str:
    """The rows in aligned columns, with the place of each number in brackets, and notes."""
    columns = [["", "run", *(row.label for row in rows)]]
    columns += [["", metric, *(number(row, metric) for row in rows)] for metric in metrics]
    for name, values in differing.items():
        group, _, field = name.rpartition(".")
        columns.append([group, field, *map(shown, values)])
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *rest in zip(*columns, strict=True):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*(lines if lines[0] else lines[1:]), *notes(rows, metrics)])


def number(row: Row, metric: str) -> str:
    """A value with its deviation and its place: 8.624±0.24 (2)."""
    passport = row.passports[metric]
    deviation = "" if passport["std"] is None else f"±{passport['std']:.2g}"
    return f"{passport['value']:#.4g}{deviation} ({row.places.get(metric, 'unlike')})"


def notes(rows: list[Row], metrics: list[str]) -> list[str]:
    """What to know of the numbers, a line each."""
    lines = []
    for row in rows:
        unlike = [metric for metric in metrics if row.unlike[metric]]
        where: dict[str, list[str]] = {}  # in which metrics a field differs, in words
        for metric in unlike:
            for field, (one, two) in row.unlike[metric].items():
                where.setdefault(f"{field} is {shown(two)}, not {shown(one)}", []).append(metric)
        what = [words if found == unlike else f"{words} ({', '.join(found)})" for words, found in where.items()]
        if unlike:
            lines.append(f"{row.label} is not ranked by {', '.join(unlike)}: {'; '.join(what)}")
    for metric in metrics:
        few = [row.label for row in rows if row.passports[metric]["rank_deficient"]]
        if few and rows[0].passports[metric]["metric"] == "fid":
            lines.append(f"{metric} of {', '.join(few)} is rank-deficient: no more images than features")
    return ["", *lines] if lines else []


def shown(value: Any) -> str:
    """A field's value for people; hashes are cut short."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24,}", r"\1", value)
    return json.dumps(value)


def as_dict(rows: list[Row], metrics: list[str], differing: dict[str, list[Any]]) -> dict[str, Any]:
    """The table as plain values, in its order."""
    return {
        "metrics": metrics,
        "rows": [
            {
                "run": row.label,
                "scores": {
                    metric: {
                        **{key: passport[key] for key in ("name", "value", "std", "n", "rank_deficient")},
                        "place": row.places.get(metric),
                        "unlike": {
                            field: {"first": one, "this": two} for field, (one, two) in row.unlike[metric].items()
                        },
                    }
                    for metric, passport in row.passports.items()
                },
                "differing": {name: values[k] for name, values in differing.items()},
            }
            for k, row in enumerate(rows)
        ],
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a passports.json, a folder, or a run of MLflow")
    parser.add_argument(
        "--metric",
        action="append",
        dest="metrics",
        metavar="NAME",
        help=f"{', '.join(BEST)}, or a passport's name; again for more, the first orders (default: all that all have)",
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="of MLflow (default: as the stages find it)")
    parser.add_argument("--force", action="store_true", help="show what is unlike the first RUN too, marked")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON in place of the table")


if __name__ == "__main__":
    _stage.run("compare", __doc__, main, options)
