"""Single pictures without cameras among the renders of 2D batches. Both halves are sources of batches.py's."""

from typing import Any

import torch
from torch import Tensor

from mvdream_fast.core.processes import ALONE, Ranks
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import Batch, Source

PICTURE_SHARE = 0.25  # of a 2D batch, where there are pictures


class WithPictures:
    """A source whose 2D batches are pictures to PICTURE_SHARE, and single views of renders for the rest.

    MVDream (arXiv 2308.16512, section 3.2) trains its 2D mode on pictures of another data set.
    """

    def __init__(self, renders: Source, pictures: Source):
        self.renders, self.pictures = renders, pictures

    def batch(self, stream: Stream, n_scenes: int, n_views: int, multi_view: bool, ranks: Ranks = ALONE) -> Batch:
        """As ImageSource.batch; pictures stand anywhere among the renders."""
        total = n_scenes * n_views
        n = int(PICTURE_SHARE * total)
        if multi_view or not n:
            return self.renders.batch(stream, n_scenes, n_views, multi_view, ranks)
        order = stream.permutation(total).tolist()  # the renders' places in the batch, then the pictures'
        own = ranks.part(list(range(total)))
        seeds, found = stream.integers(0, 2**31, 2).tolist(), dict[int, tuple[Tensor, str]]()
        for source, seed, places in zip((self.renders, self.pictures), seeds, (order[:-n], order[-n:]), strict=True):
            rows = [row for row, place in enumerate(places) if place in own]
            if rows:
                part = source.batch(Stream(seed, 0, "part of a batch"), len(places), 1, False, _Rows(rows))
                found |= zip((places[row] for row in rows), zip(part.images, part.captions, strict=True), strict=True)
        images, captions = zip(*(found[place] for place in own), strict=True)
        return Batch(torch.stack(images), None, list(captions), 1, encoded=part.encoded)


class _Rows(Ranks):
    """A process whose share of a batch is these rows of it."""

    def __init__(self, rows: list[int]):
        super().__init__()
        self._rows = rows

    def part(self, rows: Any) -> Any:
        return [rows[i] for i in self._rows]
