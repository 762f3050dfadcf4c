"""dis-ssm score"""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from dis_ssm.cli.messages import check_report_name, write_report
from dis_ssm.config import Sampler
from dis_ssm.storage.checkpoint import locate
from dis_ssm.system.distributed import join_world
from dis_ssm.system.files import check_writable


def score(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    *,
    num: int = 600,
    cfg_scale: float | None = None,
    steps: int | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    bound_images: int = 256,
    bound_terms: int = 32,
    keep: bool = False,
    device: str | None = None,
    out: Path | None = None,
) -> int:
    """Score a run on small images: class accuracy, pixel distance, bits per dimension.

    Images drawn from its newest checkpoint are compared with the held-out images of its data, in
    one process. Scores of these settings that RUN/scores has already are not computed again.

    Args:
        run: a run folder, or one of its checkpoints.
        num: how many images to draw.
        cfg_scale: guidance; unset, like steps, sampler and batch-size, as the run's config says.
        bound_images: held-out images whose bits per dimension are bounded.
        bound_terms: timesteps at which each of them is evaluated, an even number; 0: no bound.
        keep: write the samples to RUN/samples as .npz.
        out: the report (.json); by default in RUN/scores.
    """
    from dis_ssm.metrics.run_scores import format_scores, score_run, scores_path

    check_report_name(out)
    with join_world(device) as world:
        if world.size > 1:
            raise ValueError(f"one process scores a run, not {world.size}: start without torchrun")
    folder, _ = locate(run)
    check_writable(out or folder / "scores" / "trial.json")
    scores = score_run(
        run,
        num=num,
        steps=steps,
        sampler=sampler,
        cfg_scale=cfg_scale,
        seed=seed,
        batch_size=batch_size,
        bound_images=bound_images,
        bound_terms=bound_terms,
        device=device,
        keep=keep,
        reuse=True,
    )
    write_report(out or scores_path(folder, scores), scores, format_scores(scores))
    return 0
