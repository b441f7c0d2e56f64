"""The materials of an OBJ: a .mtl file as what Part wants to know.

Its colours are read as sRGB, as viewers show them (three.js, MeshLab): the format itself is silent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mvdream_fast.core.color import to_linear
from mvdream_fast.core.files import lines
from mvdream_fast.rendering import images
from mvdream_fast.rendering.mesh import HOLE, Texture
from mvdream_fast.rendering.reading import Reading, text_of

# How many words each option of a map takes; -o, -s and -t take one to three numbers.
OPTIONS = {"-blendu": 1, "-blendv": 1, "-cc": 1, "-clamp": 1, "-boost": 1, "-bm": 1, "-imfchan": 1, "-mm": 2,
           "-o": 3, "-s": 3, "-t": 3, "-texres": 1, "-type": 1}  # fmt: skip
UNSAID = (0.8, 0.8, 0.8)


@dataclass
class Material:
    """The statements of one `newmtl`."""

    name: str = ""
    diffuse: tuple[float, ...] | None = None
    emission: tuple[float, ...] = (0.0, 0.0, 0.0)
    opacity: float | None = None  # d, which rules over Tr
    transparency: float = 0.0  # Tr
    maps: dict[str, "Map"] = field(default_factory=dict)

    def color(self) -> np.ndarray:
        """Linear light and opacity, [4]. A map multiplies Kd; one of zeros beside a map is an exporter's blank."""
        blank = 1.0 if "map_kd" in self.maps else UNSAID
        rgb = blank if self.diffuse is None or ("map_kd" in self.maps and not any(self.diffuse)) else self.diffuse
        opacity = 1 - self.transparency if self.opacity is None else self.opacity
        return np.array([*to_linear(np.clip(np.broadcast_to(rgb, 3), 0, 1)), np.clip(opacity, 0, 1)])

    def look(self, reading: Reading) -> dict:
        """What Part wants to know beside colours; textures as functions of their coordinates.

        map_d is its image's alpha where it has one, else its lightness.
        """
        from PIL import Image

        base, clear = (self._pixels(key, reading) for key in ("map_kd", "map_d"))
        glow = self._pixels("map_ke", reading)
        if clear is not None:
            alpha = clear[..., 3] if clear[..., 3].min() < 255 else np.asarray(Image.fromarray(clear).convert("L"))
            base = images.with_alpha(base, alpha)
        emission = np.array(self.emission if any(self.emission) or glow is None else (1.0, 1, 1))
        place = self.maps.get("map_kd", self.maps.get("map_d"))
        return {
            "texture": None if base is None or place is None else place.texture(base),
            "emission": tuple(map(float, to_linear(np.clip(emission, 0, 1)))),
            "emission_texture": None if glow is None else self.maps["map_ke"].texture(glow),
            "blend": clear is not None or bool(self.color()[3] < 1),
            "cutoff": HOLE,
            "material": self.name,
        }

    def _pixels(self, key: str, reading: Reading) -> np.ndarray | None:
        if key not in self.maps:
            return None
        image = self.maps[key]
        content = reading.file(image.name)
        if content is None and " " in image.name:
            content = reading.file(image.name.split()[-1])
        if content is None:
            reading.note(f"the texture {image.name} is not there and is not drawn")
            return None
        pixels = images.decode(content)
        low, gain = image.range
        if (low, gain) == (0, 1):
            return pixels
        rgb = np.clip(low * 255 + gain * pixels[..., :3].astype(np.float32), 0, 255).round().astype(np.uint8)
        return np.dstack([rgb, pixels[..., 3]])


@dataclass(frozen=True)
class Map:
    """An image with the options of its statement."""

    name: str
    offset: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)
    range: tuple[float, float] = (0.0, 1.0)  # -mm: what is added to the image's values, and what multiplies them
    clamp: bool = False

    def texture(self, pixels: np.ndarray) -> Callable[[np.ndarray], Texture]:
        """The image on OBJ's coordinates, whose v goes up."""
        scale, offset = np.array(self.scale, np.float32), np.array(self.offset, np.float32)

        def placed(uv: np.ndarray) -> Texture:
            uv = uv * scale + offset
            return Texture(pixels, np.stack([uv[:, 0], 1 - uv[:, 1]], 1), (not self.clamp, not self.clamp))

        return placed


def read(content: bytes) -> dict[str, Material]:
    """The materials of a .mtl by name. Raises: ValueError for numbers that are none."""
    materials: dict[str, Material] = {}
    now = Material()
    for line in lines(text_of(content).replace("\\\r\n", " ").replace("\\\n", " ")):
        key, rest = (*line.split(None, 1), "", "")[:2]
        key, rest = key.lower(), rest.strip()
        if key == "newmtl":
            now = materials[rest] = Material(rest)
        elif key in ("kd", "ke") and rest.split()[:1] not in (["spectral"], ["xyz"]):
            rgb = [float(word) for word in rest.split()[:3]]
            setattr(now, "diffuse" if key == "kd" else "emission", tuple(rgb * 3)[:3] if len(rgb) == 1 else tuple(rgb))
        elif key == "d":
            now.opacity = float(rest.split()[-1])  # behind -halo, which asks for less opacity in the middle
        elif key == "tr":
            now.transparency = float(rest.split()[-1])
        elif key in ("map_kd", "map_d", "map_ke"):
            now.maps[key] = _map(rest)
    return materials


def _map(statement: str) -> Map:
    words, found = statement.split(), {}
    while words and words[0] in OPTIONS:
        option, most = words[0], OPTIONS[words[0]]
        values = words[1:2] if most == 1 else []
        while most > 1 and len(values) < most and _is_number((*words, "")[1 + len(values)]):
            values.append(words[1 + len(values)])
        words = words[1 + len(values) :]
        found[option] = values
    numbers = {key: [float(x) for x in found[key]] for key in ("-o", "-s", "-mm") if key in found}
    rest = statement.split(None, len(statement.split()) - len(words))[-1] if words else ""
    (u, v), (su, sv) = ((*numbers.get(key, []), k, k)[:2] for key, k in (("-o", 0.0), ("-s", 1.0)))
    low, high = numbers.get("-mm", (0.0, 1.0))
    return Map(
        rest.strip().strip('"'),
        offset=(u, v),
        scale=(su, sv),
        range=(low, high),
        clamp=found.get("-clamp") == ["on"],
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
