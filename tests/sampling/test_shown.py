"""What a run shows while it trains: TensorBoard's tags, the progress bar."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dis_ssm.config import Config, ModelConfig, SampleConfig, ScoreConfig, TrainConfig
from dis_ssm.training import train

BAR_WIDTH = 100


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The tags of a run and what it wrote on stderr."""
    run = tmp_path_factory.mktemp("shown") / "run"
    config = Config(
        out=run,
        model=ModelConfig(hidden_size=16, depth=1, patch_size=4, d_state=4),
        train=TrainConfig(steps=4, batch_size=8, lr=1e-3, log_every=1),
        sample=SampleConfig(every=0, steps=2),
        score=ScoreConfig(every=4, num=12, extractor="pixels"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        text = captured(lambda: train(config))
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return set(board.Tags()["scalars"]), text


def captured(call):
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as stream:
        call()
    return stream.getvalue()


def test_tensorboard_tags_are_grouped(shown):
    tags, _ = shown
    assert {"loss/loss", "loss/mse", "speed/images_per_second", "optimizer/lr"} <= tags
    assert {"optimizer/grad_norm", "progress/epoch", "score/fd_pixels_12"} <= tags
    groups = {"loss", "optimizer", "speed", "progress", "score"}
    assert {tag.split("/")[0] for tag in tags} == groups


def test_the_progress_bar_fits_and_says_loss_pace_and_time_left(shown):
    lines = [line for line in re.split(r"[\r\n]", shown[1]) if "%" in line]
    assert lines and max(map(len, lines)) <= BAR_WIDTH
    assert re.search(r"4/4 steps, loss \d+\.\d{4}, [\d.e+]+ images/s, ETA \d\d:\d\d", lines[-1])
