"""WHERE: a model, seen as an ordered list of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from torch import nn
from torch.nn import Parameter

from gradselect.core import Block, can_train, is_frozen_for_now, nothing_trains, settle
from gradselect.parallel import check_module
from gradselect.slices import check_whole_layers, sliced_linears
from gradselect.usage import UsageError, as_tuple, check_is, check_one_of, matches_any, matching, nearest, parent

from .slicing import DEFAULT_PARTS, check_parts, slice_layers, slice_names
from .structure import Layout, Place

By = Literal["layer", "matrix", "columns", "rows"]
"""Size of a block."""

Patterns = Mapping[str, str | Sequence[str]]
"""Block name -> a glob, or several, on parameter names."""


def partition(
    model: nn.Module, *, by: By = "layer", parts: int | None = None, patterns: Patterns | None = None
) -> tuple[Block, ...]:
    """Divide the parameters that train among blocks: each stands in exactly one.

    A parameter trains when it requires a gradient, or when an optimizer of this package has frozen it for the moment.
    Names come from the structure alone, so they stay when something else trains. The order is that of the model:

        embedding      every `nn.Embedding` outside the layers, the input embeddings, what shares a module with them
                       (positions, token types, their norm) and modules called so ("layernorm_embedding")
        layer.0, ...   the layers; one of which nothing trains is left out, and the others keep their numbers
        norm           modules of 1-D tensors only
        head           the output embeddings, or, where the model names none, the last module after the layers that
                       holds a matrix; tied to the embedding it is no block, but an alias of that one
        pooler, ...    anything else, under its module's name; what has one name is one block

    With several stacks of layers the name of its stack goes before all that belongs to one: "encoder.layer.0",
    "encoder.norm", "decoder.layer.0", "decoder.norm". If the stacks share an embedding, all of it is "embedding". Where
    one stack stands with the input embeddings, as the language model's beside a vision tower, its blocks have aliases
    without the stack's name: "layer.0" for "language_model.layer.0".

    Args:
        model: any module; of transformers' methods it may have `get_input_embeddings` and `get_output_embeddings`.
        by: "matrix" divides the layers further: a tensor of two or more dimensions is a block, with the 1-D tensors of
            its module, under the module's name ("layer.3.self_attn.q_proj"), or under its own if the module holds
            several ("layer.3.mlp.experts.down_proj"). The other 1-D tensors of a layer are "layer.3.vectors".
            "columns" and "rows" cut the weight of every plain `nn.Linear` in the layers, **in place**, into `parts`
            ranges of columns or rows: "layer.3.columns.0" holds the first range of each of them. The 1-D tensors of a
            layer are "layer.3.vectors", other matrices are blocks as with "matrix". The layers stay the same objects,
            the forward pass and state dicts are those of the plain model, and `gradselect.join_slices` undoes it. Cut
            before DistributedDataParallel wraps the model. Called again with the same `parts` it only returns the
            blocks. docs/slices.md says more.
        parts: number of ranges, for "columns" and "rows". Default 8. Their sizes differ by at most one.
        patterns: blocks of the user's own. What matches the globs of an entry forms the block of that name, the first
            entry wins, and the rest is divided as above. Any of the names of a tied tensor stands for it.

    Returns:
        The blocks, in model order; a block made by `patterns` stands where the first of its parameters would.

    Raises:
        UsageError: nothing trains; there are no repeated layers and `patterns` does not name every parameter; a pattern
            matches nothing, or its block gets nothing; a name in `patterns` is also that of a block of the rest. For
            slices: a layer has no plain `nn.Linear`, all have fewer columns or rows than `parts`, the model is sharded
            or wrapped, or an optimizer holds it.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> [block.name for block in partition(nn.ModuleDict({"tokens": nn.Embedding(3, 2), "layers": layers}))]
        ['embedding', 'layer.0', 'layer.1']
    """
    check_one_of("by", by, get_args(By))
    check_parts(parts, by=by)
    names = names_of_trained(model)
    if not names:
        raise UsageError(nothing_trains(model))
    if by in ("columns", "rows"):
        slice_layers(model, by=by, parts=parts or DEFAULT_PARTS)
        names = names_of_trained(model)
    elif by == "matrix":
        check_whole_layers(model, to='by="matrix"')
    claimed = claim(names, patterns or {})
    layout = layout_of(model, names, by=by)
    unclaimed = [parameter for parameter in names if parameter not in claimed]
    if unclaimed and not layout.layers:
        raise UsageError(no_layers(model, [names[parameter][0] for parameter in unclaimed]))
    places = {
        parameter: sorted(map(layout.place, known), key=lambda place: place.rank) for parameter, known in names.items()
    }
    for parameter in unclaimed:
        if (block := places[parameter][0].block) in claimed.values():
            raise UsageError(
                f"patterns name a block {block!r}, but {names[parameter][0]!r}, which they do not match, belongs to a "
                "block of this name too; match it as well, or choose another name"
            )
    for parameter, block in claimed.items():
        places[parameter] = [places[parameter][0]._replace(block=block)]
    blocks = with_short_names(assemble(names, places), main=layout.main)
    return tuple(replace(block, over_vocabulary=not layout.vocabulary.isdisjoint(block.parameters)) for block in blocks)


def whole_layers(model: nn.Module) -> tuple[Block, ...]:
    """Return the blocks of an optimizer that was given none.

    Raises:
        UsageError: the model is sliced, so that somebody wants slices as blocks.
    """
    for sliced in sliced_linears(model).values():
        raise UsageError(
            "the model is cut into slices, and no blocks are given; write blocks=partition(model, "
            f'by="{sliced.kind}", parts={len(sliced.slice_names)}), or blocks=partition(model) for whole layers'
        )
    return partition(model)


def resolve_names(blocks: Sequence[Block], patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the blocks that a user means, in model order.

    Args:
        blocks: as `partition` returns them.
        patterns: names, aliases or globs on them ("layer.1?"); a single one may stand alone.

    Raises:
        UsageError: one of them matches no block.
    """
    known = [name for block in blocks for name in (block.name, *block.aliases)]
    found = set(matching(known, patterns, kind="block")) if as_tuple(patterns) else set()
    return tuple(block.name for block in blocks if not found.isdisjoint((block.name, *block.aliases)))


def assemble(names: Mapping[Parameter, list[str]], places: Mapping[Parameter, list[Place]]) -> tuple[Block, ...]:
    """The blocks in order, from all places of each parameter, the first of which is its own.

    The other places are those of a tied tensor. A block that would hold none but tied ones is an alias of their blocks.
    """
    grouped: dict[str, list[Parameter]] = {}
    for parameter in names:
        grouped.setdefault(places[parameter][0].block, []).append(parameter)
    blocks = []
    for block, parameters in sorted(grouped.items(), key=lambda item: min(places[each][0].rank for each in item[1])):
        tied = [place.block for parameter in parameters for place in places[parameter][1:]]
        blocks.append(
            Block(
                name=block,
                parameters=tuple(parameters),
                parameter_names=tuple(names[parameter][0] for parameter in parameters),
                aliases=tuple(dict.fromkeys(name for name in tied if name not in grouped)),
            )
        )
    return tuple(blocks)


def with_short_names(blocks: Sequence[Block], *, main: str) -> tuple[Block, ...]:
    """Return the blocks; those of the main stack get their names without its label as aliases, where they are free."""
    if not main:
        return tuple(blocks)
    taken = {name for block in blocks for name in (block.name, *block.aliases)}
    short = {block.name: block.name.removeprefix(f"{main}.") for block in blocks}
    return tuple(
        block if short[block.name] in taken else replace(block, aliases=(*block.aliases, short[block.name]))
        for block in blocks
    )


def check_partition(model: nn.Module, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks, which hold every parameter of the model that trains exactly once.

    Raises:
        UsageError: one is missing or stands in two blocks, or is not of this model; or two blocks have one name.
    """
    for block in [blocks] if isinstance(blocks, str) else blocks:
        check_is(block, Block, name="blocks", example='blocks=gs.partition(model, by="matrix")')
    placed = Counter(id(parameter) for block in blocks for parameter in block.parameters)
    trained = {id(parameter): known[0] for parameter, known in names_of_trained(model).items()}
    faults = {
        "is in no block": [name for key, name in trained.items() if key not in placed],
        "is in several blocks": [name for key, name in trained.items() if placed[key] > 1],
        "is no parameter of the model that trains": [
            name
            for block in blocks
            for name, parameter in zip(block.parameter_names, block.parameters, strict=True)
            if id(parameter) not in trained
        ],
        "names two blocks": [name for name, count in Counter(block.name for block in blocks).items() if count > 1],
    }
    for fault, names in faults.items():
        if names:
            raise UsageError(f"blocks: {names[0]!r} {fault}; write blocks=partition(model, patterns={{...}})")
    return tuple(blocks)


# parameters and patterns -----------------------------------------------------------------------------


def names_of_trained(model: nn.Module) -> dict[Parameter, list[str]]:
    """Every parameter that trains with all of its names; a tied one has several, that of `named_parameters()` first."""
    check_module(model)
    settle(model.parameters())
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # so the blocks stay the same while an optimizer freezes some of them
        if can_train(parameter) and (parameter.requires_grad or is_frozen_for_now(parameter)):
            names.setdefault(parameter, []).append(name)
    return names


def claim(names: Mapping[Parameter, list[str]], patterns: Patterns) -> dict[Parameter, str]:
    """The block of each parameter that a pattern matches; the first entry wins."""
    claimed: dict[Parameter, str] = {}
    for block, globs in patterns.items():
        for glob in as_tuple(globs):
            matched = [
                parameter for parameter, known in names.items() if any(matches_any(name, (glob,)) for name in known)
            ]
            if not matched:
                close = nearest(glob, [name for known in names.values() for name in known])
                raise UsageError(f"{glob!r}, of block {block!r}, matches no parameter that trains; nearest: {close}")
            for parameter in matched:
                claimed.setdefault(parameter, block)
        if block not in claimed.values():
            raise UsageError(f"block {block!r} gets no parameter: earlier entries match all of {globs!r}; leave it out")
    return claimed


def layout_of(model: nn.Module, names: Mapping[Parameter, list[str]], *, by: By) -> Layout:
    """Return the layout whose layers are divided in this way."""
    if by == "layer":
        return Layout(model, matrices=None)
    slices = slice_names(model) if by in ("columns", "rows") else {}
    whole = {each: known for each, known in names.items() if known[0] not in slices}
    return Layout(model, matrices=matrices_of(whole), slices=slices)


def matrices_of(names: Mapping[Parameter, list[str]]) -> dict[str, list[str]]:
    """Names of the tensors of two or more dimensions that a module holds itself, by its path."""
    matrices: dict[str, list[str]] = {}
    for name in (name for parameter, known in names.items() if parameter.ndim > 1 for name in known):
        matrices.setdefault(parent(name), []).append(name)
    return matrices


def no_layers(model: nn.Module, unclaimed: Sequence[str]) -> str:
    return (
        f"{type(model).__name__} has no repeated layers: looked for an nn.ModuleList (or an nn.ModuleDict with numbers "
        "as keys) whose children repeat a class, or an nn.Sequential with neighbours of one class, that hold "
        'parameters; name the blocks with blocks=gs.partition(model, patterns={"block": "*"}). '
        f"In no block so far: {', '.join(unclaimed[:5])}{', ...' if unclaimed[5:] else ''}"
    )
