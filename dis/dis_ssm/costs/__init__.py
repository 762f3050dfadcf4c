"""What a model costs: operations and memory, counted from the model itself."""

from dis_ssm.costs.operations import forward_flops, training_flops, training_memory

__all__ = [
    "forward_flops",
    "training_flops",
    "training_memory",
]
