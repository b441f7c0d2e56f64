"""Checks that prompts.txt asks for pairs of words that training captions know but never pair.

    python benchmarks/check_prompts.py SHARDS

Rewrites prompts_near.txt: the training captions that hold the nouns of a prompt, which is what
tests/evaluation/test_prompts.py checks against without the shards.
"""

import sys
from pathlib import Path

from mvdream_fast.data.batches import SUFFIX, Shards
from mvdream_fast.data.captions import NAMES
from mvdream_fast.evaluation.judging import is_new, read_prompts

HERE = Path(__file__).parent


def near(prompt: str, caption: str) -> bool:
    """Whether a caption has all words of a prompt but its colours and articles."""
    nouns = set(prompt.split()) - {"a", "an", *NAMES}
    return nouns <= set(caption.replace(",", " ").split())


def main(folder: str) -> None:
    captions = [caption for caption in Shards(Path(folder)).captions() if caption != SUFFIX]
    prompts = read_prompts(HERE / "prompts.txt")
    new = [prompt for prompt in prompts if is_new(prompt, captions)]
    print(f"{len(prompts)} prompts, {len(new)} of new pairs, against {len(captions)} training captions")
    print("seen: " + "; ".join(prompt for prompt in prompts if prompt not in new))
    kept = sorted(caption for caption in captions if any(near(prompt, caption) for prompt in prompts))
    (HERE / "prompts_near.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
