"""The kernels' tests again, compiled for the instruction sets below the processor's best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dis_ssm.ops.cpu import ISA_FLAGS, instruction_set

HERE = Path(__file__).parent
ORDER = ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize("isa", ORDER)
def test_kernels(native, isa):
    assert set(ORDER) == set(ISA_FLAGS)
    if ORDER.index(isa) >= ORDER.index(instruction_set()):
        pytest.skip(f"{instruction_set()} is what the other tests run, {isa} not below it")
    files = [HERE / "test_scan.py", HERE / "test_conv.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *files],
        env={**os.environ, "DIS_SSM_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
