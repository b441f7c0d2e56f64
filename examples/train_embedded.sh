#!/bin/sh
# The embedded model and its evaluator from nothing: assets -> renders -> autoencoder -> diffusion model -> evaluator.
# Every stage can be stopped with Ctrl-C and goes on when the script is run again.
#   examples/train_embedded.sh ASSETS WORK
# ASSETS: Debian's sweethome3d-furniture unpacked (apt-get download sweethome3d-furniture && dpkg -x *.deb ASSETS).
# With a GPU the settings are those of the weights that ship: 5 minutes of an H100 and its 16 cores. Without one the
# batches are small: 0.25 to 0.5 s a step on 2 cores, so a night and more for as many images.
# STEPS and DECAY: the diffusion model's updates, and how many of them its learning rate falls over.
# INIT=embedded goes on from the weights that ship, instead of a new model.
set -eu
ASSETS=$1
WORK=$2
PYTHON=${PYTHON:-python}
INIT=${INIT:-}
if $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    STEPS=${STEPS:-2862} DECAY=${DECAY:-1001} VAE="--steps 928 --batch-size 256 --lr 5e-4 --warmup 300 --ema 0.999"
    UNET="--batch-size 256 --lr 1e-3 --warmup 500 --dtype bf16"
else
    STEPS=${STEPS:-60000} DECAY=${DECAY:-6000} VAE="--steps 1500 --lr 4e-4 --warmup 100"
    UNET="--batch-size 8 --lr 7e-4 --warmup 300"
fi

resume() { [ -e "$1/checkpoints/LATEST" ] && echo "--resume" || true; }

# All assets, twice 3 orbits each in their own colours and 5 in others: 10 minutes each on 2 cores.
for SEED in 0 1; do
    $PYTHON -m mvdream_fast.render sweethome3d --sweethome3d-dir "$ASSETS" -o "$WORK/shards$SEED" --preset embedded \
        --seed "$SEED" --orbits 3 --recolours 5
    mkdir -p "$WORK/shards"
    for TAR in "$WORK/shards$SEED"/train-*.tar; do
        ln -sf "../shards$SEED/$(basename "$TAR")" "$WORK/shards/train-$SEED$(basename "${TAR#*train-}")"
    done
done
for TAR in "$WORK"/shards0/held_out-*.tar; do ln -sf "../shards0/$(basename "$TAR")" "$WORK/shards/"; done

# It begins as the best linear autoencoder of 8 x 8 patches and 24 components.
if [ -z "$INIT" ]; then
    # shellcheck disable=SC2046,SC2086  # lists of flags
    $PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/vae" --stage vae $VAE --seed 0 $(resume "$WORK/vae")
fi

# shellcheck disable=SC2046,SC2086
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/unet" ${INIT:+--init "$INIT"} \
    $([ -n "$INIT" ] || echo "--vae $WORK/vae/model") --cache-latents --steps "$STEPS" --decay "$DECAY" $UNET \
    --timestep-shift 2 --ema 0.999 --sheet-guidance 4 --seed 0 $(resume "$WORK/unet")

# 0.26 s of one core a step: 48 minutes.
# shellcheck disable=SC2046
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/evaluator" --stage evaluator --steps 11000 --threads 1 \
    --seed 0 $(resume "$WORK/evaluator")

echo "the model is in $WORK/unet/model, the evaluator in $WORK/evaluator/model; try:"
echo "$PYTHON -m mvdream_fast.generate --model $WORK/unet/model --prompt 'a red armchair'"
echo "$PYTHON -m mvdream_fast.evaluate $WORK/unet/model --evaluator $WORK/evaluator/model"
