"""Activations of the MLPs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.edits import set_activation
from scripts.selftest.mutant import Mutant

ACT = "act head-act"

ACTIVATION = [
    Mutant(
        "gelu_exact",
        "exact GELU instead of tanh GELU",
        ACT,
        source="timm 1.0.31; kyutai-labs/pocket-tts#278",
        patch=seams.activation(F.gelu),
    ),
    Mutant(
        "gelu_exact_encoder",
        "exact GELU in the blocks",
        "act",
        source="nntrainer/nntrainer#3745",
        edit=set_activation("blocks", F.gelu),
    ),
    Mutant(
        "gelu_exact_head",
        "exact GELU in the head only",
        "head-act",
        edit=set_activation("head", F.gelu),
    ),
    Mutant(
        "gelu_exact_once",
        "exact GELU in one block",
        "5.act",
        edit=set_activation(r"blocks\.5", F.gelu),
    ),
    Mutant(
        "quick_gelu",
        "QuickGELU",
        ACT,
        source="mlfoundations/open_clip#771",
        patch=seams.activation(lambda x: x * torch.sigmoid(1.702 * x)),
    ),
    Mutant(
        "silu",
        "SiLU",
        ACT,
        source="NVIDIA/TensorRT-Model-Connect#720",
        patch=seams.activation(F.silu),
    ),
    Mutant("relu", "ReLU", ACT, patch=seams.activation(F.relu)),
    Mutant(
        "gelu_tanh_constant",
        "tanh GELU with 0.8 instead of sqrt(2/pi)",
        ACT,
        patch=seams.activation(lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))),
    ),
    Mutant(
        "gelu_cubic_constant",
        "tanh GELU with 0.0447 instead of 0.044715",
        ACT,
        patch=seams.activation(
            lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.0447 * x**3)))
        ),
    ),
    Mutant(
        "activation_missing",
        "no activation",
        ACT,
        patch=seams.mlp(lambda mlp, x: mlp.fc2(mlp.fc1(x))),
    ),
    Mutant(
        "activation_twice",
        "activation applied twice",
        ACT,
        patch=seams.mlp(lambda mlp, x: mlp.fc2(mlp.activation(mlp.activation(mlp.fc1(x))))),
    ),
]
