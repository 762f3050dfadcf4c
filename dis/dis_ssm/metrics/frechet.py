"""The Fréchet distance between Gaussians, and the streaming statistics it needs."""

from functools import cached_property

import torch


def frechet_distance(
    mu1: torch.Tensor, cov1: torch.Tensor, mu2: torch.Tensor, cov2: torch.Tensor
) -> float:
    """|mu1 - mu2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2)), in float64.

    The squared 2-Wasserstein distance between N(mu1, cov1) and N(mu2, cov2) (Dowson & Landau 1982;
    Heusel et al. 2017, eq. 6), in squared units of the features. With cov = S S^T from a symmetric
    eigendecomposition, (cov1 cov2)^(1/2) has the trace of (S1^T cov2 S1)^(1/2), the sum of the
    singular values of S1^T S2: real, and exact for covariances without full rank.

    Args:
        mu1: mean (d,).
        cov1: covariance (d, d), symmetric.
        mu2: mean (d,).
        cov2: covariance (d, d), symmetric.

    Raises:
        ValueError: other shapes, values that are not finite, or a covariance with a negative
            eigenvalue.
    """
    return Gaussian(mu1, cov1).distance(Gaussian(mu2, cov2))


class Gaussian:
    """N(mean (d,), cov (d, d)), factored once however often it is compared.

    Raises:
        ValueError: other shapes, or a mean that is not finite.
    """

    def __init__(self, mean: torch.Tensor, cov: torch.Tensor):
        self.mean, self.cov = (
            torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (mean, cov)
        )
        self.eps = torch.finfo(cov.dtype).eps if _is_float(cov) else torch.finfo(torch.float64).eps
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.cov.shape != (d, d):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.cov.shape)}"
            raise ValueError(f"need shapes (d,) and (d, d), got {shapes}")
        if not torch.isfinite(self.mean).all():
            raise ValueError("a mean holds non-finite values")

    @cached_property
    def factor(self) -> torch.Tensor:
        """S (d, rank) with cov = S S^T.

        Raises:
            ValueError: the covariance is not finite, or has a negative eigenvalue.
        """
        return _factor(self.cov, self.eps)

    def distance(self, other: "Gaussian") -> float:
        """The squared Fréchet distance to another Gaussian, see `frechet_distance`.

        Raises:
            ValueError: they differ in d, or one is no covariance.
        """
        if self.mean.shape != other.mean.shape:
            sizes = f"{len(self.mean)} and {len(other.mean)}"
            raise ValueError(f"need shapes (d,) and (d, d) with one d, got d = {sizes}")
        cross = torch.linalg.svdvals(self.factor.T @ other.factor).sum()
        squared = (self.mean - other.mean).square().sum()
        return max((squared + self.cov.trace() + other.cov.trace() - 2 * cross).item(), 0.0)


def _is_float(cov) -> bool:
    return isinstance(cov, torch.Tensor) and cov.is_floating_point()


def _factor(cov: torch.Tensor, eps: float) -> torch.Tensor:
    """S (d, rank) with cov = S S^T. Eigenvalues within rounding of zero are dropped: their square
    roots would be 1e-8, not 1e-16, of the largest. `eps` is that of the dtype which cov was stored
    in: a covariance of fewer images than features has eigenvalues below zero by its rounding."""
    if not torch.isfinite(cov).all():
        raise ValueError("the covariance holds non-finite values")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    rounding = values.abs().max() * len(values) * torch.finfo(cov.dtype).eps
    stored = values.abs().max() * len(values) * eps
    if values[0] < -max(1e3 * rounding, stored):
        raise ValueError(f"not a covariance: it has the eigenvalue {values[0].item():.3g}")
    kept = values > rounding
    return vectors[:, kept] * values[kept].sqrt()


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64 on the CPU.

    Keeps the count n, the mean (d,) and the scatter sum_i (f_i - mean)(f_i - mean)^T (d, d), joined
    by Chan, Golub & LeVeque's update, so that nothing cancels when the mean is large. Statistics of
    parts merge into those of the whole.
    """

    def __init__(self):
        self.n = 0
        self._mean = self._scatter = None

    def update(self, features: torch.Tensor) -> "FeatureStatistics":
        """Add features (n, d).

        Raises:
            ValueError: they are not finite, not 2-D, or of another d than those before.
        """
        features = torch.as_tensor(features).detach().cpu().to(torch.float64)
        if features.dim() != 2:
            raise ValueError(f"need features (n, d), got {tuple(features.shape)}")
        bad = len(features) - int(torch.isfinite(features).all(dim=1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(features)} feature vectors are not finite")
        if len(features):
            mean = features.mean(dim=0)
            centred = features - mean
            self._join(len(features), mean, centred.T @ centred)
        return self

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Add everything that `other` has seen."""
        if other.n:
            self._join(other.n, other._mean, other._scatter)
        return self

    def _join(self, n: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if self.n == 0:
            self.n, self._mean, self._scatter = n, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise ValueError(f"{len(mean)} features, but {len(self._mean)} before")
        total = self.n + n
        delta = mean - self._mean
        self._scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self._mean += delta * (n / total)
        self.n = total

    @property
    def mean(self) -> torch.Tensor:
        """The mean (d,).

        Raises:
            ValueError: there are no features yet.
        """
        if self.n == 0:
            raise ValueError("no features yet")
        return self._mean.clone()

    def cov(self, ddof: int = 1) -> torch.Tensor:
        """The covariance (d, d): scatter / (n - ddof).

        Raises:
            ValueError: n is not more than `ddof`.
        """
        if self.n <= ddof:
            raise ValueError(f"a covariance with ddof {ddof} needs more than {self.n} features")
        return self._scatter / (self.n - ddof)


def frechet_of_features(features1: torch.Tensor, features2: torch.Tensor) -> float:
    """`frechet_distance` between the Gaussians of two feature sets (n, d), ddof 1."""
    one, two = FeatureStatistics().update(features1), FeatureStatistics().update(features2)
    return frechet_distance(one.mean, one.cov(), two.mean, two.cov())
