"""The key map: how published checkpoints name and shape the tensors of the tower, and how we do.

Data, and its reader.

One `Row` a module, one `Layout` a way of storing. The same rows load (`Layout.claims`), save
(`Layout.to_stored`) and pair our modules with the reference's. What no row claims and no `Dropped`
row names is not ours to guess: it is an error.

Sources of the stored names: transformers `models/siglip`, `models/siglip2` and `models/janus`,
releases 4.37 to 5.23; timm 1.0.31 `models/vision_transformer.py` and `models/naflexvit.py`;
big_vision `models/vit.py`; gemma_pytorch `gemma/siglip_vision`; mlx-vlm
`mlx_vlm/models/*/vision.py`; nanoVLM `models/vision_transformer.py`; moondream
`moondream/torch/vision.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from siglip_port.checkpoint.transforms import (
    BATCHED,
    BATCHED_GRID,
    BIAS_OF_HEADS,
    CHANNEL_LAST,
    GRID,
    HEADS_FIRST,
    HEADS_LAST,
    KERNEL,
    PATCHES,
    PATCHES_CHANNEL_FIRST,
    PATCHES_TRANSPOSED,
    PLAIN,
    TRANSPOSED,
    Form,
)


@dataclass(frozen=True)
class Row:
    """One module, in our names and in those of the file.

    `{}` stands for the number of the block, `*` for both `weight` and `bias`. Where `ours` names
    several modules, the file stores them fused: their tensors stacked along dimension 0, in this
    order. Where `ours` has a number of the block and `stored` has none, the file stores all blocks
    in one tensor, along a dimension before all others.
    """

    ours: tuple[str, ...]
    stored: str
    form: Form = PLAIN


@dataclass(frozen=True)
class Claim:
    """One stored tensor, and what of ours it holds: a `Row`, spelled out.

    Attributes:
        ours: the names of our tensors.
        form: how they are stored.
        stacked: whether each is one slice of the stored tensor, instead of all being joined along
            dimension 0.
    """

    ours: tuple[str, ...]
    form: Form = PLAIN
    stacked: bool = False

    def to_stored(self, tensors: list[Tensor], num_heads: int) -> Tensor:
        """Makes the stored tensor of ours."""
        if self.stacked:
            return torch.stack([self.form.store(tensor, num_heads) for tensor in tensors])
        return self.form.store(fuse(tensors), num_heads)

    def from_stored(self, stored: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        """Makes ours of the stored tensor: views of it, wherever that can be."""
        if self.stacked:
            return tuple(
                self.form.load(t, shape) for t, shape in zip(stored.unbind(), shapes, strict=True)
            )
        return split(self.form.load(stored, shapes[0]), len(self.ours))

    def stored_shape(self, shapes: list[torch.Size], num_heads: int) -> tuple[int, ...]:
        """The shape of `to_stored` of tensors of these shapes."""
        # Of one number in memory. (On `meta`, torch would import 900 modules to join tensors.)
        first = self.form.store(torch.empty(1).expand(shapes[0]), num_heads).shape
        return (len(shapes), *first) if self.stacked else (len(shapes) * first[0], *first[1:])


@dataclass(frozen=True)
class Dropped:
    """Tensors that a file may hold and the tower has no use for.

    Full names match `pattern`, with a reason.
    """

    pattern: str
    reason: str


def _rows(
    *rows: tuple[str | tuple[str, ...], str] | tuple[str | tuple[str, ...], str, Form],
) -> tuple[Row, ...]:
    return tuple(Row((ours,) if isinstance(ours, str) else ours, *rest) for ours, *rest in rows)


# fmt: off
_BLOCK, _HF_BLOCK = "transformer.encoder.encoder_blocks.{}", "encoder.layers.{}"

TOWER = _rows(
    # ours                                                  in the file
    ("transformer.embeddings.patch_embedding.*",            "embeddings.patch_embedding.*"),
    ("transformer.embeddings.position_embedding.weight",    "embeddings.position_embedding.weight"),
    (f"{_BLOCK}.layer_norm1.*",                             f"{_HF_BLOCK}.layer_norm1.*"),
    (f"{_BLOCK}.self_attn.k_proj.*",                        f"{_HF_BLOCK}.self_attn.k_proj.*"),
    (f"{_BLOCK}.self_attn.v_proj.*",                        f"{_HF_BLOCK}.self_attn.v_proj.*"),
    (f"{_BLOCK}.self_attn.q_proj.*",                        f"{_HF_BLOCK}.self_attn.q_proj.*"),
    (f"{_BLOCK}.self_attn.out_proj.*",                      f"{_HF_BLOCK}.self_attn.out_proj.*"),
    (f"{_BLOCK}.layer_norm2.*",                             f"{_HF_BLOCK}.layer_norm2.*"),
    (f"{_BLOCK}.mlp.fc1.*",                                 f"{_HF_BLOCK}.mlp.fc1.*"),
    (f"{_BLOCK}.mlp.fc2.*",                                 f"{_HF_BLOCK}.mlp.fc2.*"),
    ("transformer.post_layernorm.*",                        "post_layernorm.*"),
)

HEAD = _rows(
    # The reference's head is an nn.MultiheadAttention, which stores q, k and v in one tensor, in
    # this order.
    (("pooling_head.attention.q_proj.*",
      "pooling_head.attention.k_proj.*",
      "pooling_head.attention.v_proj.*"),                   "head.attention.in_proj_*"),
    ("pooling_head.probe",                                  "head.probe"),
    ("pooling_head.attention.out_proj.*",                   "head.attention.out_proj.*"),
    ("pooling_head.layernorm.*",                            "head.layernorm.*"),
    ("pooling_head.mlp.fc1.*",                              "head.mlp.fc1.*"),
    ("pooling_head.mlp.fc2.*",                              "head.mlp.fc2.*"),
)

_HF_POSITIONS = (Dropped(r"embeddings\.position_ids", "position ids: counted, not learned"),)
_CLASS_TOKEN = "a class token, which SigLIP has not"


def _renamed(rows: Iterable[Row], names: Mapping[str, str | tuple[str, Form]]) -> tuple[Row, ...]:
    """The same rows, some of them stored under other names, or in another form."""
    new = {old: (name, None) if isinstance(name, str) else name for old, name in names.items()}
    assert new.keys() <= {row.stored for row in rows}
    return tuple(
        replace(row, stored=new[row.stored][0], form=new[row.stored][1] or row.form) if row.stored in new else row
        for row in rows
    )


_T_BLOCK = "blocks.{}"
_QKV = tuple(f"{_BLOCK}.self_attn.{name}_proj.*" for name in "qkv")
_TIMM_BLOCK = _rows(
    (f"{_BLOCK}.layer_norm1.*",                             f"{_T_BLOCK}.norm1.*"),
    (_QKV,                                                  f"{_T_BLOCK}.attn.qkv.*"),
    (f"{_BLOCK}.self_attn.out_proj.*",                      f"{_T_BLOCK}.attn.proj.*"),
    (f"{_BLOCK}.layer_norm2.*",                             f"{_T_BLOCK}.norm2.*"),
    (f"{_BLOCK}.mlp.fc1.*",                                 f"{_T_BLOCK}.mlp.fc1.*"),
    (f"{_BLOCK}.mlp.fc2.*",                                 f"{_T_BLOCK}.mlp.fc2.*"),
)
_TIMM_TOWER = _rows(
    ("transformer.embeddings.patch_embedding.*",            "patch_embed.proj.*"),
    ("transformer.embeddings.position_embedding.weight",    "pos_embed", BATCHED),
) + _TIMM_BLOCK + _rows(
    ("transformer.post_layernorm.*",                        "norm.*"),
)
_TIMM_HEAD = _rows(
    ("pooling_head.probe",                                  "attn_pool.latent"),
    ("pooling_head.attention.q_proj.*",                     "attn_pool.q.*"),
    (("pooling_head.attention.k_proj.*",
      "pooling_head.attention.v_proj.*"),                   "attn_pool.kv.*"),
    ("pooling_head.attention.out_proj.*",                   "attn_pool.proj.*"),
    ("pooling_head.layernorm.*",                            "attn_pool.norm.*"),
    ("pooling_head.mlp.fc1.*",                              "attn_pool.mlp.fc1.*"),
    ("pooling_head.mlp.fc2.*",                              "attn_pool.mlp.fc2.*"),
)

_F_BLOCK, _MHA, _MLP = "Transformer/encoderblock_{}", "MultiHeadDotProductAttention_0", "MlpBlock_0"


def _flax_norm(ours: str, stored: str) -> tuple[Row, ...]:
    return _rows((f"{ours}.weight", f"{stored}/scale"), (f"{ours}.bias", f"{stored}/bias"))


def _flax_attention(ours: str, stored: str) -> tuple[Row, ...]:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    rows = [
        (f"{ours}.{name}.{kind}", f"{stored}/{flax}/{part}", form)
        for flax, name in names.items()
        for kind, part, form in (("weight", "kernel", HEADS_LAST), ("bias", "bias", BIAS_OF_HEADS))
    ]
    return _rows(*rows, (f"{ours}.out_proj.weight", f"{stored}/out/kernel", HEADS_FIRST),
                 (f"{ours}.out_proj.bias", f"{stored}/out/bias"))


def _flax_mlp(ours: str, stored: str) -> tuple[Row, ...]:
    return _rows(
        (f"{ours}.fc1.weight", f"{stored}/Dense_0/kernel", TRANSPOSED), (f"{ours}.fc1.bias", f"{stored}/Dense_0/bias"),
        (f"{ours}.fc2.weight", f"{stored}/Dense_1/kernel", TRANSPOSED), (f"{ours}.fc2.bias", f"{stored}/Dense_1/bias"),
    )


_FLAX_TOWER = (
    *_rows(("transformer.embeddings.patch_embedding.weight", "embedding/kernel", KERNEL),
           ("transformer.embeddings.patch_embedding.bias", "embedding/bias"),
           ("transformer.embeddings.position_embedding.weight", "pos_embedding", BATCHED)),
    *_flax_norm(f"{_BLOCK}.layer_norm1", f"{_F_BLOCK}/LayerNorm_0"),
    *_flax_attention(f"{_BLOCK}.self_attn", f"{_F_BLOCK}/{_MHA}"),
    *_flax_norm(f"{_BLOCK}.layer_norm2", f"{_F_BLOCK}/LayerNorm_1"),
    *_flax_mlp(f"{_BLOCK}.mlp", f"{_F_BLOCK}/{_MLP}"),
    *_flax_norm("transformer.post_layernorm", "Transformer/encoder_norm"),
)
_FLAX_HEAD = (
    *_rows(("pooling_head.probe", "MAPHead_0/probe")),
    *_flax_attention("pooling_head.attention", f"MAPHead_0/{_MHA}"),
    *_flax_norm("pooling_head.layernorm", "MAPHead_0/LayerNorm_0"),
    *_flax_mlp("pooling_head.mlp", f"MAPHead_0/{_MLP}"),
)
# fmt: on


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints store the tower, wherever in the file it stands.

    A file is in this layout if, behind one and the same prefix, it has both of the names in
    `marks`, the first of them (the patch embedding) of a shape that `fits`, and none of the names
    in `never`.

    Attributes:
        name: how `layout=` calls it.
        title: what it is called in messages.
        tower: the rows of the tower.
        head: the rows of the pooling head; empty where no file of this layout has one.
        marks: two stored names.
        square: which two dimensions of the patch embedding's weight are the height and width of a
            patch, and therefore equal; None where it is stored as a matrix, as NaFlex towers do.
        dropped: what else may stand behind the prefix.
        never: stored names of other models with the same marks, and what they mean.
        naflex: whether the tower is one for pictures of any shape.
        described: whether transformers' `config.json` lies beside it, which tells the architecture.
        layer_norm_eps: where the code that reads this layout fixes it, and no file tells it.
        hidden_act: likewise.
        head_dim: likewise.
    """

    name: str
    title: str
    tower: tuple[Row, ...]
    head: tuple[Row, ...]
    marks: tuple[str, str]
    square: tuple[int, int] | None = (2, 3)
    dropped: tuple[Dropped, ...] = ()
    never: tuple[tuple[str, str], ...] = ()
    naflex: bool = False
    described: bool = False
    layer_norm_eps: float | None = None
    hidden_act: str | None = None
    head_dim: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all blocks."""
        return any("{}" in row.ours[0] and "{}" not in row.stored for row in self.tower)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the weight of the patch embedding may have this shape in this layout."""
        if self.square is None or len(shape) != 4:
            return len(shape) == 2 and self.square is None
        # Of three channels in patches of 3 x 3 pixels, only torch's own order can be meant.
        a, b = self.square
        return shape[a] == shape[b] and (self.square == (2, 3) or shape[2] != shape[3])

    def rows(self, pooling_head: bool) -> tuple[Row, ...]:
        """The rows of a tower with or without its pooling head."""
        return self.tower + (self.head if pooling_head else ())

    def claims(self, num_blocks: int, rows: Iterable[Row], prefix: str = "") -> dict[str, Claim]:
        """Spells the rows out: stored name -> which of our tensors it holds, and how.

        Raises:
            ValueError: two rows claim one tensor, of the file or of ours: a fault in the table.
        """
        claimed = [
            (prefix + stored, claim)
            for row in rows
            for stored, claim in _spell_out(row, num_blocks)
        ]
        names = Counter(stored for stored, _ in claimed) + Counter(
            name for _, claim in claimed for name in claim.ours
        )
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"the key map claims these more than once: {', '.join(twice)}")
        return dict(claimed)

    def reason_to_drop(self, stored: str, prefix: str = "") -> str | None:
        """Says why a stored tensor is dropped, or None where no row says so.

        Never for what lies outside the prefix.
        """
        rows = self.dropped
        if not stored.startswith(prefix):
            rows, prefix = (*OUTSIDE, Dropped(".*", "rest of the file")), ""
        return next(
            (d.reason for d in rows if re.fullmatch(d.pattern, stored[len(prefix) :])), None
        )

    def prefixes(self, stored_names: Collection[str]) -> list[str]:
        """Finds the prefixes behind which both marks of this layout stand."""
        first, second = self.marks
        places = (name.removesuffix(first) for name in stored_names if name.endswith(first))
        return [
            place
            for place in places
            if place[-1:] in ("", ".", "/") and place + second in stored_names
        ]

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, int]:
        """What the shapes of the stored tensors tell about the architecture, in the names of `SigLipVisionConfig`.

        Args:
            shapes: of the tensors of the file; those of the embeddings and of the first block will
                do.
            prefix: what stands before the names.

        Raises:
            ValueError: a tensor that tells is missing, or of a shape that makes no sense.
        """

        def shape(ours: str) -> tuple[Row, tuple[int, ...]]:
            row = next(
                row for row in self.tower if row.ours[0] in (ours, ours.replace(".weight", ".*"))
            )
            name = prefix + row.stored.replace("{}", "0").replace("*", "weight")
            if name not in shapes:
                raise ValueError(f"{name} is missing, from which its size is told")
            return row, shapes[name]

        patch, patches = shape("transformer.embeddings.patch_embedding.weight")
        fc1, hidden = shape(f"{_BLOCK}.mlp.fc1.weight")
        _, queries = shape(f"{_BLOCK}.self_attn.q_proj.weight")
        _, positions = shape("transformer.embeddings.position_embedding.weight")
        stacked = "{}" not in fc1.stored
        if not self.fits(patches) or len(hidden) != 2 + stacked or len(positions) < 2:
            raise ValueError(f"its tensors have shapes that no {self.title} tower has")
        mlp = hidden[-1] if fc1.form is TRANSPOSED else hidden[-2]
        if self.square is not None:
            _, channels, size, _ = patch.form.load(torch.empty(1).expand(patches), ()).shape
        else:  # A matrix tells P * P * C; SigLIP's pictures have three channels.
            channels, pixels = 3, patches[0] if patch.form is PATCHES_TRANSPOSED else patches[1]
            size = math.isqrt(pixels // channels)
            if not size or channels * size**2 != pixels:
                raise ValueError(
                    f"its patch embedding takes {pixels} values, which are no square of 3 channels"
                )
        pattern = re.compile(
            re.escape(prefix + fc1.stored).replace(r"\{\}", r"(\d{1,6})").replace(r"\*", "weight")
        )
        numbers = [
            int(match[1]) for match in map(pattern.fullmatch, shapes) if match and not stacked
        ]
        found = {
            "embed_dim": positions[-1],
            "num_patches": math.prod(positions[:-1]),
            "patch_size": size,
            "num_channels": channels,
            "mlp_hidden_dim": mlp,
            "num_encoder_blocks": hidden[0] if stacked else max(numbers) + 1,
        }
        if len(queries) == 3 + stacked:
            found["num_attention_heads"] = queries[-2]
        elif self.head_dim is not None:
            found["num_attention_heads"] = positions[-1] // self.head_dim
        return found

    def to_stored(
        self,
        state_dict: Mapping[str, Tensor],
        num_blocks: int,
        num_heads: int,
        rows: Iterable[Row],
        prefix: str = "",
    ) -> dict[str, Tensor]:
        """Renames, fuses and reshapes our tensors into those of the file.

        The reverse of loading.
        """
        claims = self.claims(num_blocks, rows, prefix)
        return {
            s: claim.to_stored([state_dict[name] for name in claim.ours], num_heads)
            for s, claim in claims.items()
        }


OUTSIDE = (
    Dropped(r"(.+\.)?text_model\..+|text\..+|(params/)?txt/.+", "text tower"),
    Dropped(r"(.+\.)?logit_(scale|bias)|(params/)?[tb]", "scale and bias of the image-text logits"),
    Dropped(r"classifier\.(weight|bias)", "image classifier"),
    Dropped(
        r"(.+\.)?(language_model|llm|lm_head|embed_tokens|text_decoder)\..+|(params/)?llm/.+",
        "language model",
    ),
    Dropped(
        r"(.+\.)?(multi_modal_projector|mm_projector|connector|aligner|projector|resampler)\..+",
        "projector",
    ),
)
"""What files hold beside the tower, by reasons that are good to read.

Anything else is called the rest of the file.
"""

HUGGINGFACE = Layout(
    "huggingface",
    "HuggingFace",
    TOWER,
    HEAD,
    marks=("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.out_proj.weight"),
    dropped=_HF_POSITIONS,
    described=True,
    never=(("embeddings.class_embedding", _CLASS_TOKEN),),
)
"""SiglipModel, SiglipForImageClassification, SiglipVisionModel, and the models that hold one.

Behind `vision_model.`,
it is what we write."""

PREFIX = "vision_model."
"""What stands before the names that we write.

As on the Hub, where old and new releases of transformers find them.
"""

HUGGINGFACE_NAFLEX = replace(
    HUGGINGFACE,
    name="huggingface-naflex",
    title="HuggingFace NaFlex",
    tower=_renamed(
        TOWER, {"embeddings.patch_embedding.*": ("embeddings.patch_embedding.*", PATCHES)}
    ),
    square=None,
    naflex=True,
)
TIMM = Layout(
    "timm",
    "timm",
    _TIMM_TOWER,
    _TIMM_HEAD,
    marks=("patch_embed.proj.weight", "blocks.0.norm1.weight"),
    dropped=(Dropped(r"head\.(weight|bias)", "image classifier"),),
    never=(
        ("cls_token", _CLASS_TOKEN),
        ("blocks.0.attn.rel_pos_h", "relative positions, which SAM has and SigLIP has not"),
    ),
)
"""timm's own files, open_clip's (behind `visual.trunk.`), and those of models whose tower was built by timm."""
TIMM_NAFLEX = replace(
    TIMM,
    name="timm-naflex",
    title="timm NaFlex",
    tower=_renamed(
        _TIMM_TOWER,
        {
            "patch_embed.proj.*": ("embeds.proj.*", PATCHES),
            "pos_embed": ("embeds.pos_embed", BATCHED_GRID),
        },
    ),
    marks=("embeds.proj.weight", "blocks.0.norm1.weight"),
    square=None,
    never=(("embeds.cls_token", _CLASS_TOKEN),),
    naflex=True,
)
BIG_VISION = Layout(
    "big_vision",
    "big_vision",
    _FLAX_TOWER,
    _FLAX_HEAD,
    marks=("embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"),
    square=(0, 1),
    dropped=(Dropped(r"head/(kernel|bias)", "projector"),),
    never=(("cls", _CLASS_TOKEN),),
    layer_norm_eps=1e-6,
    hidden_act="gelu_pytorch_tanh",
)
BIG_VISION_NAFLEX = replace(
    BIG_VISION,
    name="big_vision-naflex",
    title="big_vision NaFlex",
    tower=_renamed(
        _FLAX_TOWER,
        {
            "embedding/kernel": ("embedding/kernel", PATCHES_TRANSPOSED),
            "pos_embedding": ("pos_embedding", GRID),
        },
    ),
    square=None,
    naflex=True,
)


def _scanned(layout: Layout) -> Layout:
    """The same layout with the tensors of all blocks in one, as flax's `scan` leaves them."""

    def stacked(name: str) -> str:
        return name.replace("encoderblock_{}", "encoderblock").replace(
            "encoderblock_0", "encoderblock"
        )

    return replace(
        layout,
        name=f"{layout.name}-scanned",
        title=f"{layout.title}, blocks stacked",
        tower=tuple(replace(row, stored=stacked(row.stored)) for row in layout.tower),
        marks=(layout.marks[0], stacked(layout.marks[1])),
    )


JANUS = replace(
    HUGGINGFACE,
    name="janus",
    title="Janus (HuggingFace)",
    tower=_renamed(
        TOWER,
        {
            "encoder.layers.{}.self_attn.out_proj.*": "encoder.layers.{}.self_attn.projection_layer.*"
        },
    ),
    head=(),
    marks=(
        "embeddings.patch_embedding.weight",
        "encoder.layers.0.self_attn.projection_layer.weight",
    ),
)
GEMMA_PYTORCH = Layout(
    "gemma_pytorch",
    "gemma_pytorch",
    tuple(
        replace(
            row,
            stored=row.stored.replace("embeddings.", "")
            .replace("encoder.layers.", "encoder_blocks.")
            .replace("out_proj", "o_proj")
            .replace("post_layernorm", "final_norm"),
        )
        for row in TOWER
    ),
    (),
    marks=("patch_embedding.weight", "encoder_blocks.0.layer_norm1.weight"),
    layer_norm_eps=1e-6,
    hidden_act="gelu_pytorch_tanh",
    head_dim=72,
)
NANOVLM = Layout(
    "nanovlm",
    "nanoVLM",
    _renamed(
        _TIMM_TOWER,
        {
            "patch_embed.proj.*": "patch_embedding.conv.*",
            "pos_embed": "patch_embedding.position_embedding",
            "blocks.{}.norm1.*": "blocks.{}.ln1.*",
            "blocks.{}.attn.qkv.*": "blocks.{}.attn.qkv_proj.*",
            "blocks.{}.attn.proj.*": "blocks.{}.attn.out_proj.*",
            "blocks.{}.norm2.*": "blocks.{}.ln2.*",
            "norm.*": "layer_norm.*",
        },
    ),
    (),
    marks=("patch_embedding.conv.weight", "blocks.0.ln1.weight"),
    never=(("patch_embedding.cls_token", _CLASS_TOKEN),),
    hidden_act="gelu_pytorch_tanh",
)
MOONDREAM = Layout(
    "moondream",
    "Moondream",
    _renamed(
        _TIMM_TOWER,
        {
            "patch_embed.proj.*": ("patch_emb.*", PATCHES_CHANNEL_FIRST),
            "pos_embed": "pos_emb",
            "blocks.{}.norm1.*": "blocks.{}.ln1.*",
            "blocks.{}.norm2.*": "blocks.{}.ln2.*",
            "norm.*": "post_ln.*",
        },
    ),
    (),
    marks=("patch_emb.weight", "blocks.0.ln1.weight"),
    square=None,
    dropped=(Dropped(r"proj_mlp\..+", "projector"),),
    layer_norm_eps=1e-5,
    hidden_act="gelu_pytorch_tanh",
    head_dim=72,
)
MOONDREAM_OLD = replace(
    MOONDREAM,
    name="moondream-old",
    title="Moondream before 2025",
    tower=_renamed(
        _TIMM_TOWER, {"patch_embed.proj.*": ("patch_embed.linear.*", PATCHES_CHANNEL_FIRST)}
    ),
    marks=("patch_embed.linear.weight", "blocks.0.norm1.weight"),
    dropped=(),
)

MLX = replace(
    HUGGINGFACE,
    name="mlx",
    title="mlx",
    tower=_renamed(
        TOWER, {"embeddings.patch_embedding.*": ("embeddings.patch_embedding.*", CHANNEL_LAST)}
    ),
    square=(1, 2),
)
"""Files converted by mlx-vlm and mlx-embeddings, as far as they are not quantised."""

LAYOUTS = (
    HUGGINGFACE,
    HUGGINGFACE_NAFLEX,
    MLX,
    TIMM,
    TIMM_NAFLEX,
    BIG_VISION,
    _scanned(BIG_VISION),
    BIG_VISION_NAFLEX,
    _scanned(BIG_VISION_NAFLEX),
    JANUS,
    GEMMA_PYTORCH,
    NANOVLM,
    MOONDREAM,
    MOONDREAM_OLD,
)
"""Every layout that is read."""


def split(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Takes a stored tensor apart into `parts` of ours: views of equal height along dimension 0."""
    return tensor.chunk(parts) if parts > 1 else (tensor,)


def fuse(tensors: list[Tensor]) -> Tensor:
    """Stacks several of our tensors into the one that is stored: the reverse of `split`."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _spell_out(row: Row, num_blocks: int) -> Iterable[tuple[str, Claim]]:
    if "{}" in row.ours[0] and "{}" not in row.stored:
        for kind in ("weight", "bias") if "*" in row.stored else ("",):
            blocks = (
                name.replace("{}", str(i)).replace("*", kind)
                for i in range(num_blocks)
                for name in row.ours
            )
            yield row.stored.replace("*", kind), Claim(tuple(blocks), row.form, stacked=True)
        return
    for number in range(num_blocks) if "{}" in row.stored else (0,):
        for kind in ("weight", "bias") if "*" in row.stored else ("",):
            stored, *ours = (
                name.replace("{}", str(number)).replace("*", kind)
                for name in (row.stored, *row.ours)
            )
            yield stored, Claim(tuple(ours), row.form if kind != "bias" else PLAIN)
