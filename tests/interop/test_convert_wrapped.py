"""Released weights as people keep them: wrapped, under other keys, beside objects of any class."""

import pathlib
import subprocess

import numpy as np
import pytest
import torch

from dis_ssm import DiS, cli
from dis_ssm.interop.released import _released_name, from_released


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    model = DiS(input_size=4, in_channels=1, hidden_size=16, depth=3, num_classes=2)
    released = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor[:, None] if name.endswith("conv_weight") else tensor
        released[_released_name(name, 3)] = tensor.clone()
    return released


def same(model, state):
    other = from_released(state).state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())


def wrapped(state, *parts):
    prefix = "".join(f"{part}." for part in parts)
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "parts",
    [("module",), ("_orig_mod",), ("_orig_mod", "module"), ("module", "_fsdp_wrapped_module")],
)
def test_what_wrappers_add_is_taken_off(state, parts):
    assert same(from_released(wrapped(state, *parts)), state)


def test_wrapped_blocks_and_the_counter_of_an_average(state):
    inner = {name.replace("mid_block.", "mid_block._orig_mod."): t for name, t in state.items()}
    assert same(from_released(wrapped(inner, "module") | {"n_averaged": torch.tensor(3)}), state)


def test_a_tensor_that_is_there_twice_is_refused(state):
    with pytest.raises(ValueError, match="holds a tensor twice"):
        from_released(state | wrapped(state, "module"))


@pytest.mark.parametrize("keys", [["state_dict"], ["model_ema"], ["model", "state_dict"], ["net"]])
def test_the_usual_keys_are_looked_under(state, keys):
    content = state
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    assert same(from_released(content), state)


def test_other_objects_are_left_out_and_named(state, tmp_path, capsys):
    file = tmp_path / "with.pt"
    extra = {"loss": np.float64(0.5), "where": pathlib.PurePosixPath("/data"), "steps": {1, 2}}
    torch.save({"state_dict": wrapped(state, "_orig_mod"), **extra}, file)
    assert cli.main(["convert", str(file), str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for words in (
        "taken from 'state_dict'",
        "_orig_mod taken off the names",
        "pathlib.PurePosixPath",
        f"{len(state)} tensors",
    ):
        assert words in said
    assert same(from_released(file), state)


class Runs:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return subprocess.check_call, (["touch", str(self.trace)],)


def test_what_a_pickle_would_call_is_never_called(state, tmp_path):
    trace, allowed = tmp_path / "trace", set(torch.serialization.get_safe_globals())
    torch.save({"ema": state, "args": Runs(trace)}, tmp_path / "bad.pt")
    assert same(from_released(tmp_path / "bad.pt"), state)
    assert not trace.exists()
    assert set(torch.serialization.get_safe_globals()) == allowed
