#!/usr/bin/env bash
# ImageNet 512x512: from the images to ADM's five metrics.
#   GPUS=8 bash experiments/recipes/imagenet512.sh [options of dis-ssm train]
# Another size: RUN=runs/L bash ... --model.name DiS-L/2
set -euo pipefail
launch() { torchrun --standalone --nproc-per-node "${GPUS:-8}" -m dis_ssm -- "$@"; }
images=${IMAGENET:-data/ILSVRC2012/train}  # one folder a class
vae=${VAE:-stabilityai/sd-vae-ft-ema}      # a folder or hub id
reference=data/VIRTUAL_imagenet512.npz  # ADM's: github.com/openai/guided-diffusion/tree/main/evaluations
latents=data/imagenet512-latents run=${RUN:-runs/imagenet512}

ls "$reference" > /dev/null  # training scores against it: better missed now than then
launch encode "$images" $latents --image-size 512 --vae "$vae" --precision bf16
dis-ssm check $latents
launch train imagenet512 --out $run --data.source $latents --data.vae "$vae" "$@"
for cfg in 1 1.5; do
    set=$run/fid50k-cfg-$cfg.npz
    launch sample $run --num 50000 --labels random --cfg-scale $cfg --sampler ddpm --steps 250 \
        --batch-size 16 --precision bf16 --vae "$vae" --out "$set"
    launch evaluate "$set" $reference
done
