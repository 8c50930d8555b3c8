"""Mixtures of experts: finds the weights of the experts by structure, and reads keys with their routing.

A mixture contains a module with stacked weights of all experts, which is called with the states, the indices of each
token's experts and their weights. Grouped products run inside that module, where hooks see nothing, so the activations
of the wanted tokens are computed again from its inputs. `check_mixture` verifies the result in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.linear import (
    FLOATS,
    Projection,
    Stack,
    check_no_adapter,
    check_weight,
    input_width,
    output_width,
)
from rlsedit_fast.models.mlps import candidates, find_mlps, is_norm, within
from rlsedit_fast.rls import BlockLayout

_SLACK = 0.05
"""Allowed relative error of an output that is computed again from keys: rounding in bfloat16, a few times 2^-8."""

_SUPPORTED = (
    "supported are stacked weights [experts, d, f] or [experts, f, d] that are called with the experts of each token "
    "and their weights, as in transformers 5"
)

_OTHER_PROJECTION = (
    "set projection_module in --config (Python: EditConfig(projection_module=...)) to an nn.Linear that processes "
    "every token, such as that of a shared expert, or use layers without experts"
)


@dataclass(frozen=True)
class ExpertProjection(Projection):
    """The output projections of a mixture of experts, as one linear map of a block-sparse key.

    The key of a token is `[g_e a_e]` over its experts: the weight of the router times the input of the expert's output
    projection. If the router scales the inputs of the experts instead, the key is `a_e(g x)`. A shared expert, if the
    mixture contains one, has a block of its own.

    Attributes:
        layer: index of the decoder layer.
        name: dotted name of the mixture.
        module: the mixture: router, experts and shared expert.
        experts_name: name of the module of the stacked weights within the mixture.
        up: name of its input weight.
        down: name of its output weight.
        transposed: whether the weights are stored as `[experts, d_in, d_out]`.
        sizes: layout of the keys.
        shared: name of the output projection of the shared expert within the mixture, or None.
        shared_gate: name of the linear module with one output that scales the shared expert, or None.

    Example:
        >>> from rlsedit_fast.models import find_decoder
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
        >>> config = Qwen3MoeConfig(**sizes, **experts, num_key_value_heads=1, vocab_size=9)
        >>> (projection,) = find_decoder(Qwen3MoeForCausalLM(config)).projections
        >>> projection.name, projection.layout
        ('model.layers.0.mlp', BlockLayout(experts=4, width=6, active=2, shared=0))
        >>> len(projection.blocks), projection.blocks[3].shape
        (4, torch.Size([8, 6]))
    """

    experts_name: str
    up: str
    down: str
    transposed: bool
    sizes: BlockLayout
    shared: str | None
    shared_gate: str | None

    @property
    def experts(self) -> nn.Module:
        """The module of the stacked weights."""
        return self.module.get_submodule(self.experts_name)

    @property
    def layout(self) -> BlockLayout:
        """The layout of the keys."""
        return self.sizes

    @property
    def stacked_name(self) -> str:
        """Dotted name of the output weight of the routed experts in the model."""
        return f"{self.name}.{self.experts_name}.{self.down}"

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See `Projection`."""
        found = {self.stacked_name: self.experts.get_parameter(self.down)}
        if self.shared is not None:
            found[f"{self.name}.{self.shared}.weight"] = self.module.get_submodule(self.shared).get_parameter("weight")
        return found

    @property
    def blocks(self) -> Sequence[Tensor]:
        """See `Projection`; the shared expert has the last block."""
        stacked, *shared = (parameter.detach() for parameter in self.parameters.values())
        return [*(stacked.mT if self.transposed else stacked).unbind(), *shared]

    def block_name(self, block: int) -> tuple[str, bool]:
        """See `Projection`: the parameter with the index of the expert, or the module of the shared expert."""
        if block == self.sizes.experts:
            return f"{self.name}.{self.shared}", False
        return f"{self.stacked_name}.{block}", self.transposed

    def stack_of(self, block: int) -> Stack | None:
        """See `Projection`."""
        if block == self.sizes.experts:
            return None
        return Stack(self.sizes.experts, bool(getattr(self.experts, "is_transposed", False)))

    def assembled(self, blocks: Sequence[Tensor]) -> dict[str, Tensor]:
        """See `Projection`."""
        stacked = torch.stack(list(blocks[: self.sizes.experts]))
        parts = [stacked.mT if self.transposed else stacked, *blocks[self.sizes.experts :]]
        return dict(zip(self.parameters, parts, strict=True))

    def add(self, change: Mapping[int, Tensor]) -> None:
        """See `Projection`; changes of some blocks, each `[d_v, block width]`, float64."""
        blocks = self.blocks
        with torch.no_grad():
            for block, delta in change.items():
                blocks[block].copy_(blocks[block].double() + delta)

    def watch(self, pick: Callable[[Tensor], Tensor], keep: Callable[[Tensor], None]) -> list[Any]:
        """See `Projection`."""
        record = _Record(self, pick)

        def done(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            keep(record.keys())

        return [*record.handles, self.module.register_forward_hook(done)]


@dataclass(frozen=True)
class _Routed:
    """Inputs of the experts for the wanted tokens.

    Attributes:
        states: `[n, d]`, or one state per expert, `[experts, n, d]`.
        experts: `[n, active]`.
        weights: `[n, active]`; None if the states are already scaled.
        shape: leading dimensions of the wanted tokens.
    """

    states: Tensor
    experts: Tensor
    weights: Tensor | None
    shape: torch.Size


class _Record:
    """Reads the inputs of the experts in a forward pass and computes keys from them."""

    def __init__(self, projection: ExpertProjection, pick: Callable[[Tensor], Tensor]) -> None:
        self._projection, self._pick = projection, pick
        self._routed: _Routed | None = None
        self._shared: Tensor | None = None
        self._gate: Tensor | None = None
        module = projection.module
        self.handles: list[Any] = [projection.experts.register_forward_pre_hook(self._keep_routed, with_kwargs=True)]
        if projection.shared is not None:
            self.handles.append(module.get_submodule(projection.shared).register_forward_pre_hook(self._keep_shared))
        if projection.shared_gate is not None:
            self.handles.append(module.get_submodule(projection.shared_gate).register_forward_hook(self._keep_gate))

    def keys(self) -> Tensor:
        """Returns the keys of the wanted tokens, `[..., key_width]`, float32 or wider."""
        projection, routed = self._projection, self._routed
        if routed is None:
            raise ModelError(f"{projection.name}: the forward pass did not run its experts, so they cannot be edited")
        wide = torch.promote_types(routed.states.dtype, torch.float32)
        activations = _activations(projection, routed).to(wide)
        if routed.weights is not None:
            activations *= routed.weights.to(wide)[..., None]
        shared = None
        if projection.shared is not None:
            if self._shared is None:
                raise ModelError(f"{projection.name}: the forward pass did not run {projection.shared}")
            shared = self._shared.flatten(0, -2).to(wide)
            if self._gate is not None:
                shared = shared * self._gate.flatten(0, -2).to(wide).sigmoid()
        return projection.sizes.pack(activations, routed.experts, shared).unflatten(0, routed.shape)

    def routing(self) -> Tensor:
        """Returns the experts of the wanted tokens, `[n, active]`, ascending."""
        assert self._routed is not None
        return self._routed.experts.sort(dim=1).values

    def offset(self) -> Tensor | float:
        """Returns what biases add to the output, `[n, d]`, or 0."""
        projection, routed, total = self._projection, self._routed, 0.0
        assert routed is not None
        found: Tensor | float = total
        if (bias := getattr(projection.experts, f"{projection.down}_bias", None)) is not None:
            each = bias[routed.experts].double()
            found = (each if routed.weights is None else each * routed.weights.double()[..., None]).sum(1)
        if projection.shared is not None:
            own = getattr(projection.module.get_submodule(projection.shared), "bias", None)
            if own is not None:
                found = found + own.double() * (1.0 if self._gate is None else self._gate.flatten(0, -2).sigmoid())
        return found

    def _keep_routed(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes = self._projection.sizes
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(given) == 1:  # the states of all tokens once per expert, scaled by the router
            each = [self._pick(states) for states in given[0].reshape(sizes.experts, -1, given[0].shape[-1])]
            shape, states = each[0].shape[:-1], torch.stack([one.flatten(0, -2) for one in each])
            reached = states.ne(0).any(-1)
            if int(reached.sum(0).max()) > sizes.active:
                raise self._unknown(f"a token reaches more than {sizes.active} experts")
            self._routed = _Routed(states, reached.T.int().topk(sizes.active, dim=1).indices, None, shape)
            return
        states = self._pick(given[0])
        index = [one for one in given[1:] if not one.is_floating_point()]
        weights = [one for one in given[1:] if one.is_floating_point()]
        if len(index) != 1 or len(weights) != 1 or index[0].shape[-1] != sizes.active:
            shapes = [(list(one.shape), one.dtype) for one in given]
            raise self._unknown(f"the experts are called with {shapes}")
        experts = self._pick(index[0]).flatten(0, -2)
        scores = self._pick(weights[0]).flatten(0, -2)
        if scores.shape[-1] != sizes.active:  # one weight per expert
            scores = scores.gather(1, experts)
        if bool(((experts < 0) | (experts >= sizes.experts)).any()):
            raise self._unknown("a token reaches experts that are not on this device")
        self._routed = _Routed(states.flatten(0, -2), experts, scores, states.shape[:-1])

    def _keep_shared(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._shared = self._pick(args[0])

    def _keep_gate(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._gate = self._pick(output)

    def _unknown(self, what: str) -> ModelError:
        return ModelError(f"{self._projection.name}: {what}; {_SUPPORTED}")


def _activations(projection: ExpertProjection, routed: _Routed) -> Tensor:
    """Returns the inputs of the output projections of each token's experts, `[n, active, width]`."""
    sizes, experts = projection.sizes, projection.experts
    up, bias = experts.get_parameter(projection.up), getattr(experts, f"{projection.up}_bias", None)
    n = len(routed.experts)
    result = routed.states.new_empty(n, sizes.active, sizes.width)
    flat = routed.experts.flatten()
    order, at = flat.argsort(stable=True), 0
    for expert, count in enumerate(torch.bincount(flat, minlength=sizes.experts).tolist()):
        rows, slots = order[at : at + count] // sizes.active, order[at : at + count] % sizes.active
        at += count
        if count:
            states = routed.states[rows] if routed.states.ndim == 2 else routed.states[expert, rows]
            inner = states @ up[expert] if projection.transposed else functional.linear(states, up[expert])
            inner = inner if bias is None else inner + bias[expert]
            result[rows, slots] = _gated(experts, inner, sizes.width)
    return result


def _gated(experts: nn.Module, inner: Tensor, width: int) -> Tensor:
    """Applies the activation of the experts to `[m, width]` or `[m, 2 width]`."""
    activation: Any = getattr(experts, "act_fn", None)
    if inner.shape[-1] == width:
        result: Tensor = activation(inner)
        return result
    apply: Any = getattr(experts, "_apply_gate", None)
    if apply is not None:
        result = apply(inner)
        return result
    gate, linear = inner.chunk(2, dim=-1)
    result = activation(gate) * linear
    return result


def expert_projection(
    layer: int, block_name: str, block: nn.Module, experts_path: str, width: int, config: Any
) -> ExpertProjection:
    """Returns the projection of a decoder layer with a mixture of experts.

    Args:
        layer: index of the decoder layer.
        block_name: dotted name of the decoder layer.
        block: the decoder layer.
        experts_path: name of the module of the experts within the decoder layer.
        width: width of the residual stream.
        config: config of the model, for the number of experts of a token if the mixture does not have it.

    Raises:
        ModelError: the experts are not stacked, their weights cannot be distinguished or edited, or there are several
            shared experts.
    """
    mixture, _, inner = experts_path.rpartition(".")
    name, experts = f"{block_name}.{experts_path}", block.get_submodule(experts_path)
    check_no_adapter(name, experts)
    if not mixture:
        raise ModelError(f"{name} is a mixture of experts without a module of its own; {_SUPPORTED}")
    module = block.get_submodule(mixture)
    _check_path(f"{block_name}.{mixture}", module, inner, width)
    up, down, transposed = _weights(name, experts, width)
    stacked = experts.get_parameter(down)
    count, features = stacked.shape[0], stacked.shape[1 if transposed else 2]
    shared = [one for one in candidates(module, width) if not within(one, inner)]
    for one in shared:
        check_weight(f"{block_name}.{mixture}.{one}", module.get_submodule(one))
    if len({one.rpartition(".")[0] for one in shared}) > 1:
        raise ModelError(
            f"{block_name}.{mixture} is a mixture of experts with several shared ones, {shared}; {_SUPPORTED}"
        )
    last = shared[-1] if shared else None
    gates = [one for one, m in module.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1 and count > 1]
    if len(gates) > 1:
        raise ModelError(f"{block_name}.{mixture} is a mixture of experts with several gates, {gates}; {_SUPPORTED}")
    active = _active(module, config)
    if active is None or not 0 < active <= count:
        raise ModelError(f"{name} is a mixture of experts with an unknown number of experts per token; {_SUPPORTED}")
    sizes = BlockLayout(
        experts=count,
        width=features,
        active=active,
        shared=0 if last is None else int(module.get_submodule(last).get_parameter("weight").shape[1]),
    )
    gate = gates[0] if gates and last is not None else None
    return ExpertProjection(layer, f"{block_name}.{mixture}", module, inner, up, down, transposed, sizes, last, gate)


def _check_path(name: str, mixture: nn.Module, inner: str, width: int) -> None:
    """Checks that the outputs of the experts reach the residual stream as a weighted sum.

    Raises:
        ModelError: the experts work in a latent space, or a norm follows each of them or their sum.
    """
    experts = mixture.get_submodule(inner)
    norms = [
        f"{name}.{at}"
        for at, module in mixture.named_modules()
        if is_norm(module) and (within(at, inner) or "post" in at.rpartition(".")[2])
    ]
    if norms:
        raise ModelError(
            f"{name} is a mixture of experts with the norm {norms[0]} behind its experts, so its output is not a "
            f"linear map of their activations; {_SUPPORTED}",
            hint=_OTHER_PROJECTION,
        )
    stacked = [p.shape for p in experts.parameters(recurse=False) if p.ndim == 3]
    shared = {one.projection for one in find_mlps(mixture, width, outside=inner) if one.home}
    for at, module in mixture.named_modules():
        latent = input_width(module)
        if within(at, inner) or at in shared or output_width(module) != width or latent in (None, width):
            continue
        # The input and the output weight of the experts have the latent width, and none has that of the stream.
        if len(stacked) > 1 and all(latent in shape[1:] and width not in shape[1:] for shape in stacked):
            raise ModelError(
                f"{name} is a mixture of experts in a latent space of width {latent}, which {name}.{at} maps to the "
                f"residual stream of width {width}; {_SUPPORTED}",
                hint=_OTHER_PROJECTION,
            )


def _weights(name: str, experts: nn.Module, width: int) -> tuple[str, str, bool]:
    """Returns the names of the input and output weight of stacked experts, and whether they are transposed."""
    own = dict(experts.named_parameters(recurse=False))
    stacked = {key: parameter for key, parameter in own.items() if parameter.ndim == 3}
    buffers = [key for key, _ in experts.named_buffers(recurse=False)]
    declared = getattr(experts, "is_transposed", None)
    found = []
    for up, first in stacked.items():
        for down, last in stacked.items():
            for transposed in (False, True) if declared is None else (bool(declared),):
                inner, outer = (2, 1) if transposed else (1, 2)
                fits = first.shape[outer] == width and last.shape[inner] == width and first.shape[0] == last.shape[0]
                # With a gate, the input weight has twice the features.
                if fits and up != down and first.shape[inner] in (last.shape[outer], 2 * last.shape[outer]):
                    found.append((up, down, transposed))
    if len(found) > 1:  # square weights fit both ways
        found = [one for one in found if "down" in one[1] and "down" not in one[0]] or found
    contents = {
        key: (type(parameter).__name__, parameter.dtype, list(parameter.shape)) for key, parameter in own.items()
    }
    if len(found) != 1:
        raise ModelError(
            f"{name} is a mixture of experts with {contents or 'no weights of its own'}; {_SUPPORTED}",
            hint=_OTHER_PROJECTION,
        )
    wrong = [key for key, parameter in stacked.items() if type(parameter) is not nn.Parameter]
    if wrong or buffers or any(parameter.dtype not in FLOATS for parameter in own.values()):
        raise ModelError(
            f"{name} has {contents} and {buffers or 'no buffers'}; only ordinary weights of dtype "
            f"{', '.join(map(str, FLOATS))} can be edited. Load the model without quantization"
        )
    return found[0]


def _active(module: nn.Module, config: Any) -> int | None:
    """Returns the number of routed experts of a token."""
    for part in module.modules():
        for name in ("top_k", "num_experts_per_tok"):
            if isinstance(found := getattr(part, name, None), int):
                return found
    found = getattr(config.get_text_config(), "num_experts_per_tok", None)
    return found if isinstance(found, int) else None


def read_routing(projections: Sequence[ExpertProjection], run: Callable[[], object]) -> list[Tensor]:
    """Reads which experts each token reaches.

    Args:
        projections: mixtures of experts.
        run: runs a forward pass through all of them.

    Returns:
        Per mixture `[tokens, active]`, ascending.
    """
    records = [_Record(one, lambda states: states.reshape(-1, states.shape[-1]).detach()) for one in projections]
    try:
        with torch.no_grad():
            run()
        return [record.routing() for record in records]
    finally:
        for record in records:
            for handle in record.handles:
                handle.remove()


def check_mixture(projection: ExpertProjection, run: Callable[[], object]) -> None:
    """Verifies that keys times weights give the output of a mixture of experts.

    Args:
        projection: the mixture.
        run: runs a forward pass of a single row of tokens, at least up to the mixture.

    Raises:
        ModelError: the output differs by more than rounding.
    """
    record = _Record(projection, lambda states: states.reshape(-1, states.shape[-1]).detach())
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    handles = [*record.handles, projection.module.register_forward_hook(keep)]
    try:
        with torch.no_grad():
            run()
            wanted = outputs[0].reshape(-1, outputs[0].shape[-1]).double()
            keys, layout = record.keys().double(), projection.layout
            found = torch.zeros_like(wanted)
            features = layout.features(keys)
            for group in layout.groups(keys):
                part = layout.part(features, group) @ projection.blocks[group.block].double().T
                found.index_add_(0, group.rows, part)
            error = float((found + record.offset() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    finally:
        for handle in handles:
            handle.remove()
    if not error <= _SLACK:
        raise ModelError(
            f"{projection.name}: the output is not the sum of its experts' output projections, weighted by the router "
            f"(relative difference {error:.2g}), so the mixture cannot be edited; {_SUPPORTED}",
            hint=_OTHER_PROJECTION,
        )
