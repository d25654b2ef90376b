"""The options of a load from the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class HubOptions:
    """How a repository of the Hub is read. Of no meaning for a local path.

    Attributes:
        revision: branch, tag or commit; None for the one that the address names, or `main`.
        local_files_only: use the Hub's cache only, never the network.
        token: a Hub token, True for the stored one, False for none.
        cache_dir: instead of the Hub's usual cache folder.
        vision_only: of weights that are not cached, fetch only the tensors of the vision encoder,
            where that is less than the file.

    Raises:
        ValueError: `token` cannot be a token. The message does not repeat it.
    """

    revision: str | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    vision_only: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.token, str) and not _TOKEN.fullmatch(self.token):
            raise ValueError(
                "token must be the Hub token itself: it has characters, or is as short, as none "
                "can be"
            )

    @property
    def is_offline(self) -> bool:
        """Whether the Hub may not be asked, by this option or by `HF_HUB_OFFLINE`."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    @property
    def cache_root(self) -> Path:
        """The cache folder, which all repositories share."""
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE)
