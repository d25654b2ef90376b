"""Options of a load from the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from siglip_port.checkpoint.errors import CheckpointError

_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class HubOptions:
    """Options of a load from the Hub; ignored for local paths.

    Attributes:
        revision: Branch, tag or commit; None for the revision in the address, or `main`.
        local_files_only: Whether to use only the local cache, never the network.
        token: Hub token; True for the stored token, False for none.
        cache_dir: Cache folder; None for the default of `huggingface_hub`.
        vision_only: Whether to download only the tensors of the vision encoder, if that is less
            than the whole file.

    Raises:
        ValueError: `token` is not a valid token. The message does not contain it.
    """

    revision: str | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    vision_only: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.token, str) and not _TOKEN.fullmatch(self.token):
            raise ValueError(
                "token must be a Hub token: printable ASCII without spaces, such as 'hf_...'"
            )

    @property
    def is_offline(self) -> bool:
        """Whether downloads are disabled by `local_files_only` or `HF_HUB_OFFLINE`."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    @property
    def cache_root(self) -> Path:
        """The cache folder, shared by all repositories; `~` is expanded.

        Raises:
            CheckpointError: It is in the home folder of a user who has none.
        """
        from huggingface_hub import constants

        root = Path(self.cache_dir or constants.HF_HUB_CACHE)
        try:
            return root.expanduser()
        except RuntimeError as error:
            raise CheckpointError(
                f"the Hub's cache {root} needs a home folder, which this user does not have; set "
                "HF_HOME to a folder"
            ) from error
