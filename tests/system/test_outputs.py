"""Outputs replace regular files only, with the usual mode, whatever encoding the terminal has."""

import os
import stat
import subprocess
import sys

import pytest
import torch

from dis_ssm import cli
from dis_ssm.storage.checkpoint import _write_tensors
from dis_ssm.system.files import check_writable, drafted, write_json


def test_a_pipe_is_refused_and_left_as_it_is(tmp_path):
    pipe = tmp_path / "report.json"
    os.mkfifo(pipe)
    for write in (lambda: write_json(pipe, {}), lambda: check_writable(pipe)):
        with pytest.raises(OSError, match=r"report\.json: it is no regular file"):
            write()
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["report.json"]


def test_no_command_replaces_a_device(capsys):
    assert cli.main(["flops", "--models", "DiS-S/2", "--json", "/dev/null"]) == 2
    assert "/dev/null: it is no regular file" in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_is_written_through(tmp_path):
    target, link = tmp_path / "there.json", tmp_path / "link.json"
    link.symlink_to(target)
    check_writable(link)
    write_json(link, [1])
    assert link.is_symlink() and target.read_text() == "[\n  1\n]\n"


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_weights_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        _write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(1)})
        with drafted(tmp_path / "x") as draft:
            draft.write_text("x")
            draft.chmod(0o600)
    finally:
        os.umask(before)
    for name in ("w.safetensors", "x"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_encoding_ends_a_command(encoding):
    for arguments in (["flops", "--models", "DiS-S/2"], ["evaluate", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "dis_ssm", *arguments],
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
