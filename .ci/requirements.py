"""Prints the requirements of pyproject.toml, with the extras named: `requirements.py [--only] [EXTRA ...]`."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
only = "--only" in sys.argv
wanted = [extra for extra in sys.argv[1:] if extra != "--only"]
requirements = [] if only else list(project["dependencies"])
for extra in wanted:
    for requirement in project["optional-dependencies"][extra]:
        nested = re.fullmatch(r"mvdream_fast\[([\w,]+)\]", requirement)
        if nested:
            for name in nested.group(1).split(","):
                requirements += project["optional-dependencies"][name]
        else:
            requirements.append(requirement)
print(" ".join(dict.fromkeys(requirements)))
