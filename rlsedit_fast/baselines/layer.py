"""A layer with a baseline rule: its exact weight, the memory of the rule, and transactions."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule
from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.rls import BlockPrior, Bounds, Monitor, Prior, Step, Terms, checks
from rlsedit_fast.rls.columns import Columns
from rlsedit_fast.rls.layer import Layer, dtype_of
from rlsedit_fast.rls.master import master_of

_versions = itertools.count(1)


class LayerState(Protocol):
    """Interface of an edited layer that the editor uses, implemented by `RLSState`, `BlockState` and `RuleLayer`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.baselines import LayerState, make_layer
        >>> from rlsedit_fast.rls import Prior
        >>> layer: LayerState = make_layer("rls", {}, torch.zeros(1, 2), Prior(lam=1.0), delay=0, label="layer 0")
        >>> layer.name
        'layer 0'
    """

    @property
    def device(self) -> torch.device:
        """The device of the weight."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys, values and the exact weight."""

    @property
    def key_width(self) -> int:
        """The width of a row of keys."""

    @property
    def value_width(self) -> int:
        """The width of a value, `d_v`."""

    @property
    def columns(self) -> Columns:
        """The columns of the weight that this process holds."""

    @property
    def prior(self) -> Prior | BlockPrior:
        """The prior of the layer."""

    @property
    def name(self) -> str:
        """The name of the layer."""

    @property
    def objective(self) -> float:
        """The objective `J`; NaN for a rule without an objective."""

    def originals(self) -> list[Tensor]:
        """Returns the original weight of each block, `[d_v, block width]`; a single one for an ordinary layer."""

    def weights(self) -> list[tuple[Tensor, Tensor] | None]:
        """Returns the original and the current weight of each block; None for one that was never written."""

    def outputs(self, keys: Tensor) -> Tensor:
        """Returns `K W^T [n, d_v]`."""

    def deviation(self) -> float:
        """Returns `||W - W0||_F`."""

    def bounds(self) -> Bounds:
        """Returns bounds on the weight, the anchors and the edits."""

    def terms(self) -> Terms:
        """Returns the terms of the objective that are known."""

    def monitor(self) -> Monitor:
        """Returns the drift of the layer's state."""

    def project(self, keys: Tensor, weights: Tensor | None = None) -> Any:
        """Returns a panel for `update_projected`, with the keys in the dtype of the layer as `keys`."""

    def update_projected(self, panel: Any, innovation: Tensor) -> Step:
        """Applies the edits of a panel, given as innovations `E [n, d_v]`."""

    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Applies a batch of edits with values `V [n, d_v]`."""

    def remove(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Removes applied edits."""

    def refresh(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
        """Recomputes the layer from the given edits."""

    def settle(self) -> None:
        """Completes deferred work after a transaction."""

    def snapshot(self) -> Any:
        """Takes a snapshot for `restore`; no deferred work is completed while it is referenced."""

    def restore(self, snapshot: Any) -> None:
        """Restores a snapshot of this layer bit for bit."""


@dataclass(frozen=True, eq=False)
class RulePanel:
    """A batch of keys for one version of a layer.

    Attributes:
        keys: `K [n, d_k]` in the dtype of the layer.
        weights: `w [n]`.
        version: version of the layer.

    Example:
        >>> import torch
        >>> from rlsedit_fast.baselines import MEMIT, RuleLayer
        >>> from rlsedit_fast.rls import Prior
        >>> RuleLayer(torch.zeros(1, 2), Prior(lam=1.0), MEMIT()).project(torch.ones(3, 2)).weights
        tensor([1., 1., 1.])
    """

    keys: Tensor
    weights: Tensor
    version: int


@dataclass(frozen=True, eq=False)
class RuleSnapshot:
    """Contents of a `RuleLayer` at one point.

    Attributes:
        tensors: copies of the tensors of the exact weight.
        memory: memory of the rule.
        edits: number of edits.
        version: version of the layer.
    """

    tensors: list[Tensor]
    memory: Any
    edits: int
    version: int


class WithoutHistory:
    """The methods of a layer whose rule does not solve one problem over all edits, and can therefore not remove any."""

    _rule: Rule

    @property
    def objective(self) -> float:
        """NaN: the baselines have no objective over all edits."""
        return math.nan

    def bounds(self) -> Bounds:
        """Returns infinite bounds: the baselines have no objective over all edits."""
        return Bounds(weight=math.inf, anchors=math.inf, edits=math.inf)

    def monitor(self) -> Monitor:
        """Returns a residual of 0: a baseline has no state that can drift."""
        return Monitor(0.0, False, "this rule has no state that can drift.")

    def remove(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Not supported: only RLS can remove edits.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"rule={self._rule.name!r} cannot remove an edit, so edits cannot be undone, replaced or combined with "
            "another edit of the same subject. Use rule='rls', or same_subject='separate' and different subjects."
        )

    def refresh(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
        """Not supported, see `remove`."""
        self.remove(keys, values, weights)


class RuleLayer(WithoutHistory, Layer):
    """A layer that is edited by a baseline rule, with the interface of `RLSState`.

    The rule computes in float64; the exact weight is float32 (float64 for a float64 weight).

    Args:
        weight: `W0 [d_v, d_k]`, any floating dtype.
        prior: prior of the layer, with default anchor values.
        rule: the rule.
        name: name of the layer, for error messages.
        in_place: keep `weight` itself up to date, see `RLSState`.

    Raises:
        InputError: the weight is invalid, or the prior has custom anchor values.
        PriorError: the rule does not support this prior.

    Example:
        >>> import torch
        >>> from rlsedit_fast.baselines import MEMIT, RuleLayer
        >>> from rlsedit_fast.rls import Prior
        >>> layer = RuleLayer(torch.zeros(1, 3), Prior(lam=1.0), MEMIT())
        >>> panel = layer.project(torch.ones(1, 3))
        >>> step = layer.update_projected(panel, torch.tensor([[4.0]]))
        >>> layer.weight, step.residual
        (tensor([[1., 1., 1.]]), tensor([[1.]]))
    """

    @torch.no_grad()
    def __init__(
        self, weight: Tensor, prior: Prior, rule: Rule, *, name: str = "layer", in_place: bool = False
    ) -> None:
        checks.matrix("weight", weight)
        self._dtype = dtype_of(weight)
        checks.finite(weight=weight.detach().to(self._dtype))
        prior.check_shape(weight.shape[0], weight.shape[1], name)
        if prior.custom:
            raise InputError(f"{name}: rule={rule.name!r} does not support custom anchor values; use rule='rls'.")
        self._prior, self._rule, self._name = prior, rule, name
        self._original = weight.detach().clone(memory_format=torch.contiguous_format)
        self._memory: Any = rule.init_memory(self._original.double(), prior, name)
        self._master = master_of(weight.detach(), self._dtype, in_place=in_place)
        self._edits = 0
        self._version = next(_versions)

    def terms(self) -> Terms:
        """Returns the changes of the weight and on the anchors; the misfit of the edits is not known."""
        anchored = self._prior.anchor_moment is not None or self._prior.anchor_keys is not None
        change = self._prior.anchor_change(self.weight - self._original) if anchored else None
        return Terms(weight=self.deviation(), anchors=None if change is None else math.sqrt(change), edits=None)

    def project(self, keys: Tensor, weights: Tensor | None = None) -> RulePanel:
        """Checks a batch of keys.

        Args:
            keys: `K [n, d_k]`, any floating dtype.
            weights: `w [n]`, any floating dtype, positive; 1 by default.

        Returns:
            A panel for `update_projected`.

        Raises:
            InputError: an argument is invalid.
        """
        checks.matrix("keys", keys, columns=self._original.shape[1])
        if not len(keys):
            raise InputError("keys has no rows; pass at least one edit.")
        checks.same_device("keys", keys, self._original.device)
        given = torch.ones(len(keys), device=keys.device) if weights is None else weights
        checks.vector("weights", given, size=len(keys))
        checks.finite(keys=keys.to(self._dtype))
        checks.positive_weights(given.to(self._dtype))
        return RulePanel(keys.detach().to(self._dtype), given.to(keys.device, self._dtype), self._version)

    @torch.no_grad()
    def update_projected(self, panel: RulePanel, innovation: Tensor) -> Step:
        """Applies a batch with the rule. If it raises, the layer is unmodified.

        Args:
            panel: panel returned by `project` for the current state.
            innovation: `E [n, d_v]`, any floating dtype.

        Returns:
            Residuals, realized fractions and the norm of the weight change; the objective is NaN.

        Raises:
            InputError: an argument is invalid, or the rule does not support the batch.
            UpdateError: the batch cannot be solved, or the result is not finite.
        """
        if panel.version != self._version:
            raise InputError(
                f"{self._name} was changed after the panel was computed; call project again and pass its result."
            )
        checks.matrix("innovation", innovation, rows=len(panel.keys), columns=self._original.shape[0])
        checks.finite(innovation=innovation)
        innovation = innovation.detach().double()
        keys, before = panel.keys.double(), self.weight.double()
        change, memory = self._rule.step(Batch(keys, innovation, panel.weights.double()), before, self._memory)
        after = before + change
        if not checks.all_finite(after.to(self._dtype)):
            raise UpdateError(
                f"rule {self._rule.name!r} on {self._name}: the weight overflows {self._dtype}. No weight was "
                "modified. Increase lam or mu, or change the options of the rule."
            )
        self._master.write(after.to(self._dtype))
        self._memory, self._edits, self._version = memory, self._edits + len(keys), next(_versions)
        residual = innovation - keys @ change.T
        return Step(residual.to(self._dtype), innovation.to(self._dtype), math.nan, float(change.norm()))

    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Applies a batch of edits with values, which protects the outputs of a rule that accumulates keys.

        Args:
            keys: `K [n, d_k]`, any floating dtype.
            values: `V [n, d_v]`, any floating dtype.
            weights: `w [n]`, any floating dtype, positive; 1 by default.

        Returns:
            See `update_projected`.

        Raises:
            InputError: an argument is invalid, or the rule does not accumulate keys.
            UpdateError: the batch cannot be solved, or the result is not finite.
        """
        if not self._rule.accumulates_keys:
            raise InputError(
                f"rule={self._rule.name!r} does not accumulate keys, so it cannot protect prompts or restore edits; "
                "use rule='rls'."
            )
        panel = self.project(keys, weights)
        return self.update_projected(panel, values - self.outputs(panel.keys))

    def settle(self) -> None:
        """Does nothing: no work is deferred."""

    def snapshot(self) -> RuleSnapshot:
        """Copies the weight and the memory for `restore`."""
        return RuleSnapshot(
            [tensor.clone() for tensor in self._master.tensors], self._memory, self._edits, self._version
        )

    @torch.no_grad()
    def restore(self, snapshot: RuleSnapshot) -> None:
        """Restores a snapshot bit for bit."""
        for tensor, old in zip(self._master.tensors, snapshot.tensors, strict=True):
            tensor.copy_(old)
        self._master.settle()
        self._memory, self._edits, self._version = snapshot.memory, snapshot.edits, snapshot.version
