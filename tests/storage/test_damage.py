"""Damage that would go into a result is named, and mended where it can be."""

import hashlib
import json

import numpy as np
import pytest
import torch

from dis_ssm.config import SampleConfig
from dis_ssm.sampling.sets import SamplePlan, _part, draw_set
from dis_ssm.storage.checkpoint import COMPLETE, STATE, CheckpointError, locate, read_state
from dis_ssm.training.log import truncate_log


def checkpoint(run, step, text=None):
    folder = run / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    state = {"format": 1, "step": step, "config": {}, "versions": {}, "trainer": {}, "files": {}}
    text = json.dumps(state) if text is None else text
    (folder / STATE).write_text(text)
    (folder / COMPLETE).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    return folder


WHOLE = {"format": 1, "step": 1, "config": {}, "versions": {}, "trainer": {}, "files": {}}


@pytest.mark.parametrize(
    "text, words",
    [
        *((json.dumps({k: v for k, v in WHOLE.items() if k != name}), name) for name in WHOLE),
        (json.dumps([]), "a list, not an object"),
        (json.dumps(WHOLE | {"files": {"ema.safetensors": 3}}), "ema.safetensors"),
        ("[" * 100_000, "is not valid JSON"),
        ("{", "is not valid JSON"),
        (json.dumps(WHOLE)[:-1] + ', "format": 1}', "it names 'format' twice"),
    ],
)
def test_a_state_of_another_shape_is_one_error(tmp_path, text, words):
    with pytest.raises(CheckpointError, match=words) as found:
        read_state(checkpoint(tmp_path, 1, text))
    assert STATE in str(found.value)


def test_a_damaged_marker_is_not_called_a_damaged_state(tmp_path):
    folder = checkpoint(tmp_path, 1)
    (folder / COMPLETE).write_bytes(b"\x93" + (folder / COMPLETE).read_bytes()[1:])
    with pytest.raises(CheckpointError, match="COMPLETE was cut short or altered"):
        read_state(folder)


def test_an_older_step_is_not_taken_for_the_newest(tmp_path):
    older, newest = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert locate(tmp_path) == (tmp_path, newest)
    (newest / COMPLETE).unlink()
    with pytest.raises(CheckpointError, match=r"00000002 is incomplete.*00000001"):
        locate(tmp_path)
    assert locate(older) == (tmp_path, older)


def test_damage_inside_a_log_costs_that_line_and_is_said(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step}) for step in range(1, 6)]
    log.write_text("\n".join([lines[0], "\x00" + lines[1][1:], *lines[2:]]) + "\n")
    with pytest.warns(UserWarning, match="1 lines are damaged and lost, the first is line 2"):
        truncate_log(log, 4)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 3, 4]


class Painted:
    """Draws image i in the grey i."""

    num_classes = 0

    def __init__(self, killed_at=None):
        self.calls, self.killed_at = 0, killed_at

    def draw(self, indices, y, settings):
        if indices[0] == self.killed_at:
            raise Killed
        self.calls += 1
        return torch.stack([torch.full((1, 2, 2), i, dtype=torch.uint8) for i in indices])


class Killed(Exception):
    pass


def make(out, killed_at=None):
    """The greys of a set and how many batches were drawn for it."""
    drawing = Painted(killed_at)
    draw_set(drawing, SamplePlan(SampleConfig(num=6, batch_size=2), 1, "abc", "run"), out)
    with np.load(out) as arrays:
        return arrays["arr_0"][:, 0, 0, 0].tolist(), drawing.calls


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_part_of_an_interrupted_set_is_drawn_again(tmp_path):
    out = tmp_path / "set.npz"

    with pytest.raises(Killed):
        make(out, killed_at=4)
    flip(_part(out.with_suffix(".parts"), 0), -40)
    with pytest.warns(UserWarning, match=r"part-000000\.npy is damaged"):
        assert make(out) == (list(range(6)), 2)


def test_a_set_that_was_altered_is_drawn_again(tmp_path):
    out = tmp_path / "set.npz"
    assert make(out) == (list(range(6)), 3)
    assert make(out) == (list(range(6)), 0)
    flip(out, out.stat().st_size // 2)
    with pytest.warns(UserWarning, match="altered since it was drawn"):
        assert make(out) == (list(range(6)), 3)


def test_a_set_of_the_first_version_has_no_digest_and_is_whole(tmp_path):
    out = tmp_path / "set.npz"
    make(out)
    record = out.with_suffix(".json")
    found = json.loads(record.read_text())
    found.pop("sha256")
    record.write_text(json.dumps(found))
    assert make(out) == (list(range(6)), 0)
