"""Several encodings side by side, summed or multiplied; and the table of all encodings."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mvdream_fast.core.rng import Stream
from mvdream_fast.tcnn_compat.config import Options
from mvdream_fast.tcnn_compat.encoder import Encoder, next_multiple
from mvdream_fast.tcnn_compat.grid import Grid
from mvdream_fast.tcnn_compat.waves import Frequency, Identity, OneBlob, SphericalHarmonics, TriangleWave

REDUCTIONS = {"Concatenation": None, "Sum": torch.sum, "Product": torch.prod}


@dataclass(frozen=True)
class Composite(Encoder):
    """`parts[i]` encodes the inputs from `begins[i]` on; their params follow each other."""

    n_dims: int
    parts: tuple[Encoder, ...]
    begins: tuple[int, ...]
    reduction: str

    @classmethod
    def read(cls, options: Options, n_dims: int) -> "Composite":
        """The composite of a configuration; raises ValueError where its parts do not fit n_dims or each other."""
        nested = list(options.nested("nested"))
        counts = [part.integer("n_dims_to_encode", 0, 0, n_dims) for part in nested]
        open_parts = [part for part in nested if "n_dims_to_encode" not in part]
        placed = any("dims_to_encode_begin" in part for part in nested)
        allowed = 0 if placed else 1
        requirement = "given for every part where one has dims_to_encode_begin" if placed else "missing once at most"
        for part in open_parts[allowed:]:
            part.require(False, "n_dims_to_encode", requirement, "give it")
        rest = n_dims - sum(counts)
        options.require(placed or rest >= 0, "nested", f"of {n_dims} inputs in all", "lower n_dims_to_encode")
        parts, begins, begin = [], [], 0
        for part, count in zip(nested, counts, strict=True):
            count = rest if part in open_parts else count
            begin = part.integer("dims_to_encode_begin", begin, 0, n_dims)
            part.require(begin + count <= n_dims, "dims_to_encode_begin", f"at most {n_dims - count}", "lower it")
            if count:
                parts.append(new_encoder(part, count))
                begins.append(begin)
            begin += count
        options.require(bool(parts), "nested", "of one input at least", "raise n_dims_to_encode")
        reduction = options.choice("reduction", "Concatenation", {name: name for name in REDUCTIONS})
        composite = cls(n_dims, tuple(parts), tuple(begins), reduction)
        widths = composite._widths()
        ok = reduction == "Concatenation" or len(set(widths)) == 1
        options.require(ok, "reduction", f"Concatenation for parts of {widths} columns", "make them equally wide")
        return composite

    @property
    def alignment(self) -> int:
        """That of all parts."""
        return math.lcm(*(part.alignment for part in self.parts))

    @property
    def n_params(self) -> int:
        """Numbers of all parts."""
        return sum(part.n_params for part in self.parts)

    @property
    def width(self) -> int:
        """Columns, of which some between the parts are padding."""
        widths = self._widths()
        return widths[0] if REDUCTIONS[self.reduction] else sum(widths)

    def _widths(self, total: int | None = None) -> list[int]:
        """Columns of each part with its padding, up to where the next may begin; the last one's fills up to `total`."""
        if REDUCTIONS[self.reduction]:
            return [total or next_multiple(part.width, self.alignment) for part in self.parts]
        widths: list[int] = []
        for part, after in pairwise(self.parts):
            done = sum(widths)
            widths.append(next_multiple(done + part.width, after.alignment) - done)
        return [*widths, total - sum(widths) if total else self.parts[-1].width]

    def initial(self, stream: Stream) -> Tensor:
        """Parameters to start from."""
        return torch.cat([part.initial(stream) for part in self.parts])

    def values(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, n_dims] and params [n_params] -> [P, width]."""
        return self.encode(x, params, self.width)

    def encode(self, x: Tensor, params: Tensor, width: int) -> Tensor:
        """The same, padded to [P, width]: by the last part, or by each where they are reduced."""
        pieces, widths = params.split([part.n_params for part in self.parts]), self._widths(width)
        parts = zip(self.parts, self.begins, pieces, widths, strict=True)
        out = [part.encode(x[:, begin : begin + part.n_dims], piece, w) for part, begin, piece, w in parts]
        reduce = REDUCTIONS[self.reduction]
        return reduce(torch.stack(out), dim=0) if reduce else torch.cat(out, dim=-1)


ENCODERS = {
    "Composite": Composite,
    "Frequency": Frequency,
    "Grid": Grid,
    "HashGrid": Grid,
    "DenseGrid": Grid,
    "TiledGrid": Grid,
    "Identity": Identity,
    "OneBlob": OneBlob,
    "SphericalHarmonics": SphericalHarmonics,
    "TriangleWave": TriangleWave,
}


def new_encoder(options: Options, n_dims: int) -> Encoder:
    """The encoding of a configuration, OneBlob where it names none."""
    return options.choice("otype", "OneBlob", ENCODERS).read(options, n_dims)
