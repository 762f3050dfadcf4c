"""The CUDA sources compile with the NVRTC that CUDA builds of torch bring, for each architecture.

`make` puts these libraries into the virtual environment; test_cuda_source.py has the newest one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nvrtc_compile
from dis_ssm.ops.cuda import IO_TYPES
from dis_ssm.ops.nvrtc import SOURCES
from nvrtc_compile import conv_macros, scan_macros

VERSIONS = [(12, 8), (13, 0)]
ARCHITECTURES = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
LIBRARIES = sorted(Path(sys.prefix).glob("nvrtc/*/nvidia/*/lib/libnvrtc.so.*"))
BF16 = next(number for dtype, number in IO_TYPES.items() if "bfloat16" in str(dtype))
FORWARD_REGISTERS = 65536 // (6 * 64)  # 6 blocks of 64 threads are what the launch counts on


CASES = [
    *(["scan", arch, scan_macros(BF16)] for arch in ARCHITECTURES),
    *(["conv", arch, conv_macros(BF16)] for arch in ARCHITECTURES),
    *(["scan", "sm_90", scan_macros(io)] for io in IO_TYPES.values() if io != BF16),
    *(["scan", "sm_90", scan_macros(BF16, **{name: 0})] for name in ("KEEPS", "FULL", "GATED")),
    ["scan", "sm_90", scan_macros(BF16, ALIGNED=0, FULL=0)],
    *(["scan", "sm_90", scan_macros(BF16, warps=warps)] for warps in (1, 2)),
    ["conv", "sm_90", conv_macros(BF16, EACH=1, FUTURE=0, SILU=0)],
]


@pytest.fixture(scope="module")
def compiled():
    """What each library made of the cases, side by side."""
    command = [sys.executable, nvrtc_compile.__file__]
    running = [
        subprocess.Popen(
            [*command, library, SOURCES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for library in LIBRARIES
    ]
    found = {}
    for process in running:
        process.stdin.write(json.dumps(CASES))
        process.stdin.close()
    for process in running:
        answer = json.load(process.stdout)
        found[tuple(answer["version"])] = answer["results"]
        assert process.wait() == 0
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_program_compiles_without_a_spill(version, compiled):
    if version not in compiled:
        message = f"no NVRTC {version} in {sys.prefix}/nvrtc: run make"
        pytest.fail(message) if os.environ.get("CI") or LIBRARIES else pytest.skip(message)
    for (source, arch, macros), result in zip(CASES, compiled[version], strict=True):
        case = f"{source} for {arch} with {macros}: {result}"
        assert result, case
        assert "error" not in result, case
        assert all(spilled == 0 for _, spilled in result.values()), case
        if source == "scan":
            assert result["scan_forward"][0] <= FORWARD_REGISTERS, case
