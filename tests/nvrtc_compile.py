"""Compiles the CUDA sources with one NVRTC library, in a process of its own: two would clash.

    python nvrtc_compile.py LIBNVRTC FOLDER < cases.json > results.json

A case is [source, architecture, macros]. Its result is {"error": log}, or {kernel: [registers,
bytes of spills]}, or null for an architecture that this NVRTC does not know.
"""

import ctypes
import json
import re
import sys
from pathlib import Path


def scan_macros(io, states=16, warps=4, **changes):
    """Of scan.cu, as a model that trains sets them."""
    names = ("SOFTPLUS", "GATED", "SKIPS", "KEEPS", "FULL", "ALIGNED")
    return {"IO": io, "STATES": states, "WARPS": warps} | dict.fromkeys(names, 1) | changes


def conv_macros(io, width=4, **changes):
    """Of conv.cu, as a model sets them."""
    names = ("SILU", "PAST", "FUTURE")
    return {"IO": io, "K": width, "EACH": 2} | dict.fromkeys(names, 1) | changes


def load(path):
    """The library, with its built-ins, which it would look for on the library path only."""
    for builtins in Path(path).parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path)


def version(nvrtc):
    major, minor = ctypes.c_int(), ctypes.c_int()
    assert nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0
    return major.value, minor.value


def architectures(nvrtc):
    count = ctypes.c_int()
    assert nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)) == 0
    numbers = (ctypes.c_int * count.value)()
    assert nvrtc.nvrtcGetSupportedArchs(numbers) == 0
    return [f"sm_{number}" for number in numbers]


def resources(report):
    """{kernel: (registers, bytes of spill stores and loads)} of ptxas' report."""
    found = {}
    for block in report.split("Compiling entry function '")[1:]:
        stores, loads = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        registers = re.search(r"Used (\d+) registers", block)[1]
        found[block.split("'")[0]] = int(registers), int(stores) + int(loads)
    return found


def compile_case(nvrtc, folder, source, arch, macros):
    program = ctypes.c_void_p()
    text = (Path(folder) / f"{source}.cu").read_bytes()
    name = f"{source}.cu".encode()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None)
    assert created == 0, f"nvrtcCreateProgram: {created}"
    options = [f"-arch={arch}", "-std=c++17", f"-I{folder}", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    array = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    log = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetProgramLog(program, log) == 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    report = log.value.decode()
    return {"error": report[:2000]} if failed else resources(report)


def main(library, folder):
    nvrtc = load(library)
    cases = json.load(sys.stdin)
    known = architectures(nvrtc)
    results = [compile_case(nvrtc, folder, *case) if case[1] in known else None for case in cases]
    json.dump({"version": version(nvrtc), "results": results}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
