"""Cache of `optimize`: choices and compiled files, one folder per model.

The folder name is a hash of the weights, the configuration, the CPU and the versions of all
compilers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from siglip_port import __version__, atomic
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize.choice import Choice

log = logging.getLogger(__name__)


def model_cache_folder(
    model: SigLipVisionModel, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Return the cache folder of one model.

    Args:
        model: Model, whose weights are hashed.
        cache_dir: Cache folder; None for `engines` of siglip_port in the user's cache.
    """
    if cache_dir is None:
        cache_dir = user_cache() / "siglip_port" / "engines"
    return Path(cache_dir) / model_fingerprint(model)


def user_cache() -> Path:
    """Return the user's cache folder; for a user without a home folder, one of this process."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # HOME is not set, and the user has no account
        return Path(temporary_cache().name)


@functools.cache
def temporary_cache() -> tempfile.TemporaryDirectory[str]:
    """Create a cache folder that is deleted when this process ends."""
    log.warning(
        "engines are not cached, since this user has no home folder; set XDG_CACHE_HOME to a "
        "folder, or pass cache_dir="
    )
    return tempfile.TemporaryDirectory(prefix="siglip_port-")


def model_fingerprint(model: SigLipVisionModel) -> str:
    """Hash the configuration, weights, CPU and versions: 32 hexadecimal digits."""
    return short_hash(repr(model.config), *compiler_versions(), weights_hash(model))


def weights_hash(model: SigLipVisionModel) -> str:
    """Hash every bit of every parameter: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def short_hash(*parts: str) -> str:
    """Hash strings: 32 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def machine_name(device: torch.device) -> str:
    """Describe the hardware that timings depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = processor_info().get("model name", platform.machine())
    return f"{torch.get_num_threads()} threads, {processor}"


def processor_info() -> dict[str, str]:
    """Return the first CPU's entries of /proc/cpuinfo; empty except on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    info = {}
    for line in lines:
        key, _, value = line.partition(":")
        info[key.strip()] = value.strip()
    return info


def compiler_versions() -> list[str]:
    """Return everything that invalidates compiled files: versions and CPU instructions."""
    flags = processor_info().get("flags", platform.processor())
    engines = [installed_version(package) for package in ("onnxruntime", "openvino")]
    return [torch.__version__, *engines, __version__, flags]


def installed_version(package: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def load_choice(path: Path) -> Choice | None:
    """Load a cached choice; None if there is none or it is unreadable."""
    try:
        return Choice(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def save_choice(path: Path, choice: Choice) -> None:
    """Cache a choice. On failure, log a warning: the next process measures again."""
    try:
        with atomic.staging_dir(path.parent) as staging:
            file = staging / path.name
            file.write_text(json.dumps(asdict(choice), indent=1), encoding="utf-8")
            atomic.commit_files([file], path.parent)
    except OSError as error:
        log.warning("engine choice not cached, the next process measures again: %s", error)
