"""What a mesh loses as it is exported: of how many triangles, coloured at its vertices or by textures of some sizes.

    python benchmarks/export_colors.py RUN/asset.safetensors... [--faces 0 30000] [--textures 512 1024]

Each asset is meshed as `sds` does and drawn from four sides at 256 pixels. Of the pixels that the mesh of all triangles
and this one show, and the field's own renders wholly: the PSNR against those renders; that against the field's colours
at the very points of the surface of all triangles, which is all that a mesh can show; and the mean step between
neighbouring pixels as a share of the latter's, its sharpness. Beside that the overlap of the mesh's silhouette with the
renders', the size of the GLB, and the processor's seconds that decimation or the texture took.
"""

import argparse
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

from mvdream_fast.camera import evaluation_cameras, generate_rays
from mvdream_fast.ops import interpolate, rasterize, texture
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.mesh.export import glb_bytes
from mvdream_fast.scene.mesh.mesh import Mesh, colored_mesh
from mvdream_fast.scene.mesh.texture import bake_texture
from mvdream_fast.scene.raster import clip_matrices

SIZE, N_VIEWS = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, nargs="+")
    parser.add_argument("--faces", type=int, nargs="+", default=[0, 30_000])
    parser.add_argument("--textures", type=int, nargs="+", default=[512, 1024])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for path in args.assets for row in measure(path, args.faces, args.textures)]
    head = ("at most", "colours", "triangles", "renders, dB", "surface, dB", "sharpness", "overlap", "GLB, MB", "s")
    print("| {} |".format(" | ".join(head)), "|---" * len(head) + "|", sep="\n")
    for kind in dict.fromkeys(row[:2] for row in rows):
        numbers = np.mean([row[2:] for row in rows if row[:2] == kind], axis=0)
        print("| {} | {} | {:.0f} | {:.2f} | {:.2f} | {:.3f} | {:.4f} | {:.2f} | {:.1f} |".format(*kind, *numbers))


def measure(path: Path, limits: list[int], sizes: list[int]) -> list[tuple[int, str, *tuple[float, ...]]]:
    """The table's rows of one asset: for each limit of triangles those of the vertices and of each texture."""
    asset = Asset.load(path)
    cameras = evaluation_cameras(N_VIEWS)
    rendered = asset.representation.render(generate_rays(cameras, SIZE, SIZE))
    wanted, opacity = rendered.rgb.reshape(N_VIEWS, SIZE, SIZE, 3), rendered.opacity.reshape(N_VIEWS, SIZE, SIZE)
    whole = asset.mesh(max_faces=0)
    rast, seen = drawn(whole)
    points, _ = interpolate(torch.from_numpy(whole.vertices), rast, torch.from_numpy(whole.faces))
    with torch.no_grad():
        best = torch.zeros_like(points)
        best[seen] = asset.representation.colors(points[seen]).clamp(0, 1)
    rows = []
    for limit, size in product(limits, (None, *sizes)):
        begun = time.process_time()
        if size is None:
            plain = mesh = colored_mesh(whole.vertices, whole.faces, asset.representation.colors, limit)
            rast, shown = drawn(plain)
            colors, _ = interpolate(torch.from_numpy(plain.colors), rast, torch.from_numpy(plain.faces))
        else:
            mesh = bake_texture(plain, asset.representation.colors, size)
            colors = of_texture(mesh)
        seconds = time.process_time() - begun
        solid = (opacity > 0.99) & seen & shown
        psnr = [-10 * (colors - other)[solid].square().mean().log10().item() for other in (wanted, best)]
        overlap = ((opacity > 0.5) & shown).sum().item() / ((opacity > 0.5) | shown).sum().item()
        kind = "vertices" if size is None else f"texture of {size}"
        sharpness = steps(colors, solid) / steps(best, solid)
        rows.append((limit, kind, len(mesh.faces), *psnr, sharpness, overlap, len(glb_bytes(mesh)) / 1e6, seconds))
        print(path, rows[-1], mesh.n_open_edges(), flush=True)
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
