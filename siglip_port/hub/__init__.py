"""Checkpoints on the Hub: addresses, the cache, and downloads that resume."""

from __future__ import annotations

from siglip_port.hub.client import unreachable_reason
from siglip_port.hub.local import LocalFolder
from siglip_port.hub.options import HubOptions
from siglip_port.hub.repository import HubRepository
from siglip_port.hub.sources import find_source

__all__ = ["HubOptions", "HubRepository", "LocalFolder", "find_source", "unreachable_reason"]
