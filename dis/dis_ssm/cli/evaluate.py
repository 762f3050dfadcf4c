"""dis-ssm evaluate"""

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from dis_ssm.storage.checkpoint import locate
from dis_ssm.storage.run import is_run
from dis_ssm.system.distributed import World, join_world
from dis_ssm.system.files import check_writable, write_json

DEFAULT_EXTRACTOR = "inception"


def evaluate(
    samples: Positional[Path],
    reference: Positional[str | None] = None,
    *,
    num: int | None = None,
    cfg_scale: float | None = None,
    steps: int | None = None,
    sampler: Literal["ddpm", "ddim"] | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    vae: str | None = None,
    bound_images: int | None = None,
    bound_terms: int | None = None,
    keep: bool = False,
    extractor: Literal["inception", "lite0", "dinov2", "pixels"] | None = None,
    weights: Path | None = None,
    resize: int | None = None,
    image_size: int | None = None,
    split: Literal["train", "heldout"] | None = None,
    background: Literal["white", "black", "drop"] | None = None,
    save_reference: Path | None = None,
    device: str | None = None,
    out: Path | None = None,
) -> int:
    """Score images against a reference: FID, sFID, IS, precision, recall; or score a run.

    SAMPLES are images (.npz, .zip, folder), and the REFERENCE is images, a data set, or statistics
    such as ADM's. Or SAMPLES is a run, from which `num` images are drawn: with a REFERENCE or an
    extractor (then against the run's held-out images) they are scored as images are; with neither,
    by class accuracy, pixel distance and bits per dimension, in one process. Several processes
    share the other work under torchrun.

    Args:
        samples: images, or a run folder or one of its checkpoints.
        reference: what to compare with.
        num: of a run: how many images to draw, 600 unless given.
        cfg_scale: of a run: guidance; unset, like steps and sampler, as its config says.
        seed: of a run: 0 unless given.
        vae: of a run that is compared: folder or hub id of the VAE that decodes its latents; unset,
            that of its config or of its latent cache.
        bound_images: of a run alone: held-out images whose bits per dimension are bounded, 256
            unless given.
        bound_terms: of a run alone: timesteps each of them is evaluated at, even, 32 unless given;
            0: no bound.
        keep: of a run alone: write the samples to RUN/samples as .npz.
        extractor: the features; inception, which is FID's, unless given.
        weights: a file of the extractor's weights; inception downloads its own without one.
        resize: side in pixels at which lite0 and dinov2 look, instead of 224.
        image_size: crop and scale a reference that is a data set to this.
        split: of a reference that is a data set; train unless given.
        background: what image files with alpha are composed on, else white; drop ignores it.
        save_reference: write the reference's statistics to this .npz for the next time.
        out: the report (.json); by default beside the samples, or in RUN/scores.
    """
    given = {"num": num, "cfg_scale": cfg_scale, "steps": steps, "sampler": sampler, "seed": seed}
    given |= {"bound_images": bound_images, "bound_terms": bound_terms, "keep": keep or None}
    given |= {"weights": weights, "resize": resize, "image_size": image_size, "split": split}
    given |= {"background": background, "save_reference": save_reference, "vae": vae}
    given = {name: value for name, value in given.items() if value is not None}
    a_run, by_features = _is_run(samples), reference is not None or extractor is not None
    if a_run:
        _refuse(given, ALONE if by_features else (*OF_FEATURES, *DECODED), HOW[by_features])
    else:
        _refuse(given, (*DRAWN, *ALONE, *DECODED), "images are scored")
    if out and out.suffix != ".json":
        raise ValueError(f"the report is JSON: give --out a name that ends in .json, not {out}")
    if save_reference and not save_reference.absolute().parent.is_dir():
        raise ValueError(f"cannot write {save_reference}: there is no such folder, make it first")
    if reference and reference.endswith(".npz") and (split or image_size is not None):
        raise ValueError(f"{reference} is taken as it is: leave out --split and --image-size")
    if a_run and not by_features:
        return _score_alone(samples, out, device, batch_size=batch_size, **given)
    if not a_run and reference is None:
        raise ValueError(f"{samples} is no run: say what to compare it with, too, if it is images")
    inputs = {samples.resolve(), Path(reference or "").expanduser().resolve()}
    for path in (out, save_reference):
        if path and path.resolve() in inputs:
            raise ValueError(f"{path} would overwrite what is scored: give another name")
    given |= {"extractor": extractor or DEFAULT_EXTRACTOR}
    with join_world(device) as world:
        if a_run:
            return _score_drawn(samples, reference, out, world, batch_size=batch_size, **given)
        return _score_images(samples, reference, out, world, batch_size, **given)


DRAWN = ("num", "cfg_scale", "steps", "sampler", "seed")  # options of runs
DECODED = ("vae",)  # of runs that are compared by features
ALONE = ("bound_images", "bound_terms", "keep")  # of runs that are not
OF_FEATURES = ("weights", "resize", "image_size", "split", "background", "save_reference")
HOW = {
    True: "a run is scored by an extractor's features",
    False: "a run is scored without a REFERENCE or an --extractor",
}


def _refuse(given: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    """ValueError for those of the options `names` that are given."""
    for name in names:
        if name in given:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} has no meaning where {where}: leave it out")


def _is_run(path: Path) -> bool:
    """Whether it is a run or a checkpoint, and not images."""
    if is_run(path):
        return True
    try:
        locate(path)
    except ValueError:
        return False
    return True


def _score_alone(run: Path, out: Path | None, device: str | None, **options: Any) -> int:
    from dis_ssm.metrics.run_scores import evaluate_run, format_scores, scores_path

    with join_world(device) as world:
        if world.size > 1:
            raise ValueError(
                f"{run} is a run, which one process scores, not {world.size}, unless a REFERENCE "
                f"or an --extractor is given"
            )
    folder, _ = locate(run)
    check_writable(out or folder / "scores" / "trial.json")
    scores = evaluate_run(run, device=device, reuse=True, **options)
    path = out or scores_path(folder, scores)
    _report(path, scores, format_scores(scores))
    return 0


def _score_drawn(
    run: Path, reference: str | None, out: Path | None, world: World, **options: Any
) -> int:
    from dis_ssm.metrics import format_report
    from dis_ssm.metrics.drawn import evaluate_drawn

    folder, _ = locate(run)
    check_writable(out or folder / "scores" / "trial.json")
    report = evaluate_drawn(run, reference, world=world, progress=world.main, **options)
    if world.main:
        against = "data" if reference is None else Path(reference).stem
        name = f"{report['drawn']['samples']}-{options['extractor']}-to-{against}.json"
        _report(out or folder / "scores" / name, report, format_report(report))
    return 0


def _score_images(
    images: Path, reference: str, out: Path | None, world: World, batch_size: int | None, **options
) -> int:
    from dis_ssm.metrics import evaluate_samples, format_report

    place = images.absolute()
    name = place.name if place.is_dir() else place.stem
    out = out or place.with_name(f"{name}-{options['extractor']}.json")
    check_writable(out)
    if batch_size is not None:
        options |= {"batch_size": batch_size}
    report = evaluate_samples(images, reference, world=world, progress=world.main, **options)
    if world.main:
        _report(out, report, format_report(report))
    return 0


def _report(path: Path, report: dict[str, Any], text: str) -> None:
    """Write, then print: a report outlives a terminal that cannot show it."""
    try:
        write_json(path, report)
    finally:
        print(text)
    print(path)
