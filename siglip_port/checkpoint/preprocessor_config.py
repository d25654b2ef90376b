"""`preprocessor_config.json`: how transformers' image processors make `pixel_values`.

Sources: the files of the google/siglip* repositories; transformers 5.23
`models/siglip/image_processing_siglip.py` and `models/siglip2/image_processing_siglip2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from siglip_port.checkpoint.formats import SUFFIXES
from siglip_port.config import SigLipVisionConfig, is_number

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""PIL's number of each resampling filter."""

REFERENCES = ("processor_class", "auto_map")
"""Keys that refer to files beside the configuration, which a saved encoder does not have."""

# Key in other configurations -> key of transformers.
MEAN_AND_STD = (
    ("mean", "image_mean"),
    ("std", "image_std"),
    ("image_mean", "image_mean"),
    ("image_std", "image_std"),
)


def default(config: SigLipVisionConfig, resample: int | None = None) -> dict[str, Any]:
    """Return the `preprocessor_config.json` of the published checkpoints.

    Args:
        config: Architecture of the model.
        resample: PIL's filter number; None for bicubic (3), or bilinear (2) in NaFlex models.
    """
    common = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
    }
    if config.naflex:
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            **common,
            "patch_size": config.patch_size,
            "max_num_patches": config.num_patches,
            "resample": 2 if resample is None else resample,
        }
    return {
        "image_processor_type": "SiglipImageProcessor",
        **common,
        "resample": 3 if resample is None else resample,
        "size": {"height": config.image_size, "width": config.image_size},
    }


def derive(
    config: SigLipVisionConfig,
    stored: Mapping[str, Any] | None,
    content: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
    """Derive the `preprocessor_config.json` of a model.

    Args:
        config: Architecture of the model.
        stored: Contents of the checkpoint's `preprocessor_config.json`. A file of a SigLIP
            processor, or of an unnamed one, is used with `size` set to the model's. From the file
            of another processor, only filter, mean and std are used.
        content: Contents of the configuration file, where timm and open_clip store filter, mean and
            std.
        name: Name of the checkpoint. Without other information, SigLIP 2 is resized with the
            bilinear and SigLIP with the bicubic filter, as in transformers' conversion script.
    """
    if stored is not None and is_siglip_processor(config, stored):
        return complete(config, stored)
    is_siglip2 = "siglip2" in last_part(name).lower()
    result = default(config, 2 if is_siglip2 else None)
    sections = [content.get("pretrained_cfg"), content.get("preprocess_cfg"), stored]
    for section in sections:
        if isinstance(section, Mapping):
            result |= filter_and_mean(section)
    return result


def is_siglip_processor(config: SigLipVisionConfig, stored: Mapping[str, Any]) -> bool:
    """Return whether a file belongs to the model's SigLIP processor, or names no processor."""
    kind = str(stored.get("image_processor_type", stored.get("feature_extractor_type", "")))
    prefix = "Siglip2" if config.naflex else "SiglipImage"
    return not kind or kind.startswith(prefix)


def complete(config: SigLipVisionConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of a SigLIP processor, and the model's image size."""
    defaults = default(config)
    if config.naflex:
        return {**defaults, "max_num_patches": 256, **stored}
    if is_other_size(stored.get("size")):
        return {**defaults, **stored}
    return {**defaults, **stored, "size": defaults["size"]}


def without_references(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without names of a processor and of code, which are other files.

    A `processor_class` such as `SiglipProcessor` makes transformers look for a tokenizer.
    """
    return {key: value for key, value in content.items() if key not in REFERENCES}


def is_other_size(size: object) -> bool:
    """Return whether a size is not a height and a width, such as 224 or `{"shortest_edge": 224}`.

    It is kept so that `ImageProcessor` rejects it.
    """
    if isinstance(size, Mapping):
        return not {"height", "width"} <= size.keys()
    return isinstance(size, int)


def filter_and_mean(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid values of filter, mean and std in another model's configuration."""
    result: dict[str, Any] = {}
    for key, name in MEAN_AND_STD:
        value = section.get(key)
        if isinstance(value, list) and len(value) == 3 and all(is_finite_float(v) for v in value):
            result[name] = value
    resample = section.get("resample", RESAMPLE.get(str(section.get("interpolation"))))
    if is_finite_float(resample) and resample in RESAMPLE.values():
        result["resample"] = resample
    return result


def last_part(name: str) -> str:
    """Return the last component of a path or Hub id; the last two for a weights file."""
    parts = name.replace("\\", "/").rstrip("/").split("/")
    if parts[-1].endswith(SUFFIXES):
        return "/".join(parts[-2:])
    return parts[-1]


def is_finite_float(value: object) -> bool:
    """Return whether a value is a number that fits any floating-point type."""
    return is_number(value) and abs(value) < 1e30
