#!/usr/bin/env bash
# CIFAR-10, unconditional: from the archive to FID-50K. GPUS=8 uses eight GPUs of this machine.
#   bash experiments/recipes/cifar10.sh [further options of dis-ssm train]
set -euo pipefail
launch() { torchrun --standalone --nproc-per-node "${GPUS:-1}" -m dis_ssm -- "$@"; }
archive=${CIFAR10:-data/cifar-10-python.tar.gz}  # from https://www.cs.toronto.edu/~kriz/cifar.html
run=${RUN:-runs/cifar10}

launch train cifar10 --out $run --data.source $archive "$@"
launch sample $run --num 50000 --sampler ddpm --steps 250 --batch-size 500 --precision bf16 --out $run/fid50k.npz
launch evaluate $run/fid50k.npz $archive --image-size 32
