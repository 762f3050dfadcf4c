"""Reports of `evaluate_samples`: their warnings, their table, and where they are written."""

from pathlib import Path
from typing import Any

from dis_ssm.metrics.extractors import TF_2015
from dis_ssm.system.tables import format_table

PUBLISHED = 50_000  # samples of FID-50K
PUBLISHED_REFERENCES = 10_000  # of precision and recall

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
}


def warnings_about(report: dict) -> list[str]:
    """Why the numbers of a report are not those that papers print."""
    found = []
    settings, samples, reference = (report[key] for key in ("settings", "samples", "reference"))
    extractor, n = settings["extractor"], samples["images"]
    if extractor["name"] != "inception":
        found.append(
            f"these are distances over {extractor['name']} features, not FID: compare them with "
            f"their like only"
        )
    elif not str(extractor["weights"]).startswith(TF_2015):
        found.append(
            f"the Inception weights are not those of TensorFlow 2015 (SHA-256 "
            f"{str(extractor['weights'])[:8]}, not {TF_2015}): this is not FID"
        )
    if n < PUBLISHED:
        found.append(
            f"{n:,} samples instead of {PUBLISHED:,}: a Fréchet distance is larger, recall and "
            f"the Inception score are other, at smaller n"
        )
    if n != PUBLISHED and "inception_score" in report["scores"]:
        found.append(
            f"the Inception score is of {settings['inception_score_splits']} splits; ADM's "
            f"evaluator cuts every {PUBLISHED // 10:,} images, which is the same at {PUBLISHED:,}"
        )
    sizes = [(part.get("height"), part.get("width")) for part in (samples, reference)]
    if None not in sizes[1] and sizes[0] != sizes[1]:
        (h, w), (real_h, real_w) = sizes
        found.append(
            f"samples are {h}x{w}, reference images {real_h}x{real_w}: resizing is part of the "
            f"distance"
        )
    if reference["statistics"] == "computed" and reference["images"] < PUBLISHED:
        found.append(
            f"the reference is {reference['images']:,} images: its covariance is uncertain too"
        )
    compared = settings["precision_recall_references"]
    if compared and compared != PUBLISHED_REFERENCES:
        found.append(
            f"precision and recall are to {compared:,} reference images, not to "
            f"{PUBLISHED_REFERENCES:,} as ADM's"
        )
    if reference["statistics"] == "read":
        found += _differences(reference, extractor)
    return found


def format_report(report: dict) -> str:
    """The scores as a table, then what they were made of, then the warnings."""
    rows = [("score", "value", "std. error", "95 % interval")]
    for name, found in report["scores"].items():
        low_high = found["interval"]
        rows.append(
            (
                _title(name),
                f"{found['value']:.4f}",
                "-" if found["stderr"] is None else f"{found['stderr']:.4f}",
                "-" if low_high is None else "{:.4f} .. {:.4f}".format(*low_high),
            )
        )
    lines = [format_table(rows)]
    lines += [f"{_title(name)} not available: {why}" for name, why in report["unavailable"].items()]
    settings, run = report["settings"], report["run"]
    extractor = settings["extractor"]
    weights = f", weights {extractor['weights'][:8]}" if extractor["weights"] else ""
    lines += [
        f"samples:   {_describe(report['samples'])}",
        f"reference: {_describe(report['reference'])}",
        f"extractor: {extractor['name']}{weights}, resize {extractor['resize']}; batches of "
        f"{settings['batch_size']}; {settings['inception_score_splits']} splits; "
        f"k = {settings['neighbours']}; {settings['halves']} halves",
        f"run:       {run['device']}, {run['processes']} process(es), {run['seconds']} s",
    ]
    return "\n".join(lines + [f"warning: {warning}" for warning in report["warnings"]])


def report_path(samples: str | Path, extractor: str) -> Path:
    """Where the command writes the report of image files: beside them, NAME-EXTRACTOR.json."""
    place = Path(samples).absolute()
    name = place.name if place.is_dir() else place.stem
    return place.with_name(f"{name}-{extractor}.json")


def drawn_report_path(run: Path, report: dict[str, Any], reference: str | Path | None) -> Path:
    """Where the command writes the report of images drawn from `run`: in RUN/scores.

    The name says which samples, which extractor and which `reference`; None is the run's own data.
    """
    extractor = report["settings"]["extractor"]["name"]
    against = "data" if reference is None else Path(reference).stem
    return run / "scores" / f"{report['drawn']['samples']}-{extractor}-to-{against}.json"


def _title(name: str) -> str:
    return NAMES.get(name) or name.replace("fd_", "FD-", 1)


def _describe(part: dict) -> str:
    count = part.get("images")
    said = f"{part['source']}, " + (f"{count:,} images" if count else "images not counted")
    if part.get("height"):
        said += f" of {part['height']}x{part['width']}"
    return said + (", statistics from the file" if part.get("statistics") == "read" else "")


def _differences(reference: dict, extractor: dict) -> list[str]:
    theirs = (reference["protocol"] or {}).get("extractor")
    if theirs is None:
        return (
            []
            if extractor["name"] == "inception"
            else [f"{reference['source']} does not say which extractor made it"]
        )
    return [
        f"{reference['source']} was made with another {key}: {theirs.get(key)}, here "
        f"{extractor.get(key)}"
        for key in sorted(theirs.keys() | extractor.keys())
        if theirs.get(key) != extractor.get(key)
    ]
