"""Weight changes between a base model and an edited model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlsedit_fast.errors import InputError, ModelError, listed
from rlsedit_fast.models.fingerprint import settings
from rlsedit_fast.models.linear import Stack
from rlsedit_fast.models.projections import find_block, stacked_blocks
from rlsedit_fast.rls.checks import all_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class WeightChange:
    """Weight of one linear module before and after editing, each `[d_v, d_k]` regardless of the module's layout.

    Attributes:
        name: dotted name of the `nn.Linear` or `Conv1D` in the model.
        original: weight before the first edit, in the model's dtype.
        stored: weight in the edited model, in the same dtype.
        current: float32 master weight that `stored` was rounded from, or `stored` if there is none.
        transposed: whether the module stores the weight as `[d_k, d_v]`.
        stack: stacked weight of which this is the output weight of a routed expert; then the name is that of the
            stacked weight, with the index of the expert. None for a linear module.

    Raises:
        InputError: shapes or dtypes do not match, a tensor is not finite, or `stored` is not `current` rounded.

    Example:
        >>> import torch
        >>> from rlsedit_fast.export import WeightChange
        >>> original, edited = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
        >>> WeightChange("layers.0.down_proj", original, edited, edited, transposed=False).delta
        tensor([[1., 0.]])
    """

    name: str
    original: Tensor
    stored: Tensor
    current: Tensor
    transposed: bool
    stack: Stack | None = None

    def __post_init__(self) -> None:
        """Checks the tensors, see the class."""
        original, stored, current = self.original, self.stored, self.current
        shapes = [list(tensor.shape) for tensor in (original, stored, current)]
        if original.ndim != 2 or shapes[1:] != shapes[:1] * 2:
            raise InputError(
                f"{self.name}: original, stored and current have shapes {shapes}; expected the same [d_v, d_k]"
            )
        dtype = original.dtype
        if not dtype.is_floating_point or stored.dtype != dtype or current.dtype not in (dtype, torch.float32):
            raise InputError(
                f"{self.name}: original is {dtype}, stored is {stored.dtype} and current is {current.dtype}; expected "
                "the model's dtype for original and stored, and that or float32 for current"
            )
        for role, tensor in (("original", original), ("stored", stored), ("current", current)):
            if not all_finite(tensor):
                raise InputError(f"{self.name}: {role} contains NaN or Inf; load the model again")
        limits = torch.finfo(dtype)
        difference = (current.to(_wide(dtype)) - stored.to(_wide(dtype))).abs()
        # Half a unit in the last place; near zero, half the smallest subnormal.
        if bool((difference > limits.eps / 2 * (stored.to(_wide(dtype)).abs() + limits.tiny)).any()):
            raise InputError(
                f"{self.name}: stored differs from current by up to {difference.max():.3g}, more than rounding to "
                f"{dtype}; pass both from the same state"
            )

    @property
    def delta(self) -> Tensor:
        """`current - original [d_v, d_k]`, float32."""
        wide = _wide(self.original.dtype)
        return (self.current.to(wide) - self.original.to(wide)).float()


def changes_between(base_model: PreTrainedModel, edited_model: PreTrainedModel) -> list[WeightChange]:
    """Returns the linear weights in which two loaded models differ, in model order.

    Args:
        base_model: model before editing.
        edited_model: edited model of the same architecture and dtype; the changes are on its devices.

    Returns:
        One change per weight that differs; empty if the models are equal.

    Raises:
        InputError: the models differ in config, in names, shapes or dtypes of tensors, or in a tensor that is not the
            weight of a linear module.

    Example:
        >>> import torch
        >>> from rlsedit_fast.export import changes_between
        >>> from rlsedit_fast.world import load_demo_model
        >>> (base, _), (edited, _) = load_demo_model(), load_demo_model()
        >>> with torch.no_grad():
        ...     _ = edited.model.layers[0].mlp.down_proj.weight[0, 0].add_(1.0)
        >>> [(change.name, float(change.delta.sum())) for change in changes_between(base, edited)]
        [('model.layers.0.mlp.down_proj', 1.0)]
    """
    before, after = settings(base_model.config.to_dict()), settings(edited_model.config.to_dict())
    if other := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise InputError(
            f"the configs of the models differ in {', '.join(other)}; pass models of the same architecture"
        )
    base, edited = _tensors(base_model), _tensors(edited_model)
    if unmatched := sorted(base.keys() ^ edited.keys()):
        raise InputError(
            f"only one of the models has {', '.join(listed(unmatched, 5))}; pass models of the same architecture, "
            "loaded the same way"
        )
    mismatched = [
        f"{name} ({list(base[name].shape)} {base[name].dtype} and {list(tensor.shape)} {tensor.dtype})"
        for name, tensor in edited.items()
        if (base[name].shape, base[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if mismatched:
        raise InputError(f"shape or dtype differ in {', '.join(listed(mismatched, 5))}; load both models the same way")
    changed = [name for name, tensor in edited.items() if not same_bits(base[name].to(tensor.device), tensor)]
    parts = dict[str, Tensor]()
    for name in changed:
        blocks = stacked_blocks(edited_model, name) if base[name].ndim == 3 else []
        for at, block in enumerate(blocks):
            if not same_bits(base[name][at].to(edited[name].device), edited[name][at]):
                parts[block] = base[name][at]
        if not blocks:
            parts[name] = base[name]
    found = {name: linear_weight(edited_model, name.removesuffix(".weight")) for name in parts}
    if other_tensors := [name for name, weight in found.items() if weight is None]:
        raise InputError(
            f"the models differ in {', '.join(listed(other_tensors, 5))}; only changes of nn.Linear and Conv1D weights "
            "and of the output weights of experts can be exported, so save the whole model instead"
        )
    return [_change(name, parts[name], *weight) for name, weight in found.items() if weight is not None]


def check_distinct(changes: Sequence[WeightChange]) -> None:
    """Checks that every module occurs in one change only.

    Raises:
        InputError: a module occurs in several changes.
    """
    names = [change.name for change in changes]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several changes of {', '.join(repeated)}; pass one change per module")


def check_no_experts(changes: Sequence[WeightChange], what: str) -> None:
    """Raises InputError if a change is that of a routed expert, which `what` cannot contain."""
    if experts := [change.name for change in changes if change.stack]:
        raise InputError(
            f"{len(experts)} of {len(changes)} changes are those of routed experts, such as {experts[0]}, which {what} "
            "cannot contain",
            hint="write a checkpoint or a delta (--out, --delta; Python: save_pretrained, save_delta)",
        )


def linear_weight(model: PreTrainedModel, name: str) -> tuple[Tensor, bool, Stack | None] | None:
    """Returns the weight of a linear module, or the output weight of a routed expert.

    Args:
        model: transformers causal language model.
        name: dotted name of the module, or of the stacked weight of the experts with the index of one.

    Returns:
        `(weight [d_v, d_k], transposed, stack)`, the weight as a view, see `WeightChange`; None if there is no such
        `nn.Linear`, `Conv1D` or expert.

    Raises:
        ModelError: the weight is on the meta device.
    """
    from transformers.pytorch_utils import Conv1D

    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if module is None:
        return find_block(model, name)
    if not isinstance(module, (nn.Linear, Conv1D)):
        return None
    weight, transposed = module.get_parameter("weight").detach(), isinstance(module, Conv1D)
    if weight.is_meta:
        raise ModelError(f"{name} is on the meta device and has no values; load the model completely into memory")
    return weight.T if transposed else weight, transposed, None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors of the same shape and dtype are bitwise equal (0.0 != -0.0, NaN == NaN)."""
    return torch.equal(bits(one), bits(other))


def bits(tensor: Tensor) -> Tensor:
    """Views a floating-point tensor as integers of the same size; returns other tensors unchanged."""
    if not tensor.dtype.is_floating_point:
        return tensor
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _change(name: str, before: Tensor, weight: Tensor, transposed: bool, stack: Stack | None) -> WeightChange:
    original = before.to(weight.device)
    original = original.T if transposed else original
    return WeightChange(name.removesuffix(".weight"), original, weight, weight, transposed, stack)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint of the model, tied tensors only under their first name."""
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: state[name].detach() for name in reversed(first.values())}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
