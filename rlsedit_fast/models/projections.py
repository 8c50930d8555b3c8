"""Where a model keeps the projections that are edited, and how their weights are read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlsedit_fast.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Projection:
    """The last projection of one block's MLP: its input is the key, its output is added to the residual stream.

    Attributes:
        layer: index of the block.
        name: dotted name of the module in the model.
        module: an `nn.Linear`, or GPT-2's `Conv1D`, which stores its weight transposed.
        transposed: whether it does.
    """

    layer: int
    name: str
    module: nn.Module
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module stores it."""
        return self.module.get_parameter("weight")

    @property
    def weight(self) -> Tensor:
        """The weight as `[d_v, d_k]`: a view, whichever way the module stores it."""
        parameter = self.parameter.detach()
        return parameter.T if self.transposed else parameter

    def write(self, weight: Tensor) -> None:
        """Copies `weight [d_v, d_k]`, rounded to the model's dtype, into the module."""
        with torch.no_grad():
            self.weight.copy_(weight)


@dataclass(frozen=True)
class Decoder:
    """A causal language model with the parts of it that editing touches.

    Attributes:
        model: the transformers model.
        blocks: its decoder blocks, in order.
        projections: of every block, in order.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    projections: Sequence[Projection]

    @property
    def device(self) -> torch.device:
        """Where token ids are sent to: the device of the input embeddings."""
        device: torch.device = self.model.get_input_embeddings().get_parameter("weight").device
        return device

    def select(self, layers: Sequence[int]) -> list[Projection]:
        """The projections of `layers`, in ascending order.

        Raises:
            ModelError: a layer that the model does not have.
        """
        count = len(self.projections)
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong:
            raise ModelError(f"layers {wrong} do not exist: the model has layers 0 to {count - 1}; choose among those")
        return [self.projections[layer] for layer in sorted(set(layers))]


def find_decoder(
    model: PreTrainedModel, *, layer_module: str | None = None, projection_module: str | None = None
) -> Decoder:
    """Recognises a model's blocks and MLP output projections from its modules, never from its name.

    The blocks are the `nn.ModuleList` with `config.num_hidden_layers` entries. A block's projection is the last
    linear module of its submodule `mlp` whose output is as wide as the residual stream.

    Args:
        model: a transformers causal language model.
        layer_module: dotted name of the module list of blocks, where the above does not find it.
        projection_module: dotted name of the projection within a block, likewise.

    Raises:
        ModelError: nothing fits, or more than one thing does; the message lists the candidates.
    """
    blocks_name = layer_module or _find_blocks(model)
    modules = dict(model.named_modules())
    blocks = modules.get(blocks_name)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"layer_module={blocks_name!r} is not a module list of this model; name the list of its blocks"
        )
    projections = []
    for layer, block in enumerate(blocks):
        inner = projection_module or _find_projection(model, f"{blocks_name}.{layer}", block)
        name = f"{blocks_name}.{layer}.{inner}"
        module = modules.get(name)
        if module is None:
            raise ModelError(
                f"projection_module={inner!r}: the model has no module {name!r}; name one within the block"
            )
        projections.append(Projection(layer, name, module, _is_transposed(name, module)))
    return Decoder(model, list(blocks), projections)


def _find_blocks(model: PreTrainedModel) -> str:
    count = model.config.get_text_config().num_hidden_layers
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, length in lists.items() if length == count]
    if len(fitting) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected one module list of {count} blocks, found {fitting or 'none'} among "
            f"{lists}; name it with EditConfig(layer_module=...)"
        )
    return fitting[0]


def _find_projection(model: PreTrainedModel, block_name: str, block: nn.Module) -> str:
    hidden = model.config.get_text_config().hidden_size
    linear = {name: m for name, m in block.named_modules() if _output_width(m) is not None}
    fitting = [name for name, m in linear.items() if name.startswith("mlp.") and _output_width(m) == hidden]
    if not fitting:
        raise ModelError(
            f"{block_name}: no linear module under 'mlp' has outputs of width {hidden}; the block's linear modules are "
            f"{sorted(linear)}; name the MLP's output projection with EditConfig(projection_module=...)"
        )
    return fitting[-1]


def _output_width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    if _is_conv1d(module):
        return int(module.get_parameter("weight").shape[1])
    return None


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_transposed(name: str, module: nn.Module) -> bool:
    if _output_width(module) is None:
        raise ModelError(f"{name} is a {type(module).__name__}; only nn.Linear and Conv1D projections can be edited")
    weight = module.get_parameter("weight")
    if not weight.dtype.is_floating_point:
        raise ModelError(f"{name} has {weight.dtype} weights; only floating-point projections can be edited")
    return _is_conv1d(module)  # by type, not by shape: square weights exist
