import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dis_ssm.data.datasets import TensorDataset
from dis_ssm.data.open import open_dataset
from dis_ssm.metrics import evaluate_samples, format_report, frechet_of_features
from dis_ssm.metrics.extractors import Extractor
from dis_ssm.metrics.manifold import Manifold, precision_recall, squared_distances
from dis_ssm.metrics.statistics import (
    GROUPS,
    HALVES,
    SetStatistics,
    StoredStatistics,
    groups_of,
    halves_error,
)
from dis_ssm.system.distributed import World
from dis_ssm.system.extras import require

ALONE = World(torch.device("cpu"))


class Toy(nn.Module):
    """Features that are cheap, fixed and not Gaussian."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(24, 3, 4, 4, generator=generator))
        self.logits = nn.Parameter(torch.randn(12, 24, generator=generator))

    def forward(self, images):
        x = torch.conv2d(images.float() / 255, self.weight, stride=2).relu()
        pool = x.mean((2, 3))
        spatial = nn.functional.adaptive_avg_pool2d(x[:, :2], 3)  # of 8 x 8 images all of it
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.logits.T}


def toy(**protocol):
    return Extractor("toy", Toy(), {"weights": None, "resize": None} | protocol)


def pictures(n, seed, low=0):
    """Smooth-ish colour images, of 8 x 8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(low, 256, (n, 3, 4, 4), generator=generator)
    images = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).to(torch.uint8)
    return TensorDataset(f"pictures-{seed}", images, [-1] * n)


def values(report):
    return {name: found["value"] for name, found in report["scores"].items()}


def test_equal_to_torch_fidelity():
    """Its own FID, Inception score (unshuffled), precision and recall on the same features."""
    require("torch_fidelity")
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.toy = Toy()

        def forward(self, x):
            features = self.toy(x)
            return tuple(features[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list():
            return "pool", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "pool"

        @staticmethod
        def can_be_compiled():
            return False

    torch_fidelity.register_feature_extractor("toy", Registered)
    made, real = pictures(607, 1, low=40), pictures(450, 2)
    theirs = torch_fidelity.calculate_metrics(
        input1=Plain(made.images),
        input2=Plain(real.images),
        feature_extractor="toy",
        isc=True,
        fid=True,
        prc=True,
        samples_shuffle=False,
        cuda=False,
        cache=False,
        verbose=False,
    )
    report = evaluate_samples(made, real, extractor=toy(), world=ALONE)
    ours = values(report)
    for name, key in (
        ("fd_toy", "frechet_inception_distance"),
        ("inception_score", "inception_score_mean"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert math.isclose(ours[name], theirs[key], rel_tol=1e-6), (name, ours, theirs)
    spread = report["scores"]["inception_score"]["std_over_splits"]
    assert math.isclose(spread, theirs["inception_score_std"], rel_tol=1e-6)
    assert 0.1 < ours["recall"] < 0.95 and 0.1 < ours["precision"] < 1


class Plain(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def test_frechet_scores_are_those_of_all_features():
    made, real = pictures(300, 1, low=40), pictures(200, 2)
    ours = values(evaluate_samples(made, real, extractor=toy(), world=ALONE, batch_size=7))
    with torch.no_grad():
        f1, f2 = Toy()(made.images), Toy()(real.images)
    assert math.isclose(ours["fd_toy"], frechet_of_features(f1["pool"], f2["pool"]), rel_tol=1e-6)
    spatial = (f["spatial"].flatten(1) for f in (f1, f2))
    assert math.isclose(ours["sfid"], frechet_of_features(*spatial), rel_tol=1e-6)


def test_digits_do_not_depend_on_batches_or_order_of_arrival():
    """A network without rounding of its own: batches of 5 and of 64 give the same bits."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(5000, 6, generator=generator)
    logits = torch.randn(5000, 9, generator=generator)
    found = []
    for size in (5, 64, 5000):
        statistics = SetStatistics(5000, 10)
        for part in torch.arange(5000).split(size):
            statistics.update({"pool": features[part], "logits": logits[part]})
        gaussian = statistics.gaussian("pool")
        found.append(
            (gaussian.mean, gaussian.cov, *map(torch.tensor, statistics.inception_score()))
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert torch.allclose(found[0][0], features.double().mean(0), atol=1e-14)
    np.testing.assert_allclose(found[0][1], np.cov(features.double().numpy().T), atol=1e-12)


def test_inception_score_in_file_order():
    """10 splits, each of two classes: 2. Shuffled it would be about 20, constant it is 1."""
    n, classes = 400, 20
    labels = torch.arange(n) // 40 * 2 + torch.arange(n) % 2
    sure = 100.0 * nn.functional.one_hot(labels, classes)

    def score(logits, splits=10):
        statistics = SetStatistics(len(logits), splits)
        statistics.update({"pool": logits, "logits": logits})
        return statistics.inception_score()

    mean, spread = score(sure)
    assert math.isclose(mean, 2, rel_tol=1e-12) and spread < 1e-12
    assert math.isclose(score(sure, 1)[0], classes, rel_tol=1e-12)
    assert math.isclose(score(torch.zeros(n, classes))[0], 1, rel_tol=1e-12)
    assert score(sure[:9]) is None
    uneven = torch.zeros(12, 4)  # splits 0 .. 5 and 6 .. 11: scores 2 and 1
    uneven[:6] = 100.0 * nn.functional.one_hot(torch.arange(6) % 2, 4)
    assert np.allclose(score(uneven, 2), (1.5, 0.5))


def adm_precision_recall(reference, samples, k=3):
    """ADM's definition, point by point."""

    def squared(u, v):
        return ((u[:, None] - v[None]) ** 2).sum(2)

    def radii(x):
        return np.partition(squared(x, x), k, axis=1)[:, k]

    between = squared(reference, samples)
    inside = between <= radii(reference)[:, None]
    covered = between <= radii(samples)[None]
    return inside.any(0).mean(), covered.any(1).mean()


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k, monkeypatch):
    """On a small grid of integers, where points lie exactly on surfaces and on one another."""
    monkeypatch.setattr("dis_ssm.metrics.manifold.ROWS", 16)
    monkeypatch.setattr("dis_ssm.metrics.manifold.COLUMNS", 10)
    rng = np.random.default_rng(0)
    seen = set()
    for width in (2, 4, 30):
        reference = rng.integers(0, width, (57, 2)).astype(np.float32)
        samples = rng.integers(0, 2 * width, (83, 2)).astype(np.float32)
        made, real = (Manifold(torch.from_numpy(x), k, ALONE) for x in (samples, reference))
        got = precision_recall(real, made, ALONE)
        assert got == adm_precision_recall(reference, samples, k)
        seen.add(got)
    assert len(seen) > 1


def test_precision_and_recall_of_collapse():
    """Far from the origin, where |u|^2 - 2 u v + |v|^2 cancels: copies of one real image."""
    generator = torch.Generator().manual_seed(1)
    reference = 1e3 + torch.randn(50, 8, generator=generator)
    copies = reference[:1].repeat(20, 1)
    real, made = Manifold(reference, 3, ALONE), Manifold(copies, 3, ALONE)
    assert precision_recall(real, made, ALONE) == (1.0, 1 / 50)
    assert precision_recall(real, real, ALONE) == (1.0, 1.0)
    far = Manifold(reference + 100, 3, ALONE)
    assert precision_recall(real, far, ALONE) == (0.0, 0.0)
    wide = 1e3 * torch.rand(40, 300, generator=generator)
    assert not squared_distances(wide, wide).diagonal().any()
    exact = ((reference[:, None].double() - reference[None].double()) ** 2).sum(2)
    assert torch.allclose(squared_distances(reference, reference), exact, atol=1e-8)
    with pytest.raises(ValueError, match="3 images: a radius to neighbour 3"):
        Manifold(reference[:3], 3, ALONE)


def test_halves_are_balanced():
    signs = np.array([[1 if g in pair[0] else -1 for g in range(GROUPS)] for pair in HALVES])
    assert np.array_equal(signs @ signs.T, GROUPS * np.eye(7)) and not signs.sum(1).any()
    counts = torch.bincount(groups_of(803))
    assert counts.max() - counts.min() <= 1 and len(counts) == GROUPS
    means = np.random.default_rng(0).normal(size=GROUPS)
    pairs = [tuple(np.mean([means[g] for g in half]) for half in pair) for pair in HALVES]
    assert math.isclose(halves_error(pairs), means.std(ddof=1) / math.sqrt(GROUPS))


def test_standard_errors_are_the_spread_over_sample_sets():
    """60 sets of 400 samples: the errors reported are the spread that is seen."""
    rng = np.random.default_rng(0)
    aim = None
    found, errors = [], []
    for _ in range(60):
        features = torch.from_numpy(rng.normal(0.2, 1.3, (400, 6)))
        statistics = SetStatistics(400, 1)
        statistics.update({"pool": features})
        if aim is None:
            aim = type(statistics.gaussian("pool"))(torch.zeros(6), torch.eye(6))
        found.append(statistics.gaussian("pool").distance(aim))
        pairs = [tuple(statistics.gaussian("pool", h).distance(aim) for h in p) for p in HALVES]
        errors.append(halves_error(pairs))
    assert 0.7 < np.sqrt(np.mean(np.square(errors))) / np.std(found) < 1.4


def adm_file(path, dataset, images=None, **more):
    """What ADM publishes, made without our code."""
    with torch.no_grad():
        features = Toy()(dataset.images)
    pool, spatial = (features[k].flatten(1).double().numpy() for k in ("pool", "spatial"))
    arrays = {"mu": pool.mean(0), "sigma": np.cov(pool, rowvar=False)}
    arrays |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)} | more
    if images is not None:
        arrays["arr_0"] = images.permute(0, 2, 3, 1).numpy()
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_adms_reference_files(tmp_path):
    made, real = pictures(200, 1, low=40), pictures(300, 2)
    computed = evaluate_samples(made, real, extractor=toy(), world=ALONE)
    whole = adm_file(tmp_path / "whole.npz", real, real.images)
    read = evaluate_samples(made, whole, extractor=toy(), world=ALONE)
    assert values(read) == pytest.approx(values(computed), rel=1e-6)
    assert read["reference"]["statistics"] == "read" and read["reference"]["protocol"] is None
    assert any("does not say which extractor" in w for w in read["warnings"])

    bare = adm_file(tmp_path / "bare.npz", real, mu_s=None, sigma_s=None)
    read = evaluate_samples(made, bare, extractor=toy(), world=ALONE)
    assert set(read["scores"]) == {"fd_toy", "inception_score"}
    assert "(arr_0)" in read["unavailable"]["precision"] == read["unavailable"]["recall"]
    assert "lacks mu_s, sigma_s" in read["unavailable"]["sfid"]
    text = format_report(read)
    assert "precision" in text and "not available:" in text and "images not counted" in text


def test_saved_statistics_give_the_same_digits(tmp_path):
    made, real = pictures(200, 1, low=40), pictures(300, 2)
    path = tmp_path / "made" / "reference.npz"
    options = {"world": ALONE, "reference_images": 120}
    first = evaluate_samples(made, real, extractor=toy(), save_reference=path, **options)
    again = evaluate_samples(made, path, extractor=toy(), **options)
    assert again["scores"] == first["scores"]
    assert first["settings"]["precision_recall_references"] == 120
    assert again["settings"]["precision_recall_references"] == 120
    assert not any("was made with another" in w for w in again["warnings"])
    with np.load(path, allow_pickle=False) as file:  # what ADM's evaluator looks for
        assert file["arr_0"].shape == (120, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        assert file["mu"].shape == (24,) and file["sigma_s"].shape == (18, 18)
        assert json.loads(str(file["protocol"]))["images"] == 300

    other = evaluate_samples(made, path, extractor=toy(resize="64"), **options)
    assert any("another resize: None, here 64" in w for w in other["warnings"])
    renamed = Extractor("other", Toy(), {"weights": None, "resize": None})
    with pytest.raises(ValueError, match="statistics of 'toy' features"):
        evaluate_samples(made, path, extractor=renamed, **options)
    with pytest.raises(ValueError, match="already holds statistics"):
        evaluate_samples(made, path, extractor=toy(), save_reference=tmp_path / "x.npz", **options)


def test_statistics_that_cannot_be_used(tmp_path):
    made, real = pictures(40, 1), pictures(40, 2)
    whole = adm_file(tmp_path / "whole.npz", real).read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    for name, more, message in (
        ("object", {"mu": np.array([None] * 24, dtype=object)}, "Object arrays cannot be loaded"),
        ("half", {"sigma": None}, "lacks sigma"),
        ("half_s", {"sigma_s": None}, "lacks sigma_s"),
        ("ints", {"mu": np.zeros(24, int)}, "not floats"),
        ("shape", {"sigma": np.eye(23)}, r"got \(24,\) and \(23, 23\)"),
        ("small", {"mu": np.zeros(5), "sigma": np.eye(5)}, "24 and 5 'pool' features"),
        ("odd", {"protocol": np.array("[1")}, "cannot read the statistics"),
        ("short", None, "cut short"),
    ):
        path = tmp_path / f"{name}.npz"
        if more is not None:
            adm_file(path, real, **more)
        with pytest.raises(ValueError, match=message):
            evaluate_samples(made, path, extractor=toy(), world=ALONE)
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        StoredStatistics({}).save(tmp_path / "statistics.npy")


def test_statistics_of_other_widths_and_damaged_ones(tmp_path):
    mean, cov = np.arange(3.0), np.eye(3)
    for i, dtype in enumerate((np.float32, np.longdouble, ">f8")):
        np.savez(tmp_path / f"{i}.npz", mu=mean.astype(dtype), sigma=cov.astype(dtype))
        found = StoredStatistics.load(tmp_path / f"{i}.npz").gaussians["pool"]
        assert found.mean.dtype == torch.float64 and found.mean.tolist() == [0, 1, 2]
    np.savez_compressed(tmp_path / "c.npz", mu=mean, sigma=np.random.default_rng(0).random((3, 3)))
    raw = bytearray((tmp_path / "c.npz").read_bytes())
    start = raw.index(b"mu.npy") + len("mu.npy")
    raw[start : start + 40] = bytes(40)
    (tmp_path / "c.npz").write_bytes(raw)
    with pytest.raises(ValueError, match="cannot read the statistics"):
        StoredStatistics.load(tmp_path / "c.npz")


def test_requests_that_cannot_be_met(tmp_path):
    made, real = pictures(40, 1), pictures(40, 2)
    real.images, real.height, real.width = real.images[:, :, :2, :2], 2, 2
    for options, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"splits": 0}, "splits is 0"),
        ({"neighbours": -1}, "neighbours is -1"),
        ({"extractor": toy(), "resize": 3}, "belong to the extractor"),
        ({"extractor": Extractor("raw", lambda x: {"pool": x.flatten(1)}, {})}, "192 and 12"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_samples(made, real, **{"extractor": "pixels", "world": ALONE} | options)
    with pytest.raises(ValueError, match="has 1 image"):
        evaluate_samples(pictures(1, 1), real, extractor=toy(), world=ALONE)
    made, real = pictures(40, 1), pictures(40, 2)
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        evaluate_samples(made, real, extractor=toy(), save_reference=tmp_path / "a.txt")
    broken = Extractor("nan", lambda x: {"pool": x.float().flatten(1) / 0 * 0}, {})
    with pytest.raises(ValueError, match="not finite"):
        evaluate_samples(made, real, extractor=broken, world=ALONE)


def test_small_sets_say_what_they_lack():
    report = evaluate_samples(pictures(3, 1), pictures(3, 2), extractor=toy(), world=ALONE)
    assert report["scores"]["fd_toy"]["stderr"] is None
    assert "fewer samples than splits" in report["unavailable"]["inception_score"]
    assert report["unavailable"]["precision"] == "there are too few images"
    json.dumps(report, allow_nan=False)
    format_report(report)


def test_report_warns_of_what_changes_the_number():
    made, real = pictures(50, 1), open_dataset("digits", "heldout")
    wide = TensorDataset("wide", made.images.repeat(1, 1, 1, 2), made.labels)
    extractor = Extractor("inception", Toy(), {"weights": "0" * 64, "resize": "299"})
    report = evaluate_samples(wide, real, extractor=extractor, world=ALONE)
    for said in (
        "weights are not those of TensorFlow 2015 (SHA-256 00000000",
        "50 samples instead of 50,000",
        "samples are 8x16, reference images 8x8",
        "the reference has 602 images",
        "precision and recall use 602 reference images",
        "uses 10 splits; ADM's evaluator uses splits of 5,000",
    ):
        assert any(said in warning for warning in report["warnings"]), said
    text = format_report(report)
    lines = text.splitlines()
    assert lines[1].startswith("FID ") and f"{report['scores']['fid']['value']:.4f}" in lines[1]
    low, high = report["scores"]["fid"]["interval"]
    assert f"{low:.4f} .. {high:.4f}" in lines[1] and low < report["scores"]["fid"]["value"] < high
    assert "digits, 602 images of 8x8" in text and text.count("warning: ") == 6
    true = Extractor("inception", Toy(), {"weights": "6726825d", "resize": "299"})
    quiet = evaluate_samples(wide, real, extractor=true, world=ALONE, confidence=False)
    assert not any("TensorFlow 2015" in warning for warning in quiet["warnings"])
    assert quiet["settings"]["halves"] == 0 and quiet["scores"]["fid"]["stderr"] is None


TWO = """
import json, sys
sys.path.insert(0, {tests!r})
from dis_ssm.system.distributed import join_world
from dis_ssm.metrics import evaluate_samples
from test_metrics_evaluator import scored
with join_world("cpu") as world:
    report = scored(world)
    if world.rank == 1:
        json.dump(report, open({out!r}, "w"))
    try:
        evaluate_samples({bad!r}, {bad!r}, extractor="pixels", batch_size=2, world=world)
    except (ValueError, RuntimeError) as error:
        print(f"refused {{error}}\\n", end="")
"""


def scored(world):
    made, real = pictures(333, 1, low=40), pictures(250, 2)
    return evaluate_samples(made, real, extractor=toy(), batch_size=16, world=world)


def test_two_processes_give_the_digits_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = json.loads(json.dumps(scored(ALONE)))
    torch.set_num_threads(threads)

    bad, script, out = tmp_path / "bad", tmp_path / "two.py", tmp_path / "two.json"
    bad.mkdir()
    for i in range(9):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(bad / f"{i}.png")
    (bad / "5.png").write_bytes(b"no image")
    tests = str(Path(__file__).parent)
    script.write_text(TWO.format(tests=tests, out=str(out), bad=str(bad)))
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == done.stdout.count("5.png") == 2, done.stdout
    two = json.loads(out.read_text())
    assert two.pop("run")["processes"] == 2 and one.pop("run")["processes"] == 1
    assert one == two and len(one["scores"]) == 5
    assert all(found["stderr"] > 0 for found in one["scores"].values())
