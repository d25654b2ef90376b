"""What the reference computes for the entrances, once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from siglip_port.parity.siglip.entrances.subject import Expected


@pytest.fixture(scope="session")
def fixed() -> Iterator[Expected]:
    from siglip_port.parity.siglip.entrances import models
    from siglip_port.parity.siglip.reference_process import IN_THIS_PROCESS

    with models.expectations(models.FIXED, IN_THIS_PROCESS) as expected:
        yield expected


@pytest.fixture(scope="session")
def naflex() -> Iterator[Expected]:
    from siglip_port.parity.siglip.entrances import models
    from siglip_port.parity.siglip.reference_process import IN_THIS_PROCESS

    with models.expectations(models.NAFLEX, IN_THIS_PROCESS) as expected:
        yield expected
