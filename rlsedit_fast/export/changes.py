"""What editing changed of a model, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlsedit_fast.errors import InputError, ModelError, listed
from rlsedit_fast.models.fingerprint import settings
from rlsedit_fast.rls.checks import all_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class WeightChange:
    """One linear module's weight before and after, each `[d_v, d_k]`, whichever way the module stores it.

    Attributes:
        name: dotted name of the `nn.Linear` or `Conv1D` in the model.
        original: before the first edit, in the model's dtype.
        stored: what the model holds now, in the same dtype.
        current: what `stored` was rounded from: the float32 master; or `stored` where there is none.
        transposed: whether the module stores it as `[d_k, d_v]`.
    """

    name: str
    original: Tensor
    stored: Tensor
    current: Tensor
    transposed: bool

    def __post_init__(self) -> None:
        """Refuses tensors that do not belong together, or are not finite.

        Raises:
            InputError: naming the module.
        """
        original, stored, current = self.original, self.stored, self.current
        shapes = [list(tensor.shape) for tensor in (original, stored, current)]
        if original.ndim != 2 or shapes[1:] != shapes[:1] * 2:
            raise InputError(f"{self.name}: original, stored and current have the shapes {shapes}; give one [d_v, d_k]")
        dtype = original.dtype
        if not dtype.is_floating_point or stored.dtype != dtype or current.dtype not in (dtype, torch.float32):
            raise InputError(
                f"{self.name}: original is {dtype}, stored {stored.dtype} and current {current.dtype}; give the first "
                "two in the model's dtype, the third in that or in float32"
            )
        for role, tensor in (("original", original), ("stored", stored), ("current", current)):
            if not all_finite(tensor):
                raise InputError(f"{self.name}: {role} is not finite; put the model as it should be")
        limits = torch.finfo(dtype)
        apart = (current.to(_wide(dtype)) - stored.to(_wide(dtype))).abs()
        # Half a unit in the last place; near zero, half of the least number.
        if bool((apart > limits.eps / 2 * (stored.to(_wide(dtype)).abs() + limits.tiny)).any()):
            raise InputError(
                f"{self.name}: stored lies up to {apart.max():.3g} from current, farther than rounding to {dtype} "
                "takes it; give both as they are at one moment"
            )

    @property
    def delta(self) -> Tensor:
        """`current - original [d_v, d_k]`, float32."""
        wide = _wide(self.original.dtype)
        return (self.current.to(wide) - self.original.to(wide)).float()


def changes_between(base_model: PreTrainedModel, edited_model: PreTrainedModel) -> list[WeightChange]:
    """The linear weights in which two loaded models differ, in the model's order; empty where they are the same.

    Args:
        base_model: as it was before editing.
        edited_model: of the same architecture and dtype; its devices are those of what is returned.

    Raises:
        InputError: they differ in settings, in the names, shapes or dtypes of their tensors, or in a tensor that is
            no linear module's weight.
    """
    before, after = settings(base_model.config.to_dict()), settings(edited_model.config.to_dict())
    if other := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise InputError(f"the models differ in the settings {', '.join(other)}; give two of one architecture")
    base, edited = _tensors(base_model), _tensors(edited_model)
    if lone := sorted(base.keys() ^ edited.keys()):
        raise InputError(
            f"only one of the models has {', '.join(listed(lone, 5))}; give two of one architecture, loaded alike"
        )
    unlike = [
        f"{name} ({list(base[name].shape)} {base[name].dtype} and {list(tensor.shape)} {tensor.dtype})"
        for name, tensor in edited.items()
        if (base[name].shape, base[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if unlike:
        raise InputError(f"the models differ in shape or dtype in {', '.join(listed(unlike, 5))}; load both alike")
    changed = [name for name, tensor in edited.items() if not same_bits(base[name].to(tensor.device), tensor)]
    found = {name: linear_weight(edited_model, name.removesuffix(".weight")) for name in changed}
    if foreign := [name for name, weight in found.items() if weight is None]:
        raise InputError(
            f"the models differ in {', '.join(listed(foreign, 5))}, which no linear module has as its weight; only "
            "changes of nn.Linear and Conv1D weights can be exported: save the whole model instead"
        )
    return [_change(name, base[name], weight) for name, weight in found.items() if weight is not None]


def linear_weight(model: nn.Module, name: str) -> tuple[Tensor, bool] | None:
    """`(weight [d_v, d_k], transposed)` of the linear module of that name, a view; None where it is none."""
    from transformers.pytorch_utils import Conv1D

    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(module, (nn.Linear, Conv1D)):
        return None
    weight, transposed = module.get_parameter("weight").detach(), isinstance(module, Conv1D)
    if weight.is_meta:
        raise ModelError(f"{name} is on the meta device: its values are not in memory; load the model whole")
    return weight.T if transposed else weight, transposed


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same, bit for bit: zero has a sign, and NaN equals itself."""
    return torch.equal(bits(one), bits(other))


def bits(tensor: Tensor) -> Tensor:
    """A floating-point tensor's bits as integers of its size; any other tensor as it is."""
    if not tensor.dtype.is_floating_point:
        return tensor
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _change(name: str, before: Tensor, found: tuple[Tensor, bool]) -> WeightChange:
    weight, transposed = found
    original = before.to(weight.device)
    return WeightChange(
        name.removesuffix(".weight"), original.T if transposed else original, weight, weight, transposed
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of it holds, each tensor under the first of its names."""
    held = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(held.items())}
    return {name: held[name].detach() for name in reversed(first.values())}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
