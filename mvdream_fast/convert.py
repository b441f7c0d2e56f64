"""`python -m mvdream_fast.convert SRC DST`: a published model into a folder of config.json and safetensors files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mvdream_fast.checkpoints.folder import check_target
from mvdream_fast.core import cli


@dataclass(frozen=True)
class Flags:
    """Converts a released .pt file, a diffusers-layout folder or one of our own folders into one of ours."""

    src: Annotated[Path, tyro.conf.Positional]
    """The model to read."""
    dst: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it appears complete or not at all."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the weights written; as they are stored, by default."""
    overwrite: bool = False
    """Replace a model folder that exists."""


def main(flags: Flags) -> None:
    """Checks every name and shape of the source, then reads, checks and writes one part at a time."""
    check_target(flags.dst, flags.overwrite)
    import torch

    from mvdream_fast.checkpoints.manifest import PARTS
    from mvdream_fast.checkpoints.open import open_source, write_folder

    source = open_source(flags.src)
    for part in PARTS:
        source.check(part)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = None if flags.dtype is None else dtypes[flags.dtype]
    print(f"{flags.src}: {source.layout}, {source.config.name}")
    total = 0

    def read(part: str) -> dict[str, torch.Tensor]:
        nonlocal total
        tensors = source.tensors(part, dtype)
        n_parameters = sum(tensor.numel() for tensor in tensors.values())
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        kind = str(dtype or source.dtype(part)).removeprefix("torch.")
        print(f"  {part:<5} {len(tensors):4d} tensors {n_parameters:12,d} parameters {kind} {n_bytes / 1e9:6.3f} GB")
        total += n_bytes
        return tensors

    parts = ((part, lambda part=part: read(part)) for part in PARTS)
    write_folder(flags.dst, source.config, parts, source.vocabulary, source.stand_ins, flags.overwrite)
    print(f"wrote {flags.dst}, {total / 1e9:.3f} GB")


if __name__ == "__main__":
    cli.run(main, Flags, prog="convert")
