"""Downloads from the Hub's Xet store by `huggingface_hub` and `hf_xet`."""

from __future__ import annotations

import shutil
from pathlib import Path

from siglip_port.hub.errors import RetriesExhaustedError
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.redact import describe_error
from siglip_port.hub.retry import MIN_PROGRESS_BYTES, call_with_timeout

CLIENT_IDLE_SECONDS = 30.0
"""A download without a write for this time is given up, in seconds."""


def download_with_client(name: str, file: RemoteFile, path: Path, token: str | bool | None) -> Path:
    """Download a file from the Xet store through `huggingface_hub`.

    Args:
        name: Hub id.
        file: File on the Hub.
        path: Path of the finished file; the staged file is next to it.
        token: Hub token; True for the stored token, False for none.

    Returns:
        Path of the staged file.

    Raises:
        OSError: The file cannot be written.
        RetriesExhaustedError: The download failed, or nothing was written for
            `CLIENT_IDLE_SECONDS`.
    """
    from huggingface_hub import hf_hub_download

    folder = path.with_suffix(".xet")
    target = path.with_suffix(".stream")

    def download() -> str:
        return hf_hub_download(
            name, file.filename, revision=file.commit, local_dir=folder, token=token
        )

    def progress() -> int:
        sizes = [part.stat().st_size for part in folder.rglob("*") if part.is_file()]
        return sum(sizes) // MIN_PROGRESS_BYTES

    try:
        Path(call_with_timeout(CLIENT_IDLE_SECONDS, download, progress)).replace(target)
        return target
    # The errors of Xet and of the HTTP libraries have no common base class.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RetriesExhaustedError(
            "the Xet store (cas-server.xethub.hf.co on huggingface.co) failed as well "
            f"({describe_error(error)})"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
