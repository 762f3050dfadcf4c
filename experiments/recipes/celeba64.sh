#!/usr/bin/env bash
# CelebA 64x64, unconditional: from the aligned images to FID-50K.
#   GPUS=8 bash experiments/recipes/celeba64.sh [further options of dis-ssm train]
set -euo pipefail
launch() { torchrun --standalone --nproc-per-node "${GPUS:-1}" -m dis_ssm -- "$@"; }
images=${CELEBA:-data/celeba}  # img_align_celeba/ and list_eval_partition.txt
run=${RUN:-runs/celeba64}

launch train celeba64 --out $run --data.source $images "$@"
launch sample $run --num 50000 --sampler ddpm --steps 250 --batch-size 250 --precision bf16 --out $run/fid50k.npz
launch evaluate $run/fid50k.npz $images --image-size 64
