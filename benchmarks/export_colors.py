"""How sharp a mesh's colours are as exported: at its vertices, or baked into textures of some sizes.

    python benchmarks/export_colors.py RUN/asset.safetensors... [--textures 512 1024]

Each asset is meshed as `sds` does and drawn from four sides at 256 pixels. Of the pixels that the mesh shows, and the
field's own renders wholly: the PSNR against those renders; that against the field's colours at the very points of the
surface, which is all that a mesh of this shape can show; and the mean step between neighbouring pixels as a share of
the latter's, its sharpness. Beside that the size of the GLB, and the processor's seconds that the colours took.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from mvdream_fast.camera import evaluation_cameras, generate_rays
from mvdream_fast.ops import interpolate, rasterize, texture
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.mesh.export import glb_bytes
from mvdream_fast.scene.mesh.mesh import Mesh
from mvdream_fast.scene.mesh.texture import bake_texture
from mvdream_fast.scene.raster import clip_matrices

SIZE, N_VIEWS = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, nargs="+")
    parser.add_argument("--textures", type=int, nargs="+", default=[512, 1024])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for path in args.assets for row in measure(path, args.textures)]
    print("| colours | renders, dB | surface, dB | sharpness | GLB, MB | s |", "|---|---|---|---|---|---|", sep="\n")
    for kind in dict.fromkeys(kind for kind, *_ in rows):
        numbers = np.mean([row for name, *row in rows if name == kind], axis=0)
        print("| {} | {:.2f} | {:.2f} | {:.3f} | {:.2f} | {:.1f} |".format(kind, *numbers))


def measure(path: Path, sizes: list[int]) -> list[tuple[str, float, float, float, float, float]]:
    """(colours, both PSNR, sharpness, megabytes, seconds) of the vertices and of each texture."""
    asset = Asset.load(path)
    plain = asset.mesh()
    cameras = evaluation_cameras(N_VIEWS)
    rendered = asset.representation.render(generate_rays(cameras, SIZE, SIZE))
    wanted, solid = rendered.rgb.reshape(N_VIEWS, SIZE, SIZE, 3), rendered.opacity.reshape(N_VIEWS, SIZE, SIZE) > 0.99
    rast, shown = drawn(plain)
    solid &= shown
    points, _ = interpolate(torch.from_numpy(plain.vertices), rast, torch.from_numpy(plain.faces))
    with torch.no_grad():
        best = torch.zeros_like(points)
        best[shown] = asset.representation.colors(points[shown]).clamp(0, 1)
    colors, _ = interpolate(torch.from_numpy(plain.colors), rast, torch.from_numpy(plain.faces))
    rows, limit = [], steps(best, solid)
    for size in (None, *sizes):
        begun, mesh = time.process_time(), plain
        if size is not None:
            mesh = bake_texture(plain, asset.representation.colors, size)
            colors = of_texture(mesh)
        seconds = time.process_time() - begun
        kind = "vertices" if size is None else f"texture of {size}"
        psnr = [-10 * (colors - other)[solid].square().mean().log10().item() for other in (wanted, best)]
        rows.append((kind, *psnr, steps(colors, solid) / limit, len(glb_bytes(mesh)) / 1e6, seconds))
        print(path, rows[-1], flush=True)
    return rows


def drawn(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """`rasterize`'s image of the mesh [V, S, S, 4], and which pixels show it."""
    matrices = clip_matrices(evaluation_cameras(N_VIEWS), (SIZE, SIZE), 3**0.5)
    clip = torch.from_numpy(mesh.vertices) @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]
    rast, _ = rasterize(clip, torch.from_numpy(mesh.faces), (SIZE, SIZE))
    return rast, rast[..., 3] > 0


def of_texture(mesh: Mesh) -> torch.Tensor:
    """Its colours where pixels show it, bilinear in the texture as a viewer has them up close."""
    assert mesh.uvs is not None
    assert mesh.texture is not None
    uv, _ = interpolate(torch.from_numpy(mesh.uvs), drawn(mesh)[0], torch.from_numpy(mesh.faces))
    sheet = torch.from_numpy(np.ascontiguousarray(mesh.texture[::-1])).float() / 255
    return texture(sheet[None], uv, filter_mode="linear", boundary_mode="clamp")


def steps(image: torch.Tensor, solid: torch.Tensor) -> float:
    """The mean difference of neighbouring pixels [V, S, S, 3] that are both solid."""
    across = (image[:, :, 1:] - image[:, :, :-1]).abs()[solid[:, :, 1:] & solid[:, :, :-1]]
    down = (image[:, 1:] - image[:, :-1]).abs()[solid[:, 1:] & solid[:, :-1]]
    return torch.cat([across, down]).mean().item()


if __name__ == "__main__":
    main()
