"""python looks_on_gpu.py LIBRARY LOOK... evaluates expressions on reference.gpu and prints, as JSON, what each waited
for, or the error that it raised. They know `x`, three numbers there, and two functions of rays."""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from reference.cuda_host import loaded
from reference.gpu import DEVICE, GPU

from mvdream_fast.core.reads import Later
from mvdream_fast.ops import march_rays, render
from mvdream_fast.ops.march_rays import pack_bits
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig


def main(library: str, looks: list[str]) -> list[dict[str, int] | str]:
    found = []
    with GPU(loaded(Path(library))) as gpu:
        x = torch.ones(3, device=DEVICE)
        bits = pack_bits(torch.ones(8, dtype=torch.bool)).to(DEVICE)

        def rays(direction):
            return march_rays(x[None] * 0, x[None] * direction, (-1,) * 3 + (1,) * 3, bits, 2, 0.5)

        def evaluate(direction):
            volume = Volume(VolumeConfig(n_levels=2, log2_size=4, width=16)).to(DEVICE)
            gpu.take()
            return render(x[None] * 0, x[None] * direction, volume, (-1,) * 3 + (1,) * 3, bits, 2, 0.5)

        names = {"torch": torch, "x": x, "DEVICE": DEVICE, "Later": Later, "host": torch.ones(3)}
        names |= {"rays": rays, "evaluate": evaluate}
        for look in looks:
            gpu.take()
            try:
                eval(look, names)  # of the test beside this file
                waits = Counter()
                for place, n in gpu.take().items():
                    waits[place.split(" at ")[0]] += n
                found.append(waits)
            except (RuntimeError, ValueError) as error:
                found.append(str(error))
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
