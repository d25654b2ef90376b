"""How a layout is described: which stored tensor holds which of ours, and what else may be there.

One `KeyRule` a module, one `Layout` a way of storing: `siglip_port.checkpoint.layouts` holds all of
them. The same rules load (`Layout.mappings`), save (`Layout.to_stored`) and pair our modules with
the reference's. What no rule claims and no `IgnoredKeys` names is an error, and never guessed.
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
    """One module, in our names and in those of the file.

    `{}` stands for the number of the block, `*` for both `weight` and `bias`. Where `port` names
    several modules, the file stores them fused: their tensors stacked along dimension 0, in this
    order. Where `port` has a number of the block and `stored` has none, the file stores all blocks
    in one tensor, along a dimension before all others.

    Attributes:
        port: our names.
        stored: the name in the file.
        transform: how the file stores a weight. Biases of a `*` are stored as they are.
    """

    port: tuple[str, ...]
    stored: str
    transform: Transform = PLAIN

    @property
    def is_stacked(self) -> bool:
        """Whether one stored tensor holds all blocks."""
        return "{}" in self.port[0] and "{}" not in self.stored

    def split_kinds(self) -> list[KeyRule]:
        """Return one rule for `weight` and one for `bias`, if this one stands for both."""
        if "*" not in self.stored:
            return [self]
        rules = []
        for kind, transform in (("weight", self.transform), ("bias", PLAIN)):
            port = tuple(name.replace("*", kind) for name in self.port)
            rules.append(KeyRule(port, self.stored.replace("*", kind), transform))
        return rules

    def mappings(self, num_blocks: int) -> Iterator[tuple[str, KeyMapping]]:
        """Spell the rule out: stored name, and which of our tensors it holds."""
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
    """One stored tensor, and what of ours it holds: a `KeyRule`, spelled out.

    Attributes:
        port: the names of our tensors.
        transform: how they are stored.
        stacked: whether each is one slice of the stored tensor, instead of all being joined along
            dimension 0.
    """

    port: tuple[str, ...]
    transform: Transform = PLAIN
    stacked: bool = False

    def to_stored(self, tensors: list[Tensor], num_heads: int) -> Tensor:
        """Make the stored tensor of ours."""
        if self.stacked:
            return torch.stack([self.transform.store(tensor, num_heads) for tensor in tensors])
        return self.transform.store(fuse(tensors), num_heads)

    def from_stored(self, stored: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Make ours of the stored tensor: views of it, wherever that can be."""
        if not self.stacked:
            return split(self.transform.load(stored, shapes[0]), len(self.port))
        slices = zip(stored.unbind(), shapes, strict=True)
        return tuple(self.transform.load(tensor, shape) for tensor, shape in slices)

    def stored_shape(self, shapes: Sequence[torch.Size], num_heads: int) -> tuple[int, ...]:
        """Return the shape of `to_stored` of tensors of these shapes."""
        # Of one number in memory. (On `meta`, torch would import 900 modules to join tensors.)
        first = self.transform.store(torch.empty(1).expand(shapes[0]), num_heads).shape
        if self.stacked:
            return (len(shapes), *first)
        return (len(shapes) * first[0], *first[1:])


def split(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Take a stored tensor apart into `parts` of ours: views of equal height along dimension 0."""
    return tensor.chunk(parts) if parts > 1 else (tensor,)


def fuse(tensors: list[Tensor]) -> Tensor:
    """Stack several of our tensors into the one that is stored: the reverse of `split`."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


@dataclass(frozen=True)
class IgnoredKeys:
    """Tensors that a file may hold and the vision encoder has no use for.

    Attributes:
        pattern: a regular expression of their full names.
        reason: what they are.
    """

    pattern: str
    reason: str


OUTSIDE_PREFIX = (
    IgnoredKeys(r"(.+\.)?text_model\..+|text\..+|(params/)?txt/.+", "text encoder"),
    IgnoredKeys(
        r"(.+\.)?logit_(scale|bias)|(params/)?[tb]", "scale and bias of the image-text logits"
    ),
    IgnoredKeys(r"classifier\.(weight|bias)", "image classifier"),
    IgnoredKeys(
        r"(.+\.)?(language_model|llm|lm_head|embed_tokens|text_decoder)\..+|(params/)?llm/.+",
        "language model",
    ),
    IgnoredKeys(
        r"(.+\.)?(multi_modal_projector|mm_projector|connector|aligner|projector|resampler)\..+",
        "projector",
    ),
    IgnoredKeys(r".*", "rest of the file"),
)
"""What files hold beside the vision encoder, by reasons that are good to read."""


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints store the vision encoder, wherever in the file it stands.

    A file is in this layout if, behind one and the same prefix, it has both of the names in
    `signature_keys`, the first of them (the patch embedding) of a shape that `fits`, and none of
    the names in `rejected_keys`.

    Attributes:
        name: how `layout=` calls it.
        title: what it is called in messages.
        encoder: the rules of the encoder.
        head: the rules of the pooling head; empty where no file of this layout has one.
        signature_keys: two stored names.
        square_dims: which two dimensions of the patch embedding's weight are the height and width
            of a patch, and therefore equal; None where it is stored as a matrix, as NaFlex models
            do.
        ignored: what else may stand behind the prefix.
        rejected_keys: stored names of other models with the same signature, and what they mean.
        naflex: whether the model is one for images of any shape.
        has_hf_config: whether transformers' `config.json` lies beside it, which tells the
            architecture.
        layer_norm_eps: where the code that reads this layout fixes it, and no file tells it.
        hidden_act: likewise.
        head_dim: likewise.
    """

    name: str
    title: str
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

    @property
    def is_stacked(self) -> bool:
        """Whether one tensor holds all blocks."""
        return any(rule.is_stacked for rule in self.encoder)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the weight of the patch embedding may have this shape in this layout."""
        if self.square_dims is None:
            return len(shape) == 2
        if len(shape) != 4:
            return False
        height, width = self.square_dims
        # Of three channels in patches of 3 x 3 pixels, only torch's own order can be meant.
        is_ambiguous = self.square_dims != (2, 3) and shape[2] == shape[3]
        return shape[height] == shape[width] and not is_ambiguous

    def rules(self, pooling_head: bool) -> tuple[KeyRule, ...]:
        """Return the rules of a model with or without its pooling head."""
        return self.encoder + self.head if pooling_head else self.encoder

    def mappings(
        self, num_blocks: int, rules: Iterable[KeyRule], prefix: str = ""
    ) -> dict[str, KeyMapping]:
        """Spell rules out: stored name -> which of our tensors it holds, and how.

        Raises:
            ValueError: two rules claim one tensor, of the file or of ours: a fault in the table.
        """
        mappings: dict[str, KeyMapping] = {}
        claims: Counter[str] = Counter()
        for rule in rules:
            for stored, mapping in rule.mappings(num_blocks):
                mappings[prefix + stored] = mapping
                claims.update([prefix + stored, *mapping.port])
        repeated = [name for name, count in claims.items() if count > 1]
        if repeated:
            raise ValueError(f"the key map claims these more than once: {', '.join(repeated)}")
        return mappings

    def to_stored(
        self,
        state_dict: Mapping[str, Tensor],
        num_blocks: int,
        num_heads: int,
        rules: Iterable[KeyRule],
        prefix: str = "",
    ) -> dict[str, Tensor]:
        """Rename, fuse and reshape our tensors into those of the file: the reverse of loading."""
        stored = {}
        for name, mapping in self.mappings(num_blocks, rules, prefix).items():
            stored[name] = mapping.to_stored([state_dict[port] for port in mapping.port], num_heads)
        return stored

    def reason_to_ignore(self, stored: str, prefix: str = "") -> str | None:
        """Say why a stored tensor is ignored, or None where no `IgnoredKeys` says so.

        Behind the prefix, only what the layout names; outside of it, everything.
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
        """Find the prefixes behind which both signature keys of this layout stand."""
        first, second = self.signature_keys
        prefixes = []
        for name in stored_names:
            if not name.endswith(first):
                continue
            prefix = name.removesuffix(first)
            if prefix[-1:] in ("", ".", "/") and prefix + second in stored_names:
                prefixes.append(prefix)
        return prefixes
