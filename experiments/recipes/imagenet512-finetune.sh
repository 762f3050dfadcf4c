#!/usr/bin/env bash
# ImageNet 512x512 from a finished 256x256 run, its position embedding interpolated.
#   GPUS=8 bash experiments/recipes/imagenet512-finetune.sh [further options of dis-ssm train]
# The latents and the reference are those of imagenet512.sh.
set -euo pipefail
launch() { torchrun --standalone --nproc-per-node "${GPUS:-8}" -m dis_ssm -- "$@"; }
vae=${VAE:-stabilityai/sd-vae-ft-ema} run=${RUN:-runs/imagenet512-finetune}
reference=data/VIRTUAL_imagenet512.npz

ls "$reference" > /dev/null  # training scores against it: better missed now than then
launch train imagenet512-finetune --out $run --train.init "${INIT:-runs/imagenet256}" --data.vae "$vae" "$@"
launch sample $run --num 50000 --labels random --cfg-scale 1.5 --sampler ddpm --steps 250 \
    --batch-size 16 --precision bf16 --vae "$vae" --out $run/fid50k-cfg-1.5.npz
launch evaluate $run/fid50k-cfg-1.5.npz $reference
