"""Finds the MLP and the mixture of experts of a decoder block by structure.

An MLP is a linear module whose output has the width of the residual stream and whose input has the width that another
linear module of the same parent gives. Modules that mix tokens (attention, state space models, convolutions) are
excluded: their forward takes a mask, positions or a cache, or they contain a convolution.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import nn

from rlsedit_fast.models.linear import in_attention, input_width, output_width

_MIXING_ARGUMENTS = frozenset(
    """attention_mask position_embeddings position_ids cache cache_params cache_position past_key_value
    past_key_values past_kv layer_past kv_cache use_cache rotary_pos_emb rotary_emb freqs_cis alibi""".split()
)
"""Arguments of modules in which a token reads other tokens; the forward of an MLP takes the states only."""

_NORM = re.compile(r"Norm(?![a-z])")
"""Classes of norms, some of which contain an MLP for their scale."""

_WIDER = 2
"""MLPs with at most 1/_WIDER of the width of another one are side paths, such as those of low rank."""


@dataclass(frozen=True)
class Mlp:
    """An MLP of a decoder block.

    Attributes:
        projection: name of its output projection within the block.
        home: name of the module that contains all of it, empty for the block itself.
        width: width of the input of the projection; 0 if the module does not state it.
        nonlinear: whether it has an activation or a gate.
    """

    projection: str
    home: str
    width: int
    nonlinear: bool


def mixes_tokens(block: nn.Module) -> bool:
    """Returns whether a part of a block mixes tokens."""
    return any(_mixes(name, module) for name, module in block.named_modules() if name)


def _mixes(name: str, module: nn.Module) -> bool:
    """Returns whether a module mixes tokens, by its name, its parts or the arguments of its forward."""
    if in_attention(name) or not _MIXING_ARGUMENTS.isdisjoint(_arguments(cast(Any, type(module)))):
        return True
    return any(isinstance(child, nn.Conv1d) and max(child.kernel_size) > 1 for child in module.children())


@cache
def _arguments(kind: Any) -> frozenset[str]:
    """Returns the names of the arguments of a module's forward."""
    try:
        return frozenset(inspect.signature(kind.forward).parameters)
    except (TypeError, ValueError):  # a module that is not written in Python
        return frozenset()


def _of_tokens(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a block that process each token by itself, with their names, parents first; no norms."""
    left = list(block.named_children())[::-1]
    while left:
        name, module = left.pop()
        if not _mixes(name, module) and not is_norm(module):
            yield name, module
            left += [(f"{name}.{inner}", child) for inner, child in module.named_children()][::-1]


def candidates(block: nn.Module, width: int) -> list[str]:
    """Returns the names of the linear modules with outputs of a given width, outside of modules that mix tokens."""
    return [name for name, module in _linear(block) if output_width(module) == width]


def _linear(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in _of_tokens(block) if output_width(module) is not None]


def find_mlps(block: nn.Module, width: int, *, outside: str | None = None) -> list[Mlp]:
    """Returns the MLPs of a block, one per module that contains one.

    Args:
        block: the decoder block.
        width: width of the residual stream.
        outside: name of a module whose parts are ignored, such as a mixture of experts.

    Returns:
        The MLPs, in the order of their modules.
    """
    linear = [(name, module) for name, module in _linear(block) if outside is None or not within(name, outside)]
    by_home = dict[str, Mlp]()
    for name, module in linear:
        if output_width(module) != width:
            continue
        home = _home(name, module, linear, width)
        if home is not None:
            feeding = _feeding(name, module, linear, width, home)
            gated = len(feeding) > 1 or any(output_width(one) != input_width(module) for one in feeding.values())
            parents = {at.rpartition(".")[0] for at in (name, *feeding)}
            nonlinear = gated or any(_activates(block.get_submodule(at)) for at in parents)
            by_home[home] = Mlp(name, home, input_width(module) or 0, nonlinear)
    return list(by_home.values())


def _home(name: str, module: nn.Module, linear: Sequence[tuple[str, nn.Module]], width: int) -> str | None:
    """Returns the innermost module around a projection that also contains what gives its input, or None."""
    home = name
    while home:
        home = home.rpartition(".")[0]
        if _feeding(name, module, linear, width, home):
            return home
    return None


def _feeding(
    name: str, module: nn.Module, linear: Sequence[tuple[str, nn.Module]], width: int, home: str
) -> dict[str, nn.Module]:
    """Returns the linear modules in `home` that can give the input of a projection; a gate may double their width."""
    inner = input_width(module)
    return {
        at: other
        for at, other in linear
        if at != name
        and within(at, home)
        and input_width(other) in (width, None)
        and (inner is None or output_width(other) in (inner, 2 * inner))
    }


def _activates(own: nn.Module) -> bool:
    """Returns whether a module has an activation: a function, or a module without weights and parts except dropout."""
    if any(inspect.isroutine(value) for name, value in vars(own).items() if name != "forward" and name[0] != "_"):
        return True
    return any(
        next(module.parameters(), None) is None
        and next(module.children(), None) is None
        and not isinstance(module, (nn.Identity, nn.Dropout, nn.ModuleList, nn.ModuleDict))
        for module in own.children()
    )


def choose_mlps(mlps: Sequence[Mlp]) -> list[Mlp]:
    """Returns the MLP of a block among several that `find_mlps` found; more than one if they cannot be distinguished.

    Linear side paths are ignored, then those that are much narrower, then parts of the block itself.
    """
    chosen = [one for one in mlps if one.nonlinear] or list(mlps)
    widest = max((one.width for one in chosen), default=0)
    chosen = [one for one in chosen if one.width * _WIDER > widest or not widest]
    return [one for one in chosen if one.home] or chosen


def mlps_beside(block: nn.Module, width: int, experts: str) -> list[Mlp]:
    """Returns the MLPs of a block with a mixture of experts that process every token and lie outside of the mixture.

    Args:
        block: the decoder block.
        width: width of the residual stream.
        experts: name of the routed experts.

    Returns:
        The MLPs, without side paths, which are much narrower than an expert.
    """
    stacked = [p for p in block.get_submodule(experts).parameters(recurse=False) if p.ndim == 3]
    inner = min((side for weight in stacked for side in weight.shape[1:] if side != width), default=width)
    found = find_mlps(block, width, outside=experts.rpartition(".")[0] or experts)
    return [one for one in found if one.home and one.nonlinear and one.width * _WIDER > inner]


def find_experts(block: nn.Module) -> str | None:
    """Returns the name of a block's routed experts: a module named `experts` or with stacked weights, or None."""
    for name, module in _of_tokens(block):
        stacked = any(p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))
        if name.rpartition(".")[2] == "experts" or (stacked and not isinstance(module, nn.Conv1d)):
            return name
    return None


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a norm, by the name of its class."""
    return _NORM.search(type(module).__name__) is not None


def within(name: str, parent: str) -> bool:
    """Returns whether a module is another one or a part of it, by their dotted names; all are parts of an empty one."""
    return not parent or name == parent or name.startswith(f"{parent}.")
