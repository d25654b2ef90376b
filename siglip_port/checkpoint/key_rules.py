"""Descriptions of layouts: which stored tensor holds which parameters, and which keys are ignored.

One `KeyRule` per module, one `Layout` per published layout; the tables are in
`siglip_port.checkpoint.layouts`. The same rules load (`Layout.mappings`), save (`Layout.to_stored`)
and pair modules of the port with modules of the reference. A tensor that no rule maps and no
`IgnoredKeys` matches is an error; nothing is guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_port.checkpoint.transforms import PLAIN, Transform


@dataclass(frozen=True)
class KeyRule:
    """The parameters of one module and their name in the file.

    `{}` is the block index, and `*` stands for both `weight` and `bias`. Several names in `port`
    are stored fused: concatenated along dimension 0, in this order. If `port` has a block index and
    `stored` has none, the file stacks all blocks in one tensor along a new first dimension.

    Attributes:
        port: Parameter names.
        stored: Name in the file.
        transform: How the file stores the weight. With `*`, the bias is stored unchanged.
    """

    port: tuple[str, ...]
    stored: str
    transform: Transform = PLAIN

    @property
    def is_stacked(self) -> bool:
        """Whether one stored tensor contains all blocks."""
        return "{}" in self.port[0] and "{}" not in self.stored

    def split_kinds(self) -> list[KeyRule]:
        """Return one rule for `weight` and one for `bias` if this rule has a `*`."""
        if "*" not in self.stored:
            return [self]
        rules = []
        for kind, transform in (("weight", self.transform), ("bias", PLAIN)):
            port = tuple(name.replace("*", kind) for name in self.port)
            rules.append(KeyRule(port, self.stored.replace("*", kind), transform))
        return rules

    def mappings(self, num_blocks: int) -> Iterator[tuple[str, KeyMapping]]:
        """Expand the rule: yield each stored name and its mapping."""
        blocks = range(num_blocks)
        if self.is_stacked:
            for rule in self.split_kinds():
                port = [name.replace("{}", str(i)) for i in blocks for name in rule.port]
                yield rule.stored, KeyMapping(tuple(port), rule.transform, stacked=True)
            return
        for i in blocks if "{}" in self.stored else range(1):
            for rule in self.split_kinds():
                port = [name.replace("{}", str(i)) for name in rule.port]
                stored = rule.stored.replace("{}", str(i))
                yield stored, KeyMapping(tuple(port), rule.transform)


@dataclass(frozen=True)
class KeyMapping:
    """The parameters that one stored tensor contains: an expanded `KeyRule`.

    Attributes:
        port: Parameter names.
        transform: How the parameters are stored.
        stacked: Whether parameters are stacked along a new first dimension (one per block), instead
            of concatenated along dimension 0.
    """

    port: tuple[str, ...]
    transform: Transform = PLAIN
    stacked: bool = False

    def to_stored(self, tensors: list[Tensor], num_heads: int) -> Tensor:
        """Return the stored tensor of these parameters."""
        if self.stacked:
            return torch.stack([self.transform.to_stored(tensor, num_heads) for tensor in tensors])
        return self.transform.to_stored(fuse(tensors), num_heads)

    def from_stored(self, stored: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the parameters, of these shapes; views of the stored tensor where possible."""
        if not self.stacked:
            return split(self.transform.from_stored(stored, shapes[0]), len(self.port))
        slices = zip(stored.unbind(), shapes, strict=True)
        return tuple(self.transform.from_stored(tensor, shape) for tensor, shape in slices)

    def stored_shape(self, shapes: Sequence[torch.Size], num_heads: int) -> tuple[int, ...]:
        """Return the shape of the stored tensor for parameters of these shapes."""
        # One element in memory; on `meta`, torch would import 900 modules to join tensors.
        first = self.transform.to_stored(torch.empty(1).expand(shapes[0]), num_heads).shape
        if self.stacked:
            return (len(shapes), *first)
        return (len(shapes) * first[0], *first[1:])


def split(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split a fused tensor into `parts` views of equal size along dimension 0."""
    return tensor.chunk(parts) if parts > 1 else (tensor,)


def fuse(tensors: list[Tensor]) -> Tensor:
    """Concatenate tensors along dimension 0: the inverse of `split`."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


@dataclass(frozen=True)
class IgnoredKeys:
    """Stored tensors that the vision encoder does not need.

    Attributes:
        pattern: Regular expression that matches the full stored names.
        reason: Kind of tensor, for messages.
    """

    pattern: str
    reason: str


OUTSIDE_PREFIX = (
    IgnoredKeys(
        r"(.+\.)?text_model\..+|text\..+|(.+\.)?text_proj(ection)?(\..+)?|(params/)?txt/.+",
        "text encoder",
    ),
    IgnoredKeys(r"(.+\.)?logit_(scale|bias)|(params/)?[tb]", "logit scale and bias"),
    IgnoredKeys(r"classifier\.(weight|bias)", "image classifier"),
    IgnoredKeys(
        r"(.+\.)?(language_model|llm|lm_head|embed_tokens|text_decoder)\..+|(params/)?llm/.+",
        "language model",
    ),
    IgnoredKeys(
        r"(.+\.)?(multi_modal_projector|mm_projector|connector|aligner|projector|resampler)\..+",
        "projector",
    ),
    IgnoredKeys(r".*", "other tensors"),
)
"""Tensors outside the encoder's prefix; the first matching pattern gives the reason."""


@dataclass(frozen=True)
class CodePreprocessing:
    """How the code that defines a layout preprocesses images: resized without cropping.

    Attributes:
        resample: Pillow's resampling filter, a value of `siglip_port.image_options.RESAMPLE`.
        do_normalize: True for pixels in [-1, 1], mean and std 0.5; False for [0, 1].
        only_for: Restriction to some images or releases, for messages; empty if there is none.
        tiled_by: Key of the configuration of later releases, which divide images into tiles.
        difference: What the code does that is not supported; empty if results are the same.
    """

    resample: int
    do_normalize: bool = True
    only_for: str = ""
    tiled_by: str | None = None
    difference: str = ""


@dataclass(frozen=True)
class Layout:
    """A published way to store the vision encoder, under any prefix.

    A file has this layout if, under one prefix, it has both `signature_keys`, a patch embedding
    (the first of them) whose shape `fits`, and none of the `rejected_keys`.

    Attributes:
        name: Value of `layout=`.
        title: Name in messages.
        used_by: Libraries and models that store the encoder this way, for the docs.
        encoder: Rules of the encoder.
        head: Rules of the pooling head; empty if this layout has none.
        signature_keys: Two stored names, the patch embedding's weight first.
        square_dims: Dimensions of the patch embedding's weight that are the height and width of a
            patch, and therefore equal; None if the weight is a matrix, as in NaFlex models.
        ignored: Other tensors that may occur under the prefix.
        rejected_keys: (stored name, reason) pairs that exclude other models with this signature.
        naflex: Whether the model accepts images of any aspect ratio.
        has_hf_config: Whether transformers' `config.json` describes the architecture.
        layer_norm_eps: LayerNorm epsilon, if fixed by the code that defines the layout.
        hidden_act: Activation, if fixed by that code.
        head_dim: Width of an attention head, if fixed by that code.
        image_size: Image size in pixels, if fixed by that code.
        preprocessing: Preprocessing of that code; None if configuration files describe it.
        projections: Patterns of names under the prefix that belong to a projection behind the
            pooling.
        model_types: Types of models whose configuration selects this layout, because the shapes
            do not; empty if the shapes do.
        refused_types: (model_type, reason) pairs of models with this layout that are not supported.
    """

    name: str
    title: str
    used_by: str
    encoder: tuple[KeyRule, ...]
    head: tuple[KeyRule, ...]
    signature_keys: tuple[str, str]
    square_dims: tuple[int, int] | None = (2, 3)
    ignored: tuple[IgnoredKeys, ...] = ()
    rejected_keys: tuple[tuple[str, str], ...] = ()
    naflex: bool = False
    has_hf_config: bool = False
    layer_norm_eps: float | None = None
    hidden_act: str | None = None
    head_dim: int | None = None
    image_size: int | None = None
    preprocessing: CodePreprocessing | None = None
    projections: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    refused_types: tuple[tuple[str, str], ...] = ()

    @property
    def is_stacked(self) -> bool:
        """Whether one tensor contains all blocks."""
        return any(rule.is_stacked for rule in self.encoder)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether this layout allows this shape for the patch embedding's weight."""
        if self.square_dims is None:
            return len(shape) == 2
        if len(shape) != 4:
            return False
        height, width = self.square_dims
        # [D, 3, 3, 3] fits several layouts; read it in PyTorch's order.
        is_ambiguous = self.square_dims != (2, 3) and shape[2] == shape[3]
        return shape[height] == shape[width] and not is_ambiguous

    def rules(self, pooling_head: bool) -> tuple[KeyRule, ...]:
        """Return the rules of the encoder, with those of the pooling head if it has one."""
        return self.encoder + self.head if pooling_head else self.encoder

    def mappings(
        self, num_blocks: int, rules: Iterable[KeyRule], prefix: str = ""
    ) -> dict[str, KeyMapping]:
        """Expand rules: stored name -> the parameters that it contains.

        Raises:
            ValueError: Two rules map the same stored name or parameter, a bug in the table.
        """
        mappings: dict[str, KeyMapping] = {}
        counts: Counter[str] = Counter()
        for rule in rules:
            for stored, mapping in rule.mappings(num_blocks):
                mappings[prefix + stored] = mapping
                counts.update([prefix + stored, *mapping.port])
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"key map: names mapped more than once: {', '.join(repeated)}")
        return mappings

    def to_stored(
        self,
        state_dict: Mapping[str, Tensor],
        num_blocks: int,
        num_heads: int,
        rules: Iterable[KeyRule],
        prefix: str = "",
    ) -> dict[str, Tensor]:
        """Rename, fuse and transform parameters into stored tensors: the inverse of loading."""
        stored = {}
        for name, mapping in self.mappings(num_blocks, rules, prefix).items():
            stored[name] = mapping.to_stored([state_dict[port] for port in mapping.port], num_heads)
        return stored

    def reason_to_ignore(self, stored: str, prefix: str = "") -> str | None:
        """Return why a stored tensor is ignored; None if it is not.

        Under the prefix, only the layout's `ignored` keys are; outside of it, all keys are.
        """
        name = stored.removeprefix(prefix)
        ignored = self.ignored
        if not stored.startswith(prefix):
            ignored = OUTSIDE_PREFIX
        for keys in ignored:
            if re.fullmatch(keys.pattern, name):
                return keys.reason
        return None

    def prefixes(self, stored_names: Collection[str]) -> list[str]:
        """Return the prefixes under which both signature keys occur."""
        first, second = self.signature_keys
        prefixes = []
        for name in stored_names:
            if not name.endswith(first):
                continue
            prefix = name.removesuffix(first)
            if prefix[-1:] in ("", ".", "/") and prefix + second in stored_names:
                prefixes.append(prefix)
        return prefixes
