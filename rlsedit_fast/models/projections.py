"""Finds the projections of a model that are edited, and reads and writes their weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.compiled import unwrapped
from rlsedit_fast.models.experts import ExpertProjection, expert_projection
from rlsedit_fast.models.linear import (
    LinearProjection,
    Projection,
    Stack,
    check_in_memory,
    check_no_adapter,
    check_weight,
    is_conv1d,
    output_width,
)
from rlsedit_fast.models.mlps import candidates, choose_mlps, find_experts, find_mlps, mixes_tokens, mlps_beside
from rlsedit_fast.models.quantized import dequantize_module
from rlsedit_fast.models.shards import columns_of, processes_of
from rlsedit_fast.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device for token ids.

    This is the device of the input embeddings or, if they are offloaded, of the first weight in memory.
    """
    weights = (model.get_input_embeddings().get_parameter("weight"), *model.parameters())
    device: torch.device = next((weight.device for weight in weights if not weight.is_meta), torch.device("cpu"))
    return device


@dataclass(frozen=True)
class Decoder:
    """A causal language model and the parts that are edited.

    Attributes:
        model: the transformers model.
        blocks: its decoder blocks, in order.
        blocks_name: dotted name of their list in the model.
        projection_module: dotted name of the projection within a block, or None to find it by structure.
        prefixed: whether the model supports cached prefixes, see `with_prefixes`.
        processes: the processes that hold the model together.

    Example:
        >>> from rlsedit_fast.models import find_decoder
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> decoder = find_decoder(model)
        >>> decoder.blocks_name, len(decoder.blocks), len(decoder.projections)
        ('model.layers', 4, 4)
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    blocks_name: str
    projection_module: str | None = None
    prefixed: bool = False
    processes: Processes = ALONE

    @property
    def device(self) -> torch.device:
        """The device for token ids."""
        return input_device(self.model)

    @property
    def projections(self) -> list[Projection]:
        """The projections of all blocks; see `select` for errors."""
        return self.select(range(len(self.blocks)))

    def select(self, layers: Sequence[int], *, dequantize: bool = False) -> list[Projection]:
        """Finds the projections of some layers. Other blocks need not have one.

        The projection of a block is the output projection of its MLP, see `models.mlps`. In a block with a mixture of
        experts and no other MLP it is the mixture: the routed experts with their router, and a shared expert in the
        same module.

        Args:
            layers: indices of blocks, from 0.
            dequantize: replace quantized projections by ordinary ones, see `quantized.dequantize_module`.

        Returns:
            The projections, in ascending order of their layers.

        Raises:
            ModelError: a layer does not exist, has no MLP or several ones, or a projection has the wrong width or
                cannot be edited (quantized, wrapped by an adapter, on the meta device, with a shared weight, or experts
                of an unknown form).
        """
        count = len(self.blocks)
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong:
            raise ModelError(f"layers {wrong} do not exist; the model has layers 0 to {count - 1}")
        projections = [self._projection(layer, dequantize=dequantize) for layer in sorted(set(layers))]
        for projection in projections:
            for name, parameter in projection.parameters.items():
                check_in_memory(name.removesuffix(".weight"), parameter)
            self._check_not_shared(projection)
        return projections

    def locate(self, layers: Sequence[int]) -> list[Projection]:
        """Finds the projections of some layers as `select` does, also in a model on the meta device."""
        return [self._projection(layer) for layer in sorted(set(layers))]

    @property
    def editable(self) -> list[int]:
        """Layers that have an MLP or, with `projection_module`, a module of this name; hybrid models have others.

        A layer whose MLP cannot be edited is included; `select` then states the reason.
        """
        width, inner = _residual_width(self.model), self.projection_module
        if inner is not None:
            return [layer for layer, block in enumerate(self.blocks) if _named(block, inner) is not None]
        return [layer for layer, block in enumerate(self.blocks) if _holds_mlp(block, width)]

    def _projection(self, layer: int, *, dequantize: bool = False) -> Projection:
        block, block_name, width = self.blocks[layer], f"{self.blocks_name}.{layer}", _residual_width(self.model)
        inner = self.projection_module
        experts = find_experts(block)
        mixture = None if experts is None else experts.rpartition(".")[0]
        if inner is None:
            inner = _find_projection(self, layer, width, experts)
        if experts is not None and inner in (None, mixture, experts):
            if self.processes.together.count > 1:
                raise ModelError(
                    f"{block_name} contains a mixture of experts, which is not edited in several processes",
                    hint="load the model in one process, with device_map='auto' for several devices, or edit layers "
                    "without experts",
                )
            return expert_projection(layer, block_name, block, experts, width, self.model.config)
        assert inner is not None
        name = f"{block_name}.{inner}"
        module = _named(block, inner)
        if module is None:
            raise ModelError(
                f"projection_module={inner!r}: the model has no module {name!r}; expected a module in the block"
            )
        if dequantize:
            module = dequantize_module(self.model, name)
        _check_editable(name, module)
        if (found := output_width(module)) != width:
            raise ModelError(
                f"projection_module={inner!r}: {name} has outputs of width {found}, but the residual stream has width "
                f"{width}; expected the output projection of the MLP, whose output is added to the residual stream"
            )
        # By type: weights can be square.
        return LinearProjection(layer, name, module, is_conv1d(module), columns_of(name, module))

    def _check_not_shared(self, projection: Projection) -> None:
        addresses = {tensor.data_ptr() for tensor in projection.tensors}
        for layer, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters() if layer != projection.layer else ():
                # Only plain tensors have an address.
                if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.data_ptr() in addresses:
                    raise ModelError(
                        f"{projection.name} shares its weight with {self.blocks_name}.{layer}.{name}, so an edit would "
                        "change both; use layers with separate weights"
                    )


def find_decoder(
    model: PreTrainedModel, *, layer_module: str | None = None, projection_module: str | None = None
) -> Decoder:
    """Finds the blocks of a model by its module structure, not by its name; `Decoder.select` finds the projections.

    The blocks are the `nn.ModuleList` with `config.num_hidden_layers` entries. If there are several, lists in the
    module of the input embeddings (the text decoder) are preferred, then lists whose blocks have an MLP.

    Args:
        model: transformers causal language model.
        layer_module: dotted name of the list of blocks, if it is not found automatically.
        projection_module: dotted name of the projection within a block, if it is not found automatically.

    Returns:
        The decoder.

    Raises:
        ModelError: no list or several lists match, or the model has an adapter.

    Example:
        >>> from rlsedit_fast.models import find_decoder
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> [projection.name for projection in find_decoder(model).select([1, 2])]
        ['model.layers.1.mlp.down_proj', 'model.layers.2.mlp.down_proj']
    """
    model = unwrapped(model)
    if getattr(model, "peft_config", None):
        raise ModelError(
            f"{type(model).__name__} has an adapter, and its checkpoint would contain only the adapter, not the edits; "
            "merge or unload it first (merge_and_unload)"
        )
    processes = processes_of(model)
    name = layer_module or _find_blocks(model)
    blocks = _named(model, name)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(f"layer_module={name!r} is not an nn.ModuleList; expected the name of the list of blocks")
    return Decoder(model, list(blocks), name, projection_module, processes=processes)


def find_block(model: PreTrainedModel, name: str) -> tuple[Tensor, bool, Stack | None] | None:
    """Returns the output weight of a routed expert.

    Args:
        model: transformers causal language model.
        name: dotted name of the stacked weight and the index of the expert, see `Projection.block_name`.

    Returns:
        `(weight [d_v, width], transposed, stack)`, the weight as a view; None if there is no such expert.
    """
    parameter, _, index = name.rpartition(".")
    if not index.isdecimal() or not any(parameter == one for one, _ in model.named_parameters()):
        return None
    for projection in find_mixtures(find_decoder(model)):
        if parameter == projection.stacked_name and int(index) < projection.sizes.experts:
            return projection.blocks[int(index)], projection.transposed, projection.stack_of(int(index))
    return None


def stacked_blocks(model: PreTrainedModel, name: str) -> list[str]:
    """Returns the names of the blocks of a stacked weight of experts, see `find_block`; empty for other tensors."""
    for projection in find_mixtures(find_decoder(model)):
        if name == projection.stacked_name:
            return [projection.block_name(block)[0] for block in range(projection.sizes.experts)]
    return []


def find_mixtures(decoder: Decoder) -> list[ExpertProjection]:
    """Returns the mixtures of experts of a model, without those of an unknown form."""
    found = []
    for layer, block in enumerate(decoder.blocks):
        if find_experts(block) is not None:
            with suppress(ModelError):
                found += decoder.locate([layer])
    return [projection for projection in found if isinstance(projection, ExpertProjection)]


def _find_blocks(model: PreTrainedModel) -> str:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, m in lists.items() if len(m) == count] or [
        name for name, m in lists.items() if len(m) and all(mixes_tokens(block) for block in m)
    ]  # some models count the attention modules of a block as layers
    # A block can contain a list of the same length, such as experts.
    fitting = [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)]
    embeddings = model.get_input_embeddings()
    home = next((name.rpartition(".")[0] for name, m in model.named_modules() if m is embeddings), "")
    in_decoder = [name for name in fitting if not home or name.startswith(f"{home}.")]
    fitting = in_decoder or fitting
    with_mlp = [name for name in fitting if any(_holds_mlp(m, _residual_width(model)) for m in lists[name])]
    fitting = with_mlp or fitting
    if len(fitting) != 1:
        lengths = {name: len(m) for name, m in lists.items()}
        raise ModelError(
            f"{type(model).__name__}: expected one module list of {count} blocks, found {fitting or 'none'} among "
            f"{lengths}",
            hint="set layer_module in --config (Python: EditConfig(layer_module=...))",
        )
    return fitting[0]


def _find_projection(decoder: Decoder, layer: int, width: int, experts: str | None) -> str | None:
    """Returns the output projection of the MLP of a block.

    Args:
        decoder: the model.
        layer: index of the block.
        width: width of the residual stream.
        experts: name of the routed experts of the block, or None.

    Returns:
        Its name within the block; None if a block with a mixture has no other MLP.

    Raises:
        ModelError: the block has no MLP and no mixture, or several MLPs.
    """
    block, block_name = decoder.blocks[layer], f"{decoder.blocks_name}.{layer}"
    for name in candidates(block, width):
        check_no_adapter(f"{block_name}.{name}", block.get_submodule(name))
    found = find_mlps(block, width) if experts is None else mlps_beside(block, width, experts)
    fitting = choose_mlps(found)
    if len(fitting) == 1:
        return fitting[0].projection
    if len(fitting) > 1:
        names = [f"{block_name}.{one.projection}" for one in fitting] + [f"{block_name}.{experts}"] * bool(experts)
        raise ModelError(
            f"{block_name} has several MLPs, {', '.join(names)}; an edit is written into one MLP per block, and the "
            "structure does not show which one",
            hint=_NAME_ONE,
        )
    if experts is not None:
        return None
    linear = {name: output_width(m) for name, m in block.named_modules() if output_width(m) is not None}
    editable = decoder.editable
    raise ModelError(
        f"{block_name} has no MLP: expected a linear module with outputs of width {width} outside of attention and "
        f"state space modules, and one that gives its input; found the linear modules and widths {linear}",
        hint=f"use a layer that has one: {_ranges(editable)}" if editable else _NAME_ONE,
    )


_NAME_ONE = (
    "set layer_module and projection_module, the list of layers and the output projection of the MLP, in --config "
    "(Python: EditConfig(layer_module=..., projection_module=...))"
)


def _ranges(layers: Sequence[int]) -> str:
    """Formats ascending indices, such as `1, 4-6`."""
    parts = list[list[int]]()
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _named(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _residual_width(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _holds_mlp(block: nn.Module, width: int) -> bool:
    return bool(find_mlps(block, width)) or find_experts(block) is not None


def _check_editable(name: str, module: nn.Module) -> None:
    """Checks that a module has an ordinary floating-point weight and processes every token.

    Raises:
        ModelError: the module cannot be edited.
    """
    if "experts" in name.split("."):
        raise ModelError(
            f"{name} is a routed expert, which processes only the tokens routed to it; name the module that contains "
            "the experts and their router, or a projection that processes every token"
        )
    check_weight(name, module)
