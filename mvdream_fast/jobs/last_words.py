"""What a process that a worker started said last."""

from pathlib import Path

from mvdream_fast.core.files import lines


def last_words(errors: Path, verb: str) -> str:
    """The last line of a process's errors that says anything, without its command's name; "" where there is none."""
    told = [line.strip() for line in lines(errors.read_bytes().decode(errors="replace")) if line.strip()]
    return (told or [""])[-1].removeprefix(f"{verb}: ")
