"""The experiments, tiny and end to end: what they report must be what the runs scored."""

import dataclasses
import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from dis_ssm.build import build_diffusion, load_model
from dis_ssm.config import Config, load_config, to_dict
from dis_ssm.costs.operations import forward_flops
from dis_ssm.data.open import open_dataset
from dis_ssm.data.order import epoch_order
from dis_ssm.metrics import frechet_of_features, pixel_features
from dis_ssm.sampling.draw import draw_images

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
TINY = "--model.hidden-size 8 --model.depth 1 --train.steps 4 --train.save-every 2 --score.every 2"
TINY += " --score.num 12 --sample.steps 2 --seeds 2"


@pytest.fixture(scope="module")
def load():
    """Imports an experiment by name; its folder is on the path only meanwhile."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path[:] = before


@pytest.fixture(scope="module")
def study(load):
    return load("study")


def row(mean, error):
    return {"mean": [9.0, mean], "stderr": [9.0, error]}


def reals(split: str) -> torch.Tensor:
    dataset = open_dataset("digits", split)
    return dataset.batch(range(len(dataset)))[0]


def distance_to_heldout(images: torch.Tensor) -> float:
    features = (pixel_features(part) for part in (images, reals("heldout")))
    return frechet_of_features(*features)


def drawn_again(run: Path, num: int, labels=None) -> torch.Tensor:
    model, config = load_model(run)
    shape = (model.in_channels, *model.input_size)
    settings = dataclasses.replace(config.sample, num=num)
    return draw_images(
        model, build_diffusion(config.diffusion), shape, range(num), labels, settings
    )


def parsed(flags: str) -> Config:
    return tyro.cli(Config, default=load_config("imagenet256"), args=shlex.split(flags))


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def test_mean_and_standard_error(study):
    mean, error = study.mean_error([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and error == pytest.approx((7 / 9) ** 0.5)
    assert study.mean_error([5.0]) == (5.0, None)


def test_a_difference_counts_beyond_two_standard_errors(study):
    """√(0.3² + 0.4²) = 0.5, so the last distances must be more than 1 apart."""
    found = study.compare(row(2.0, 0.3), row(3.1, 0.4))
    assert found == {
        "gain": pytest.approx(1.1),
        "stderr": pytest.approx(0.5),
        "verdict": "repeats",
    }
    assert study.compare(row(3.1, 0.3), row(2.0, 0.4))["verdict"] == "does not"
    assert study.compare(row(2.0, 0.3), row(2.9, 0.4))["verdict"] == "undecided"
    assert study.compare(row(2.0, None), row(9.0, None))["verdict"] == "undecided"


@pytest.mark.parametrize(
    "finals, verdict",
    [
        ((3, 2, 1), "repeats"),
        ((3, 2, 2), "undecided"),
        ((3, 1, 2), "in part"),
        ((2, 2, 3), "does not"),
    ],
)
def test_a_finding_repeats_only_if_each_step_does(load, finals, verdict):
    ablations = load("ablations")
    names = ablations.ABLATIONS["depth"][1].values()
    rows = {name: row(mean, 0.1) for name, mean in zip(names, finals, strict=True)}
    found = ablations.finding("depth", rows)
    assert found["verdict"] == verdict
    said = {"repeats": "better repeats at", "does not": "better does not repeat at"}
    said |= {"in part": "better repeats in part at", "undecided": "better stays undecided at"}
    assert said[verdict] in found["sentence"]
    assert f"3 {finals[0]}.000 ± 0.100" in found["sentence"]
    if finals == (3, 1, 2):
        assert "5 is 2.000 ± 0.141 below 3, as in the paper" in found["sentence"]
        assert "9 is 1.000 ± 0.141 above 5, against the paper" in found["sentence"]


def test_listed_commands_make_the_same_configurations(study):
    config = study.change(
        load_config("imagenet256"),
        model={"name": None, "hidden_size": 40, "depth": 3, "patch_size": 4},
        data={"flip": False},
        train={"betas": (0.8, 0.95), "compile": True, "micro_batch_size": None},
        sample={"cfg_interval": (10.0, 500.0)},
    )
    line = study.command(config, "imagenet256", "torchrun --nproc-per-node 8 -m dis_ssm --")
    start = "torchrun --nproc-per-node 8 -m dis_ssm -- train imagenet256 "
    assert line.startswith(start)
    assert parsed(line.removeprefix(start)) == config


def test_the_scaling_figure_of_the_paper(load, capsys):
    """S to H at three patch sizes, a command each."""
    load("scaling").main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    models = [f"DiS-{size}/{patch}" for size in "SBMLH" for patch in (2, 4, 8)]
    models[-3] = ""  # DiS-H/2, which the configuration is
    assert [line.partition("--model.name ")[2] for line in lines] == models
    made = [parsed(line.removeprefix("dis-ssm train imagenet256 ")) for line in lines[::14]]
    assert [config.model.name for config in made] == ["DiS-S/2", "DiS-H/8"]
    assert [config.out.name for config in made] == ["S-2-0", "H-8-0"]
    assert {(config.train.steps, config.train.batch_size) for config in made} == {(500_000, 1024)}


def test_a_power_law_is_a_perfect_correlation(load):
    points = [{"gflops": 10.0**k, "mean": [0.0, 5 * 10.0 ** (-k / 2)]} for k in range(4)]
    assert load("scaling").correlation(points) == pytest.approx(-1)
    assert load("scaling").correlation(points[:2]) is None


@pytest.fixture(scope="module")
def ablated(load, tmp_path_factory):
    """Two variants, two seeds, killed within the third run and started again."""
    torch.set_num_threads(1)
    ablations, study = load("ablations"), load("study")
    folder = tmp_path_factory.mktemp("ablations")
    flags = [*TINY.split(), "--runs", str(folder / "runs")]
    flags += ["--results", str(folder / "results" / "ablations.json")]
    with pytest.MonkeyPatch.context() as patch:
        names = ("base", "skip-none")
        patch.setattr(ablations, "VARIANTS", {name: ablations.VARIANTS[name] for name in names})
        skip = ("beats", {"none": "skip-none", "concat": "base"}, [("concat", "none")])
        patch.setattr(ablations, "ABLATIONS", {"long skip": skip, "again": skip})
        started, train = [], study.train

        def killed(config):
            started.append(config.out.name)
            if len(started) == 3:
                raise KeyboardInterrupt
            return train(config)

        patch.setattr(study, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            ablations.main(flags)
        before = times(folder, "runs/*/checkpoints/*/COMPLETE")
        ablations.main(flags)
        again = times(folder, "runs/*/checkpoints/*/COMPLETE")
        first = ["base-0", "skip-none-0", "base-1"]  # all variants of a seed, then the next
        assert started == [*first, "base-1", "skip-none-1"]
        assert len(before) == 2 and before.items() <= again.items() and len(again) == 4
        yield ablations, folder, flags


def test_ablations_report_what_the_runs_scored(ablated):
    _, folder, _ = ablated
    report = json.loads((folder / "results" / "ablations.json").read_text())
    base, none = report["variants"]["base"], report["variants"]["skip-none"]
    assert base["steps"] == [2, 4] and base["runs"].keys() == {"0", "1"}
    for seed in ("0", "1"):
        images = drawn_again(folder / "runs" / f"base-{seed}", 12)
        assert base["runs"][seed][-1] == pytest.approx(distance_to_heldout(images), rel=1e-4)
    last = json.loads((folder / "runs" / "base-1" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and base["mse"]["1"] == last["mse"]
    first, second = base["runs"].values()
    assert first != second
    assert base["mean"] == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert base["stderr"][1] == pytest.approx(abs(first[1] - second[1]) / 2)
    model, config = load_model(folder / "runs" / "skip-none-0")
    assert none["parameters"] == sum(p.numel() for p in model.parameters())
    assert none["gflops"] == pytest.approx(sum(forward_flops(config).values()) / 1e9)
    chosen = epoch_order(1195, seed=0, epoch=0)[:12]
    assert report["floor"] == pytest.approx(distance_to_heldout(reals("train")[chosen]), rel=1e-4)
    assert report["commit"] and report["config"]["train"]["steps"] == 4
    written = (folder / "results" / "ablations.md").read_text()
    assert all(found["sentence"] in written for found in report["findings"])
    assert Image.open(folder / "results" / "ablations.png").size[0] > 1000


def test_scores_of_other_settings_are_refused(ablated):
    ablations, _, flags = ablated
    with pytest.raises(ValueError, match=r"training-000002.json was made with steps 2, not 3"):
        ablations.main([*flags, "--sample.steps", "3", "--collect"])
    with pytest.raises(ValueError, match="seeds is 0"):
        ablations.main([*flags, "--seeds", "0"])
    with pytest.raises(ValueError, match=r"score.every is 0"):
        ablations.main([*flags, "--score.every", "0"])


def test_a_run_is_another_when_a_setting_differs(study, ablated):
    run = ablated[1] / "runs" / "base-0"
    same = load_config(run / "config.json")
    assert study.is_that(run, same)
    others = [{"train": {"lr": 1e-3}}, {"sample": {"steps": 3}}, {"score": {"split": "train"}}]
    assert not any(study.is_that(run, study.change(same, **other)) for other in others)
    assert not study.is_that(run.parent, same)


def test_scaling_reuses_the_runs_that_are_there(load, ablated):
    _, folder, _ = ablated
    config = str(folder / "runs" / "base-0" / "config.json")
    flags = ["--models", "8x1", "16x1", "--patches", "4", "2", "--reuse", str(folder / "runs")]
    flags += ["--runs", str(folder / "scaling"), "--results", str(folder / "scaling.json")]
    load("scaling").main([config, *flags])
    made = {path.name for path in (folder / "scaling").iterdir()}
    assert made == {"8x1-4-0", "16x1-4-0", "16x1-2-0"}
    report = json.loads((folder / "scaling.json").read_text())
    ablation = json.loads((folder / "results" / "ablations.json").read_text())["variants"]["base"]
    points = {(p["model"], p["patch"]): p for p in report["points"]}
    assert points["8x1", 2]["runs"]["0"] == ablation["runs"]["0"]
    assert points["8x1", 2]["gflops"] == ablation["gflops"]
    assert points["8x1", 4]["gflops"] < points["8x1", 2]["gflops"] < points["16x1", 2]["gflops"]
    images = drawn_again(folder / "scaling" / "16x1-4-0", 12)
    assert points["16x1", 4]["mean"][-1] == pytest.approx(distance_to_heldout(images), rel=1e-4)
    assert Image.open(folder / "scaling.png").size[0] > 500
    before = times(folder, "scaling/*/checkpoints/*/COMPLETE")
    load("scaling").main([config, *flags, "--models", "8x1", "24x1", "--collect"])
    assert json.loads((folder / "scaling.json").read_text())["missing"] == ["24x1/4", "24x1/2"]
    assert times(folder, "scaling/*/checkpoints/*/COMPLETE") == before


def test_guidance_sweeps_sets_of_one_run(load, study, tmp_path):
    config = study.change(
        load_config("digits"),
        model={"hidden_size": 8, "depth": 1},
        train={"steps": 3, "warmup_steps": 0},
        sample={"every": 0, "steps": 2, "cfg_scale": 1.0},
    )
    config = dataclasses.replace(config, out=tmp_path / "run")
    study.train(config)
    results = tmp_path / "guidance.json"
    flags = [str(config.out), "--scales", "1", "4", "--num", "12", "--labels", "balanced"]
    flags += ["--extractor", "pixels", "--split", "heldout", "--real", "--results", str(results)]
    load("guidance").main(flags)
    report = json.loads(results.read_text())
    sets = [np.load(point["samples"])["arr_0"] for point in report["points"]]
    labels = torch.arange(12) % 10
    expected = drawn_again(config.out, 12, labels)
    assert np.array_equal(sets[0][..., 0], expected[:, 0].numpy())
    assert not np.array_equal(*sets)
    for images, point in zip(sets, report["points"], strict=True):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        assert point["scores"]["fd_pixels"]["value"] == pytest.approx(
            distance_to_heldout(images), rel=1e-4
        )
        assert {"precision", "recall"} <= point["scores"].keys()
    chosen = epoch_order(1195, seed=0, epoch=0)[:12]
    assert report["real"]["fd_pixels"]["value"] == pytest.approx(
        distance_to_heldout(reals("train")[chosen]), rel=1e-4
    )
    assert report["step"] == 3 and report["config"] == to_dict(load_model(config.out)[1])
    before = times(config.out, "guidance/step-*")
    load("guidance").main([*flags, "--scales", "1", "4", "2"])
    after = times(config.out, "guidance/step-*")
    assert before.items() <= after.items() and len(after) == len(before) * 3 // 2
    shutil.rmtree(config.out / "checkpoints")
    study.train(study.change(config, train={"seed": 1}))  # another model, at the same step
    load("guidance").main(flags)
    redrawn = [point["scores"]["fd_pixels"] for point in json.loads(results.read_text())["points"]]
    assert not any(p["scores"]["fd_pixels"] in redrawn for p in report["points"])
    load("guidance").main([*flags, "--scales", "1", "4", "2"])
    assert [p["scale"] for p in json.loads(results.read_text())["points"]] == [1, 4, 2]
    assert Image.open(tmp_path / "guidance.png").size[0] > 1000
