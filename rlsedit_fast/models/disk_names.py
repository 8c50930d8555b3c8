"""Matches the tensors of a checkpoint on disk with those of the loaded model: names and layout can differ.

transformers renames tensors while it loads them, and fuses some, such as the weights of experts. Its own rules are
applied here in both directions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlsedit_fast.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a model, and the tensors on disk that they are loaded from.

    Attributes:
        names: names in the model.
        keys: names on disk.
        fused: whether their layout differs, so that `convert` is not the identity.
        convert: computes the tensors of the model, by name, from those on disk, by name.
        revert: computes the tensors on disk from those of the model; raises ModelError if it gives other names.

    Example:
        >>> from rlsedit_fast.models.disk_names import match_tensors
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> (group,), unused = match_tensors(model, ["norm.weight", "mtp.weight"])
        >>> group.names, group.keys, unused
        (('model.norm.weight',), ('norm.weight',), ['mtp.weight'])
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    fused: bool
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    revert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def match_tensors(model: PreTrainedModel, keys: Iterable[str]) -> tuple[list[TensorGroup], list[str]]:
    """Matches names on disk with names in a model.

    Args:
        model: the model.
        keys: names of the tensors of its checkpoint on disk.

    Returns:
        The groups, and the names of tensors that the model does not use.
    """
    state = model.state_dict(keep_vars=True)
    rules = _Rules.of(model)
    plain: dict[str, list[str]] = {}
    fused: dict[str, list[tuple[str, str]]] = {}
    unused = []
    for key in rules.ordered(keys):
        name, pattern = rules.rename(key, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            unused.append(key)
        elif pattern is None:
            plain.setdefault(name, []).append(key)
        else:
            fused.setdefault(name, []).append((key, pattern))
    groups = [_plain_group(name, held) for name, held in plain.items()]
    return [*groups, *(rules.fused_group(name, held, state) for name, held in fused.items())], unused


def module_keys(model: PreTrainedModel, keys: Iterable[str], module: str) -> tuple[str, list[str]]:
    """Finds the tensors of a module on disk, also of a quantized one, except its bias.

    Args:
        model: the model.
        keys: names of the tensors of its checkpoint on disk.
        module: dotted name of a module with a weight.

    Returns:
        The name of the module on disk, and the names of its tensors there; empty if there are none.
    """
    state, rules, tried = model.state_dict(keep_vars=True), _Rules.of(model), dict[str, bool]()
    last, found = module.rpartition(".")[2], dict[str, list[str]]()
    for key in keys:
        place, _, rest = key.partition(f".{last}.")
        place = f"{place}.{last}"
        if not rest or rest == "bias":
            continue
        if place not in tried:
            tried[place] = rules.rename(f"{place}.weight", state)[0] == f"{module}.weight"
        if tried[place]:
            found.setdefault(place, []).append(key)
    return next(iter(found.items()), ("", []))


def _plain_group(name: str, keys: list[str]) -> TensorGroup:
    return TensorGroup(
        (name,),
        tuple(keys),
        fused=False,
        convert=lambda held: {name: held[keys[0]]},
        revert=lambda held: dict.fromkeys(keys, held[name]),
    )


@dataclass(frozen=True)
class _Rules:
    """The rules by which transformers loads a model.

    Attributes:
        model: the model.
        renamings: rules for names, in order.
        converters: rules for names and layout.
    """

    model: Any
    renamings: list[Any]
    converters: list[Any]

    @classmethod
    def of(cls, model: Any) -> _Rules:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter
        except ImportError:  # before version 5
            return cls(model, [], [])
        found = getattr(model, "_weight_conversions", None)
        if getattr(model, "hf_quantizer", None) is not None:  # its rules pack and unpack tensors
            found = None
        found = copy.deepcopy(found) if found is not None else get_model_conversion_mapping(model)
        converters = [one for one in found if isinstance(one, WeightConverter)]
        return cls(model, [one for one in found if not isinstance(one, WeightConverter)], converters)

    def ordered(self, keys: Iterable[str]) -> list[str]:
        """Returns names in the order in which transformers loads them."""
        try:
            from transformers.core_model_loading import dot_natural_key
        except ImportError:
            return sorted(keys)
        return sorted(keys, key=dot_natural_key)

    def rename(self, key: str, state: dict[str, Tensor]) -> tuple[str, str | None]:
        """Returns the name in the model, and the pattern of the rule if the layout differs."""
        prefix = self.model.base_model_prefix
        try:
            from transformers.core_model_loading import rename_source_key
        except ImportError:
            return self._rename_before_5(key, state), None
        name, pattern = rename_source_key(key, self.renamings, self.converters, prefix, state)
        if name not in state:
            plain, _ = rename_source_key(key, [], [], prefix, state)
            if plain in state:
                return plain, None
        return name, pattern

    def _rename_before_5(self, key: str, state: dict[str, Tensor]) -> str:
        for pattern, new in (getattr(self.model, "_checkpoint_conversion_mapping", None) or {}).items():
            renamed, count = re.subn(pattern, new, key)
            if count:
                key = renamed
                break
        prefix = f"{self.model.base_model_prefix}."
        return next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in state), key)

    def fused_group(self, first: str, held: list[tuple[str, str]], state: dict[str, Tensor]) -> TensorGroup:
        """Returns the group of the tensors on disk that one rule converts together."""
        pattern_of = dict(held)
        rule = next(one for one in self.converters if held[0][1] in one.source_patterns)
        names = [first.replace(rule.target_patterns[0], target) for target in rule.target_patterns]

        def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            used = copy.deepcopy(rule)
            for key, pattern in pattern_of.items():
                used.add_tensor(first, key, pattern, tensors[key])
            found = used.convert(first, model=self.model, config=self.model.config)
            return {name: one[0] if isinstance(one, list) else one for name, one in found.items()}

        def revert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            from transformers.core_model_loading import revert_weight_conversion

            found = revert_weight_conversion(self.model, dict(tensors))
            if found.keys() != pattern_of.keys():
                raise ModelError(f"transformers does not convert {first} back to {held[0][0]}")
            return found

        return TensorGroup(tuple(name for name in names if name in state), tuple(pattern_of), True, convert, revert)
