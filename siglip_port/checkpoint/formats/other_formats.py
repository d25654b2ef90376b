"""What else is found under the names of weights files, recognized by its first bytes."""

from __future__ import annotations

from siglip_port.checkpoint.formats.headers import OtherFormatError

PICKLES_REFUSED = (
    "to load a pickle can run any code. Where you trust its origin, transformers' "
    "`SiglipVisionModel.from_pretrained(SOURCE).save_pretrained(FOLDER)` makes safetensors of it"
)

PICKLE = ("a pickle, which is refused", PICKLES_REFUSED)
ARCHIVE = (
    "a zip archive: a pickle of torch.save, which is refused, or an .npz file",
    PICKLES_REFUSED,
)
WEB_PAGE = (
    "a web page, as a login or an error brings",
    "fetch it again, logged in where that is needed",
)
GIT_LFS = (
    "a pointer of Git LFS in the place of the file",
    "fetch the file itself: git lfs pull",
)

FORMATS = {
    b"pk\x03\x04": ARCHIVE,
    b"\x80\x02": PICKLE,
    b"\x80\x03": PICKLE,
    b"\x80\x04": PICKLE,
    b"\x80\x05": PICKLE,
    b"<!docty": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"<?xml": WEB_PAGE,
    b"{": ("JSON, as an error brings", "fetch it again"),
    b"version ": GIT_LFS,
    b"gguf": ("a GGUF file", "pass the safetensors that it was made from"),
    b"\x89hdf": ("an HDF5 file", "pass the checkpoint's safetensors"),
    b"\x93numpy": ("a single array of numpy", "pass an .npz or .safetensors file"),
    b"\x1f\x8b": ("compressed by gzip", "unpack it first"),
}
"""By the first bytes, in lower case: what the file is, and what to do."""


def refuse_other_formats(first: bytes) -> None:
    """Raise OtherFormatError if these are the first bytes of a file of another format."""
    start = first.lstrip().lower()
    for signature, (what, advice) in FORMATS.items():
        if start.startswith(signature):
            raise OtherFormatError(what, advice)
