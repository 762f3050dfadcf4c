"""Compiled kernels on disk: whose are run, how they appear, and what a failed compiler leaves."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dis_ssm.ops import kernel_cache

ROOT = Path(__file__).resolve().parents[2]
STRANGER = 12345  # a user id that is neither ours nor root's

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")

USE = """
import torch
from dis_ssm.ops import causal_conv1d
print(causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2), activation=None{}).tolist())
"""
RESULT = "[[[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]]"
POISON = """
#include <cstdio>
__attribute__((constructor)) static void run() { std::puts("POISONED"); std::fflush(stdout); }
"""


@pytest.fixture(autouse=True)
def every_message(monkeypatch):
    kernel_cache.say_once.cache_clear()
    yield
    kernel_cache.say_once.cache_clear()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The named cache and the user's own."""
    monkeypatch.setenv("DIS_SSM_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "named", tmp_path / "home" / "dis_ssm"


def install(path, data):
    with kernel_cache.draft(path) as unfinished:
        unfinished.write_bytes(data)


def start(*command, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    env = {n: str(v) for n, v in env.items() if v is not None}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes)


def use(options=', backend="cpu"', **environment):
    process = start("-c", USE.format(options), **environment)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


@pytest.fixture(scope="module")
def compiled(native, tmp_path_factory):
    """The kernels' library, compiled once."""
    folder = tmp_path_factory.mktemp("compiled")
    assert use(DIS_SSM_CACHE=folder)[0] == RESULT
    (library,) = folder.iterdir()
    return library


@pytest.fixture(scope="module")
def quick(compiled):
    """A compiler that takes no time: it has one answer."""
    answer, script = compiled.with_name("answer"), compiled.with_name("quick-c++")
    answer.write_bytes(kernel_cache.read(compiled))
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; exec cp {answer} "$2"\n')
    script.chmod(0o755)
    return script


# ---- files --------------------------------------------------------------------------------


def test_what_is_installed_is_found_again(folders):
    path, data = kernel_cache.find("a.bin")
    assert path == folders[0] / "a.bin" and data is None
    install(path, b"code")
    assert kernel_cache.find("a.bin") == (path, b"code") and kernel_cache.read(path) == b"code"
    assert [p.name for p in folders[0].iterdir()] == ["a.bin"]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_damage_is_not_used(folders, damage):
    path, _ = kernel_cache.find("a.bin")
    install(path, b"code")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"code", b"cide") if damage is None else damage)
    assert kernel_cache.find("a.bin") == (path, None)
    install(path, b"code")
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644), (0, 0o644)]
)
def test_modes_follow_the_umask_but_never_let_others_write(folders, umask, mode):
    old = os.umask(umask)
    try:
        path, _ = kernel_cache.find("a.bin")
        install(path, b"code")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert not path.parent.stat().st_mode & 0o022
    assert kernel_cache.read(path) == b"code"


def test_a_failed_draft_leaves_nothing(folders):
    path, _ = kernel_cache.find("a.bin")
    with pytest.raises(RuntimeError), kernel_cache.draft(path) as unfinished:
        unfinished.write_bytes(b"half")
        raise RuntimeError
    assert not list(folders[0].iterdir())


def test_drafts_of_killed_processes_are_removed(folders):
    path, _ = kernel_cache.find("a.bin")
    old, new = (path.with_name(f"{kernel_cache.DRAFT}{i}-ab.so") for i in (1, 2))
    for draft in (old, new):
        draft.write_bytes(b"half")
    before = time.time() - kernel_cache.DRAFT_LIFE - 9
    os.utime(old, (before, before))
    kernel_cache.find("a.bin")
    assert not old.exists() and new.exists()


def test_a_kill_during_compilation_leaves_what_the_next_process_removes(quick, tmp_path):
    compiler = tmp_path / "slow-c++"
    compiler.write_text('#!/bin/sh\necho "$@" > "$0.called"\nexec sleep 100\n')
    compiler.chmod(0o755)
    folder = tmp_path / "cache"
    process = start("-c", USE.format(""), CXX=compiler, DIS_SSM_CACHE=folder)
    for _ in range(1000):
        if (tmp_path / "slow-c++.called").exists():
            break
        time.sleep(0.1)
    process.kill()
    process.communicate()
    (left,) = folder.iterdir()
    old = time.time() - kernel_cache.DRAFT_LIFE - 9
    os.utime(left, (old, old))
    assert use(CXX=quick, DIS_SSM_CACHE=folder)[0] == RESULT
    assert not left.exists() and len(list(folder.iterdir())) == 1


# ---- compiled once -------------------------------------------------------------------------


def obtain(log, code=b"code", refused=(), name="a.bin"):
    def make(path):
        log.append(path.parent)
        path.write_bytes(code)

    def load(path, data):
        if data in refused:
            raise OSError("another architecture")
        return data

    return kernel_cache.obtain(name, make, load)


def test_kernels_are_compiled_once(folders):
    log = []
    assert obtain(log) == obtain(log, b"other") == b"code"
    assert log == [folders[0]] and [p.name for p in folders[0].iterdir()] == ["a.bin"]


def test_kept_kernels_that_do_not_load_are_compiled_anew(folders, caplog):
    obtain([])
    assert obtain([], b"new", refused=[b"code"]) == obtain([]) == b"new"
    (record,) = caplog.records
    assert "a.bin does not load (another architecture)" in record.message


def test_a_full_disk_costs_the_cache_but_not_the_kernels(folders, monkeypatch, caplog):
    replace = os.replace

    def full(source, target):
        if target.parent in folders:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    log = []
    assert obtain(log, name="full.bin") == b"code"
    assert log[0] == folders[0] and log[1] not in folders
    assert not list(folders[0].iterdir())
    (record,) = caplog.records
    assert "not kept" in record.message and "No space left" in record.message


def test_without_any_disk_the_remedy_is_named(folders, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(kernel_cache.BackendError, match=r"No space left.*set DIS_SSM_CACHE"):
        obtain([])


def test_what_the_compiler_raises_is_passed_on(folders):
    def make(path):
        raise kernel_cache.BackendError("no compiler")

    with pytest.raises(kernel_cache.BackendError, match=r"^no compiler$"):
        kernel_cache.obtain("a.bin", make, lambda path, data: data)
    assert not list(folders[0].iterdir())


# ---- whose --------------------------------------------------------------------------------


def test_a_folder_that_others_can_write_is_passed_over(folders, caplog):
    named, own = folders
    named.mkdir()
    install(named / "a.bin", b"poison")
    named.chmod(0o777)
    assert kernel_cache.find("a.bin") == (own / "a.bin", None)
    (record,) = caplog.records
    assert str(named) in record.message and "chmod go-w" in record.message
    assert str(named) in kernel_cache.report() and str(own) in kernel_cache.report()
    named.chmod(0o755)
    assert kernel_cache.find("a.bin") == (named / "a.bin", b"poison")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_lies_in_one_that_others_can_write(folders, tmp_path, monkeypatch, mode):
    """They could put another in its place, but for a sticky one such as /tmp."""
    (tmp_path / "open" / "cache").mkdir(parents=True)
    (tmp_path / "open").chmod(mode)
    monkeypatch.setenv("DIS_SSM_CACHE", str(tmp_path / "open" / "cache"))
    path, _ = kernel_cache.find("a.bin")
    sticky = mode == 0o1777
    assert path.parent == (tmp_path / "open" / "cache" if sticky else folders[1])


def test_a_sticky_folder_is_no_cache_itself(folders):
    folders[0].mkdir()
    folders[0].chmod(0o1777)
    assert kernel_cache.find("a.bin")[0].parent == folders[1]


def test_without_a_trusted_folder_there_is_a_private_one(folders, caplog):
    for folder in folders:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    path, data = kernel_cache.find("a.bin")
    assert data is None and path.parent not in folders
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(caplog.records) == 2 and "life of a process" in kernel_cache.report()


def test_a_file_that_others_can_write_is_not_read(folders, caplog):
    path, _ = kernel_cache.find("a.bin")
    install(path, b"poison")
    path.chmod(0o664)
    assert kernel_cache.find("a.bin") == (path, None)
    (record,) = caplog.records
    assert str(path) in record.message and "compiled anew" in record.message


def test_links_pipes_and_folders_are_not_read(folders):
    path, _ = kernel_cache.find("a.bin")
    install(path.with_name("b.bin"), b"code")
    path.symlink_to("b.bin")
    assert kernel_cache.read(path) is None
    path.unlink()
    os.mkfifo(path)
    assert kernel_cache.read(path) is None
    path.unlink()
    path.mkdir()
    assert kernel_cache.read(path) is None


def test_a_link_to_a_folder_is_judged_by_what_it_leads_to(folders, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    folders[0].symlink_to(tmp_path / "open")
    assert kernel_cache.find("a.bin")[0].parent == folders[1]
    (tmp_path / "open").chmod(0o755)
    assert kernel_cache.find("a.bin")[0].parent == tmp_path / "open"


def test_another_user_s_files_are_not_ours(folders, monkeypatch):
    """The same files, seen by somebody else; root's are everybody's."""
    path, _ = kernel_cache.find("a.bin")
    install(path, b"code")
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert (kernel_cache.read(path) == b"code") == (owner == 0)
    if owner:
        assert kernel_cache.find("a.bin")[0].parent not in folders


@needs_root
@pytest.mark.parametrize("what", ["file", "folder", "parent"])
def test_root_does_not_trust_a_user_s_files(folders, what):
    named = folders[0]
    path, _ = kernel_cache.find("a.bin")
    install(path, b"poison")
    os.chown({"file": path, "folder": named, "parent": named.parent}[what], STRANGER, -1)
    found, data = kernel_cache.find("a.bin")
    assert data is None
    if what != "file":
        assert found.parent != named


@pytest.fixture(scope="module")
def poisoned(compiled, tmp_path_factory):
    """The library's name, and contents that run code when loaded, with a digest."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "poison.cpp").write_text(POISON)
    compiler = os.environ.get("CXX", "c++")
    command = f"{compiler} -shared -fPIC {folder}/poison.cpp -o {folder}/poison.so"
    subprocess.run(command.split(), check=True)
    install(folder / compiled.name, (folder / "poison.so").read_bytes())
    return compiled.name, (folder / compiled.name).read_bytes()


@pytest.mark.parametrize("how", ["writable folder", "writable file", "owner"])
def test_a_poisoned_library_is_not_run(poisoned, quick, how, folders):
    name, content = poisoned
    named, own = folders
    named.mkdir()
    (named / name).write_bytes(content)
    if how == "owner":
        if os.geteuid():
            pytest.skip("gives files to another user")
        os.chown(named / name, STRANGER, -1)
    elif how == "writable file":
        (named / name).chmod(0o666)
    else:
        named.chmod(0o777)
    out, err = use(CXX=quick)
    assert out == RESULT
    assert len(err.splitlines()) == 1 and str(named) in err
    assert (own / name if how == "writable folder" else named / name).read_bytes() != content


def test_a_library_that_does_not_load_is_compiled_anew(compiled, quick, folders):
    """Whole and ours, but of another machine."""
    folders[0].mkdir()
    install(folders[0] / compiled.name, b"\x7fELF of another architecture")
    out, err = use(CXX=quick)
    assert out == RESULT and len(err.splitlines()) == 1 and "does not load" in err
    assert use() == (RESULT, "")


# ---- compilers that fail ------------------------------------------------------------------


def info(**environment):
    process = start("-m", "dis_ssm", "info", **environment)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


@pytest.mark.parametrize("compiler", ["true", "false", "/nonexistent/c++"])
def test_a_failed_compiler_is_forgotten_when_another_is_set(quick, folders, compiler):
    code, out, _ = info(CXX=compiler)
    assert code == 0 and "cpu: not available" in out and "by default on the CPU: reference" in out
    assert compiler in out
    if compiler != "/nonexistent/c++":
        assert "set CXX" in out
    assert not list(folders[0].iterdir())
    code, out, _ = info(CXX=quick)
    assert code == 0 and "cpu: native kernels" in out and str(folders[0]) in out


IN_ONE_PROCESS = """
import os
from dis_ssm.ops import cpu
os.environ["CXX"] = "true"
first, again = cpu.why_not(), cpu.why_not()
os.environ["CXX"] = os.environ["QUICK"]
print("true" in first and first is again, cpu.why_not())
"""


def test_a_failure_is_remembered_for_the_compiler_that_failed(quick, folders):
    process = start("-c", IN_ONE_PROCESS, QUICK=quick)
    out, err = process.communicate(timeout=200)
    assert out.split() == ["True", "None"], err


def test_info_fails_with_the_backend_it_is_told(quick, folders):
    for name in ("abacus", "cpu"):
        code, out, _ = info(DIS_SSM_BACKEND=name, CXX="true")
        assert code == 1 and f"DIS_SSM_BACKEND={name} is forced and cannot run" in out
    code, out, _ = info(DIS_SSM_BACKEND="cpu", CXX=quick)
    assert code == 0 and "cannot run" not in out
