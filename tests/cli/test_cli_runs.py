"""What commands do with a run: continue and extend it, draw classes by name, score it."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dis_ssm.build import load_model
from dis_ssm.cli import main
from dis_ssm.config import load_config
from dis_ssm.sampling.pipeline import Pipeline
from dis_ssm.storage.classes import class_labels, class_names
from dis_ssm.training import train
from dis_ssm.training.optimizer import learning_rate

NAMES = ["cat", "dog", "wild horse"]
TINY = "--model.hidden-size 16 --model.depth 1 --model.patch-size 4 --model.d-state 4".split()
TINY += "--train.batch-size 4 --train.log-every 1 --sample.every 0 --sample.steps 2".split()
TINY += "--sample.num 6 --data.image-size 8 --diffusion.num-steps 50".split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine images of three classes for training, six held out."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, each in (("train", 3), ("heldout", 2)):
        for name in NAMES:
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    torch.set_num_threads(1)  # as in every test
    run = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--data.source", str(photos), "--train.steps", "3", "--sample.every", "3"]
    assert main(["train", *TINY, *flags, "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# ---- train RUN, --extend -------------------------------------------------------------------


def test_a_run_is_continued_by_its_name(run, capsys):
    assert main(["train", str(run), "--train.max-nonfinite", "5"]) == 0
    assert f"{run} is done: 3 of 3 steps" in capsys.readouterr().out
    assert main(["train", str(run), "--train.lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "train.lr: " in error and f"--train.init {run}" in error


def test_a_run_that_is_continued_by_its_name_is_the_one_that_was_never_stopped(
    run, photos, tmp_path, monkeypatch
):
    whole = tmp_path / "whole"
    config = dataclasses.replace(load_config(run / "config.json"), out=whole)
    settings = dataclasses.replace(config.train, steps=4, lr_schedule="constant", save_every=2)
    train(dataclasses.replace(config, train=settings))
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "00000004")
    assert main(["train", str(half)]) == 0
    (a, _), (b, _) = load_model(whole), load_model(half)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_last_step_moves_only_when_asked(run, capsys):
    assert main(["train", str(run), "--train.steps", "6"]) == 2
    assert "train.steps: 3 -> 6" in (error := capsys.readouterr().err) and "--extend 6" in error
    assert main(["train", str(run), "--extend", "6", "--train.seed", "3"]) == 2
    assert "train.seed: 0 -> 3" in (error := capsys.readouterr().err)
    assert "train.steps" not in error
    before = log_of(run)
    for _ in range(2):  # the second time it is done
        assert main(["train", str(run), "--extend", "6"]) == 0
    said = capsys.readouterr().out
    assert "is extended from 3 to 6 steps: the learning rate's schedule ends there" in said
    assert "is done: 6 of 6 steps" in said
    lines = log_of(run)
    assert lines[:3] == before and [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("extended_from") for line in lines] == [None] * 3 + [3, None, None]
    settings = load_config(run / "config.json").train
    assert settings.steps == 6
    assert [line["lr"] for line in lines[3:]] == [learning_rate(n, settings) for n in (3, 4, 5)]
    assert main(["train", str(run), "--extend", "4"]) == 2
    assert "train.steps: 6 -> 4" in capsys.readouterr().err


def test_there_must_be_something_to_extend(tmp_path, capsys):
    assert main(["train", "digits", "--out", str(tmp_path / "new"), "--extend", "5000"]) == 2
    assert "has no checkpoint to extend" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["train", "score", "sample"])
def test_a_folder_is_no_run_for_a_config_that_cannot_be_read(tmp_path, capsys, command):
    deep, pipe = tmp_path / "deep", tmp_path / "pipe"
    for folder in (deep, pipe):
        folder.mkdir()
    (deep / "config.json").write_text("[" * 100_000)
    os.mkfifo(pipe / "config.json")  # reading it would wait for ever
    for folder in (deep, pipe):
        assert main([command, str(folder)]) == 2
        error = capsys.readouterr().err
        assert str(folder) in error and error.count("\n") == 1


# ---- classes -------------------------------------------------------------------------------


def test_a_run_keeps_the_names_of_its_classes(run, capsys):
    assert list(class_names(run)) == NAMES
    assert main(["sample", str(run), "--classes", "dog", "2", "--num", "4"]) == 0
    by_name = capsys.readouterr().out
    assert main(["sample", str(run), "--classes", "1", "wild horse", "--num", "4"]) == 0
    assert capsys.readouterr().out == by_name and "-classes-1-2-" in by_name
    assert main(["sample", str(run), "--classes", "dgo"]) == 2
    assert "no class is named 'dgo': did you mean 'dog'?" in capsys.readouterr().err


def test_a_run_without_names_takes_numbers(run, capsys):
    (run / "classes.json").unlink()
    assert main(["sample", str(run), "--classes", "1", "--num", "1"]) == 0
    assert main(["sample", str(run), "--classes", "dog"]) == 2
    assert "keeps no names of classes" in capsys.readouterr().err
    (run / "classes.json").write_text("{}")
    assert main(["sample", str(run), "--classes", "dog"]) == 2
    assert "classes.json is not a list of names" in capsys.readouterr().err


def test_a_number_is_a_number_also_where_a_class_is_named_so():
    with pytest.warns(UserWarning, match="class 1 is '2'; the class named '1' is 0"):
        assert class_labels(["1"], ["1", "2"], 2) == (1,)
    assert class_labels(["2"], ["1", "2"], 2) == (1,)
    with pytest.raises(ValueError, match="class 7 is not one of the model's 2 classes"):
        class_labels(["7"], ["1", "2"], 2)


def test_other_classes_are_announced(run, photos, tmp_path):
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "train" / "dog").rename(other / "train" / "cow")
    (run / "classes.json").write_text(json.dumps(["cat", "cow", "dog"]))
    config = load_config(run / "config.json")
    with pytest.warns(UserWarning, match="trained on other classes: 'cow' is now 'dog'"):
        train(dataclasses.replace(config, out=run), extend=4)


def test_tensorboard_names_the_columns(trained):
    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    (event,) = board.Tensors("samples/text_summary")
    assert event.tensor_proto.string_val == [b"columns: cat, dog, wild horse"]


# ---- sample, evaluate ----------------------------------------------------------------------


def test_what_was_drawn_and_scored_is_not_drawn_again(run, monkeypatch, capsys):
    flags = "--num 6 --bound-images 2 --bound-terms 2".split()
    for _ in range(2):
        assert main(["sample", str(run), "--num", "6"]) == 0
        assert main(["score", str(run), *flags]) == 0
        monkeypatch.setattr(Pipeline, "draw", lambda *_, **__: pytest.fail("drew again"))
        monkeypatch.setattr(
            "dis_ssm.metrics.run_scores.draw_images", lambda *_: pytest.fail("drew again")
        )
        printed = capsys.readouterr()
    assert "FD-pixels" in printed.out and "remove it to compute them again" in printed.err
    monkeypatch.undo()
    path = run / "samples" / printed.out.split()[0].rpartition("/")[2]
    content = path.read_bytes()
    path.write_bytes(b"")
    assert main(["sample", str(run), "--num", "6"]) == 0
    assert path.read_bytes() == content


def scores_of(capsys):
    return json.loads(open(capsys.readouterr().out.splitlines()[-1]).read())


def test_a_run_is_scored_by_an_extractor_and_against_a_reference(run, photos, tmp_path, capsys):
    drawing = "--num 5 --seed 3 --cfg-scale 2 --batch-size 4".split()
    assert main(["evaluate", str(run), "--extractor", "pixels", *drawing]) == 0
    own = scores_of(capsys)
    assert own["drawn"]["cfg_scale"] == 2 and own["reference"]["images"] == 6
    images = tmp_path / "set.npz"
    assert main(["sample", str(run), *drawing, "--out", str(images)]) == 0
    compared = ["--extractor", "pixels", "--split", "heldout", "--image-size", "8"]
    assert main(["evaluate", str(images), str(photos), *compared]) == 0
    assert scores_of(capsys)["scores"] == own["scores"]
    statistics = tmp_path / "reference.npz"
    compared = ["--extractor", "pixels", "--save-reference", str(statistics)]
    assert main(["evaluate", str(run), str(photos), *compared, *drawing]) == 0
    against_training = scores_of(capsys)["scores"]
    assert against_training != own["scores"]
    assert main(["evaluate", str(run), str(statistics), "--extractor", "pixels", *drawing]) == 0
    assert scores_of(capsys)["scores"].keys() == against_training.keys()


# ---- what a command needs is checked before it works ---------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sample", "{run}", "--cfg-channels", "1"], "cfg_channels has no effect while cfg_scale"),
        (["sample", "{run}", "--cfg-interval", "0", "9"], "cfg_interval has no effect while"),
        (["sample", "{run}", "--steps", "51"], "sample.steps 51 exceeds diffusion.num_steps 50"),
        (["score", "{run}", "--steps", "51"], "steps 51 exceeds"),
        (["evaluate", "{run}", "{photos}", "--steps", "51"], "steps 51 exceeds"),
        (["evaluate", "{run}", "/nonexistent"], "/nonexistent"),
        (["evaluate", "{run}", "--extractor", "dinov2"], "needs weights"),
        (
            ["evaluate", "{run}", "--extractor", "dinov2", "--weights", "/nonexistent"],
            "no file of weights at /nonexistent",
        ),
        (
            ["evaluate", "{run}", "{photos}", "--save-reference", "/nonexistent/x.npz"],
            "cannot write /nonexistent/x.npz: there is no such folder",
        ),
    ],
)
def test_refusals_come_first_and_leave_nothing_behind(
    run, photos, capsys, monkeypatch, arguments, words
):
    for name in ("samples", "scores"):
        shutil.rmtree(run / name, ignore_errors=True)
    monkeypatch.setattr(Pipeline, "draw", lambda *_, **__: pytest.fail("drew"))
    before = sorted(run.rglob("*"))
    assert main([argument.format(run=run, photos=photos) for argument in arguments]) == 2
    assert words in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("command", ["train", "sample", "score"])
def test_a_backend_that_does_not_exist_is_refused_first(
    run, tmp_path, capsys, monkeypatch, command
):
    from dis_ssm.ops import dispatch as backend

    for name in ("samples", "scores"):
        shutil.rmtree(run / name, ignore_errors=True)
    monkeypatch.setattr(backend, "_forced", lambda: "tpu")
    before = sorted(tmp_path.rglob("*"))
    places = {"train": ["digits", "--out", str(tmp_path / "new")]}
    assert main([command, *places.get(command, [str(run)])]) == 2
    assert "DIS_SSM_BACKEND=tpu cannot run: unknown" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--score.reference", "/nonexistent", "--score.extractor", "pixels"],
            "(score.reference): ",
        ),
        (["--score.weights", "/nonexistent"], "no file of weights at /nonexistent"),
    ],
)
def test_scores_that_could_not_be_made_are_refused_before_training(tmp_path, capsys, flags, words):
    out = tmp_path / "run"
    scoring = ["--score.every", "1", *flags]
    assert main(["train", "digits", "--out", str(out), *scoring]) == 2
    assert words in capsys.readouterr().err and not out.exists()


def test_settings_of_scores_that_are_never_made_are_named(photos, tmp_path, capsys):
    flags = ["--data.source", str(photos), "--train.steps", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *TINY, *flags, "--score.num", "20"]) == 0
    assert "no scores: score.every is 0" in capsys.readouterr().out
    assert main(["train", *TINY, *flags[:-1], str(tmp_path / "other")]) == 0
    assert "no scores" not in capsys.readouterr().out


def test_missing_weights_and_biases_leave_no_folder(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "digits", "--out", str(tmp_path / "x"), "--train.wandb", "a"]) == 2
    assert "pip install '.[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ---- flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["train", "digits", "--train.learning-rate", "1"], "--train.lr"),
        (["train", "digits", "--learning_rate=1"], "--train.lr"),
        (["train", "digits", "--batch-size", "1"], "--train.batch-size or --sample.batch-size"),
        (["train", "digits", "--train.lrr", "1"], "--train.lr"),
        (["train", "digits", "--dryrun"], "--dry-run"),
        (["sample", "x", "--guidance", "2"], "--cfg-scale"),
        (["evaluate", "x", "--save-refrence", "x"], "--save-reference"),
    ],
)
def test_unknown_flags_are_told_the_near_ones(arguments, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"did you mean {meant}?" in error.replace("'", "")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["encode", "--verify", "x"], "--verify: that is a command of its own, dis-ssm check"),
        (["evaluate", "--run", "x"], "--run: that is a command of its own, dis-ssm score"),
        (["evaluate", "x", "--keep"], "--keep: that is a flag of dis-ssm score"),
        (["check", "x", "--vae", "y"], "--vae: that is a flag of dis-ssm sample, evaluate, encode"),
    ],
)
def test_flags_of_other_commands_are_said_to_be_theirs(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
