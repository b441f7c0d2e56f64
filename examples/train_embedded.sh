#!/bin/sh
# The embedded model and its evaluator from nothing: assets -> renders -> autoencoder -> diffusion model -> evaluator.
# Times are for 2 idle AVX2 cores, from measured steps.
# Every stage can be stopped with Ctrl-C and goes on when the script is run again.
#   examples/train_embedded.sh ASSETS WORK
# ASSETS: Debian's sweethome3d-furniture unpacked (apt-get download sweethome3d-furniture && dpkg -x *.deb ASSETS).
# STEPS and DECAY: the diffusion model's updates, and how many of them its learning rate falls over.
# INIT=embedded goes on from the weights that ship, instead of a new model.
set -eu
ASSETS=$1
WORK=$2
PYTHON=${PYTHON:-python}
STEPS=${STEPS:-60000}
DECAY=${DECAY:-6000}
INIT=${INIT:-}

resume() { [ -e "$1/checkpoints/LATEST" ] && echo "--resume" || true; }

# All assets, 3 orbits each in their own colours and 5 in others: 10 minutes.
$PYTHON -m mvdream_fast.render sweethome3d --sweethome3d-dir "$ASSETS" -o "$WORK/shards" --preset embedded --seed 0 \
    --orbits 3 --recolours 5

# 0.3 s a step: 8 minutes. It begins as the best linear autoencoder of 8 x 8 patches and 24 components.
if [ -z "$INIT" ]; then
    $PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/vae" --stage vae --steps 1500 --lr 4e-4 --warmup 100 \
        --seed 0 $(resume "$WORK/vae")
fi

# 0.5 s a step of 6 scenes x 4 views, measured with little else running: 8 scenes x 4 views take about 11 hours.
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/unet" ${INIT:+--init "$INIT"} \
    $([ -n "$INIT" ] || echo "--vae $WORK/vae/model") --cache-latents --steps "$STEPS" --decay "$DECAY" --batch-size 8 \
    --lr 7e-4 --warmup 300 --ema 0.999 --seed 0 $(resume "$WORK/unet")

# 0.26 s of one core a step: 26 minutes.
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/evaluator" --stage evaluator --steps 6000 --threads 1 \
    --seed 0 $(resume "$WORK/evaluator")

echo "the model is in $WORK/unet/model, the evaluator in $WORK/evaluator/model; try:"
echo "$PYTHON -m mvdream_fast.generate --model $WORK/unet/model --prompt 'a red armchair'"
echo "$PYTHON -m mvdream_fast.evaluate $WORK/unet/model --evaluator $WORK/evaluator/model"
