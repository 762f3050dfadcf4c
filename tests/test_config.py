"""Configs: what is read is what was written, and what is wrong is refused by name."""

import dataclasses
import json
import math
import tomllib

import pytest
import torch

from dis_ssm.build import build_model
from dis_ssm.config import (
    Config,
    DataConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    check_guidance,
    differences,
    free_on_resume,
    from_dict,
    load_config,
    named_configs,
    resolve,
    to_dict,
    to_toml,
)

DIGITS = dict(channels=1, height=8, width=8, num_classes=10)
SMALL = ModelConfig(hidden_size=16, depth=3, patch_size=2)


def changed(config, section, **values):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


def test_toml_and_json_give_back_the_config(tmp_path):
    config = resolve(changed(Config(model=SMALL), "train", lr=3e-4, betas=(0.8, 0.99)), **DIGITS)
    assert from_dict(tomllib.loads(to_toml(config))) == config
    (tmp_path / "c.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "c.json") == load_config(tmp_path / "c.toml") == config
    assert config.model.input_size == (8, 8) and config.model.num_classes == 10


@pytest.mark.parametrize(
    "values, words",
    [
        ({"trian": {}}, ["'trian'", "'train'"]),
        ({"train": {"lrr": 1.0}}, ["'train.lrr'", "'train.lr'"]),
        ({"lr": 1.0}, ["'lr'", "'train.lr'"]),
        ({"model": {"flip": True}}, ["'model.flip'", "'data.flip'"]),
        ({"train": {"lr": "fast"}}, ["train.lr", "'fast'", "float"]),
        ({"train": {"steps": True}}, ["train.steps", "True", "int"]),
        ({"train": {"steps": 1.5}}, ["train.steps", "1.5", "int"]),
        ({"data": {"flip": 1}}, ["data.flip", "bool"]),
        ({"data": {"flip": "False"}}, ["data.flip", "bool"]),
        ({"train": {"betas": [0.9]}}, ["train.betas", "2 values"]),
        ({"diffusion": {"schedule": "cosin"}}, ["diffusion.schedule", "'cosin'", "cosine"]),
        ({"train": 3}, ["train", "section"]),
        ({"out": 3}, ["out", "path"]),
        ({"train": {"lr": -1.0}}, ["lr", "-1.0", "positive"]),
        ({"train": {"keep": 0}}, ["keep", "positive"]),
        ({"train": {"min_lr": 1.0}}, ["min_lr", "lr"]),
        ({"train": {"ema_decay": 1.0}}, ["ema_decay", "below 1"]),
        ({"train": {"betas": [0.9, 1.0]}}, ["betas"]),
        ({"model": {"class_dropout_prob": 1.5}}, ["class_dropout_prob", "1.5"]),
        ({"sample": {"eta": 1.0, "sampler": "ddpm"}}, ["eta", "ddim"]),
        ({"train": {"lr": math.inf}}, ["lr is inf", "finite"]),
        ({"sample": {"cfg_scale": math.nan}}, ["cfg_scale is nan", "finite"]),
        ({"sample": {"cfg_scale": -math.inf}}, ["cfg_scale is -inf", "finite"]),
    ],
)
def test_wrong_keys_types_and_values_are_named(values, words):
    with pytest.raises(ValueError) as error:
        from_dict(values)
    assert all(word in str(error.value) for word in words), error.value


def test_an_interval_may_be_open():
    assert SampleConfig(cfg_interval=(5.0, math.inf)).cfg_interval == (5.0, math.inf)


def test_an_integer_is_a_float_where_one_is_wanted():
    lr = from_dict({"train": {"lr": 1}}).train.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.toml"):
        load_config(tmp_path / "no.toml")
    with pytest.raises(ValueError, match="'digits'"):
        load_config("digist")
    (tmp_path / "bad.toml").write_text("[train]\nlr = \n")
    with pytest.raises(ValueError, match=r"bad\.toml is not valid TOML.*line 2"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "key.toml").write_text("[train]\nsteeps = 1\n")
    with pytest.raises(ValueError, match=r"key\.toml: unknown key 'train\.steeps'.*train\.steps"):
        load_config(tmp_path / "key.toml")


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_shipped_configs_build(name):
    assert name in named_configs()
    side = {"digits": 8, "fashion-mnist": 28}[name]
    config = resolve(load_config(name), channels=1, height=side, width=side, num_classes=10)
    assert config.data.source == name
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(config).parameters()) < 2e6


def test_resume_names_exactly_what_changes_training():
    old = Config()
    sections = {f.name: type(getattr(old, f.name)) for f in dataclasses.fields(old)}
    known = {"out"} | {
        f"{section}.{f.name}"
        for section, cls in sections.items()
        if dataclasses.is_dataclass(cls)
        for f in dataclasses.fields(cls)
    }
    written = {
        *("out", "data.max_corrupt", "data.workers", "data.vae", "train.compile", "train.device"),
        *("train.grad_checkpointing", "train.keep", "train.log_every", "train.max_nonfinite"),
        *("train.micro_batch_size", "train.parallel", "train.save_every", "train.wandb"),
        "train.timeout_minutes",
    } | {key for key in known if key.startswith(("sample.", "score."))}
    assert free_on_resume() == written < known
    free = changed(changed(old, "train", log_every=3, keep=9, device="cpu"), "sample", num=8)
    assert differences(old, free) == []
    lines = differences(old, changed(changed(old, "train", lr=2e-4, seed=1), "data", flip=True))
    assert [line.split(":")[0] for line in lines] == ["data.flip", "train.lr", "train.seed"]
    assert "0.0001 -> 0.0002" in lines[1]


@pytest.mark.parametrize("schedule, allowed", [("constant", True), ("cosine", False)])
def test_more_steps_may_be_asked_only_of_a_constant_rate(schedule, allowed):
    old = changed(Config(), "train", lr_schedule=schedule, steps=10)
    assert (differences(old, changed(old, "train", steps=20)) == []) is allowed
    assert differences(old, changed(old, "train", steps=5))


def test_resolve_refuses_what_contradicts_the_data():
    for name, value in [("in_channels", 3), ("input_size", (16, 16)), ("num_classes", 5)]:
        with pytest.raises(ValueError, match=f"model.{name}"):
            resolve(changed(Config(model=SMALL), "model", **{name: value}), **DIGITS)
    unconditional = changed(Config(model=SMALL), "model", num_classes=0)
    assert resolve(unconditional, **DIGITS).model.num_classes == 0
    with pytest.raises(ValueError, match="cfg_scale 2"):
        resolve(changed(unconditional, "sample", cfg_scale=2.0), **DIGITS)
    few = changed(Config(model=SMALL), "diffusion", num_steps=20)
    with pytest.raises(ValueError, match=r"sample\.steps 50.*20"):
        resolve(few, **DIGITS)
    without_null = resolve(changed(Config(model=SMALL), "model", class_dropout_prob=0.0), **DIGITS)
    with pytest.raises(ValueError, match="class_dropout_prob"):
        check_guidance(without_null, 1.5)


@pytest.mark.parametrize(
    "model, words",
    [
        (ModelConfig(), "hidden_size, depth, patch_size"),
        (ModelConfig(hidden_size=16, depth=3), "lacks patch_size"),
        (ModelConfig(name="DiS-S/2", depth=3), "already says depth"),
        (ModelConfig(name="DiS-Q/2"), "DiS-Q/2"),
        (ModelConfig(hidden_size=16, depth=4, patch_size=2), "depth must be odd, got 4"),
        (ModelConfig(hidden_size=16, depth=3, patch_size=3), "patch_size 3 does not divide"),
    ],
)
def test_models_that_cannot_be_built(model, words):
    with pytest.raises(ValueError, match=words):
        build_model(resolve(Config(model=model), **DIGITS))


def test_a_number_beyond_float_is_named(tmp_path):
    (tmp_path / "c.json").write_text('{"train": {"lr": 1' + "0" * 400 + "}}")
    with pytest.raises(ValueError, match=r"train\.lr is too large"):
        load_config(tmp_path / "c.json")


def test_sections_are_frozen():
    for section in (ModelConfig(), DataConfig(), TrainConfig(), SampleConfig(), Config()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)
