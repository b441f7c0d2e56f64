"""The packing of samples under nerfacc's name for it; it lives in scan."""

from mvdream_fast.nerfacc_compat.scan import pack_info

__all__ = ["pack_info"]
