"""The gate `interface`, in full: every public entrance of the port against the reference.

`table` lists the entrances, each with transformers' counterpart and the function that checks it.
"""

from siglip_port.parity.siglip.entrances.table import ENTRANCES, check_entrances

__all__ = ["ENTRANCES", "check_entrances"]
