# The extension, which may not be built where types are checked. Its functions take addresses and sizes: ops/ checks
# what they stand for before a call.
from typing import Any

def __getattr__(name: str) -> Any: ...
