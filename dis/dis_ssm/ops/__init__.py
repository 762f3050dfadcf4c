"""The operations of a Mamba block, each with its PyTorch reference beside it."""

from dis_ssm.ops.conv import bidirectional_causal_conv1d, causal_conv1d
from dis_ssm.ops.dispatch import backend_report
from dis_ssm.ops.kernel_cache import BackendError
from dis_ssm.ops.scan import bidirectional_selective_scan, selective_scan

__all__ = [
    "BackendError",
    "backend_report",
    "bidirectional_causal_conv1d",
    "bidirectional_selective_scan",
    "causal_conv1d",
    "selective_scan",
]
