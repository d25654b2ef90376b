"""Find the source of a checkpoint: a local folder or file, or a Hub repository."""

from __future__ import annotations

import os
import re
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
from siglip_port.hub.subfolder import Subfolder, no_subfolder, parse_subfolder


def find_source(
    source: str | os.PathLike[str],
    options: HubOptions | None = None,
    subfolder: str | None = None,
) -> Source:
    """Return the source of a checkpoint. Existing local paths come before Hub ids.

    Args:
        source: Folder, `.safetensors` file next to its `config.json`, `.npz` file, or Hub id; also
            `name@revision`, `hf://name@revision/subfolder/file`, `hf-hub:name`, or the URL of a
            model page, or of one of its folders or files.
        options: Options of Hub repositories.
        subfolder: Folder of the files, relative to the local folder or repository; None for none.

    Raises:
        CheckpointError: `source` is neither a local checkpoint nor a Hub address, or `subfolder` is
            invalid or does not exist.
    """
    if subfolder is not None:
        subfolder = parse_subfolder(subfolder)
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"source must be a path or a Hub id, got {type(source).__name__}")
    local = find_local(str(source))
    if local is not None:
        return local if subfolder is None else local_subfolder(local, subfolder)
    address = parse_address(source) if isinstance(source, str) else None
    if address is not None:
        return open_repository(str(source), address, options or HubOptions(), subfolder)
    raise CheckpointError(
        f"{str(source)!r} is neither a local path nor a Hub id; pass a folder, a .safetensors or "
        ".npz file, or a Hub id such as 'google/siglip-base-patch16-224'"
        + long_id_advice(str(source))
    )


def find_local(name: str) -> LocalFolder | None:
    """Return the checkpoint at a local path; None if the path does not exist.

    Raises:
        CheckpointError: The path cannot be read, or is a file of another format.
    """
    try:
        path = Path(name).expanduser()
        is_folder = bool(name) and path.is_dir()  # Path("") is the working folder
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name!r}: cannot be read ({error})") from error
    if is_folder:
        return LocalFolder(path, name)
    if not is_file:
        return None
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{name}: neither a .safetensors nor an .npz file; pass one, or the checkpoint folder"
            + pickle_advice([path.name])
        )
    return LocalFolder(path.parent, name, weights=path.name)


def local_subfolder(local: LocalFolder, subfolder: str) -> Subfolder:
    """Return the checkpoint in a subfolder of a local folder.

    Raises:
        CheckpointError: The subfolder does not exist, or the local checkpoint is a file.
    """
    if local.weights is not None:
        raise CheckpointError(
            f"{local.title} is a file, which has no folder {subfolder!r}; pass the folder that "
            "contains it, or omit subfolder="
        )
    if not (local.folder / subfolder).is_dir():
        raise no_subfolder(local, subfolder)
    return Subfolder(local, subfolder)


def long_id_advice(source: str) -> str:
    """Return what to pass for a Hub id with a folder; empty if it is not one."""
    match = re.fullmatch(r"(?:models/)?([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+))?", source.strip("/ "))
    if match is None:
        return ""
    name, folder = match.groups()
    if folder is None:
        return f"; if it is on the Hub, pass {name!r}"
    return f"; if it is a folder on the Hub, pass {name!r} with subfolder={folder!r}"


def open_repository(
    source: str, address: HubAddress, options: HubOptions, subfolder: str | None = None
) -> Source:
    """Return the repository of an address, or its subfolder.

    A revision in the address is added to the options.

    Raises:
        CheckpointError: The address and the options name different revisions or subfolders, or the
            address names a file without weights.
    """
    if address.revision is not None and options.revision not in (None, address.revision):
        raise CheckpointError(
            f"{redact(source)}: revision {address.revision!r} in the address conflicts with "
            f"revision={options.revision!r}; pass only one"
        )
    options = replace(options, revision=address.revision or options.revision)
    weights = weights_file(source, address.filename)
    if address.subfolder is None:
        folder = subfolder
    else:
        folder = parse_subfolder(address.subfolder)
        if subfolder not in (None, folder):
            raise CheckpointError(
                f"{redact(source)}: folder {folder!r} in the address conflicts with "
                f"subfolder={subfolder!r}; pass only one"
            )
    if folder is None:
        return HubRepository(address.name, options, weights=weights)
    return Subfolder(HubRepository(address.name, options), folder, weights)


def weights_file(source: str, filename: str | None) -> str | None:
    """Return the weights file of an address; None for a folder or its `config.json`.

    Raises:
        CheckpointError: The file is not a weights file.
    """
    if filename is None or filename == CONFIG:
        return None
    if not filename.endswith(SUFFIXES):
        raise CheckpointError(
            f"{redact(source)}: {filename!r} is not a weights file; pass the repository or a "
            "folder of it, or a .safetensors or .npz file" + pickle_advice([filename])
        )
    return filename
