"""traverse_grids: a march through nested grids. nerfacc's needs a GPU; of one grid with a fixed step, which is what
march_rays does, too, the reference is march_rays' plain torch."""

import pytest
import torch
from contest import faster, size
from peers import need, need_gpu
from scenes import BOX, CELLS, STEP, grid_of, marched, rays_of

from mvdream_fast import ops
from mvdream_fast.ops.march_rays import unpack_bits


@pytest.mark.parametrize("share", ["10 %", "full"])
def bench_traverse_grids(contest, share):
    """One grid, a fixed step: the samples are march_rays' but for the phase, so their number is compared."""
    views, side = size(4, 1), size(64, 8)
    rays, samples = rays_of(views, side), marched(views, side, share)
    device = rays.rays_o.device
    binaries = unpack_bits(grid_of(share), CELLS**3).reshape(1, CELLS, CELLS, CELLS).to(device)
    boxes = torch.tensor([BOX], device=device)
    near, far = (torch.full((len(rays.rays_o),), x, device=device) for x in (0.0, 1e10))
    arguments = (rays.rays_o, rays.rays_d, binaries, boxes, near, far, STEP)

    def plain():
        bits = grid_of(share).to(device)
        return lambda: ops.march_rays_ref(rays.rays_o, rays.rays_d, BOX, bits, CELLS, STEP).t_starts

    def ours():
        return lambda: ops.traverse_grids(*arguments).mids

    def nerfacc():
        need("nerfacc")
        need_gpu("nerfacc's traversal")
        import nerfacc as theirs

        def call():
            intervals, _, _ = theirs.traverse_grids(*arguments[:4], near, far, STEP)
            return intervals.vals

        return call

    contest.run(
        f"traverse_grids {views}x{side}x{side} {share}",
        "forward",
        {"reference": plain, "ours": ours, "nerfacc": nerfacc},
        work={"samples": samples.n_samples, "flop": 20 * samples.n_samples, "bytes": 12 * samples.n_samples},
        goals=[faster(5, "reference")],
        seen=lambda values: torch.tensor(float(len(values))),
        tolerance=0.01,
    )
