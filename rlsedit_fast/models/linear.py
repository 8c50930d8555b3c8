"""What is edited in a decoder layer: the interface of projections, linear modules, and what prevents editing them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.shards import held, is_divided
from rlsedit_fast.rls import BlockLayout
from rlsedit_fast.rls.columns import WHOLE, Columns

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of weights that can be edited."""


@dataclass(frozen=True)
class Stack:
    """The stacked weight of the experts of a mixture, which contains the weight of each of them.

    Attributes:
        experts: number of experts.
        declared_transposed: `is_transposed` of its module, by which PEFT decides how to read the weight; False if the
            module does not have it.

    Example:
        >>> from rlsedit_fast.models.linear import Stack
        >>> Stack(experts=8, declared_transposed=False).experts
        8
    """

    experts: int
    declared_transposed: bool


@dataclass(frozen=True)
class Projection(ABC):
    """The last linear map of a decoder layer's MLP: its input is the key, its output enters the residual stream.

    Its weight consists of blocks `[d_v, block width]`: one for an ordinary MLP, one per expert for a mixture.

    Attributes:
        layer: index of the decoder layer.
        name: dotted name of the module in the model.
        module: module whose output is the output of the projection.

    Example:
        >>> from rlsedit_fast.models import find_decoder
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> (projection,) = find_decoder(model).select([0])
        >>> projection.name, projection.key_width, projection.value_width, len(projection.blocks)
        ('model.layers.0.mlp.down_proj', 1536, 128, 1)
    """

    layer: int
    name: str
    module: nn.Module

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The edited parameters of the model, by dotted name."""

    @property
    def tensors(self) -> list[Tensor]:
        """The parts of the parameters that this process holds, as views."""
        return [held(parameter.detach()) for parameter in self.parameters.values()]

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Tensor]:
        """The blocks of the weight, views `[d_v, block width]`; the held columns if processes divide the weight."""

    @property
    @abstractmethod
    def layout(self) -> BlockLayout | None:
        """The layout of the keys of a mixture of experts; None for ordinary keys."""

    @abstractmethod
    def watch(self, pick: Callable[[Tensor], Tensor], keep: Callable[[Tensor], None]) -> list[Any]:
        """Registers hooks that read the keys in every forward pass.

        Args:
            pick: takes states of all tokens, `[tokens, d]` or `[rows, t, d]`, and returns those of the wanted ones,
                `[..., d]`.
            keep: called once per forward pass with the keys of the wanted tokens, `[..., key_width]`.

        Returns:
            The handles of the hooks.
        """

    @abstractmethod
    def block_name(self, block: int) -> tuple[str, bool]:
        """Returns the name of a block in files of changes, and whether the model stores it transposed."""

    def stack_of(self, block: int) -> Stack | None:
        """Returns the stacked weight that contains a block; None if the block is the weight of a linear module."""
        return None

    @abstractmethod
    def assembled(self, blocks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns parameters, by dotted name, that have the given blocks; those of the model are not changed."""

    @abstractmethod
    def add(self, change: Any) -> None:
        """Adds the change of a trial (`TrialPanel.change`) to the weight, rounded to its dtype."""

    def copies(self) -> list[Tensor]:
        """Returns copies of the held parameters, for `restore`."""
        return [tensor.clone() for tensor in self.tensors]

    def restore(self, copies: Sequence[Tensor]) -> None:
        """Restores the parameters bit for bit."""
        with torch.no_grad():
            for tensor, copied in zip(self.tensors, copies, strict=True):
                tensor.copy_(copied)

    @property
    def columns(self) -> Columns:
        """The columns of the weight that this process holds."""
        return WHOLE

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.blocks[0].device

    @property
    def value_width(self) -> int:
        """Width of the output, `d_v`."""
        return self.blocks[0].shape[0]

    @property
    def key_width(self) -> int:
        """Width of a row of keys, `d_k`."""
        return self.layout.key_width if self.layout else self.columns.width(self.blocks[0].shape[1])


@dataclass(frozen=True)
class LinearProjection(Projection):
    """A projection that is one linear module and processes every token.

    Attributes:
        layer: index of the decoder layer.
        name: dotted name of the module in the model.
        module: `nn.Linear`, or the `Conv1D` of GPT-2, which stores its weight transposed.
        transposed: whether the module stores its weight transposed.
        held_columns: the columns of the weight that this process holds, see `shards.columns_of`.

    Example:
        >>> from rlsedit_fast.models import find_decoder
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> (projection,) = find_decoder(model).select([0])
        >>> projection.weight.shape
        torch.Size([128, 1536])
        >>> projection.write(projection.weight.neg())
    """

    transposed: bool
    held_columns: Columns = WHOLE

    @property
    def columns(self) -> Columns:
        """See `Projection`."""
        return self.held_columns

    @property
    def parameter(self) -> nn.Parameter:
        """The weight parameter of the module."""
        return self.module.get_parameter("weight")

    @property
    def weight(self) -> Tensor:
        """The weight as a view `[d_v, d_k]`, or its held columns."""
        parameter = held(self.parameter.detach())
        return parameter.T if self.transposed else parameter

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See `Projection`."""
        return {f"{self.name}.weight": self.parameter}

    @property
    def blocks(self) -> Sequence[Tensor]:
        """See `Projection`."""
        return [self.weight]

    @property
    def layout(self) -> BlockLayout | None:
        """None."""
        return None

    def watch(self, pick: Callable[[Tensor], Tensor], keep: Callable[[Tensor], None]) -> list[Any]:
        """See `Projection`."""

        def read(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            keep(self.columns.gather(pick(held(inputs[0])), "read"))

        return [self.module.register_forward_pre_hook(read)]

    def block_name(self, block: int) -> tuple[str, bool]:
        """See `Projection`."""
        return self.name, self.transposed

    def assembled(self, blocks: Sequence[Tensor]) -> dict[str, Tensor]:
        """See `Projection`."""
        (block,) = blocks
        return {f"{self.name}.weight": block.T if self.transposed else block}

    def add(self, change: Tensor) -> None:
        """See `Projection`; `change [d_v, d_k]`, float64."""
        self.write(self.weight.double() + self.columns.part(change))

    def write(self, weight: Tensor) -> None:
        """Copies `weight [d_v, d_k]`, or its held columns, into the module, rounded to its dtype."""
        with torch.no_grad():
            self.weight.copy_(weight)


def in_attention(name: str) -> bool:
    """Returns whether a module is part of attention, by its dotted name."""
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def output_width(module: nn.Module) -> int | None:
    """Returns the output width of a linear module, including quantized and wrapped ones, or None."""
    width = module.nf if is_conv1d(module) else getattr(module, "out_features", None)
    return width if isinstance(width, int) else None


def input_width(module: nn.Module) -> int | None:
    """Returns the input width of a linear module, including quantized and wrapped ones, or None if it has none."""
    width = module.nx if is_conv1d(module) else getattr(module, "in_features", None)
    return width if isinstance(width, int) else None


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether a module is the `Conv1D` of GPT-2, which stores its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def check_weight(name: str, module: nn.Module) -> None:
    """Checks that a module has an ordinary floating-point weight in memory.

    Raises:
        ModelError: the module cannot be edited.
    """
    check_no_adapter(name, module)
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    weight = own.get("weight")
    contents = ", ".join(f"{key} ({type(tensor).__name__}, {tensor.dtype})" for key, tensor in own.items())
    if not (isinstance(weight, nn.Parameter) and (isinstance(module, nn.Linear) or is_conv1d(module))):
        raise ModelError(
            f"{name} is a {type(module).__name__} with {contents or 'no tensors'}; only nn.Linear and Conv1D "
            "projections with a weight can be edited. Use such a module, or load the model without quantization"
        )
    # A quantized weight can have a floating dtype: in a tensor subclass, or with separate scales.
    ordinary = type(weight) is nn.Parameter or is_divided(weight)
    if weight.dtype not in FLOATS or not ordinary or own.keys() - {"weight", "bias"}:
        raise ModelError(
            f"{name} has {contents}; only an ordinary weight of dtype {', '.join(map(str, FLOATS))} can be edited. "
            "Load the model without quantization"
        )


def check_in_memory(name: str, weight: Tensor) -> None:
    """Raises ModelError for a weight on the meta device."""
    if weight.is_meta:
        raise ModelError(
            f"{name} is on the meta device (not loaded or offloaded); load the model with a device_map that keeps the "
            "edited layers on a device"
        )


def check_no_adapter(name: str, module: nn.Module) -> None:
    """Raises ModelError for a module that is wrapped by an adapter."""
    parts = name.split(".")
    wrapped = "base_layer" in parts or any(part.startswith("lora_") for part in parts)
    if wrapped or "base_layer" in dict(module.named_children()):
        raise ModelError(
            f"{name} is wrapped by an adapter; merge it first (model.merge_and_unload()) or unload it (model.unload())"
        )
