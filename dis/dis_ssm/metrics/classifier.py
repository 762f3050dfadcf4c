"""Whether class-conditional samples show their class, by a classifier of pixels."""

import torch

from dis_ssm.metrics.pixels import pixel_features
from dis_ssm.system.extras import how_to_install

MAX_SIDE = 32


class PixelClassifier:
    """Support vector machine (RBF kernel, gamma 1 / (d var), C = 10) over `pixel_features`.

    It suits small, aligned images such as digits; look at its accuracy on real images first.
    Fitting is deterministic.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,).

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer than two classes, or labels and images differ in number.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        require_scikit_learn()
        from sklearn.svm import SVC

        labels = torch.as_tensor(labels)
        _check_pairs(images, labels)
        if len(labels.unique()) < 2:
            raise ValueError(
                f"a classifier needs 2 classes or more, got {labels.unique().tolist()}"
            )
        self._svm = SVC(C=10.0, kernel="rbf", gamma="scale")
        self._svm.fit(pixel_features(images, MAX_SIDE).numpy(), labels.numpy())

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Classes of uint8 images (n, C, H, W): int64 (n,)."""
        return torch.from_numpy(self._svm.predict(pixel_features(images, MAX_SIDE).numpy())).long()

    def correct(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Whether each image is put into its class: bool (n,)."""
        labels = torch.as_tensor(labels).cpu()
        _check_pairs(images, labels)
        return self.predict(images) == labels


def class_accuracy(
    samples: torch.Tensor,
    labels: torch.Tensor,
    real_images: torch.Tensor,
    real_labels: torch.Tensor,
    other_images: torch.Tensor,
    other_labels: torch.Tensor,
) -> dict:
    """Fraction of samples that a `PixelClassifier` puts into the class they were asked for.

    Images are uint8 (n, C, H, W), labels int64 (n,).

    Args:
        samples: generated images, and `labels`, the classes asked for.
        real_images: what the classifier is fitted on, with `real_labels`: images that the generator
            has never seen.
        other_images: real as well, with `other_labels`: the accuracy on them is what perfect
            samples would reach.

    Returns:
        {"samples": fraction, "real": fraction of other_images, "by_class": {class: fraction of its
        samples}}.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer than two classes, or labels and images differ in number.
    """
    classifier = PixelClassifier(real_images, real_labels)
    hits = classifier.correct(samples, labels).double()
    labels = torch.as_tensor(labels).cpu()
    return {
        "samples": hits.mean().item(),
        "real": classifier.correct(other_images, other_labels).double().mean().item(),
        "by_class": {int(k): hits[labels == k].mean().item() for k in labels.unique()},
    }


def require_scikit_learn() -> None:
    """Make sure that scikit-learn is installed.

    Raises:
        ImportError: it is not; the message says how to install it.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"class accuracy needs scikit-learn: {how_to_install('demo')}") from error


def _check_pairs(images: torch.Tensor, labels: torch.Tensor) -> None:
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"need as many labels as images, got {len(labels)} and {len(images)}")
