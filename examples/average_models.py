"""The mean of a model and of what it became by training on: keeps what the first did better, learns what the other did.

    python examples/average_models.py BEFORE AFTER -o OUT [--share 0.5]

Weights that both have are averaged, AFTER's with the given share. Layers that training added began at zero, so they are
scaled by the share; words that it added stay as they are. All else is AFTER's: configuration, autoencoder, stand-ins.

Source: Wortsman et al., Robust fine-tuning of zero-shot models (2022).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mvdream_fast.checkpoints.open import load_model, save_model

PARTS = ("unet", "text")


def averaged(before: dict[str, Tensor], after: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """AFTER's weights by name, each averaged with BEFORE's; of longer tables the first rows. Raises SystemExit where
    shapes differ otherwise."""
    out = {}
    for name, weight in after.items():
        mean, old = share * weight, before.get(name)
        if old is not None:
            if old.shape[1:] != weight.shape[1:] or len(old) > len(weight):
                raise SystemExit(f"{name} is {list(old.shape)} in one model and {list(weight.shape)} in the other")
            mean[len(old) :] = weight[len(old) :]
            mean[: len(old)] += (1 - share) * old
        out[name] = mean
    return out


def main(argv: list[str] | None = None) -> None:
    """Reads both models and writes their mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5)
    args = parser.parse_args(argv)
    if not 0 <= args.share <= 1:
        parser.error(f"--share must be from 0 to 1, got {args.share}")
    before, after = (load_model(str(path), torch.float32) for path in (args.before, args.after))
    for name in PARTS:
        old, new = getattr(before, name).state_dict(), getattr(after, name)
        new.load_state_dict(averaged(old, new.state_dict(), args.share))
    for part in (*PARTS, "vae"):
        getattr(after, part).half()
    save_model(after, args.out)


if __name__ == "__main__":
    main()
