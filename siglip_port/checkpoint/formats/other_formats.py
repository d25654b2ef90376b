"""Other formats that occur under the names of weights files, recognized by their first bytes."""

from __future__ import annotations

from siglip_port.checkpoint.formats.headers import OtherFormatError

PICKLES_REFUSED = (
    "loading a pickle can run arbitrary code; if you trust the source, convert it with "
    "transformers: SiglipVisionModel.from_pretrained(SOURCE).save_pretrained(FOLDER)"
)
PICKLE_ADVICE = f"pickles are refused: {PICKLES_REFUSED}"

PICKLE = ("a pickle", PICKLE_ADVICE)
ARCHIVE = ("a zip archive, such as a torch.save pickle or an .npz file", PICKLE_ADVICE)
WEB_PAGE = ("a web page, such as a login or error page", "download it again, logged in if needed")
GIT_LFS = ("a Git LFS pointer", "download the file itself: git lfs pull")

FORMATS = {
    b"pk\x03\x04": ARCHIVE,
    b"\x80\x02": PICKLE,
    b"\x80\x03": PICKLE,
    b"\x80\x04": PICKLE,
    b"\x80\x05": PICKLE,
    b"<!docty": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"<?xml": WEB_PAGE,
    b"{": ("JSON, such as an error response", "download it again"),
    b"version ": GIT_LFS,
    b"gguf": ("a GGUF file", "pass the safetensors file that it was converted from"),
    b"\x89hdf": ("an HDF5 file", "pass the checkpoint's safetensors file"),
    b"\x93numpy": ("a single NumPy array", "pass an .npz or .safetensors file"),
    b"\x1f\x8b": ("gzip-compressed data", "decompress it first"),
}
"""First bytes, in lower case -> the format and what to do."""


def refuse_other_formats(first: bytes) -> None:
    """Raise OtherFormatError if the first bytes are those of another known format."""
    start = first.lstrip().lower()
    for signature, (file_format, advice) in FORMATS.items():
        if start.startswith(signature):
            raise OtherFormatError(file_format, advice)
