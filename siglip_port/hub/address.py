"""Parse Hub ids, `name@revision`, `hf://` and `hf-hub:` addresses, and URLs of Hub pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import SUFFIXES
from siglip_port.checkpoint.source import PICKLE_SUFFIXES
from siglip_port.hub.redact import redact

_ID = r"(?P<name>[\w-][\w.-]*/[\w.-]+)"
_BARE_ID = re.compile(rf"{_ID}(?:@(?P<revision>[^\s@]+))?")
_URI_PATH = re.compile(rf"(?:models/)?{_ID}(?:@(?P<revision>[^/\s]+))?(?:/(?P<path>.+))?(?P<page>)")
_PAGE_PATH = re.compile(
    rf"/(?:models/)?{_ID}"
    r"(?:/(?P<page>tree|blob|resolve|raw)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
_PAGE_WITHOUT_SCHEME = re.compile(r"((www\.)?huggingface\.co|hf\.co)/[^/]+/")

_URI_SCHEMES = ("hf", "hf-hub", "hf_hub")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")  # not that of a folder such as v1.0
_FILE_SUFFIXES = (*SUFFIXES, ".json", *PICKLE_SUFFIXES)


@dataclass(frozen=True)
class HubAddress:
    """A repository, with the revision, subfolder and file that the address names, if any."""

    name: str
    revision: str | None = None
    filename: str | None = None
    subfolder: str | None = None


def parse_address(source: str) -> HubAddress | None:
    """Parse a Hub id or address; None if `source` is neither.

    Raises:
        CheckpointError: The address is not that of a model on the Hub.
    """
    text = source.strip().rstrip("/")
    if _PAGE_WITHOUT_SCHEME.match(text):
        text = f"https://{text}"
    scheme, colon, rest = text.partition(":")
    if not colon:
        return parse_id(text)
    if scheme in _URI_SCHEMES:
        path = rest.removeprefix("//")
        return parse_path(_URI_PATH, path, kind=path.partition("/")[0], address=text)
    if scheme in ("http", "https"):
        path = page_path(urlsplit(text), text)
        return parse_path(_PAGE_PATH, path, kind=path.strip("/").partition("/")[0], address=text)
    return None


def parse_id(text: str) -> HubAddress | None:
    """Parse `owner/name` or `owner/name@revision`; None if it looks like a file path."""
    match = _BARE_ID.fullmatch(text)
    if match is None or Path(match["name"]).suffix in _FILE_SUFFIXES:
        return None
    return HubAddress(match["name"], match["revision"])


def page_path(url: SplitResult, address: str) -> str:
    """Return the path of a Hub page, relative to the endpoint.

    Raises:
        CheckpointError: The URL has another host.
    """
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    if url.netloc == endpoint.netloc:
        return url.path.removeprefix(endpoint.path)
    if url.netloc not in _HUB_HOSTS:
        raise CheckpointError(
            f"{redact(address)}: {url.hostname} is not the Hub; pass a Hub id such as "
            "'google/siglip-base-patch16-224', or, to use a mirror, set HF_ENDPOINT"
        )
    return url.path


def parse_path(pattern: re.Pattern[str], path: str, *, kind: str, address: str) -> HubAddress:
    """Parse the path of an address.

    Args:
        pattern: Pattern of model paths.
        path: Path part of the address.
        kind: First component of the path: `datasets` or `spaces` if it is not a model.
        address: Whole address, for messages.

    Raises:
        CheckpointError: The path is not that of a model.
    """
    if kind in _OTHER_KINDS:
        raise CheckpointError(
            f"{redact(address)}: this is one of the Hub's {kind}, not a model; pass the Hub id of "
            "a model"
        )
    match = pattern.fullmatch(path)
    if match is None:
        raise CheckpointError(
            f"{redact(address)}: no model id in this address; pass a Hub id such as "
            "'google/siglip-base-patch16-224'"
        )
    folder, filename = split_path(_unquoted(match["path"]), match["page"])
    return HubAddress(match["name"], _unquoted(match["revision"]), filename, folder)


def split_path(path: str | None, page: str | None) -> tuple[str | None, str | None]:
    """Return folder and file of a path in a repository; None for what it does not name.

    Args:
        path: Path in the repository; None for its root.
        page: `tree` for the page of a folder, another word for that of a file; empty or None if
            only the suffix of the path distinguishes them.
    """
    if path is None:
        return None, None
    is_file = page != "tree"
    if not page:
        is_file = _FILE_SUFFIX.fullmatch(Path(path).suffix) is not None
    if not is_file:
        return path, None
    folder, _, filename = path.rpartition("/")
    return folder or None, filename


def _unquoted(text: str | None) -> str | None:
    return None if text is None else unquote(text)
