"""Whether views have the colours that their prompt asks for, by the same names that captions of renders are given.

Owes nothing to a trained judge: what a pixel is called is data/captions.py's, which captions of renders are worded by.
"""

from torch import Tensor

from mvdream_fast.data.captions import NAMES, mentioned, shares
from mvdream_fast.evaluation.words import plain_words

_SPELLED = {"grey": "gray"}


def asked(text: str) -> frozenset[str]:
    """The colours that a text names: "a red and grey bus" -> red, gray.

    A word for a colour is one wherever it stands; "an orange" is, too.
    """
    return frozenset(_SPELLED.get(word, word) for word in plain_words(text).split()) & frozenset(NAMES)


def kept(images: Tensor, masks: Tensor, text: str) -> float | None:
    """The share of the colours asked for in a text that a caption of the views would say; None where it names none.

    A caption says the one or two colours that most of a thing has. 0 where nothing is seen.

    Args: images [V, 3, Hp, Wp] in [0, 1]; masks, bool [V, Hp, Wp], where the thing is.
    """
    wanted = asked(text)
    if not wanted:
        return None
    seen = images.movedim(1, -1)[masks].cpu().numpy()  # [K, 3]
    said = mentioned(shares(seen)) if len(seen) else ()
    return len(wanted & frozenset(said)) / len(wanted)
