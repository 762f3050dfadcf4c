"""Scores of generated images.

A Fréchet distance is named after its features: "FD-pixels" is `frechet_distance` over
`pixel_features`. Only Inception-v3 features of the FID papers may be called FID.
"""

from dis_ssm.metrics.classifier import PixelClassifier, class_accuracy, require_scikit_learn
from dis_ssm.metrics.evaluator import evaluate_samples
from dis_ssm.metrics.extractors import Extractor, open_extractor
from dis_ssm.metrics.frechet import FeatureStatistics, frechet_distance, frechet_of_features
from dis_ssm.metrics.pixels import pixel_features
from dis_ssm.metrics.report import format_report

__all__ = [
    "Extractor",
    "FeatureStatistics",
    "PixelClassifier",
    "class_accuracy",
    "evaluate_samples",
    "format_report",
    "frechet_distance",
    "frechet_of_features",
    "open_extractor",
    "pixel_features",
    "require_scikit_learn",
]
