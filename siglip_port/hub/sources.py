"""Where a checkpoint's bytes come from: a folder, a file in a folder, or a Hub repository."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import SUFFIXES
from siglip_port.checkpoint.source import CONFIG, Source, pickle_advice
from siglip_port.hub.address import HubAddress, parse_address
from siglip_port.hub.local import LocalFolder
from siglip_port.hub.options import HubOptions
from siglip_port.hub.redact import redact
from siglip_port.hub.repository import HubRepository


def find_source(source: str | os.PathLike[str], options: HubOptions | None = None) -> Source:
    """Decide what `source` is.

    What exists on this machine is local, else what looks like a Hub id is one.

    Args:
        source: a folder, a `.safetensors` file with its `config.json` beside it, an `.npz` file, or
            a Hub id. Also `name@revision`, `hf://name@revision/file`, `hf-hub:name`, and the
            address of the Hub's page of a model or of one of its files.
        options: how a repository of the Hub is read.

    Raises:
        CheckpointError: it is none of these, or a file of another format.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"the source must be a path or a Hub id, got a {type(source).__name__}"
        )
    local = find_local(str(source))
    if local is not None:
        return local
    address = parse_address(source) if isinstance(source, str) else None
    if address is not None:
        return open_repository(str(source), address, options or HubOptions())
    raise CheckpointError(
        f"{str(source)!r} does not exist on this machine, and is no Hub id such as "
        "'google/siglip-base-patch16-224'; "
        "pass a folder, a .safetensors or .npz file, or a Hub id"
    )


def find_local(name: str) -> LocalFolder | None:
    """Return the checkpoint at a path of this machine; None where there is nothing.

    Raises:
        CheckpointError: it cannot be read, or is a file of another format.
    """
    try:
        path = Path(name).expanduser()
        is_folder = bool(name) and path.is_dir()  # Path("") would be this folder
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name!r} cannot be read: {error}") from error
    if is_folder:
        return LocalFolder(path, name)
    if not is_file:
        return None
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{name} is neither a .safetensors nor an .npz file; pass one, or the folder that "
            "holds the checkpoint" + pickle_advice([path.name])
        )
    return LocalFolder(path.parent, name, weights=path.name)


def open_repository(source: str, address: HubAddress, options: HubOptions) -> HubRepository:
    """Return the repository that an address names, with what else it names put into the options.

    Raises:
        CheckpointError: the address and the options name two revisions, or the address names a file
            that holds no weights.
    """
    if address.revision is not None and options.revision not in (None, address.revision):
        raise CheckpointError(
            f"{redact(source)} names the revision {address.revision!r}, and "
            f"revision={options.revision!r}: pass one"
        )
    revision = address.revision or options.revision
    weights = weights_file(source, address.filename)
    return HubRepository(address.name, replace(options, revision=revision), weights=weights)


def weights_file(source: str, filename: str | None) -> str | None:
    """Return the weights file that an address names.

    None where it names the repository, or its configuration.
    """
    if filename is None or filename == CONFIG:
        return None
    if "/" in filename or not filename.endswith(SUFFIXES):
        raise CheckpointError(
            f"{redact(source)} names {filename!r}; pass the repository, or a .safetensors or "
            ".npz file at its top" + pickle_advice([filename])
        )
    return filename
