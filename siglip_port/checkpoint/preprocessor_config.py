"""`preprocessor_config.json`: how transformers' image processors make `pixel_values`.

Sources: the files of the google/siglip* repositories; transformers 5.23
`models/siglip/image_processing_siglip.py`, `models/siglip2/image_processing_siglip2.py`,
`models/gemma3/image_processing_gemma3.py` and `models/auto/image_processing_auto.py`; timm 1.0.31
`data/transforms_factory.py`; open_clip `transform.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.key_rules import CodePreprocessing, Layout
from siglip_port.checkpoint.preprocessing import ASSUMED, Preprocessing, read_assumption
from siglip_port.checkpoint.registry import PUBLISHED
from siglip_port.config import SigLipVisionConfig
from siglip_port.image_options import (
    RESAMPLE,
    UnsupportedOptionsError,
    is_finite_number,
    parse_channel_values,
    parse_options,
)

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

REFERENCES = ("processor_class", "auto_map")
"""Keys that refer to files beside the configuration, which a saved encoder does not have."""

# Key in other configurations -> key of transformers.
MEAN_AND_STD = (
    ("mean", "image_mean"),
    ("std", "image_std"),
    ("image_mean", "image_mean"),
    ("image_std", "image_std"),
)

PROCESSED_AS_SIGLIP = (
    None,
    "siglip",
    "siglip_vision_model",
    "siglip2",
    "siglip2_vision_model",
    "paligemma",
    "colpali",
)
"""Values of `model_type` for which transformers uses SigLIP's image processor."""

SIGLIP2_VOCAB_SIZE = 256000
"""Vocabulary of the text encoders of SigLIP 2, which no SigLIP 1 checkpoint has."""

WORDS = {"siglip": RESAMPLE["bicubic"], "siglip2": RESAMPLE["bilinear"]}
"""Names of the preprocessing of the published checkpoints -> PIL's number of their filter."""

OPEN_CLIP_DEFAULTS = {
    "interpolation": "bicubic",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "resize_mode": "shortest",
}
"""Values of `preprocess_cfg` that open_clip uses for missing keys."""


@dataclass(frozen=True)
class StoredProcessor:
    """The file of an image processor.

    Attributes:
        filename: Name of the file, for messages.
        content: Options of the processor.
    """

    filename: str
    content: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Class of the processor; empty if the file names none."""
        kind = self.content.get("image_processor_type")
        if kind is None:
            kind = self.content.get("feature_extractor_type")
        return "" if kind is None else str(kind)


@dataclass(frozen=True)
class Clues:
    """What the files of a checkpoint say about its preprocessing.

    Attributes:
        name: Path or Hub id, for messages.
        layout: Layout of the weights.
        stored: Its image processor; None if there is no file, or none is cached.
        content: Contents of the configuration file; empty if there is none.
        origin: Hub id of the weights; None if unknown.
    """

    name: str
    layout: Layout
    stored: StoredProcessor | None
    content: Mapping[str, Any]
    origin: str | None


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


def derive(config: SigLipVisionConfig, clues: Clues) -> Preprocessing:
    """Derive the preprocessing of a checkpoint: from files, else from code, else by default.

    The names of local folders and files have no influence.

    Args:
        config: Architecture of the model.
        clues: What the files say.

    Raises:
        CheckpointError: The file of the model's image processor has an invalid value.
    """
    if clues.stored is not None:
        return from_stored(config, clues, clues.stored)
    if clues.layout.preprocessing is not None:
        return from_code(config, clues, clues.layout.preprocessing)
    if not clues.layout.has_hf_config:
        return from_sections(config, clues)
    return from_defaults(config, clues)


def from_word(config: SigLipVisionConfig, word: str | StoredProcessor, name: str) -> Preprocessing:
    """Return the preprocessing that the user states.

    Args:
        config: Architecture of the model.
        word: One of `WORDS`, or the options of a SigLIP processor.
        name: Path or Hub id of the checkpoint, for messages.

    Raises:
        ValueError: The options are not valid, or not those of the model's processor.
    """
    if isinstance(word, str):
        if config.naflex and word == "siglip":
            raise ValueError(
                "preprocessing='siglip' is for models of a fixed size, but this one is NaFlex; "
                "pass 'siglip2'"
            )
        return Preprocessing(
            default(config, WORDS[word]), "stated", f"preprocessing={word!r}", name
        )
    if not is_siglip_processor(config, word):
        expected = default(config)["image_processor_type"]
        raise ValueError(f"{word.filename} must be of a {expected}, got {word.kind}")
    try:
        parse_options({**default(config), **word.content})
    except ValueError as error:
        raise ValueError(f"{word.filename}: {error}") from error
    result = complete(config, name, word)
    return Preprocessing(result.config, "stated", result.source, name)


# --- from the file of an image processor ----------------------------------------------------------


def from_stored(config: SigLipVisionConfig, clues: Clues, stored: StoredProcessor) -> Preprocessing:
    """Return the preprocessing of an image processor's file.

    Of a processor that is not SigLIP's, only filter, mean and std are used, and the preprocessing
    is unknown.
    """
    if is_gemma3_without_crops(config, stored):
        stored = StoredProcessor(stored.filename, as_siglip(stored.content))
    if not is_siglip_processor(config, stored):
        reason = f"{stored.filename} is of {stored.kind}"
        return assumed_from(config, clues, stored.content, reason)
    if not stored.kind and not is_processed_as_siglip(clues):
        reason = f"{stored.filename} is of a {clues.content.get('model_type')} model"
        return assumed_from(config, clues, stored.content, reason)
    return complete(config, clues.name, stored)


def is_siglip_processor(config: SigLipVisionConfig, stored: StoredProcessor) -> bool:
    """Return whether a file belongs to the model's SigLIP processor, or names no processor."""
    prefix = "Siglip2" if config.naflex else "SiglipImage"
    return not stored.kind or stored.kind.startswith(prefix)


def is_gemma3_without_crops(config: SigLipVisionConfig, stored: StoredProcessor) -> bool:
    """Return whether a file is of Gemma 3's processor, which resizes like SigLIP's."""
    if config.naflex or not stored.kind.startswith("Gemma3ImageProcessor"):
        return False
    return stored.content.get("do_pan_and_scan") in (None, False)


def as_siglip(gemma3: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of Gemma 3's processor as those of SigLIP's."""
    names = default(SigLipVisionConfig()).keys()
    shared = {name: value for name, value in gemma3.items() if name in names}
    result = {"resample": RESAMPLE["bilinear"], **shared}
    return {**result, "image_processor_type": "SiglipImageProcessor"}


def is_processed_as_siglip(clues: Clues) -> bool:
    """Return whether transformers uses SigLIP's image processor for the checkpoint's model."""
    is_described = clues.layout.has_hf_config
    return not is_described or clues.content.get("model_type") in PROCESSED_AS_SIGLIP


def complete(config: SigLipVisionConfig, name: str, stored: StoredProcessor) -> Preprocessing:
    """Fill in the defaults of a SigLIP processor, and the model's image size.

    Args:
        config: Architecture of the model.
        name: Path or Hub id of the checkpoint.
        stored: File of a SigLIP processor.

    Raises:
        CheckpointError: A field has an invalid value.
    """
    content = {**class_defaults(config), **stored.content}
    if not stored.kind:
        content["image_processor_type"] = default(config)["image_processor_type"]
    try:
        assumption = read_assumption(content.pop(ASSUMED, None))
        options = parse_options(for_three_channels(config, content))
    except UnsupportedOptionsError as error:
        # Cropping is kept, so that `save_hf` hands on what transformers supports.
        reason = f"{stored.filename}: {error}"
        return Preprocessing(with_model_size(config, content), "unknown", reason, name)
    except ValueError as error:
        raise CheckpointError(
            f"{name}: {stored.filename}: {error}; download the file again, or pass preprocessing= "
            "to from_hf"
        ) from error
    content = with_model_size(config, content)
    if assumption is not None:
        return Preprocessing(content, assumption.status, assumption.reason, name)
    source = stored.filename
    if options.size not in (None, (config.image_size, config.image_size)):
        source += f", with the model's size {config.image_size} instead of {options.size}"
    return Preprocessing(content, "stored", source, name)


def class_defaults(config: SigLipVisionConfig) -> dict[str, Any]:
    """Return the values that a processor's file may omit."""
    defaults = default(config)
    if config.naflex:
        defaults["max_num_patches"] = 256
    return defaults


def with_model_size(config: SigLipVisionConfig, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the model's image size; NaFlex processors have none."""
    if config.naflex:
        return dict(content)
    return {**content, "size": default(config)["size"]}


def for_three_channels(config: SigLipVisionConfig, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without mean and std, if they have the length of a model without RGB."""
    remaining = dict(content)
    for name in ("image_mean", "image_std"):
        value = content.get(name)
        is_list = isinstance(value, list) and len(value) == config.num_channels
        if is_list and config.num_channels != 3:
            del remaining[name]
    return remaining


# --- without such a file --------------------------------------------------------------------------


def from_code(config: SigLipVisionConfig, clues: Clues, rule: CodePreprocessing) -> Preprocessing:
    """Return the preprocessing of the code that defines a layout."""
    result = {**default(config, rule.resample), "do_normalize": rule.do_normalize}
    title = clues.layout.title
    if rule.difference:
        return Preprocessing(result, "unknown", rule.difference, clues.name)
    if rule.tiled_by is not None and clues.content.get(rule.tiled_by) is not None:
        reason = f"{title} with {rule.tiled_by} divides images into tiles"
        return Preprocessing(result, "unknown", reason, clues.name)
    source = f"the code of {title}"
    if rule.only_for:
        source += f", for {rule.only_for}"
    return Preprocessing(result, "fixed", source, clues.name)


def from_sections(config: SigLipVisionConfig, clues: Clues) -> Preprocessing:
    """Return the preprocessing of timm's `pretrained_cfg` or open_clip's `preprocess_cfg`."""
    open_clip = clues.content.get("preprocess_cfg")
    if isinstance(open_clip, Mapping):
        return from_open_clip(config, clues, {**OPEN_CLIP_DEFAULTS, **open_clip})
    timm = clues.content.get("pretrained_cfg")
    if timm is None and "architecture" in clues.content:  # timm before 0.9
        timm = clues.content
    if isinstance(timm, Mapping):
        return from_timm(config, clues, timm)
    reason = "no file describes it"
    return assumed_from(config, clues, {}, reason)


def from_open_clip(
    config: SigLipVisionConfig, clues: Clues, section: Mapping[str, Any]
) -> Preprocessing:
    """Return the preprocessing of open_clip's `preprocess_cfg`, with its defaults filled in."""
    mode = section["resize_mode"]
    if mode != "squash":
        reason = f"resize_mode {mode!r} in open_clip_config.json crops or pads images"
        return assumed_from(config, clues, section, reason)
    return from_section(config, clues, section, "preprocess_cfg in open_clip_config.json")


def from_timm(
    config: SigLipVisionConfig, clues: Clues, section: Mapping[str, Any]
) -> Preprocessing:
    """Return the preprocessing of timm's `pretrained_cfg`, which may be that of `save_timm`."""
    try:
        assumption = read_assumption(clues.content.get(ASSUMED))
    except ValueError as error:
        raise CheckpointError(f"{clues.name}: config.json: {error}") from error
    source = "pretrained_cfg in config.json"
    if section.get("crop_mode") != "squash" or section.get("crop_pct") != 1:
        source += ", without timm's center crop"
    result = from_section(config, clues, section, source)
    if assumption is not None:
        return Preprocessing(result.config, assumption.status, assumption.reason, clues.name)
    return result


def from_section(
    config: SigLipVisionConfig, clues: Clues, section: Mapping[str, Any], source: str
) -> Preprocessing:
    """Return the preprocessing of filter, mean and std; unknown if one of them is not valid."""
    values = filter_and_mean(section)
    missing = [name for name in ("resample", "image_mean", "image_std") if name not in values]
    if missing:
        reason = f"{source} has no valid {', '.join(missing)}"
        return assumed_from(config, clues, section, reason)
    return Preprocessing(default(config) | values, "fixed", source, clues.name)


def from_defaults(config: SigLipVisionConfig, clues: Clues) -> Preprocessing:
    """Return the preprocessing of a checkpoint in transformers' format without a processor file."""
    missing = f"no {PREPROCESSOR}"
    if not is_processed_as_siglip(clues):
        model_type = clues.content.get("model_type")
        reason = f"{missing}, and {model_type} models have their own image processor"
        return Preprocessing(default(config), "unknown", reason, clues.name)
    for published in PUBLISHED:
        if published.repo == clues.origin:
            source = f"the published one of {published.repo}; {missing}"
            return Preprocessing(default(config, published.resample), "fixed", source, clues.name)
    text_config = clues.content.get("text_config")
    if isinstance(text_config, Mapping) and text_config.get("vocab_size") == SIGLIP2_VOCAB_SIZE:
        reason = f"{missing}; the text encoder's vocab_size {SIGLIP2_VOCAB_SIZE} is SigLIP 2's"
        result = default(config, RESAMPLE["bilinear"])
        return Preprocessing(result, "default", reason, clues.name)
    return Preprocessing(default(config), "default", missing, clues.name)


def assumed_from(
    config: SigLipVisionConfig, clues: Clues, section: Mapping[str, Any], reason: str
) -> Preprocessing:
    """Return the unknown preprocessing for which filter, mean and std of a section are used."""
    return Preprocessing(default(config) | filter_and_mean(section), "unknown", reason, clues.name)


def without_references(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without names of a processor and of code, which are other files.

    A `processor_class` such as `SiglipProcessor` makes transformers look for a tokenizer.
    """
    return {key: value for key, value in content.items() if key not in REFERENCES}


def filter_and_mean(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid values of filter, mean and std in another model's configuration.

    Without normalization, mean and std have no effect: the encoder normalizes by its own.
    """
    result: dict[str, Any] = {}
    for key, name in MEAN_AND_STD:
        value = section.get(key)
        if section.get("do_normalize", True) and is_valid_list(name, value):
            result[name] = value
    resample = section.get("resample", RESAMPLE.get(str(section.get("interpolation"))))
    if is_finite_number(resample) and resample in RESAMPLE.values():
        result["resample"] = resample
    return result


def is_valid_list(name: str, value: object) -> bool:
    """Return whether a value is a list that `image_mean` or `image_std` can have."""
    if not isinstance(value, list):
        return False
    try:
        parse_channel_values({name: value}, name, is_used=True)
    except ValueError:
        return False
    return True
