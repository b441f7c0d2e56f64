"""The credits that CC-BY asks for, worded from a catalogue: libraries, licences, creators and what each made.

`python -m mvdream_fast.rendering.credits DIR...` prints them for the sweethome3d libraries under a DIR, or for a folder
of meshes with metadata.csv; NOTICE holds that text. A licence that weights may not ship under is refused.
"""

import sys
import textwrap
from collections import Counter
from pathlib import Path

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.rendering.catalogue import Entry, read_folder, read_sweethome3d

LICENCES = {
    "CC0-1.0": "CC0 1.0, public domain (https://creativecommons.org/publicdomain/zero/1.0/)",
    "CC-BY-3.0": "Creative Commons Attribution 3.0 (https://creativecommons.org/licenses/by/3.0/)",
    "CC-BY-4.0": "Creative Commons Attribution 4.0 (https://creativecommons.org/licenses/by/4.0/)",
    "BSD-3-Clause": "3-clause BSD licence",
    "ISC": "ISC licence",
    "MIT": "MIT licence",
}  # all that is trained on for weights that ship: no share-alike, no non-commercial, no GPL
SOURCES = {
    "Blend Swap CC-0": "Models by various authors from http://www.blendswap.com, cleaned and converted by Emmanuel "
    "Puybaret / eTeks; attribution is not asked for and given gladly",
    "Blend Swap CC-BY": "Models by various authors from http://www.blendswap.com, cleaned and converted by Emmanuel "
    "Puybaret / eTeks",
    "Kator Legaz catalog": "Licence in its United States version. Copyright 2003-2008 Andrew Kator & Jennifer Legaz",
    "Reallusion catalog": "Licence in its United States version. Copyright 2008-2016 Reallusion (http://www.reallusion.com)",
    "Scopia catalog": "Copyright Emmanuel Puybaret / eTeks and Scopia Visual Interfaces Systems, s.l. (http://www.scopia.es)",
}


def credits(entries: list[Entry]) -> str:
    """Plain text of at most 120 columns: a paragraph a library, then each creator with the models' names."""
    blocks = []
    for library in sorted({e.library for e in entries}):
        own = [e for e in entries if e.library == library]
        licence = LICENCES.get(own[0].licence, own[0].licence or "no licence stated")
        source = SOURCES.get(library, "")
        blocks.append(_wrap(f"{library}: {len(own)} models. {licence}. {source}".rstrip() + "."))
        creators = sorted({e.creator for e in own if e.creator}, key=str.lower)
        blocks += [_wrap(_line(name, [e.name for e in own if e.creator == name]), "  ") for name in creators]
    return "\n".join(blocks) + "\n"


def folder_credits(entries: list[Entry]) -> str:
    """As `credits`, for folders with metadata.csv: a paragraph for each creator and licence, their packs by name.

    Raises: InputFileError for a mesh without a licence, or under one that LICENCES does not have.
    """
    bad = [e for e in entries if e.licence not in LICENCES]
    if bad:
        raise InputFileError(
            f"{bad[0].archive}: the licence {bad[0].licence!r} is none of {', '.join(LICENCES)}; weights trained on it "
            f"must not ship ({len(bad)} of {len(entries)} meshes)"
        )
    blocks = []
    for creator, licence in sorted({(e.creator, e.licence) for e in entries}):
        packs = Counter(e.library for e in entries if (e.creator, e.licence) == (creator, licence))
        told = "; ".join(f"{name} ({n})" for name, n in sorted(packs.items()))
        blocks.append(_wrap(f"{creator}: {packs.total()} models. {LICENCES[licence]}. {told}."))
    return "\n".join(blocks) + "\n"


def _line(creator: str, names: list[str]) -> str:
    if len(names) > 40:
        return f"{creator}: {len(names)} models"
    counts = Counter(names)
    return f"{creator}: " + ", ".join(f"{n} ({k})" if k > 1 else n for n, k in sorted(counts.items()))


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 118, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False)


def main(places: list[str]) -> None:
    """Prints the credits of each folder."""
    for place in map(Path, places):
        if any(place.rglob("*.sh3f")):
            print(credits(read_sweethome3d(place)), end="")
        else:
            print(folder_credits(read_folder(place)), end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputFileError as error:
        sys.exit(f"credits: {error}")
