"""The renderer without OpenGL: a numpy rasteriser, and the constants of the look that both renderers share.

World frame and camera axes are camera.py's (z up, OpenGL camera axes).
"""

import numpy as np

# Ambient + up + headlight + key, raised by 10 % so that a white object comes out white.
AMBIENT, SKY, HEADLIGHT, KEY = 0.385, 0.165, 0.44, 0.275
KEY_DIRECTION = np.array([-0.46, -0.62, 0.64], np.float32) / np.linalg.norm([-0.46, -0.62, 0.64])


def view_projection(c2w: np.ndarray, fovy: float) -> np.ndarray:
    """World -> clip space, float64 [4, 4]; near and far planes hug the unit ball (the normalised object)."""
    distance = float(np.linalg.norm(c2w[:3, 3]))
    near, far = max(distance - 1.05, 0.02 * distance), distance + 1.05
    f = 1 / np.tan(fovy / 2)
    projection = np.array(
        [[f, 0, 0, 0], [0, f, 0, 0], [0, 0, (far + near) / (near - far), 2 * far * near / (near - far)], [0, 0, -1, 0]]
    )
    return projection @ np.linalg.inv(c2w.astype(np.float64))
