"""What a model costs: operations and memory, counted from the model itself."""

from dis_ssm.costs.formulas import register_formulas
from dis_ssm.costs.operations import forward_flops, training_flops, training_memory

__all__ = [
    "forward_flops",
    "register_formulas",
    "training_flops",
    "training_memory",
]
