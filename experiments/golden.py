"""Whether two versions of this package train and draw the same bits; status 1 where they do not.

    python experiments/golden.py OLD NEW [--work FOLDER]

Each of OLD and NEW is a git commit or a source tree, a folder that holds `dis/` and `kernels/`. For
both, in processes of one thread on the CPU, images are encoded, small models are trained, on one
process and two, with the compiled kernels and the reference, and draw images, all by the command
line, so that it does not matter how modules are arranged. NEW then continues its own runs and OLD's
as if killed half-way, and draws from OLD's. Compared are the exact digits of every step's losses in
the log, and the bytes of latents, weights, averages, optimizer and images. It needs about 3 minutes
on two cores; the runs go to a temporary folder, or stay in `--work`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"  # images, a VAE, and a converted run, whose weights are random
STEPS, HALF, FEW = 50, 25, 10  # training steps
LOGGED = ("loss", "mse", "vb", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "grad_norm", "lr")
PATIENCE = 600  # seconds for one command
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT |= {"PYTHONDONTWRITEBYTECODE": "1"}

SMALL = ["--train.batch-size", 16, "--train.log-every", 1, "--train.save-every", HALF]
SMALL += ["--sample.every", HALF, "--sample.num", 10, "--sample.steps", 5]
WHOLE, SHORT = [*SMALL, "--train.steps", STEPS], [*SMALL, "--train.steps", FEW]
ADALN = [*SHORT, "--model.time-conditioning", "adaln", "--model.patch-size", 1, "--data.flip"]
ADALN += ["--diffusion.no-learn-sigma", "--diffusion.schedule", "linear"]
ADALN += ["--diffusion.prediction", "epsilon", "--model.drop-path", 0.2]
ADALN += ["--train.micro-batch-size", 4]
LATENTS = [*SHORT, "--data.source", "latents", "--data.flip"]
HALVES = [*SHORT, "--train.precision", "bf16", "--model.skip", "add", "--train.grad-checkpointing"]
DRAWN = {"ddpm": ["--sampler", "ddpm", "--cfg-scale", 1]}  # options of `sample`
DRAWN["ddim, guidance"] = ["--sampler", "ddim", "--cfg-scale", 2.5, "--eta", 0.5, "--seed", 3]
DRAWN["ddim, guidance"] += ["--labels", "random"]

Found = dict[str, str]  # what was compared, such as a tensor's name -> its exact text or SHA-256


@dataclass(frozen=True)
class Training:
    """A run of `train digits`: the folder's name, flags, processes and the backend forced."""

    name: str
    title: str
    flags: list
    processes: int = 1
    backend: str = "cpu"


TRAININGS = (
    Training("one", f"{STEPS} steps", WHOLE),
    Training("two", f"{STEPS} steps, 2 processes", WHOLE, processes=2),
    Training("fsdp", f"{FEW} steps, FSDP2", [*SHORT, "--train.parallel", "fsdp"], processes=2),
    Training("reference", f"{FEW} steps, reference", SHORT, backend="reference"),
    Training("adaln", f"{FEW} steps, adaLN", ADALN),
    Training("adaln-reference", f"{FEW} steps, adaLN, reference", ADALN, backend="reference"),
    Training("bf16", f"{FEW} steps, bf16", HALVES),
    Training("latent", f"{FEW} steps, latents", LATENTS),
)


@dataclass(frozen=True)
class Tree:
    """A version's source, and the folder that its commands work in."""

    name: str
    source: Path
    work: Path

    def __call__(self, *arguments, processes: int = 1, backend: str = "cpu") -> None:
        """Run a command of the package; ValueError with its last words if it fails."""
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}"]
        command += ["-m", "dis_ssm", "--", *map(str, arguments)]
        print(f"{self.name}: {' '.join(command[1:])}\n", end="", flush=True)  # in one piece
        done = self.python(command, DIS_SSM_BACKEND=backend)
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-15:])
            raise ValueError(f"{self.name}: {' '.join(command[1:])} failed:\n{last}")

    def python(self, command: list[str], **environment: str) -> subprocess.CompletedProcess:
        environment = os.environ | ENVIRONMENT | environment
        environment["PYTHONPATH"] = str(self.source / "dis")
        pipes = {"capture_output": True, "text": True, "errors": "replace", "timeout": PATIENCE}
        return subprocess.run(command, cwd=self.work, env=environment, **pipes)

    def train(self, training: Training, run: Path) -> None:
        options = {"processes": training.processes, "backend": training.backend}
        self("train", "digits", "--out", run, *training.flags, **options)

    def draw(self, run: Path) -> dict[str, Found]:
        """{title: what was drawn} of a run by every sampler of `DRAWN`."""
        found = {}
        for title, options in DRAWN.items():
            file = self.work / f"{run.parent.name} {run.name} {title}.npz"
            self("sample", run, *options, "--steps", 10, "--num", 20, "--out", file)
            found[title] = read(file)
        return found


def open_tree(name: str, label: str, work: Path) -> Tree:
    """The tree of a folder or, exported, of a commit; ValueError where it is neither."""
    (work / label).mkdir(parents=True)
    source = Path(name).resolve()
    if not (source / "dis" / "dis_ssm").is_dir():
        archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True)
        if archive.returncode:
            reason = archive.stderr.decode(errors="replace").strip()
            raise ValueError(f"{name} is no folder with dis/dis_ssm, and no commit: {reason}")
        source = work / label / "source"
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(source, filter="tar")
    tree = Tree(label, source, work / label)
    where = "import importlib.util as u; print(u.find_spec('dis_ssm').origin)"
    origin = tree.python([sys.executable, "-c", where]).stdout.strip()
    if not Path(origin).is_relative_to(source):
        raise ValueError(f"{name}: Python finds {origin or 'no package dis_ssm'} instead of it")
    return tree


def sha(kind: str, shape: Sequence[int], data: bytes) -> str:
    return hashlib.sha256(f"{kind} {tuple(shape)} ".encode() + data).hexdigest()


def read(path: Path) -> Found:
    """What a file holds, by name: losses of .jsonl, tensors of .safetensors, pixels of images."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line, parse_float=str) for line in path.read_text().splitlines()]
        return {
            f"step {line['step']} {n}": str(line.get(n, "missing"))
            for line in lines
            for n in LOGGED
        }
    if path.suffix == ".safetensors":
        tensors = safetensors.deserialize(path.read_bytes())
        return {name: sha(t["dtype"], t["shape"], bytes(t["data"])) for name, t in sorted(tensors)}
    if path.suffix == ".npz":
        with np.load(path) as archive:
            arrays = dict(archive)
    else:
        with Image.open(path) as image:
            arrays = {image.mode: np.asarray(image)}
    return {name: sha(a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}


def gather(folder: Path, *patterns: str) -> Found:
    """`read` of the files of a folder; ValueError if there is nothing to compare."""
    found = {
        f"{path.relative_to(folder)} {name}": text
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern))
        for name, text in read(path).items()
    }
    if not found:
        raise ValueError(f"{folder} holds no {patterns[0]}: there is nothing to compare")
    return found


def contents(run: Path) -> dict[str, Found]:
    """What a run has logged, learned and shown."""
    last = sorted((run / "checkpoints").iterdir())[-1]
    parts = {"weights": "model", "averages": "ema", "optimizer": "optimizer"}
    return {
        "losses": gather(run, "log.jsonl"),
        **{
            title: gather(last, f"{name}.safetensors", f"{name}/*.safetensors")
            for title, name in parts.items()
        },
        "previews": gather(run / "samples", "step-*.png"),
    }


def cut_back(run: Path, copy: Path) -> Path:
    """A copy of a run as a kill after the checkpoint of step `HALF` would leave it."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name) > HALF:
            shutil.rmtree(checkpoint)
    shutil.rmtree(copy / "samples")
    return copy


def together(parts: dict[str, Found]) -> Found:
    """All parts in one, their names before those of what they hold."""
    return {
        f"{what}, {name}": text for what, found in parts.items() for name, text in found.items()
    }


def whole(tree: Tree, training: Training) -> Found:
    return together(contents(tree.work / training.name))


def continued(tree: Tree, training: Training, owner: Tree) -> Found:
    """What `owner`'s run is after `tree` has continued it from step `HALF`."""
    copy = cut_back(owner.work / training.name, tree.work / f"{owner.name}-{training.name}")
    tree.train(training, copy)
    return together(contents(copy))


def measure(tree: Tree) -> dict[str, Found]:
    """Encode, train and draw; everything that two trees are compared by, by what it is."""
    side = ["--image-size", 16, "--shard-size", 4]
    tree("encode", DATA / "images", "latents", "--vae", DATA / "vae", *side)
    found = {"encoded latents": gather(tree.work / "latents", "*.safetensors")}
    for training in TRAININGS:
        tree.train(training, tree.work / training.name)
        for what, items in contents(tree.work / training.name).items():
            found[f"{training.title}: {what}"] = items
    shutil.copytree(DATA / "converted", tree.work / "converted")
    for name in ("one", "converted"):
        for title, items in tree.draw(tree.work / name).items():
            found[f"{name} drawn by {title}"] = items
    grid = tree.work / "grid.png"
    options = ["--steps", 5, "--per-class", 1, "--weights", "model"]
    tree("sample", tree.work / "adaln", *options, "--out", grid)
    return found | {"adaln drawn, a grid": read(grid)}


def continue_all(tree: Tree, owner: Tree) -> dict[str, tuple[Found, Found]]:
    """{what: the whole run of `owner`, and the same continued by `tree` from step `HALF`}."""
    return {
        f"{tree.name} continues {owner.name}, {training.title}": (
            whole(owner, training),
            continued(tree, training, owner),
        )
        for training in TRAININGS
        if training.flags is WHOLE
    }


def compare(old: Tree, new: Tree) -> dict[str, tuple[Found, Found]]:
    """{what is compared: what was found first, and second}."""
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(measure, (old, new))
        pairs = {what: (before[what], after[what]) for what in before}
        for more in pool.map(continue_all, (new, new), (new, old)):
            pairs |= more
    for title, items in new.draw(old.work / "one").items():
        pairs[f"NEW draws OLD by {title}"] = (before[f"one drawn by {title}"], items)
    return pairs


def difference(first: Found, second: Found) -> str | None:
    """What differs first, and how; None where all is equal."""
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    if not names:
        return None
    texts = (found.get(names[0], "missing")[:20] for found in (first, second))
    return f"{names[0]}: {' -> '.join(texts)} ({len(names)} of {len({**first, **second})} differ)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLD", help="a commit, or a folder with dis/ and kernels/")
    parser.add_argument("new", metavar="NEW", help="the same")
    parser.add_argument("--work", type=Path, help="a new folder, which keeps the runs")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        try:
            old, new = open_tree(options.old, "OLD", work), open_tree(options.new, "NEW", work)
            pairs = compare(old, new)
        except (ValueError, OSError, subprocess.TimeoutExpired) as error:
            raise SystemExit(f"golden.py: error: {error}") from error
    results = {what: difference(*pair) for what, pair in pairs.items()}
    width = max(map(len, results))
    print(f"\n{'what':{width}} | result\n{'-' * width}-|-------")
    for what, reason in results.items():
        print(f"{what:{width}} | {f'differs: {reason}' if reason else 'equal'}")
    unequal = sum(reason is not None for reason in results.values())
    print(
        f"\n{options.old} and {options.new}: {unequal or 'none'} of {len(results)} differ, ", end=""
    )
    print(f"{time.perf_counter() - started:.0f} s")
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
