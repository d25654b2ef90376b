"""The preprocessing of a model, and how it is known."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

from siglip_port.image_options import RESAMPLE

log = logging.getLogger(__name__)

AssumedStatus = Literal["default", "unknown"]
Status = Literal["stored", "fixed", "stated", AssumedStatus]

ASSUMED = "siglip_port_assumed"
"""Key in saved files that records that the preprocessing was assumed, and why."""

WAYS = (
    "pass preprocessing= with 'siglip' (bicubic filter), 'siglip2' (bilinear filter), or a "
    "preprocessor_config.json"
)
"""Ways to state the preprocessing, for messages."""


class Assumption(NamedTuple):
    """The record of an assumption in a saved file.

    Attributes:
        status: Status of the preprocessing.
        reason: Why it was assumed.
    """

    status: AssumedStatus
    reason: str


@dataclass
class Preprocessing:
    """The preprocessing of a model, and how it is known.

    Attributes:
        config: Contents of `preprocessor_config.json`.
        status: `stored` in a file, `fixed` by code or publication, `stated` by the user; `default`
            of transformers, as there is no file; or `unknown`, as files or code differ from it.
        source: Where it comes from; if it is assumed, why.
        name: Path or Hub id of the checkpoint, for messages.
        is_reported: Whether the log has the warning of the default.
    """

    config: dict[str, Any]
    status: Status
    source: str
    name: str
    is_reported: bool = field(default=False, compare=False)

    @property
    def is_assumed(self) -> bool:
        """Whether neither files nor code nor the user determine it."""
        return self.status in get_args(AssumedStatus)

    def __str__(self) -> str:
        if self.is_assumed:
            return f"assumed: {describe(self.config)} ({self.source})"
        return self.source

    def checked_config(self) -> dict[str, Any]:
        """Return the contents of `preprocessor_config.json`, to preprocess images with.

        Logs a warning once if they are the default.

        Raises:
            ValueError: The preprocessing is unknown.
        """
        if self.status == "unknown":
            raise ValueError(
                f"{self.name}: the preprocessing of images is unknown ({self.source}); {WAYS}, or "
                "set model.preprocessor_config"
            )
        if self.status == "default" and not self.is_reported:
            log.warning(
                "%s: preprocessing is assumed: %s (%s); to state it, %s",
                self.name,
                describe(self.config),
                self.source,
                WAYS,
            )
            self.is_reported = True
        return self.config

    def assumption(self) -> dict[str, Any]:
        """Return the entry of saved files that records an assumption; empty if there is none."""
        if not self.is_assumed:
            return {}
        return {ASSUMED: {"status": self.status, "reason": self.source}}


def describe(config: Mapping[str, Any]) -> str:
    """Describe filter and range: `bicubic filter, pixels in [-1, 1]`."""
    filters = {number: name for name, number in RESAMPLE.items()}
    mean, std = config["image_mean"], config["image_std"]
    pixels = f"mean {mean}, std {std}"
    if not config["do_normalize"]:
        pixels = "pixels in [0, 1]"
    elif mean == std == [0.5] * 3:
        pixels = "pixels in [-1, 1]"
    return f"{filters[config['resample']]} filter, {pixels}"


def read_assumption(entry: object) -> Assumption | None:
    """Read the record of an assumption; None if there is none.

    Raises:
        ValueError: It is not a valid record.
    """
    if entry is None:
        return None
    if isinstance(entry, Mapping):
        status, reason = entry.get("status"), entry.get("reason")
        if status in get_args(AssumedStatus) and isinstance(reason, str):
            return Assumption(cast("AssumedStatus", status), reason)
    raise ValueError(f"{ASSUMED} must have a status and a reason, got {entry!r}")
