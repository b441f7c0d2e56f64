"""Writes frames as an animated WebP or, with the `video` extra, an MP4."""

import importlib.util
import io
from pathlib import Path

import numpy as np

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.files import atomic_write


def has_video() -> bool:
    """Whether PyAV is installed, which .mp4 needs."""
    return importlib.util.find_spec("av") is not None


def save_animation(frames: np.ndarray, path: Path | str, fps: int = 30) -> None:
    """frames [n, Hp, Wp, 3] uint8; a WebP loops for ever. Raises ArgumentError for another file type, OutputError."""
    path = Path(path)
    if path.suffix == ".webp":
        atomic_write(path, webp_bytes(frames, fps))
    elif path.suffix == ".mp4":
        atomic_write(path, _mp4(frames, fps))
    else:
        raise ArgumentError(f"an animation can be written as .webp or .mp4, got {path.suffix or path.name}")


def webp_bytes(frames: np.ndarray, fps: int = 30) -> bytes:
    """frames [n, Hp, Wp, 3] uint8 as a WebP file that loops for ever."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    out = io.BytesIO()
    # Pillow drops frames that equal the one before; the durations keep the turn's speed all the same.
    images[0].save(
        out, "WEBP", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, quality=80, method=2
    )
    return out.getvalue()


def _mp4(frames: np.ndarray, fps: int) -> bytes:
    try:
        import av
    except ImportError as error:
        raise ArgumentError("an .mp4 needs PyAV: pip install 'mvdream_fast[video]', or write a .webp") from error
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps)
        stream.height, stream.width = (size - size % 2 for size in frames.shape[1:3])
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            image = av.VideoFrame.from_ndarray(frame[: stream.height, : stream.width], format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return out.getvalue()
