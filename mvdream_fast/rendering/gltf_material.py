"""How a glTF primitive looks: base colour, alpha mode and emission of its material, textures and vertex colours.

Metalness, roughness, normal and occlusion textures say how light is reflected: the renderer's own plain light is not.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from mvdream_fast.rendering.gltf import Document
from mvdream_fast.rendering.images import mirrored
from mvdream_fast.rendering.mesh import MeshError, Texture

CLAMP, MIRROR, NEAREST = 33071, 33648, 9728


def look(document: Document, primitive: dict, attribute: Callable, vertices: np.ndarray) -> dict:
    """What Part wants to know beside its shape; `vertices` [N] are the rows of the attributes that the part holds."""
    material = document.get("materials", primitive["material"]) if "material" in primitive else {}
    extensions = material.get("extensions", {})
    factor, base = _base(material, extensions)
    mode = material.get("alphaMode", "OPAQUE")
    if mode not in ("OPAQUE", "MASK", "BLEND"):
        raise MeshError(f"alphaMode is {mode!r}, which glTF does not know")
    place = partial(_texture, document, attribute=attribute, vertices=vertices)
    texture = place(base)
    colors = _colors(attribute("COLOR_0"), factor, len(vertices), vertices)
    if mode == "OPAQUE":
        colors[:, 3] = 1
        if texture is not None and texture.pixels[..., 3].min() < 255:
            pixels = texture.pixels.copy()
            pixels[..., 3] = 255
            texture = Texture(pixels, texture.uv, texture.repeat, texture.nearest)
    unlit = "KHR_materials_unlit" in extensions
    strength = extensions.get("KHR_materials_emissive_strength", {}).get("emissiveStrength", 1.0)
    emission = np.zeros(3) if unlit else np.array(material.get("emissiveFactor", [0.0] * 3), float) * strength
    return {
        "colors": colors,
        "texture": texture,
        "emission": tuple(float(x) for x in emission),
        "emission_texture": place(material.get("emissiveTexture")) if emission.any() else None,
        "blend": mode == "BLEND",
        "cutoff": float(material.get("alphaCutoff", 0.5)) if mode == "MASK" else 0.0,
        "double_sided": bool(material.get("doubleSided", False)),
        "lit": not unlit,
        "material": str(material.get("name", "")),
    }


def _base(material: dict, extensions: dict) -> tuple[np.ndarray, dict | None]:
    """The linear base colour factor [4] and the textureInfo; diffuse stands for it where a file has only gloss."""
    if "KHR_materials_pbrSpecularGlossiness" in extensions:
        gloss = extensions["KHR_materials_pbrSpecularGlossiness"]
        return np.array(gloss.get("diffuseFactor", [1.0] * 4), float), gloss.get("diffuseTexture")
    rough = material.get("pbrMetallicRoughness", {})
    return np.array(rough.get("baseColorFactor", [1.0] * 4), float), rough.get("baseColorTexture")


def _colors(given: np.ndarray | None, factor: np.ndarray, n: int, vertices: np.ndarray) -> np.ndarray:
    """Vertex colours times the factor, [n, 4] float32."""
    if given is None:
        return np.tile(factor, (n, 1)).astype(np.float32)
    given = np.clip(given, 0, 1)[vertices]
    if given.shape[1] == 3:
        given = np.hstack([given, np.ones((n, 1))])
    return (given * factor).astype(np.float32)


def _texture(document: Document, info: dict | None, attribute: Callable, vertices: np.ndarray) -> Texture | None:
    """A textureInfo with its coordinates, KHR_texture_transform applied."""
    if info is None:
        return None
    transform = info.get("extensions", {}).get("KHR_texture_transform", {})
    name = f"TEXCOORD_{transform.get('texCoord', info.get('texCoord', 0))}"
    uv = attribute(name)
    if uv is None:
        document.reading.note(f"a texture asks for {name}, which the mesh lacks, and is not drawn")
        return None
    if transform:
        # Counter-clockwise on the image, whose v goes down: (u, v) -> (c u + s v, -s u + c v).
        angle = float(transform.get("rotation", 0))
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        uv = (uv * transform.get("scale", [1, 1])) @ turn.T + transform.get("offset", [0, 0])
    pixels, sampler = document.texture(info["index"])
    wrap = sampler.get("wrapS"), sampler.get("wrapT")
    texture = Texture(
        pixels,
        uv[vertices].astype(np.float32),
        (wrap[0] != CLAMP, wrap[1] != CLAMP),
        sampler.get("magFilter") == NEAREST,
    )
    return mirrored(texture, (wrap[0] == MIRROR, wrap[1] == MIRROR))
