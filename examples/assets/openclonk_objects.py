"""The meshes of Debian's openclonk-data (CC-BY 3.0 or CC0, village decorations ISC) as GLB files with metadata.csv.

    apt-get download openclonk-data && dpkg -x openclonk-data_*.deb DIR
    python examples/assets/openclonk_objects.py DIR/usr/share/games/openclonk OUT

OBJECTS names what is worth a picture and which way it faces; `python -m mvdream_fast.render OUT -o SHARDS` draws it.
"""

import argparse
import csv
import io
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GROUPS = ("Objects.ocd", "Decoration.ocd")
CREATOR = "the OpenClonk team and contributors, RedWolf Design GmbH"
VILLAGE = "Village/", "Dustin Ness (Dragonclonk)", "ISC"  # as the Authors.txt of that group says
COLUMNS = ("file", "caption", "noun", "category", "has_front", "pack", "creator", "licence")

# path: (caption, noun, category, whether it has a front, degrees that bring it to +Z), by eye
OBJECTS = {
    "Animals/Bat": ("brown bat", "bat", "animal", "yes", 0),
    "Animals/Chippie": ("green crawling creature with an orange tail", "creature", "animal", "yes", 0),
    "Animals/Chippie/Egg": ("green spotted egg with a tail", "egg", "animal", "no", 0),
    "Animals/Fish": ("white and brown cartoon fish with yellow fins", "fish", "animal", "yes", 0),
    "Animals/LavaCore/LavaCoreShell": ("black and red spiked shell", "shell", "animal", "no", 0),
    "Animals/Mooq": ("orange lava creature with horns", "creature", "animal", "yes", 0),
    "Animals/Piranha": ("red piranha with yellow fins", "piranha", "animal", "yes", 0),
    "Animals/Puka": ("white cartoon animal with a long tail", "cartoon animal", "animal", "yes", 0),
    "Animals/Shark": ("gray shark", "shark", "animal", "yes", 0),
    "Animals/Squid": ("red squid", "squid", "animal", "yes", 0),
    "Animals/Wipf": ("orange cartoon dog with big eyes", "dog", "animal", "yes", 0),
    "Animals/Zaphive": ("yellow beehive", "beehive", "animal", "no", 0),
    "Clonk/Backpack": ("brown leather backpack", "backpack", "clothing", "yes", 0),
    "Clonk/Graphics": ("boy in a white shirt with outstretched arms", "boy", "character", "yes", 0),
    "Clonk/GraphicsAlchemist": ("blond boy in a red and white pullover", "boy", "character", "yes", 0),
    "Clonk/GraphicsFarmer": ("girl in a blue shirt with a headscarf", "girl", "character", "yes", 0),
    "Clonk/GraphicsSteampunk": ("red-haired girl in a white blouse", "girl", "character", "yes", 0),
    "Environment/Column": ("broken gray stone column", "column", "structure", "no", 0),
    "Environment/Disasters/Rockfall": ("flat gray rock", "rock", "nature", "no", 0),
    "Environment/Rock": ("gray rock", "rock", "nature", "no", 0),
    "Environment/Stalactite": ("gray stalactite", "stalactite", "nature", "no", 0),
    "Environment/WalkableTrunk": ("fallen brown tree trunk", "tree trunk", "plant", "no", -90),
    "Goals/CaptureTheFlag/Flag": ("white flag", "flag", "sign", "no", 0),
    "Goals/Defense/DefenseBoomAttack": ("orange and black rocket", "rocket", "weapon", "no", 0),
    "Items/Foodstuff/CookedMushroom": ("dark brown mushroom", "mushroom", "food", "no", 0),
    "Items/Resources/Cloth": ("roll of beige cloth", "cloth", "household", "no", 0),
    "Items/Resources/CottonSeed": ("cotton seed", "cotton seed", "plant", "no", 0),
    "Items/Resources/Diamond": ("white diamond", "diamond", "treasure", "no", 0),
    "Items/Tools/Axe": ("axe with a wooden handle", "axe", "tool", "yes", -90),
    "Items/Tools/Balloon/BalloonDeployed": ("orange balloon", "balloon", "decor", "no", 0),
    "Items/Tools/Barrel": ("brown wooden barrel", "barrel", "container", "no", 0),
    "Items/Tools/Barrel/MetalBarrel": ("gray metal barrel", "barrel", "container", "no", 0),
    "Items/Tools/Boompack": ("brown firework rocket", "rocket", "weapon", "no", 0),
    "Items/Tools/Bucket": ("green bucket", "bucket", "container", "yes", -90),
    "Items/Tools/Crate": ("brown wooden crate", "crate", "container", "no", 0),
    "Items/Tools/DivingHelmet": ("diving helmet", "diving helmet", "clothing", "yes", 0),
    "Items/Tools/DynamiteBox": ("wooden dynamite box", "dynamite box", "container", "yes", -90),
    "Items/Tools/DynamiteBox/Igniter": ("white detonator box", "detonator", "tool", "yes", -90),
    "Items/Tools/GrappleBow": ("grappling hook gun", "grappling hook gun", "weapon", "yes", -90),
    "Items/Tools/GrappleBow/Hook": ("black grappling hook", "grappling hook", "tool", "no", 0),
    "Items/Tools/Hammer": ("hammer with a wooden handle", "hammer", "tool", "yes", -90),
    "Items/Tools/Lantern": ("blue glass lantern", "lantern", "lamp", "no", 0),
    "Items/Tools/Pickaxe": ("pickaxe", "pickaxe", "tool", "yes", -90),
    "Items/Tools/PowderKeg": ("red powder keg", "powder keg", "container", "yes", -90),
    "Items/Tools/Shovel": ("shovel with a wooden handle", "shovel", "tool", "yes", -90),
    "Items/Tools/Sickle": ("sickle", "sickle", "tool", "yes", -90),
    "Items/Tools/TeleGlove": ("golden robot glove", "glove", "clothing", "no", 0),
    "Items/Tools/Torch": ("wooden torch", "torch", "lamp", "no", 0),
    "Items/Tools/WindBag": ("green bagpipe", "bagpipe", "household", "yes", -90),
    "Items/Weapons/Bow": ("wooden bow", "bow", "weapon", "yes", -90),
    "Items/Weapons/Club": ("wooden club", "club", "weapon", "no", 0),
    "Items/Weapons/GrenadeLauncher": ("brown grenade launcher", "grenade launcher", "weapon", "yes", -90),
    "Items/Weapons/Helmet": ("golden knight helmet with a crest", "knight helmet", "clothing", "yes", 0),
    "Items/Weapons/Javelin": ("wooden javelin", "javelin", "weapon", "no", 0),
    "Items/Weapons/Shield": ("gray metal shield", "shield", "weapon", "yes", -90),
    "Room/Door": ("gray stone doorway", "doorway", "building-part", "yes", -90),
    "Room/StoneSign": ("dark stone tablet", "stone tablet", "sign", "yes", 0),
    "Room/WoodenSign": ("hanging wooden sign", "wooden sign", "sign", "yes", 0),
    "Misc/Hat": ("white hat", "hat", "clothing", "no", 0),
    "Misc/SprayCan": ("blue spray can", "spray can", "tool", "no", -90),
    "Rules/Gravestones/Gravestone": ("gray gravestone", "gravestone", "structure", "yes", -90),
    "Structures/Armory": ("armory hut", "armory hut", "building", "yes", -90),
    "Structures/ChemicalLab": ("straw-roofed laboratory hut", "laboratory hut", "building", "yes", -90),
    "Structures/Chest": ("brown wooden treasure chest", "treasure chest", "container", "yes", 0),
    "Structures/Compensator": ("white electric generator", "generator", "structure", "yes", -90),
    "Structures/ConstructionSite": ("blank wooden sign", "wooden sign", "sign", "yes", -90),
    "Structures/Elevator/Case/CaseBack": ("elevator cage", "elevator cage", "structure", "yes", -90),
    "Structures/Elevator": ("wooden winch tower", "winch tower", "structure", "yes", -90),
    "Structures/Flagpole": ("beige cloth on a pole", "flag", "sign", "yes", -90),
    "Structures/Foundry": ("brick foundry furnace", "furnace", "building", "yes", -90),
    "Structures/Idol": ("yellow doll statue", "statue", "decor", "yes", -90),
    "Structures/InventorsLab": ("inventor's workshop", "workshop", "building", "yes", -90),
    "Structures/Kitchen": ("outdoor brick oven kitchen", "outdoor kitchen", "building", "yes", -90),
    "Structures/Loom": ("brick house with a green roof", "house", "building", "yes", -90),
    "Structures/Pump": ("white and red oil pump", "oil pump", "structure", "yes", 0),
    "Structures/Sawmill": ("sawmill machine", "sawmill machine", "structure", "yes", -90),
    "Structures/Shipyard": ("shipyard crane", "crane", "structure", "yes", -90),
    "Structures/SteamEngine": ("brick steam engine", "steam engine", "structure", "yes", -90),
    "Structures/StoneDoor/SpinWheel": ("wooden cogwheel", "cogwheel", "structure", "yes", -90),
    "Structures/ToolsWorkshop": ("brown wooden workshop hut", "workshop hut", "building", "yes", -90),
    "Structures/WindGenerator": ("wooden wind turbine", "wind turbine", "structure", "yes", -90),
    "Structures/Windmill": ("windmill with a red roof", "windmill", "building", "yes", -90),
    "Structures/WoodenCabin": ("wooden cabin with a red roof", "cabin", "building", "yes", -90),
    "Vegetation/Coral": ("gray coral", "coral", "nature", "no", 0),
    "Vegetation/Cotton/CottonFruit": ("green cotton fruit", "cotton fruit", "plant", "no", 0),
    "Vegetation/Cotton": ("cotton plant", "cotton plant", "plant", "no", 0),
    "Vegetation/Deciduous2": ("dense green tree", "tree", "plant", "no", 0),
    "Vegetation/Deciduous3": ("bare orange tree", "tree", "plant", "no", 0),
    "Vegetation/Deciduous4": ("green bonsai tree", "bonsai tree", "plant", "no", 0),
    "Vegetation/Fern": ("green fern", "fern", "plant", "no", 0),
    "Vegetation/Flower": ("purple flower", "flower", "plant", "no", 0),
    "Vegetation/LargeCaveMushroom": ("tall orange mushroom", "mushroom", "plant", "no", 0),
    "Vegetation/Mushroom": ("brown mushroom", "mushroom", "plant", "no", 0),
    "Vegetation/Seaweed": ("green seaweed leaf", "seaweed leaf", "plant", "no", 0),
    "Vegetation/SproutBerryBush/Flower": ("pink flower", "flower", "plant", "no", 0),
    "Vegetation/Trees/Coconut": ("green coconut tree", "coconut tree", "plant", "no", 0),
    "Vegetation/Trees/Coniferous": ("green fir tree", "fir tree", "plant", "no", 0),
    "Vegetation/Trees/Coniferous2": ("thin green pine tree", "pine tree", "plant", "no", 0),
    "Vegetation/Trees/Coniferous3": ("dark green fir tree", "fir tree", "plant", "no", 0),
    "Vegetation/Trees/Coniferous4": ("crooked dark green fir tree", "fir tree", "plant", "no", 0),
    "Vegetation/Trees/Deciduous": ("young green tree", "tree", "plant", "no", 0),
    "Vegetation/Trunk": ("hollow brown tree trunk", "tree trunk", "plant", "no", 0),
    "Vegetation/Wheat": ("green wheat plants", "wheat plants", "plant", "no", 0),
    "Vehicles/Airplane": ("white and orange biplane", "biplane", "vehicle", "yes", 0),
    "Vehicles/Airship": ("white airship with a wooden cabin", "airship", "vehicle", "yes", 0),
    "Vehicles/Airship/AirshipBurnt": ("burnt black airship", "airship", "vehicle", "yes", 0),
    "Vehicles/Cannon": ("gray cannon with wooden wheels", "cannon", "weapon", "yes", 0),
    "Vehicles/Catapult": ("wooden catapult", "catapult", "weapon", "yes", 0),
    "Vehicles/Locomotive": ("white steam locomotive with orange wheels", "steam locomotive", "vehicle", "yes", 0),
    "Vehicles/Lorry": ("brown mine cart", "mine cart", "vehicle", "yes", -90),
    "Village/Bag": ("brown sack", "sack", "container", "no", 0),
    "Village/BridgeRustic/Front": ("wooden footbridge", "footbridge", "structure", "yes", -90),
    "Village/BridgeRustic/Back": ("wooden bridge railing", "bridge railing", "structure", "yes", -90),
    "Village/CandleSmall": ("beige candle stump", "candle", "household", "no", 0),
    "Village/Candle": ("gray candlestick", "candlestick", "household", "no", 0),
    "Village/Crate": ("gray wooden crate", "crate", "container", "no", 0),
    "Village/FenceRustic": ("gray wooden fence", "fence", "structure", "yes", -90),
    "Village/Guidepost": ("wooden signpost", "signpost", "sign", "yes", -90),
    "Village/Lantern": ("street lamp with three lights", "street lamp", "lamp", "yes", -90),
    "Village/Painting": ("framed painting", "painting", "decor", "yes", -90),
    "Village/Rail": ("wooden hitching rail", "hitching rail", "structure", "yes", -90),
    "Village/Scarecrow": ("wooden scarecrow with a hat", "scarecrow", "character", "yes", 0),
    "Village/StrawMan": ("scarecrow in a blue coat", "scarecrow", "character", "yes", 0),
    "Village/TreeTrunks": ("pile of brown logs", "logs", "nature", "yes", -90),
    "Village/TunnelSupport": ("wooden mine support", "mine support", "structure", "yes", 0),
    "Village/WineBarrel": ("gray wine barrel", "wine barrel", "container", "yes", -90),
}

# --- C4Group: a gzip stream with other magic bytes; 204 bytes of head, 316 bytes an entry, then the files ---


def unpacked(content: bytes, path: str = "") -> Iterator[tuple[str, bytes]]:
    """(path, content) of every file in a C4Group, those of the groups in it, too. Raises ValueError."""
    if not path:
        content = zlib.decompress(b"\x1f\x8b" + content[2:], 31)
    head = bytearray(byte ^ 237 for byte in content[:204])
    for k in range(0, len(head) - 2, 3):
        head[k], head[k + 2] = head[k + 2], head[k]
    if not head.startswith(b"RedWolf Design GrpFolder"):
        raise ValueError(f"{path or 'the file'} is no C4Group")
    n = struct.unpack_from("<i", head, 36)[0]
    files = 204 + 316 * n
    for k in range(n):
        entry = content[204 + 316 * k :][:316]
        name = entry[:260].split(b"\0")[0].decode("latin1")
        _, is_group, size, _, offset = struct.unpack_from("<5i", entry, 260)
        inside = content[files + offset :][:size]
        place = f"{path}{name}".replace(".ocd", "")
        if is_group:
            yield from unpacked(inside, f"{place}/")
        else:
            yield place, inside


# --- Ogre 1.8 meshes: chunks of a 16-bit kind and a 32-bit length that counts those six bytes ---

MESH, SUBMESH, GEOMETRY, DECLARATION, ELEMENT, BUFFER = 0x3000, 0x4000, 0x5000, 0x5100, 0x5110, 0x5200
POSITION, UV = 1, 7


class Reader:
    """Little-endian numbers from bytes, one after the other."""

    def __init__(self, content: bytes):
        self.content, self.at = content, 0

    def take(self, form: str):
        """One number by its struct letter."""
        (value,) = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        """A string up to its line end."""
        end = self.content.index(b"\n", self.at)
        value = self.content[self.at : end].decode("latin1")
        self.at = end + 1
        return value

    def array(self, dtype: str, n: int) -> np.ndarray:
        """n numbers of a numpy type."""
        values = np.frombuffer(self.content, dtype, n, self.at)
        self.at += values.nbytes
        return values

    def chunks(self, end: int) -> Iterator[tuple[int, int]]:
        """(kind, end) of the chunks up to `end`; whatever of one was not read is passed over.

        The last ones, bones and edges, have lengths in some of these files that cannot be; nothing of them is needed.
        """
        while self.at + 6 <= min(end, len(self.content)):
            start, kind, size = self.at, self.take("H"), self.take("I")
            if size < 6:
                return
            yield kind, start + size
            self.at = start + size


def submeshes(content: bytes) -> list[tuple[str, np.ndarray, dict]]:
    """(material, faces [M, 3], {POSITION: [N, 3], UV: [N, 2]}) of an Ogre mesh. Raises ValueError, struct.error."""
    reader = Reader(content)
    if reader.take("H") != 0x1000:
        raise ValueError("no Ogre mesh")
    reader.text()
    found, shared = [], {}
    for kind, end in reader.chunks(len(content)):
        if kind != MESH:
            continue
        reader.take("B")  # whether there is a skeleton
        for inner, inner_end in reader.chunks(end):
            if inner == GEOMETRY:
                shared = geometry(reader, inner_end)
            elif inner == SUBMESH:
                found.append(submesh(reader, inner_end))
    whole = [(material, faces, own or shared) for material, faces, own in found]
    if not whole or any(POSITION not in data for _, _, data in whole):
        raise ValueError("no triangles, or none with positions")
    return whole


def submesh(reader: Reader, end: int) -> tuple[str, np.ndarray, dict]:
    """One part: its material, triangles, and its own vertices, or none where it uses the shared ones."""
    material, is_shared, n, wide = reader.text(), reader.take("B"), reader.take("I"), reader.take("B")
    faces = reader.array("<u4" if wide else "<u2", n).reshape(-1, 3).astype(np.int32)
    own = {}
    for kind, inner_end in reader.chunks(end):
        if kind == GEOMETRY and not is_shared:
            own = geometry(reader, inner_end)
    return material, faces, own


def geometry(reader: Reader, end: int) -> dict[int, np.ndarray]:
    """The positions and texture coordinates of a geometry chunk, by what they mean."""
    n, elements, buffers = reader.take("I"), [], {}
    for kind, inner_end in reader.chunks(end):
        if kind == DECLARATION:
            for element, _ in reader.chunks(inner_end):
                if element == ELEMENT:
                    elements.append([reader.take("H") for _ in range(5)])  # buffer, type, meaning, offset, index
        elif kind == BUFFER:
            index, width = reader.take("H"), reader.take("H")
            reader.at += 6  # the head of the chunk of data
            buffers[index] = reader.array("u1", n * width).reshape(n, width)
    out = {}
    for source, form, meaning, offset, index in elements:
        if form < 4 and index == 0:  # one to four floats
            data = np.ascontiguousarray(buffers[source][:, offset : offset + 4 * (form + 1)])
            out[meaning] = data.view("<f4").reshape(n, form + 1)
    return out


# --- materials ---


def materials(text: str) -> dict[str, tuple[tuple[float, ...], str | None, str | None, bool]]:
    """Name -> (diffuse colour, texture, parent, whether alpha is a hole) of a script.

    The texture is the last that is neither a player's colour nor normals.
    """
    found = {}
    for block in re.split(r"(?m)^\s*material\s+", text)[1:]:
        name, _, parent = (part.strip() for part in re.split(r"[\n{]", block)[0].partition(":"))
        color = re.search(r"diffuse\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", block)
        names = [
            t for t in re.findall(r"(?m)^\s*texture\s+(\S+)", block) if not re.search("overlay|normal|nrm", t.lower())
        ]
        diffuse = tuple(map(float, color.groups())) if color else (1.0, 1.0, 1.0)
        holes = bool(re.search(r"alpha_rejection|scene_blend\s+alpha", block))
        found[name] = diffuse, names[-1] if names else None, parent.split()[0] if parent else None, holes
    return found


class Library:
    """All files of the unpacked groups; materials and textures are looked for in a mesh's folder and those above it."""

    def __init__(self, files: dict[str, bytes]):
        self.files = {name.lower(): content for name, content in files.items()}

    def above(self, path: str) -> Iterator[str]:
        """The folder of a file and those it lies in, inner ones first."""
        parts = path.lower().split("/")[:-1]
        for n in range(len(parts), 0, -1):
            yield "/".join(parts[:n]) + "/"

    def material(self, path: str, name: str) -> tuple[tuple[float, ...], bytes | None, bool]:
        """Diffuse colour and image of the material that a mesh names, and whether the image's alpha is a hole."""
        for folder in self.above(path):
            scripts = [n for n in self.files if n.startswith(folder) and n.endswith(".material")]
            scripts = [n for n in scripts if "/" not in n.removeprefix(folder)]
            for script in scripts:
                known = materials(self.files[script].decode("latin1"))
                if name in known:
                    diffuse, texture, parent, holes = known[name]
                    if texture is None and parent in known:
                        texture, holes = known[parent][1], known[parent][3]
                    return diffuse, self.image(path, texture) if texture else None, holes
        return (0.7, 0.7, 0.7), None, False

    def image(self, path: str, name: str) -> bytes | None:
        """A texture by its file name."""
        return next((c for f in self.above(path) if (c := self.files.get(f + name.lower())) is not None), None)


def scene(library: Library, path: str, turn_deg: float):
    """A mesh of the library as a trimesh scene, turned about the upright axis."""
    import trimesh
    from PIL import Image
    from trimesh.visual.material import PBRMaterial

    out = trimesh.Scene()
    angle = np.radians(turn_deg)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    for k, (name, faces, data) in enumerate(submeshes(library.files[path.lower()])):
        diffuse, content, holes = library.material(path, name)
        settings = {"metallicFactor": 0.0, "roughnessFactor": 1.0, "doubleSided": True, "name": name}
        uv = data.get(UV)
        if content is not None and uv is not None:
            # Without holes alpha says where a player's colour goes.
            image = Image.open(io.BytesIO(content)).convert("RGBA" if holes else "RGB")
            image.thumbnail((512, 512))
            material = PBRMaterial(baseColorTexture=image, alphaMode="MASK" if holes else "OPAQUE", **settings)
            visual = trimesh.visual.TextureVisuals(uv=np.stack([uv[:, 0], 1 - uv[:, 1]], 1), material=material)
        else:
            linear = np.array(diffuse) ** 2.2  # glTF's factors are linear light
            material = PBRMaterial(baseColorFactor=[*(255 * linear).astype(int).tolist(), 255], **settings)
            visual = trimesh.visual.TextureVisuals(material=material)
        out.add_geometry(trimesh.Trimesh(data[POSITION] @ turn.T, faces, visual=visual, process=False), f"part{k}")
    return out


def main() -> None:
    """Unpacks the groups and writes every object of OBJECTS that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder of Objects.ocd and Decoration.ocd")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    files = {}
    for group in GROUPS:
        try:
            files |= unpacked((args.source / group).read_bytes(), "")
        except (OSError, ValueError, zlib.error, struct.error) as error:
            sys.exit(f"openclonk_objects: {args.source / group} cannot be unpacked ({error}); see the help")
    library = Library(files)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for path, (caption, noun, category, front, turn) in OBJECTS.items():
            mesh = f"{path}.mesh" if path.rpartition("/")[2].startswith("Graphics") else f"{path}/Graphics.mesh"
            name = re.sub(r"\W+", "-", path).lower() + ".glb"
            try:
                scene(library, mesh, turn).export(args.out / name)
            except (KeyError, ValueError, IndexError, struct.error) as error:
                print(f"left out {path}: {type(error).__name__}: {error}")
                continue
            who = VILLAGE[1:] if path.startswith(VILLAGE[0]) else (CREATOR, "CC-BY-3.0")
            writer.writerow((name, caption, noun, category, front, "openclonk-data", *who))


if __name__ == "__main__":
    main()
