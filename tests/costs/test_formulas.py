"""torch's table of FLOP formulas is changed only where costs are counted."""

import subprocess
import sys

import torch
from torch.utils import flop_counter

from dis_ssm.costs import register_formulas
from dis_ssm.models.mixer import BiMamba
from dis_ssm.ops import selective_scan

IMPORT = """
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
before = dict(flop_registry)
import dis_ssm
from dis_ssm import create_model
from dis_ssm.ops import selective_scan
create_model("DiS-S/2", input_size=8, in_channels=4, num_classes=0)
assert flop_registry == before, "an import registers formulas"
from dis_ssm.config import Config, ModelConfig
from dis_ssm.costs import forward_flops
sizes = dict(input_size=(8, 8), in_channels=4, num_classes=0)
config = Config(model=ModelConfig(name="DiS-S/2", **sizes))
first = forward_flops(config)
assert forward_flops(config) == first and first["dis_ssm.scan"] > 0
assert flop_registry != before
"""


def test_an_import_leaves_torchs_table_as_it_is():
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_counter_of_ones_own_counts_the_operators(native):
    register_formulas()
    register_formulas()
    batch, length, channels, state = 2, 7, 16, 4
    x = torch.randn(batch, length, channels, requires_grad=True)
    A, B = -torch.rand(channels, state), torch.randn(batch, length, state)
    with flop_counter.FlopCounterMode(display=False) as counter:
        selective_scan(x, x, A, B, B, backend=native).sum().backward()
        BiMamba(channels, d_state=state)(x)
    found = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    points = batch * length * channels * state
    assert found["dis_ssm.scan"] == 7 * points + 2 * 7 * 2 * points  # one way; both, twice as wide
    assert found["dis_ssm.scan_backward"] == 19 * points


def test_a_formula_of_ones_own_is_kept(monkeypatch):
    def mine(*shapes, **options):
        return 1

    table = flop_counter.flop_registry | {torch.ops.dis_ssm.scan: mine}
    monkeypatch.setattr(flop_counter, "flop_registry", table)
    monkeypatch.setattr("dis_ssm.costs.formulas.flop_registry", table)
    register_formulas()
    assert table[torch.ops.dis_ssm.scan] is mine
    assert torch.ops.dis_ssm.conv in table
