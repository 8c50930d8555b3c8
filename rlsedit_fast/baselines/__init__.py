"""Write rules: how the changes wanted of a layer's outputs become a change of its weight.

Each is a page of its own, with its source. All of them are given the same keys and innovations, the same exact weight
and the same prior, so that a comparison differs in the rule alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from rlsedit_fast.baselines.alphaedit import AlphaEdit
from rlsedit_fast.baselines.base import Batch, Rule
from rlsedit_fast.baselines.emmet import EMMET
from rlsedit_fast.baselines.fine_tuning import BoundedFineTuning, FineTuning
from rlsedit_fast.baselines.history import HistoryMEMIT
from rlsedit_fast.baselines.layer import LayerState, RuleLayer, RulePanel
from rlsedit_fast.baselines.memit import MEMIT
from rlsedit_fast.baselines.nse import NSE
from rlsedit_fast.baselines.prune import PRUNE
from rlsedit_fast.baselines.rect import RECT
from rlsedit_fast.baselines.rome import ROME
from rlsedit_fast.baselines.ultraedit import UltraEdit
from rlsedit_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from rlsedit_fast.rls import Prior, Saved

__all__ = ["BASELINES", "EMMET", "MEMIT", "NSE", "PRUNE", "RECT", "RECURSIVE", "ROME", "RULES"]
__all__ += ["AlphaEdit", "Batch", "BoundedFineTuning", "FineTuning", "HistoryMEMIT", "LayerState", "Rule", "RuleLayer"]
__all__ += ["RulePanel", "UltraEdit", "make_layer", "make_rule"]

RECURSIVE = "rls"
"""The rule of this package, whose layer is `RLSState` itself."""

BASELINES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        FineTuning,
        BoundedFineTuning,
        ROME,
        MEMIT,
        HistoryMEMIT,
        PRUNE,
        RECT,
        EMMET,
        AlphaEdit,
        NSE,
        UltraEdit,
    )
}
"""The other rules, by name."""

RULES: tuple[str, ...] = (RECURSIVE, *BASELINES)


_EXPECTED: dict[Any, str] = {int: "a whole number", float: "a number", float | None: "a number, or None"}
"""What a setting may be, by its type, in words."""


def _settings(rule: type[Rule]) -> dict[str, Any]:
    """Names of a rule's settings, with their types."""
    hints = get_type_hints(rule)
    return {field.name: hints[field.name] for field in fields(rule)}  # type: ignore[arg-type]


def make_rule(name: str, options: Mapping[str, Any]) -> Rule | None:
    """The rule of a name with some settings; None for the recursive one, whose settings are the editor's own.

    Raises:
        InputError: no such rule, no such setting of it, or a value that cannot be meant.
    """
    if name not in RULES:
        raise InputError(f"rule={name!r}: expected one of {', '.join(RULES)}")
    if not isinstance(options, Mapping):
        raise InputError(f"rule_options={options!r}: expected settings of rule {name!r} by name")
    known = _settings(BASELINES[name]) if name in BASELINES else {}
    if unknown := sorted(str(key) for key in options if key not in known):
        raise InputError(
            f"rule_options: rule {name!r} has no {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
        )
    wrong = [
        f"{key}={value!r}, expected {_EXPECTED[known[key]]}"
        for key, value in options.items()
        if isinstance(value, bool) or not isinstance(value, known[key] | int)  # whole numbers are numbers too
    ]
    if wrong:
        raise InputError(f"rule_options: {'; '.join(wrong)}")
    return BASELINES[name](**options) if name in BASELINES else None


def make_layer(
    name: str,
    options: Mapping[str, Any],
    weight: Tensor,
    prior: Prior,
    *,
    delay: int,
    label: str,
    saved: Saved | None = None,
) -> LayerState:
    """A layer under the rule of a name, its weight kept current in place.

    Args:
        name: of the rule.
        options: its settings.
        weight: `W0 [d_v, d_k]`.
        prior: of the layer.
        delay: as in `RLSState`; the other rules have none.
        label: the layer's name, for the errors.
        saved: what an `RLSState` is to go on from; the other rules are not saved.
    """
    from rlsedit_fast.rls import RLSState

    rule = make_rule(name, options)
    if rule is None:
        return RLSState(weight, prior, delay=delay, name=label, in_place=True, saved=saved)
    return RuleLayer(weight, prior, rule, name=label, in_place=True)
