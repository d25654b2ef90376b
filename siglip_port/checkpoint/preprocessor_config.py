"""`preprocessor_config.json`.

How pictures become `pixel_values`, as the image processors of transformers read it.

Sources: the files of the google/siglip* repositories; transformers 5.23
`models/siglip/image_processing_siglip.py` and `models/siglip2/image_processing_siglip2.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from siglip_port.checkpoint.formats import SUFFIXES
from siglip_port.config import SigLipVisionConfig

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""PIL's numbers of the filters that a picture is resized with."""


def default(config: SigLipVisionConfig, resample: int | None = None) -> dict[str, Any]:
    """The file of the published checkpoint of this kind.

    Args:
        config: of the tower.
        resample: PIL's number of the filter; None for bicubic (3) as in SigLIP, or bilinear (2) in
            NaFlex towers.
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
        naflex = {
            "patch_size": config.patch_size,
            "max_num_patches": config.num_patches,
            "resample": 2 if resample is None else resample,
        }
        return {"image_processor_type": "Siglip2ImageProcessor", **common, **naflex}
    size = {"height": config.image_size, "width": config.image_size}
    return {
        "image_processor_type": "SiglipImageProcessor",
        **common,
        "resample": 3 if resample is None else resample,
        "size": size,
    }


def derive(
    config: SigLipVisionConfig,
    found: Mapping[str, Any] | None,
    contents: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
    """Works out the file that belongs to a tower.

    Args:
        config: of the tower.
        found: what lies beside the weights as `preprocessor_config.json`: of a SigLIP processor, or
            of none that is named, it is kept, but for a size that is not the tower's; of another
            model's, filter, mean and std are taken from it.
        contents: of the configuration, in which timm and open_clip write the same.
        name: of the checkpoint. Where nothing else tells, SigLIP 2 is resized bilinearly, SigLIP
            bicubically: the rule of transformers' own converter.
    """
    made = default(config, 2 if "siglip2" in _own_name(name).lower() else None)
    if found is not None:
        kind = str(found.get("image_processor_type", found.get("feature_extractor_type", "")))
        own = "Siglip2" if config.naflex else "SiglipImage"
        if not kind or kind.startswith(
            own
        ):  # what it does not tell is the processor's default, whatever the name
            known = {**default(config), **({"max_num_patches": 256} if config.naflex else {})}
            size = (
                {} if config.naflex or _keeps_shape(found.get("size")) else {"size": known["size"]}
            )
            return {**known, **found, **size}
    for content in (*_timm(contents), *([found] if found else ())):
        for theirs, ours in (
            ("mean", "image_mean"),
            ("std", "image_std"),
            ("image_mean",) * 2,
            ("image_std",) * 2,
        ):
            value = content.get(theirs)
            if isinstance(value, list) and len(value) == 3 and all(_is_number(v) for v in value):
                made[ours] = value
        resample = content.get("resample", RESAMPLE.get(str(content.get("interpolation"))))
        if _is_number(resample) and resample in RESAMPLE.values():
            made["resample"] = resample
    return made


def _keeps_shape(size: object) -> bool:
    """Whether a size is one that SigLIP never has, 224 or `{"shortest_edge": 224}`.

    `ImageProcessor` refuses it.
    """
    return isinstance(size, int) or (
        isinstance(size, Mapping) and not {"height", "width"} <= size.keys()
    )


def _own_name(name: str) -> str:
    """The name of the checkpoint itself, without the folders that it lies in.

    Of a file, with that of its folder.
    """
    parts = name.replace("\\", "/").rstrip("/").split("/")
    return "/".join(parts[-2:] if parts[-1].endswith(SUFFIXES) else parts[-1:])


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
    )  # of any float


def _timm(contents: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in ("pretrained_cfg", "preprocess_cfg"):
        if isinstance(content := contents.get(key), Mapping):
            yield content
