"""`preprocessor_config.json`.

How images become `pixel_values`, as the image processors of transformers read it.

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
"""PIL's numbers of the filters that an image is resized with."""

# How others name what transformers names as the second of each pair.
MEAN_AND_STD = (
    ("mean", "image_mean"),
    ("std", "image_std"),
    ("image_mean", "image_mean"),
    ("image_std", "image_std"),
)


def default(config: SigLipVisionConfig, resample: int | None = None) -> dict[str, Any]:
    """Return the file of the published checkpoint of this kind.

    Args:
        config: of the model.
        resample: PIL's number of the filter; None for bicubic (3) as in SigLIP, or bilinear (2) in
            NaFlex models.
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
    """Work out the file that belongs to a model.

    Args:
        config: of the model.
        stored: what lies beside the weights as `preprocessor_config.json`: of a SigLIP processor,
            or of none that is named, it is kept, but for a size that is not the model's; of another
            model's, filter, mean and std are taken from it.
        content: of the configuration, in which timm and open_clip write the same.
        name: of the checkpoint. Where nothing else tells, SigLIP 2 is resized bilinearly, SigLIP
            bicubically: the rule of transformers' own converter.
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
    """Whether a processor is SigLIP's of the kind of the model, or does not say whose it is."""
    kind = str(stored.get("image_processor_type", stored.get("feature_extractor_type", "")))
    own = "Siglip2" if config.naflex else "SiglipImage"
    return not kind or kind.startswith(own)


def complete(config: SigLipVisionConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Add what a SigLIP processor does not tell: its default, whatever the checkpoint's name."""
    defaults = default(config)
    if config.naflex:
        return {**defaults, "max_num_patches": 256, **stored}
    if is_other_size(stored.get("size")):
        return {**defaults, **stored}
    return {**defaults, **stored, "size": defaults["size"]}


def is_other_size(size: object) -> bool:
    """Whether a size is one that SigLIP never has, 224 or `{"shortest_edge": 224}`.

    `ImageProcessor` refuses it.
    """
    if isinstance(size, Mapping):
        return not {"height", "width"} <= size.keys()
    return isinstance(size, int)


def filter_and_mean(section: Mapping[str, Any]) -> dict[str, Any]:
    """Take filter, mean and std from what another model's code reads, where they make sense."""
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
    """Return the name of the checkpoint itself, without the folders that it lies in.

    Of a file, with that of its folder.
    """
    parts = name.replace("\\", "/").rstrip("/").split("/")
    if parts[-1].endswith(SUFFIXES):
        return "/".join(parts[-2:])
    return parts[-1]


def is_finite_float(value: object) -> bool:
    """Whether a value is a number that any float can hold."""
    return is_number(value) and abs(value) < 1e30
