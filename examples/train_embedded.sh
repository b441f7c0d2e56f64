#!/bin/sh
# The embedded model from nothing: assets -> renders -> autoencoder -> diffusion model -> model folder.
# Times are estimates for 2 idle AVX2 cores from measured steps.
# Every stage can be stopped with Ctrl-C and goes on when the script is run again.
#   examples/train_embedded.sh ASSETS WORK
# ASSETS: Debian's sweethome3d-furniture unpacked (apt-get download sweethome3d-furniture && dpkg -x *.deb ASSETS).
set -eu
ASSETS=$1
WORK=$2
PYTHON=${PYTHON:-python}
STEPS=${STEPS:-60000}

resume() { [ -e "$1/checkpoints/LATEST" ] && echo "--resume" || true; }

# All assets, 5 orbits each.
$PYTHON -m mvdream_fast.render sweethome3d --sweethome3d-dir "$ASSETS" -o "$WORK/shards" --preset embedded --seed 0

# About 0.15 s a step: 20 minutes. It begins as the best linear autoencoder of 8 x 8 patches and 16 components.
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/vae" --stage vae --steps 8000 --lr 3e-4 --seed 0 \
    $(resume "$WORK/vae")

# 0.5 s a step of 8 scenes x 4 views: about 8 hours.
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/unet" --vae "$WORK/vae/model" --cache-latents \
    --steps "$STEPS" --batch-size 8 --lr 3e-4 --warmup 200 --ema 0.9995 --seed 0 $(resume "$WORK/unet")

echo "the model is in $WORK/unet/model; try:"
echo "$PYTHON -m mvdream_fast.generate --model $WORK/unet/model --prompt 'a red armchair'"
