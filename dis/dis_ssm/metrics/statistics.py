"""Statistics of one pass over a set of images: Gaussians of its features, sums of its class
probabilities, and a file of them.

Images fall at random, but always the same way, into 8 groups of equal size, and every sum is kept
by group: any union of groups has statistics of its own, without a second pass. Halves made of 4
groups give the standard errors.
"""

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dis_ssm.data.order import epoch_order
from dis_ssm.metrics.frechet import FeatureStatistics, Gaussian
from dis_ssm.metrics.readers import ADM_IMAGES, npz_keys, open_npy
from dis_ssm.system.files import drafted
from dis_ssm.system.reading import parse_json, parsing

GROUPS = 8
BLOCK = 512  # feature vectors that enter a covariance together
ADM_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
PROTOCOL = "protocol"  # JSON; ADM's own files lack it
ALL = tuple(range(GROUPS))
# The 7 ways to halve 8 groups that are orthogonal as signs (a Hadamard matrix without its row 1)
HALVES = tuple(
    tuple(tuple(g for g in ALL if (g & row).bit_count() % 2 == side) for side in (0, 1))
    for row in range(1, GROUPS)
)
T_95 = 2.3646  # Student's t, 7 degrees of freedom, two-sided 95 %


def groups_of(n: int) -> Tensor:
    """The group of each of n images, int64 (n,)."""
    return epoch_order(n, seed=0, epoch=0) % GROUPS


def halves_error(pairs: list[tuple[float, float]]) -> float:
    """Standard error of a score of all images, from its values on complementary halves.

    sqrt(mean_r ((a_r - b_r) / 2)^2): balanced half-samples (McCarthy 1969). For a mean over images
    and the 7 `HALVES` this is the standard error from the means of the 8 groups.
    """
    return math.sqrt(sum(((a - b) / 2) ** 2 for a, b in pairs) / len(pairs))


class SetStatistics:
    """Statistics of n images whose features arrive in order, in batches of any size.

    Which digits come out depends on the features and on their order alone: vectors enter the
    float64 sums in blocks that have nothing to do with the batches.
    """

    def __init__(self, n: int, splits: int):
        self.n, self.splits, self.seen = n, splits, 0
        self.groups = groups_of(n)
        cuts = torch.tensor([n * s // splits for s in range(1, splits)])
        self._split = torch.bucketize(torch.arange(n), cuts, right=True)
        self._moments: dict[str, list[FeatureStatistics]] = {}
        self._waiting: dict[str, list[Tensor]] = {}
        self._counts = torch.bincount(self._cell(slice(None)), minlength=splits * GROUPS)
        self._sums = self._entropy = None

    def update(self, features: dict[str, Tensor]) -> None:
        """Add the features of the next images: (n, d) by name; "logits" go to the class sums."""
        n = len(next(iter(features.values())))
        where = slice(self.seen, self.seen + n)
        self.seen += n
        for name, values in features.items():
            if name == "logits":
                self._add_logits(values, self._cell(where))
            else:
                self._add_features(name, values, self.groups[where])

    def finish(self) -> None:
        """Take in the vectors that still wait for a full block. The pass must be over."""
        assert self.seen == self.n, f"{self.seen} of {self.n} images seen"
        for name, waiting in self._waiting.items():
            for g in ALL:
                self._moments[name][g].update(waiting[g])
                waiting[g] = waiting[g][:0]

    def gaussian(self, name: str, groups: tuple[int, ...] = ALL) -> Gaussian:
        """Mean and covariance (ddof 1, as ADM's np.cov) of the images in `groups`."""
        self.finish()
        whole = FeatureStatistics()
        for g in groups:
            whole.merge(self._moments[name][g])
        return Gaussian(whole.mean, whole.cov())

    @property
    def names(self) -> tuple[str, ...]:
        """Of the features that have arrived, logits not among them."""
        return tuple(self._moments)

    @property
    def has_logits(self) -> bool:
        """Whether logits have arrived, which the Inception score needs."""
        return self._sums is not None

    def inception_score(self, groups: tuple[int, ...] = ALL) -> tuple[float, float] | None:
        """exp(mean_i KL(p_i || mean_j p_j)) (Salimans et al. 2016) of the images in `groups`.

        Returns:
            Mean and standard deviation over splits, in file order; None when a split is empty.
        """
        shape = (self.splits, GROUPS)
        chosen = torch.tensor(groups)
        counts = self._counts.view(shape)[:, chosen].sum(1).double()
        if self._sums is None or not counts.all():
            return None
        mean = self._sums.unflatten(0, shape)[:, chosen].sum(1) / counts[:, None]
        negative_entropy = self._entropy.view(shape)[:, chosen].sum(1) / counts
        scores = (negative_entropy - torch.xlogy(mean, mean).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()

    def _cell(self, where: slice) -> Tensor:
        return self._split[where] * GROUPS + self.groups[where]

    def _add_features(self, name: str, values: Tensor, groups: Tensor) -> None:
        if name not in self._moments:
            self._moments[name] = [FeatureStatistics() for _ in ALL]
            self._waiting[name] = [values[:0] for _ in ALL]
        for g in ALL:
            waiting = torch.cat([self._waiting[name][g], values[groups == g]])
            while len(waiting) >= BLOCK:
                self._moments[name][g].update(waiting[:BLOCK])
                waiting = waiting[BLOCK:].clone()
            self._waiting[name][g] = waiting

    def _add_logits(self, logits: Tensor, cells: Tensor) -> None:
        if self._sums is None:
            self._sums = torch.zeros(len(self._counts), logits.shape[1], dtype=torch.float64)
            self._entropy = torch.zeros(len(self._counts), dtype=torch.float64)
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        for i, cell in enumerate(cells.tolist()):  # one at a time: batches must not show
            self._sums[cell] += p[i]
            self._entropy[cell] += (p[i] * log_p[i]).sum()


@dataclass
class StoredStatistics:
    """Gaussians as in ADM's reference files: mu, sigma (pool), mu_s, sigma_s (spatial).

    `protocol` is None for files that others wrote: they do not say how they were made.
    """

    gaussians: dict[str, Gaussian]
    protocol: dict[str, Any] | None = None
    has_images: bool = False
    source: str = ""

    def save(self, path: Path, images: np.ndarray | None = None) -> None:
        """Write `path` (.npz), which ADM's evaluator reads too; images are uint8 (n, H, W, 3).

        Raises:
            ValueError: `path` does not end in .npz.
            OSError: it cannot be written.
        """
        arrays = {}
        for name, gaussian in self.gaussians.items():
            mu, sigma = ADM_KEYS[name]
            arrays |= {mu: gaussian.mean.numpy(), sigma: gaussian.cov.numpy()}
        if self.protocol is not None:
            arrays[PROTOCOL] = np.array(json.dumps(self.protocol))
        if images is not None:
            arrays[ADM_IMAGES] = images
        if path.suffix != ".npz":
            raise ValueError(f"cannot write statistics to {path}: give a name that ends in .npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with drafted(path) as draft:
            np.savez(draft, **arrays)

    @classmethod
    def load(cls, path: Path) -> "StoredStatistics":
        """Read the statistics of an .npz, ours or ADM's.

        Raises:
            ValueError: a damaged file, pickled objects, wrong shapes, or missing arrays.
        """
        gaussians, keys = {}, npz_keys(path)
        with parsing(f"cannot read the statistics of {path}"), zipfile.ZipFile(path) as archive:
            for name, (mu, sigma) in ADM_KEYS.items():
                if lacking := {mu, sigma} - keys:
                    if name == "pool" or len(lacking) == 1:
                        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
                    continue
                mean, cov = (_read_array(archive, key) for key in (mu, sigma))
                if mean.dtype.kind != "f" or cov.dtype.kind != "f":
                    raise ValueError(f"{mu}, {sigma} are {mean.dtype}, {cov.dtype}, not floats")
                gaussians[name] = Gaussian(*map(_tensor, (mean, cov)))
                _ = gaussians[name].factor  # whether it is a covariance, before any pass
            protocol = _read_protocol(archive) if PROTOCOL in keys else None
        return cls(gaussians, protocol, ADM_IMAGES in keys, str(path))


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with parsing(f"cannot read the statistics of {archive.filename}: {name}"):
        file, _ = open_npy(archive, name)
        with file, archive.open(f"{name}.npy") as whole:
            return np.lib.format.read_array(whole, allow_pickle=False)


def _read_protocol(archive: zipfile.ZipFile) -> dict[str, Any]:
    text = str(_read_array(archive, PROTOCOL))
    protocol = parse_json(text, f"cannot read the statistics of {archive.filename}: {PROTOCOL}")
    if not isinstance(protocol, dict) or not isinstance(protocol.get("extractor", {}), dict):
        raise ValueError(f"{PROTOCOL} is no JSON object with an object 'extractor'")
    return protocol


def _tensor(array: np.ndarray) -> Tensor:
    """Floats in the byte order of this machine; those that torch does not know become float64."""
    known = array.dtype.itemsize in (2, 4, 8)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=") if known else np.float64))
