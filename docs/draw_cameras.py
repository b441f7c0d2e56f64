"""Draws docs/cameras.png from the code's own cameras: `python docs/draw_cameras.py`."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Arc, Circle, Polygon

from mvdream_fast.camera import Cameras, orbit_cameras

BLUE, RED, GREEN, GREY = "#1f5fa8", "#c03a2b", "#2e8b57", "#888888"
FOVY_DEG, ELEVATION_DEG = 40.0, 30.0


def draw_camera(axes, cameras: Cameras, index: int, across: int, along: tuple[int, int], label: str) -> None:
    """A frustum seen along a world axis; `across` is the column of c2w it is as wide as, `along` the axes drawn."""
    pose = cameras.c2w[index]
    eye, forward, side = (pose[list(along), column] for column in (3, 2, across))
    half = 0.45 * math.tan(float(cameras.fovy[index]) / 2)
    corners = [eye - 0.45 * forward + sign * half * side for sign in (1, -1)]
    axes.add_patch(Polygon([eye.tolist(), *(c.tolist() for c in corners)], color=BLUE, alpha=0.35))
    axes.plot(*eye.tolist(), "o", color=BLUE, markersize=4)
    place = eye + 0.25 * forward
    towards = "left" if place[0] > 1 else "right" if place[0] < -1 else "center"
    axes.text(*place.tolist(), label, ha=towards, va="center", fontsize=8, color=BLUE)


def from_above(axes) -> None:
    cameras = orbit_cameras(4, 0.0, 0.0, 360.0, distance=2.0, fovy_deg=FOVY_DEG)
    axes.set_title("From above: azimuths", fontsize=10)
    axes.add_patch(Circle((0, 0), 2.0, fill=False, linestyle=":", color=GREY))
    axes.add_patch(Circle((0, 0), 0.6, color=GREY, alpha=0.4))
    axes.annotate("", (0, -1.15), (0, -0.5), arrowprops={"arrowstyle": "-|>", "color": RED, "lw": 2})
    axes.text(-0.1, -0.95, "the object's front", fontsize=8, color=RED, ha="right")
    names = ("view 0: azimuth 0°", "view 1: 90°\n(its left side)", "view 2: 180°", "view 3: 270°\n(its right side)")
    for index, name in enumerate(names):
        draw_camera(axes, cameras, index, 0, (0, 1), name)
    axes.add_patch(Arc((0, 0), 3.2, 3.2, theta1=-80, theta2=-30, color=GREEN, lw=1.5))
    axes.annotate("", (1.43, -0.7), (1.35, -0.86), arrowprops={"arrowstyle": "-|>", "color": GREEN})
    axes.text(1.3, -1.75, "azimuth increases", fontsize=8, color=GREEN)
    draw_axes(axes, (-3.6, -2.4), ("+X", "+Y"))
    axes.set(xlim=(-4.1, 4.1), ylim=(-2.8, 2.8))


def from_the_side(axes) -> None:
    distance = 1 / math.sin(math.radians(FOVY_DEG / 2))
    camera = orbit_cameras(1, ELEVATION_DEG, 0.0, 360.0, distance=distance, fovy_deg=FOVY_DEG)
    axes.set_title("From the side: elevation, distance, field of view", fontsize=10)
    eye = camera.c2w[0, [1, 2], 3]
    axes.add_patch(Circle((0, 0), 1.0, fill=False, color=GREY))
    axes.text(0.1, -0.6, "unit\nsphere", fontsize=8, color=GREY, ha="center")
    for sign in (1, -1):
        edge = -camera.c2w[0, [1, 2], 2] + sign * math.tan(math.radians(FOVY_DEG / 2)) * camera.c2w[0, [1, 2], 1]
        end = eye + 3.4 * edge
        axes.plot([eye[0], end[0]], [eye[1], end[1]], color=BLUE, lw=0.8)
    draw_camera(axes, camera, 0, 1, (1, 2), "")
    axes.plot([eye[0], 0], [eye[1], 0], "--", color=GREEN, lw=1)
    axes.text(-1.05, 0.72, "distance", fontsize=8, color=GREEN, rotation=-30, ha="center", va="center")
    axes.plot([-3, 1.2], [0, 0], color=GREY, lw=0.6)
    axes.add_patch(Arc((0, 0), 2.6, 2.6, theta1=180 - ELEVATION_DEG, theta2=180, color=RED, lw=1.5))
    axes.text(-1.25, 0.15, "elevation", fontsize=8, color=RED)
    axes.add_patch(Arc(eye.tolist(), 1.5, 1.5, theta1=-ELEVATION_DEG - 20, theta2=-ELEVATION_DEG + 20, color=BLUE))
    axes.text(eye[0] + 0.8, eye[1] - 0.3, "fovy", fontsize=8, color=BLUE)
    draw_axes(axes, (-3.0, -1.7), ("+Y", "+Z"))
    axes.set(xlim=(-3.5, 1.6), ylim=(-1.9, 2.35))


def draw_axes(axes, corner: tuple[float, float], names: tuple[str, str]) -> None:
    for (dx, dy), name in zip(((0.6, 0), (0, 0.6)), names):
        axes.annotate("", (corner[0] + dx, corner[1] + dy), corner, arrowprops={"arrowstyle": "-|>", "lw": 1})
        axes.text(corner[0] + 1.35 * dx, corner[1] + 1.35 * dy, name, fontsize=8, ha="center", va="center")


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), dpi=80)
    from_above(left)
    from_the_side(right)
    for axes in (left, right):
        axes.set_aspect("equal")
        axes.axis("off")
    figure.tight_layout()
    path = Path(__file__).with_name("cameras.png")
    figure.savefig(path)
    reduce_colors(path)


def reduce_colors(path: Path) -> None:
    """64 colours are enough for lines on white, at a third of the bytes."""
    from PIL import Image

    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
