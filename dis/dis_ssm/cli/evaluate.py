"""dis-ssm evaluate"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from dis_ssm.cli.messages import check_report_name, write_report
from dis_ssm.config import Sampler
from dis_ssm.storage.checkpoint import locate
from dis_ssm.storage.run import is_run
from dis_ssm.system.distributed import join_world
from dis_ssm.system.files import check_writable

DEFAULT_EXTRACTOR = "inception"


@dataclass(frozen=True)
class Drawing:
    """How images are drawn where SAMPLES is a run.

    Args:
        num: how many images, 600 unless given.
        cfg_scale: guidance; unset, like steps and sampler, as the run's config says.
        seed: 0 unless given.
        vae: folder or hub id of the VAE that decodes latents; unset, that of the run's config or of
            its latent cache.
    """

    num: int | None = None
    cfg_scale: float | None = None
    steps: int | None = None
    sampler: Sampler | None = None
    seed: int | None = None
    vae: str | None = None

    def given(self) -> dict[str, Any]:
        """The options that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    samples: Positional[Annotated[Path, arg(metavar="SAMPLES")]],
    reference: Positional[Annotated[str | None, arg(metavar="[REFERENCE]")]] = None,
    *,
    drawing: OmitArgPrefixes[Drawing] = Drawing(),
    extractor: Literal["inception", "lite0", "dinov2", "pixels"] | None = None,
    weights: Path | None = None,
    resize: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    split: Literal["train", "heldout"] | None = None,
    background: Literal["white", "black", "drop"] | None = None,
    save_reference: Path | None = None,
    device: str | None = None,
    out: Path | None = None,
) -> int:
    """Compare images with a reference: FID, sFID, Inception score, precision, recall.

    SAMPLES is images (.npz, .zip, folder), or a run, whose newest checkpoint draws the images.
    REFERENCE is images, a data set, or statistics such as ADM's; for a run with a named extractor
    it may be left out, and the reference is then the held-out images of the run's data. Several
    processes share the work under torchrun.

    Args:
        samples: images, or a run folder or one of its checkpoints.
        reference: what to compare with.
        extractor: the features; inception, which is FID's, unless given.
        weights: a file of the extractor's weights; inception downloads its own without one.
        resize: side in pixels that lite0 and dinov2 resize images to, instead of 224.
        batch_size: images that are drawn, or passed to the extractor, together; 64 unless given, of
            a run as its config says.
        image_size: crop and scale a reference that is a data set to this; unset, of a run as its
            config says.
        split: of a reference that is a data set; train unless given, heldout of a run's own data.
        background: what image files with alpha are composed on, or drop to ignore alpha; white
            unless given, of a run as its config says.
        save_reference: write the reference's statistics to this .npz for the next time.
        out: the report (.json); by default beside the samples, or in RUN/scores.
    """
    from dis_ssm.metrics import evaluate_samples, format_report
    from dis_ssm.metrics.drawn import evaluate_drawn
    from dis_ssm.metrics.report import drawn_report_path, report_path

    check_report_name(out)
    a_run, drawn = _is_run(samples), drawing.given()
    if not a_run and drawn:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in drawn)
        raise ValueError(f"{samples} is not a run, so no images are drawn: leave out {flags}")
    if not samples.exists():
        raise ValueError(f"{samples} does not exist")
    if reference is None and not a_run:
        raise ValueError(f"{samples} is not a run: give a REFERENCE too, to compare images with")
    if reference is None and not extractor:
        raise ValueError(
            f"give a REFERENCE, or an --extractor to compare {samples} with the held-out images of "
            f"its data; for class accuracy and bits per dimension run dis-ssm score {samples}"
        )
    if reference and reference.endswith(".npz") and (split or image_size is not None):
        raise ValueError(f"{reference} is used as it is: leave out --split and --image-size")
    if save_reference and not save_reference.absolute().parent.is_dir():
        raise ValueError(
            f"cannot write {save_reference}: its folder does not exist, create it first"
        )
    inputs = {samples.resolve(), Path(reference or "").expanduser().resolve()}
    for path in (out, save_reference):
        if path and path.resolve() in inputs:
            raise ValueError(f"{path} would overwrite an input: give another name")
    extractor = extractor or DEFAULT_EXTRACTOR
    options = {
        "extractor": extractor,
        "weights": weights,
        "resize": resize,
        "image_size": image_size,
        "save_reference": save_reference,
    }
    optional = {"batch_size": batch_size, "split": split, "background": background}
    options |= {name: value for name, value in optional.items() if value is not None}
    with join_world(device) as world:
        options |= {"world": world, "progress": world.main}
        if a_run:
            folder, _ = locate(samples)
            check_writable(out or folder / "scores" / "trial.json")
            report = evaluate_drawn(samples, reference, **drawn, **options)
            path = out or drawn_report_path(folder, report, reference)
        else:
            path = out or report_path(samples, extractor)
            check_writable(path)
            report = evaluate_samples(samples, reference, **options)
        if world.main:
            write_report(path, report, format_report(report))
    return 0


def _is_run(path: Path) -> bool:
    """Whether `path` is a run or a checkpoint, and not images."""
    if is_run(path):
        return True
    try:
        locate(path)
    except ValueError:
        return False
    return True
