"""Checkpoints: what is damaged is refused by name, and nothing older is ever lost."""

import dataclasses
import errno
import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dis_ssm.build import build_model, load_model
from dis_ssm.config import Config, ModelConfig, TrainConfig
from dis_ssm.storage import checkpoint as checkpoints
from dis_ssm.storage.checkpoint import (
    CheckpointError,
    clean_drafts,
    complete_checkpoints,
    load_part,
    load_weights,
    locate,
    newest_intact,
    optimizer_tensors,
    read_part,
    save_checkpoint,
)
from dis_ssm.system import files
from dis_ssm.system.files import drafted
from dis_ssm.training.optimizer import build_optimizer
from dis_ssm.training.trainer import PARTS

CONFIG = Config(
    model=ModelConfig(
        hidden_size=16,
        depth=1,
        patch_size=4,
        d_state=4,
        num_classes=3,
        in_channels=2,
        input_size=(8, 4),
    )
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(CONFIG)


def parts_of(model, value=1.0):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = {name: tensor + value for name, tensor in weights.items()}
    return {"model": weights, "ema": average, "optimizer": {"pos_embed/exp_avg": torch.ones(2)}}


def save(run, model, step, keep=10, value=1.0):
    return save_checkpoint(run, step, parts_of(model, value), CONFIG, {"step": step}, keep)


def names(run):
    return [folder.name for folder in complete_checkpoints(run)]


def test_what_is_saved_comes_back(tmp_path, model):
    folder = save(tmp_path, model, 7)
    files = {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert set(os.listdir(folder)) == files | {"state.json", "COMPLETE"}
    found, state = newest_intact(tmp_path, PARTS)
    parts = {name: read_part(found, state, name) for name in PARTS}
    assert found == folder and state["step"] == 7 and state["trainer"] == {"step": 7}
    for name, tensors in parts_of(model).items():
        assert parts[name].keys() == tensors.keys()
        assert all(torch.equal(parts[name][key], tensors[key]) for key in tensors)
    assert load_file(folder / "ema.safetensors")["pos_embed"].dtype == torch.float32
    assert newest_intact(tmp_path / "none", PARTS) is None


@pytest.mark.parametrize("weights, offset", [("ema", 1.0), ("model", 0.0)])
def test_load_model_from_run_or_checkpoint(tmp_path, model, weights, offset):
    old = save(tmp_path, model, 1, value=5.0)
    save(tmp_path, model, 2)
    loaded, config = load_model(tmp_path, weights=weights)
    assert config == CONFIG and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor + offset)
    older, _ = load_model(old)
    assert torch.equal(older.pos_embed, model.pos_embed + 5)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-5])


def alter(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def remove(file):
    file.unlink()


@pytest.mark.parametrize("damage", [truncate, alter, remove])
@pytest.mark.parametrize("name", ["ema.safetensors", "state.json", "COMPLETE"])
def test_damage_is_named_and_resuming_goes_back_one(tmp_path, model, name, damage):
    save(tmp_path, model, 1)
    damage(save(tmp_path, model, 2) / name)
    word = name.removesuffix(".json")
    if name == "COMPLETE" and damage is not remove:
        word = "(state|COMPLETE)"
    with pytest.raises(CheckpointError, match=f"00000002.*{word}"):
        load_model(tmp_path / "checkpoints" / "00000002")
    with pytest.warns(UserWarning, match=f"00000002.*{word}.*before it") as caught:
        assert newest_intact(tmp_path, PARTS)[1]["step"] == 1
    assert len(caught) == 1
    if not (name == "COMPLETE" and damage is remove):  # without a marker it is no checkpoint at all
        with pytest.raises(CheckpointError, match=word):
            load_model(tmp_path)


def test_a_run_never_starts_over_because_all_is_damaged(tmp_path, model):
    for step in (1, 2):
        truncate(save(tmp_path, model, step) / "model.safetensors")
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match=r"no checkpoint .*00000001.*model\.safetensors"),
    ):
        newest_intact(tmp_path, PARTS)


def test_damage_to_a_part_that_is_not_read_does_not_matter(tmp_path, model):
    truncate(save(tmp_path, model, 1) / "optimizer.safetensors")
    load_model(tmp_path)


def test_a_newer_format_is_refused(tmp_path, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", checkpoints.FORMAT + 1)
        save(tmp_path, model, 1)
    with pytest.raises(CheckpointError, match="format 2"):
        load_model(tmp_path)


def test_the_newest_are_kept(tmp_path, model):
    for step in (5, 99, 100, 1000):
        save(tmp_path, model, step, keep=2)
    assert names(tmp_path) == ["00000100", "00001000"]


def test_nothing_is_removed_before_the_new_one_is_complete(tmp_path, model, monkeypatch):
    save(tmp_path, model, 1, keep=1)
    rename = os.rename

    def watched(source, target):
        assert (source / "COMPLETE").is_file()
        removing = source.name == "00000001"
        assert names(tmp_path) == ["00000001", "00000002"][: 1 + removing]
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", watched)
        save(tmp_path, model, 2, keep=1)
    assert names(tmp_path) == ["00000002"]


@pytest.mark.parametrize("part", ["safetensors", "state.json", "COMPLETE"])
def test_a_process_killed_while_saving_leaves_the_older_one(tmp_path, model, monkeypatch, part):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    def sync(path):
        if path.name.endswith(part):
            raise Killed

    save(tmp_path, model, 1, keep=1)
    with monkeypatch.context() as patch:
        for module in (checkpoints, files):
            patch.setattr(module, "sync", sync)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a dead process cleans nothing
        with pytest.raises(Killed):
            save(tmp_path, model, 2, keep=1)
    left = os.listdir(tmp_path / "checkpoints")
    assert sorted(left) == [".draft-00000002", "00000001"]
    assert newest_intact(tmp_path, PARTS)[1]["step"] == 1
    clean_drafts(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]


def test_a_full_disk_is_reported_and_leaves_the_older_one(tmp_path, model):
    save(tmp_path, model, 1, keep=1)
    size = (tmp_path / "checkpoints" / "00000001" / "model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises((CheckpointError, OSError), match=r"model\.safetensors"):
            save(tmp_path, model, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]
    load_model(tmp_path)


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path, model):
    truncate(save(tmp_path, model, 1) / "ema.safetensors")
    save(tmp_path, model, 1)
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]
    load_model(tmp_path)


def test_what_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="neither a run"):
            load_model(path)
    with pytest.raises(ValueError, match="'best'"):
        load_model(tmp_path, weights="best")


def test_weights_that_do_not_fit_are_named_with_their_shapes(tmp_path, model):
    weights = model.state_dict()
    wrong = weights | {"pos_embed": torch.zeros(1, 9, 16)}
    with pytest.raises(CheckpointError, match=r"here has pos_embed .*\(1, 9, 16\).*\(1, 4, 16\)"):
        load_weights(model, wrong, "here")
    with pytest.raises(CheckpointError, match=r"lacks pos_embed \(1, 4, 16\)"):
        load_weights(model, {k: v for k, v in weights.items() if k != "pos_embed"}, "here")
    with pytest.raises(CheckpointError, match=r"has extra \(2,\).*and 1 more"):
        load_weights(model, weights | {"extra": torch.ones(2), "more": torch.ones(1)}, "here")
    before = weights["pos_embed"].clone()
    assert torch.equal(model.pos_embed, before)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, model):
    other = dataclasses.replace(CONFIG.model, hidden_size=32)
    save_checkpoint(tmp_path, 1, parts_of(model), dataclasses.replace(CONFIG, model=other), {}, 1)
    with pytest.raises(
        CheckpointError, match=r"ema\.safetensors has .*\(32, 4\), the model \(64, 4\)"
    ):
        load_model(tmp_path)


def small_optimizer(order):
    torch.manual_seed(1)
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in order})
    return model, build_optimizer(model, TrainConfig(lr=0.1))


def update(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    x = torch.randn(5, 3)
    sum(layer(x).square().mean() for layer in model.values()).backward()
    optimizer.step()


def save_optimizer(run, model, optimizer):
    parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)}
    save_checkpoint(run, 1, parts, CONFIG, {}, 1)
    return newest_intact(run, ("optimizer",))


def test_optimizer_state_goes_by_name_not_by_position(tmp_path):
    model, optimizer = small_optimizer(["a", "b"])
    update(model, optimizer, 2)
    tensors = optimizer_tensors(optimizer, model)
    assert set(tensors) == {
        f"{layer}.{p}/{slot}"
        for layer in "ab"
        for p in ("weight", "bias")
        for slot in ("step", "exp_avg", "exp_avg_sq")
    }
    saved = save_optimizer(tmp_path, model, optimizer)
    other, reordered = small_optimizer(["b", "a"])
    other.load_state_dict(model.state_dict())
    load_part(*saved, "optimizer", optimizer_tensors(reordered, other))
    for m, o in ((model, optimizer), (other, reordered)):
        update(m, o, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_optimizer_state_that_does_not_fit_is_named(tmp_path):
    saved = save_optimizer(tmp_path, *small_optimizer(["a", "b"]))
    model, optimizer = small_optimizer(["a", "c"])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors lacks c\.weight/step"):
        load_part(*saved, "optimizer", optimizer_tensors(optimizer, model))
    own = optimizer_tensors(*small_optimizer(["a", "b"])[::-1])
    own["a.bias/exp_avg"] = torch.ones(4)
    with pytest.raises(CheckpointError, match=r"a\.bias/exp_avg of shape \(3,\).*\(4,\)"):
        load_part(*saved, "optimizer", own)


def test_state_names_config_versions_and_every_file(tmp_path, model):
    folder = save(tmp_path, model, 3)
    state = json.loads((folder / "state.json").read_text())
    assert state["versions"]["torch"] == torch.__version__
    assert state["config"]["model"]["input_size"] == [8, 4]
    sizes = {p.name: p.stat().st_size for p in folder.glob("*.safetensors")}
    assert {name: entry["size"] for name, entry in state["files"].items()} == sizes


def test_the_one_just_written_outlives_a_damaged_later_one(tmp_path, model):
    for step in (2, 4, 6):
        save(tmp_path, model, step)
    truncate(tmp_path / "checkpoints" / "00000006" / "model.safetensors")
    save(tmp_path, model, 5, keep=1)
    assert names(tmp_path) == ["00000005"]
    assert torch.equal(load_model(tmp_path)[0].pos_embed, model.pos_embed + 1)


def test_a_file_that_is_named_like_a_draft_is_in_nobodys_way(tmp_path, model):
    (tmp_path / "checkpoints").mkdir()
    for name in (".draft-x", ".draft-00000001"):
        (tmp_path / "checkpoints" / name).touch()
    save(tmp_path, model, 1)
    clean_drafts(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]


def test_a_checkpoint_without_training_state_is_drawn_from_not_continued(tmp_path, model):
    save_checkpoint(tmp_path, 0, {"ema": model.state_dict()}, CONFIG, {}, 1)
    load_model(tmp_path)
    with pytest.raises(ValueError, match=r"no training state \(model, optimizer\).*--out"):
        newest_intact(tmp_path, PARTS)


@pytest.mark.parametrize("content", [b"\xff\xfe", b""])
def test_a_marker_of_any_bytes_is_damage(tmp_path, model, content):
    save(tmp_path, model, 2)
    (save(tmp_path, model, 4) / "COMPLETE").write_bytes(content)
    with pytest.warns(UserWarning, match="altered"):
        folder, _ = newest_intact(tmp_path, PARTS)
    assert folder.name == "00000002"


def test_locate_finds_the_run_of_a_checkpoint(tmp_path, model, monkeypatch):
    folder = save(tmp_path, model, 2)
    assert locate(tmp_path) == (tmp_path, folder)
    assert locate(folder) == (tmp_path, folder)
    monkeypatch.chdir(folder.parent)
    assert locate(folder.name)[0] == tmp_path


def test_an_error_that_names_no_file_is_told_which(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*set\.npz'"):
        with drafted(tmp_path / "set.npz") as draft:
            draft.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []
