"""sRGB and linear light (IEC 61966-2-1), both in [0, 1]. A leaf: numpy only."""

import numpy as np


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """What a display shows for sRGB values, as linear light."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0) + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """The inverse of to_linear."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)
