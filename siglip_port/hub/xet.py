"""Files of the Hub's Xet store, by the Hub's own client."""

from __future__ import annotations

import shutil
from pathlib import Path

from siglip_port.hub.errors import RetriesExhaustedError
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.redact import describe_error
from siglip_port.hub.retry import MIN_PROGRESS_BYTES, call_with_timeout

CLIENT_IDLE_SECONDS = 30.0
"""The client is not waited for when it has written nothing for so long."""


def download_with_client(name: str, file: RemoteFile, path: Path, token: str | bool | None) -> Path:
    """Have the client fetch a file from the Xet store, where the other hosts do not give it.

    Args:
        name: the Hub id.
        file: at the Hub.
        path: beside which it is put.
        token: a Hub token, True for the stored one, False for none.

    Returns:
        Where it lies until it is moved.

    Raises:
        OSError: it cannot be written.
        RetriesExhaustedError: the client cannot fetch it either, or for `CLIENT_IDLE_SECONDS`
            nothing came.
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
    # Of Xet, of HTTP, of whatever the client uses: the errors have no base in common.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        store = "the Xet store (cas-server.xethub.hf.co, for the real Hub)"
        raise RetriesExhaustedError(
            f"{store} does not give it either ({describe_error(error)})"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
