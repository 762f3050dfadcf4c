"""The package as others meet it: names, imports, wheel, compiler and kernel cache."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE_OPS = """
import torch
from dis_ssm.ops import backend_report, causal_conv1d, selective_scan
torch.manual_seed(0)
torch.set_num_threads(1)
x, dt, bc = torch.randn(2, 20, 9), torch.randn(2, 20, 9), torch.randn(2, 20, 4)
A = -torch.rand(9, 4)
x.requires_grad_(True)
for _ in range(2):
    y = selective_scan(causal_conv1d(x, A), dt, A, bc, bc{options})
    y.sum().backward()
print(y.sum().item(), x.grad.sum().item())
print(*backend_report(), sep="|")
"""


def start(code, **environment):
    """A Python process at the repository root; None removes a variable."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    env = {n: str(v) for n, v in env.items() if v is not None}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, **pipes)


def finish(process):
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


def use_ops(options="", **environment):
    return start(USE_OPS.replace("{options}", options), **environment)


@pytest.fixture(scope="module")
def expected():
    """What USE_OPS prints first, computed in a process on the reference backend."""
    out, _ = finish(use_ops(DIS_SSM_BACKEND="reference"))
    numbers, report = out.splitlines()
    assert "reference" in report
    return [float(number) for number in numbers.split()]


def assert_works(process, expected, backend):
    out, err = finish(process)
    numbers, report = out.splitlines()
    assert [float(n) for n in numbers.split()] == pytest.approx(expected, rel=1e-4)
    assert backend in report
    return err


# ---- names and imports --------------------------------------------------------------------


def test_standard_library_dis_is_not_shadowed():
    out, _ = finish(start("import inspect, dis, torch; print(dis.__file__, dis.dis.__module__)"))
    path, module = out.split()
    assert module == "dis" and not Path(path).is_relative_to(ROOT / "dis")
    for folder in ("dis", "kernels", "tests", "experiments"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_import_is_light_and_compiles_nothing(tmp_path):
    heavy = "diffusers torchvision timm scipy matplotlib sklearn tensorboard tyro".split()
    modules = ", ".join("dis_ssm dis_ssm.ops dis_ssm.interop.released".split())
    code = f"import sys, {modules}\nprint([m for m in {heavy} if m in sys.modules])"
    out, err = finish(start(code, DIS_SSM_CACHE=tmp_path / "cache"))
    assert out == "[]" and err == ""
    assert not list(tmp_path.iterdir())


def test_version_is_one():
    from importlib.metadata import version

    import dis_ssm

    assert version("dis-ssm") == dis_ssm.__version__


# ---- wheel and sdist ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, so that the build leaves nothing in the checkout
    source.mkdir()
    kept = "dis kernels experiments pyproject.toml setup.py README.md LICENSE MANIFEST.in".split()
    kept = [name for name in kept if (ROOT / name).exists()]
    subprocess.run(["cp", "-a", *kept, str(source)], cwd=ROOT, check=True)
    command = "pip wheel --no-build-isolation --no-deps --no-index -q -w".split()
    command = [sys.executable, "-m", *command, str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_carries_modules_and_native_sources(wheel):
    assert wheel.name.startswith("dis_ssm-") and wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    assert all(name.startswith("dis_ssm/") for name in packed)
    package = ROOT / "dis" / "dis_ssm"
    modules = {p.relative_to(ROOT / "dis").as_posix() for p in package.rglob("*.py")}
    sources = {
        f"dis_ssm/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}"
        for p in (ROOT / "kernels").rglob("*")
        if p.suffix in (".cpp", ".h", ".hpp", ".cu", ".cuh", ".inc")
    }
    assert sources and any(name.endswith(".cpp") for name in sources)
    configs = {f"dis_ssm/configs/{p.name}" for p in (ROOT / "experiments/configs").glob("*.toml")}
    assert configs
    missing = {n for n in modules | sources | configs if "__pycache__" not in n} - names
    assert not missing
    assert "dis_ssm/py.typed" in names
    assert not {n for n in names if n.endswith((".so", ".o", ".pyc", ".dylib"))}


def test_wheel_works_where_it_is_unpacked(wheel, native, expected, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    where = "import dis_ssm; assert dis_ssm.__file__.startswith({!r}), dis_ssm.__file__\n"
    code = where.format(str(tmp_path / "site")) + USE_OPS.replace("{options}", ', backend="cpu"')
    process = start(code, PYTHONPATH=tmp_path / "site", DIS_SSM_CACHE=tmp_path / "cache")
    assert_works(process, expected, "cpu")


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    source = wheel.parent / "source"
    code = f"from setuptools import build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    command = "pip wheel --no-build-isolation --no-deps --no-index -q -w".split()
    command = [sys.executable, "-m", *command, str(tmp_path), str(archive)]
    subprocess.run(command, check=True, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(built).namelist()) == set(zipfile.ZipFile(wheel).namelist())


# ---- compiler and cache -------------------------------------------------------------------


def test_without_a_compiler_one_line_says_so_and_all_works(expected, tmp_path):
    (tmp_path / "empty").mkdir()
    environment = dict(PATH=tmp_path / "empty", CXX=None, DIS_SSM_CACHE=tmp_path / "cache")
    refused = use_ops(', backend="cpu"', **environment)
    err = assert_works(use_ops(**environment), expected, "reference")
    assert len(err.splitlines()) == 1, err
    assert "compiler" in err and "reference" in err
    _, err = refused.communicate(timeout=100)
    assert refused.returncode != 0
    assert "compiler" in err.splitlines()[-1] and "Error" in err


def test_failing_compiler_leaves_a_working_package(expected, tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'the disk of the compiler is on fire' >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment = dict(CXX=compiler, PATH=tmp_path, DIS_SSM_CACHE=tmp_path / "cache")
    err = assert_works(use_ops(**environment), expected, "reference")
    assert len(err.splitlines()) == 1 and "on fire" in err


def test_processes_that_compile_at_once_share_a_cache(native, expected, tmp_path):
    cache = tmp_path / "cache"
    for process in [use_ops(', backend="cpu"', DIS_SSM_CACHE=cache) for _ in range(2)]:
        assert_works(process, expected, "cpu")
    (library,) = [path for path in cache.iterdir() if path.is_file()]  # no leftovers

    # A second start needs no compiler; a damaged library is compiled anew, and never a crash.
    contents = {"whole": library.read_bytes(), "empty": b"", "garbage": b"\x7fELF, but not" * 99}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / library.name).write_bytes(content)
    (tmp_path / "no-compiler").mkdir()
    where = {"whole": {"PATH": tmp_path / "no-compiler", "CXX": None}}
    processes = {
        name: use_ops(', backend="cpu"', DIS_SSM_CACHE=tmp_path / name, **where.get(name, {}))
        for name in contents
    }
    for process in processes.values():
        assert_works(process, expected, "cpu")


def test_cache_that_cannot_be_written(native, expected, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    process = use_ops(', backend="cpu"', DIS_SSM_CACHE=tmp_path / "file" / "cache")
    assert_works(process, expected, "cpu")


def test_environment_chooses_the_backend():
    unknown = use_ops(DIS_SSM_BACKEND="abacus")
    impossible = use_ops(DIS_SSM_BACKEND="mamba_ssm")
    for process, name in ((unknown, "abacus"), (impossible, "mamba_ssm")):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert name in err.splitlines()[-1] and "Error" in err
