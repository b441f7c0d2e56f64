"""The one form of a sentence in which it is looked up: in lists of prompts, tables of nouns, and what has a front.

What the sentence means is judging.py's, what its nouns are classifier.py's and reference.py's.
"""

import re

from mvdream_fast.models.tokenizer import check_prompt

_WORD = re.compile(r"[^\W_]+(?:['-]+[^\W_]+)*")  # "jack-o'-lantern" and "two-legged" are words, quotes are not


def plain_words(text: str) -> str:
    """The words of a sentence, as the tokenizer reads it, with single spaces between and nothing else.

    "A red car.", "a  red car " and "“a red car”" are "a red car". Raises: ArgumentError as `check_prompt`.
    """
    return " ".join(_WORD.findall(check_prompt(text, allow_empty=True)))
