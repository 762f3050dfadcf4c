import math

import numpy as np
import pytest
import torch

from dis_ssm.data.open import open_dataset
from dis_ssm.metrics import (
    FeatureStatistics,
    PixelClassifier,
    class_accuracy,
    frechet_distance,
    frechet_of_features,
    pixel_features,
)

float64 = torch.float64


def covariance(d, rank, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, rank, generator=generator, dtype=float64) * scale
    return factor @ factor.T / rank


def scipy_frechet(mu1, cov1, mu2, cov2):
    from scipy.linalg import sqrtm

    root = sqrtm((cov1 @ cov2).numpy())
    trace = np.trace(cov1.numpy() + cov2.numpy() - 2 * np.real(root))
    return float(((mu1 - mu2) ** 2).sum()) + float(trace)


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    """sum (m1 - m2)^2 + sum (s1 - s2)^2, rotated by a common orthogonal matrix."""
    generator = torch.Generator().manual_seed(0)
    m1, m2, s1, s2 = torch.randn(4, 12, generator=generator, dtype=float64)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=float64))
    expected = ((m1 - m2) ** 2).sum() + ((s1.abs() - s2.abs()) ** 2).sum()
    cov1, cov2 = (rotation @ torch.diag(s**2) @ rotation.T for s in (s1, s2))
    got = frechet_distance(rotation @ m1, cov1, rotation @ m2, cov2)
    assert math.isclose(got, expected, rel_tol=1e-12)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 1e-3), (1e4, 1e4)])
def test_frechet_agrees_with_scipy(scales):
    d = 20
    mu1, mu2 = torch.randn(2, d, generator=torch.Generator().manual_seed(1), dtype=float64)
    cov1, cov2 = covariance(d, 3 * d, 2, scales[0]), covariance(d, 2 * d, 3, scales[1])
    expected = scipy_frechet(mu1, cov1, mu2, cov2)
    assert math.isclose(frechet_distance(mu1, cov1, mu2, cov2), expected, rel_tol=1e-9)
    swapped = frechet_distance(mu2, cov2, mu1, cov1)
    assert math.isclose(swapped, expected, rel_tol=1e-9)


@pytest.mark.parametrize("rank1, rank2", [(5, 30), (30, 5), (5, 7), (0, 30), (0, 0), (1, 1)])
def test_frechet_without_full_rank(rank1, rank2):
    """With cov = F F^T of the known factors, tr sqrt(cov1 cov2) is the nuclear norm of F1^T F2."""
    from scipy.linalg import eigvals

    d = 30
    generator = torch.Generator().manual_seed(4)
    f1 = torch.randn(d, rank1, generator=generator, dtype=float64)
    f2 = torch.randn(d, rank2, generator=generator, dtype=float64)
    cov1, cov2 = f1 @ f1.T, f2 @ f2.T
    nuclear = np.linalg.svd((f1.T @ f2).numpy(), compute_uv=False).sum() if rank1 * rank2 else 0.0
    expected = (cov1.trace() + cov2.trace()).item() - 2 * nuclear
    zero = torch.zeros(d, dtype=float64)
    got = frechet_distance(zero, cov1, zero, cov2)
    assert math.isclose(got, expected, rel_tol=1e-10, abs_tol=1e-10)
    # scipy's eigenvalues of the product carry rounding of 1e-16, hence roots of 1e-8
    roots = np.sqrt(np.maximum(eigvals((cov1 @ cov2).numpy()).real, 0)).sum()
    by_scipy = (cov1.trace() + cov2.trace()).item() - 2 * roots
    assert math.isclose(got, by_scipy, rel_tol=1e-5, abs_tol=1e-4)


def test_frechet_to_itself_is_zero_to_rounding():
    for rank in (4, 64, 200):
        cov, mu = covariance(64, rank, 5), torch.ones(64, dtype=float64)
        assert frechet_distance(mu, cov, mu, cov) <= 1e-12 * cov.trace()


def test_frechet_rejects():
    mu, eye = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match="need shapes"):
        frechet_distance(mu, eye, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(mu, eye, mu, -eye)
    with pytest.raises(ValueError, match="covariance holds non-finite"):
        frechet_distance(mu, eye, mu, eye * float("nan"))
    with pytest.raises(ValueError, match="mean holds non-finite"):
        frechet_distance(mu * float("inf"), eye, mu, eye)


def test_streaming_statistics_equal_numpy_in_one_pass():
    features = np.random.default_rng(0).normal(1e6, 1.0, (501, 7))  # a mean that cancels badly
    whole = FeatureStatistics()
    for batch in np.array_split(features, [1, 4, 4, 300]):
        whole.update(torch.from_numpy(batch))
    left, right = FeatureStatistics(), FeatureStatistics()
    left.update(torch.from_numpy(features[:200]))
    right.update(torch.from_numpy(features[200:]))
    frozen = right.mean.clone()
    for statistics in (whole, left.merge(right), FeatureStatistics().merge(left)):
        assert statistics.n == 501
        np.testing.assert_allclose(statistics.mean.numpy(), features.mean(0), rtol=1e-14)
        centred = features - features.mean(0)
        for ddof in (0, 1):
            expected = centred.T @ centred / (501 - ddof)
            np.testing.assert_allclose(statistics.cov(ddof).numpy(), expected, atol=1e-8)
    FeatureStatistics().merge(right).update(torch.zeros(50, 7))
    assert torch.equal(right.mean, frozen) and right.n == 301


def test_float32_features_are_accumulated_in_float64():
    features = torch.full((10, 2), 0.1) + torch.arange(10)[:, None] * 1e-3
    expected = np.cov(features.double().numpy().T)
    got = FeatureStatistics().update(features[:3]).update(features[3:]).cov()
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_statistics_reject():
    statistics = FeatureStatistics()
    with pytest.raises(ValueError, match="no features yet"):
        _ = statistics.mean
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="needs more than 1"):
        statistics.cov()
    with pytest.raises(ValueError, match="4 features, but 3"):
        statistics.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="1 of 2 feature vectors are not finite"):
        statistics.update(torch.tensor([[0, 0, 0], [0, float("nan"), 0]]))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        statistics.update(torch.zeros(3))
    assert statistics.n == 1


def test_pixel_features_are_block_means():
    images = torch.arange(2 * 1 * 16 * 16).reshape(2, 1, 16, 16).remainder(256).to(torch.uint8)
    features = pixel_features(images)
    blocks = images.double().reshape(2, 1, 8, 2, 8, 2).mean((3, 5)).flatten(1) / 255
    assert features.dtype == float64 and torch.allclose(features, blocks, rtol=0, atol=1e-15)
    small = images[:, :, :5, :7]
    assert torch.equal(pixel_features(small), small.double().flatten(1) / 255)
    with pytest.raises(ValueError, match="need uint8"):
        pixel_features(images.float())


def test_distance_of_shifted_images_is_the_shift():
    """Equal covariances and means one grey level apart: 64 features, each off by 1/255."""
    images = torch.randint(0, 255, (300, 1, 8, 8), generator=torch.Generator().manual_seed(6))
    one, two = images.to(torch.uint8), (images + 1).to(torch.uint8)
    for channels in (1, 3):  # a grey image stored either way
        pair = (pixel_features(images.expand(-1, channels, -1, -1)) for images in (one, two))
        assert math.isclose(frechet_of_features(*pair), 64 / 255**2, rel_tol=1e-8)


def test_class_accuracy_on_digits():
    train, heldout = open_dataset("digits"), open_dataset("digits", "heldout")
    images, labels = train.images[:400], train.labels[:400]
    wrong = labels.clone()
    wrong[:100] = (wrong[:100] + 1) % 10
    args = (heldout.images, heldout.labels, train.images, train.labels)
    right = class_accuracy(images, labels, *args)
    spoiled = class_accuracy(images, wrong, *args)
    hits = PixelClassifier(*args[:2]).correct(images, labels)
    assert right["real"] == spoiled["real"] > 0.98
    assert math.isclose(right["samples"], hits.double().mean())
    assert math.isclose(spoiled["samples"], hits[100:].sum() / 400, abs_tol=0.01)
    of_three = hits[labels == 3].double().mean()
    assert sorted(right["by_class"]) == list(range(10))
    assert math.isclose(right["by_class"][3], of_three)
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(7))
    assert class_accuracy(noise.to(torch.uint8), labels, *args)["samples"] < 0.3


def test_classifier_rejects():
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got 3 and 4"):
        PixelClassifier(images, torch.zeros(3))
    with pytest.raises(ValueError, match=r"2 classes or more, got \[0\]"):
        PixelClassifier(images, torch.zeros(4, dtype=torch.int64))
