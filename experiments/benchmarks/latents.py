"""How fast a latent cache is read: random moments a second, by one thread, files in the page cache.

    python experiments/benchmarks/latents.py [--images 50000] [--out results/latents-cpu.json]

Writes a synthetic cache of the stated size to a temporary folder and removes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from harness import processor, record, write
from safetensors.torch import save_file

from dis_ssm.data.latents import FORMAT, MANIFEST, LatentDataset, open_cache, shard_spans

SHAPE = (4, 32, 32)  # sd-vae-ft-ema at 256 x 256
ROUNDS = 5


def synthetic(folder: Path, images: int, shard_size: int, shape: tuple[int, ...]) -> Path:
    """A cache of that many images whose moments are random bits of float16 in [0, 1)."""
    manifest = {"format": FORMAT, "source_images": images, "shard_size": shard_size}
    manifest |= {"class_names": ["one"], "latent_shape": list(shape), "complete": True}
    scale = {"scaling_factor": 0.18215, "shift_factor": None}
    manifest |= {"vae": scale | {"latents_mean": None, "latents_std": None}}
    records = []
    for name, span in shard_spans(manifest).items():
        mean, std = (torch.rand(len(span), 2, *shape, dtype=torch.float16) for _ in range(2))
        tensors = {"mean": mean, "std": std, "label": torch.zeros(len(span), dtype=torch.int64)}
        save_file(tensors, folder / name)
        size = (folder / name).stat().st_size
        records.append({"name": name, "images": len(span), "bytes": size, "corrupt": {}})
    manifest |= {"images": images, "shards": records}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def rate(dataset: LatentDataset, batch_size: int, seconds: float = 1.0) -> float:
    """Moments of random images a second, the median of `ROUNDS`."""
    generator, rates = torch.Generator().manual_seed(0), []
    for _ in range(ROUNDS):
        start, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds:
            indices = torch.randint(len(dataset), (batch_size,), generator=generator)
            dataset.stored(indices, torch.rand(batch_size, generator=generator) < 0.5)
            count += batch_size
        rates.append(count / spent)
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--shard-size", type=int, default=2_000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128, 1024])
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        dataset = open_cache(synthetic(Path(folder), settings.images, settings.shard_size, SHAPE))
        size = sum(shard["bytes"] for shard in dataset.manifest["shards"])
        shards = len(dataset.manifest["shards"])
        print(f"{settings.images:,} images of {SHAPE}, {size / 1e9:.2f} GB in {shards} shards")
        rate(dataset, 1024)
        rates = {batch: round(rate(dataset, batch)) for batch in settings.batch_sizes}
    for batch, found in rates.items():
        print(f"batches of {batch:5}: {found:9,} moments/s")
    if settings.out:
        report = {"images": settings.images, "shards": shards, "gigabytes": round(size / 1e9, 3)}
        report |= {"latent_shape": SHAPE, "moments_per_second": rates, "threads": 1}
        write(record(processor()) | report, settings.out)


if __name__ == "__main__":
    main()
