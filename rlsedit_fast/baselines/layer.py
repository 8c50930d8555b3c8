"""A layer under a rule: its exact weight, what the rule remembers of it, and all or nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule
from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.rls import Bounds, Monitor, Prior, Step, checks
from rlsedit_fast.rls.layer import Layer
from rlsedit_fast.rls.master import master_of
from rlsedit_fast.rls.results import realized
from rlsedit_fast.rls.state import dtype_of

_versions = itertools.count(1)


class LayerState(Protocol):
    """What an editor asks of an edited layer; `RLSState` is one, `RuleLayer` the other."""

    @property
    def weight(self) -> Tensor:
        """`W [d_v, d_k]`."""

    @property
    def original(self) -> Tensor:
        """`W0 [d_v, d_k]`."""

    @property
    def prior(self) -> Prior:
        """What holds the weight."""

    @property
    def name(self) -> str:
        """Of the layer."""

    @property
    def objective(self) -> float:
        """`J` at the weight; NaN under a rule that minimises none."""

    def outputs(self, keys: Tensor) -> Tensor:
        """`K W^T`."""

    def deviation(self) -> float:
        """`||W - W0||_F`."""

    def bounds(self) -> Bounds:
        """What is promised of the weight."""

    def monitor(self) -> Monitor:
        """The health of what the layer keeps beside its weight."""

    def project(self, keys: Tensor, weights: Tensor | None = None) -> Any:
        """A batch, as `update_projected` takes it; it has the keys in the layer's dtype as `keys`."""

    def update_projected(self, panel: Any, innovation: Tensor) -> Step:
        """Writes a batch."""

    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Writes a batch given by its outputs."""

    def remove(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Takes a batch back."""

    def refresh(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
        """Makes the layer afresh from the edits that it is to hold."""

    def settle(self) -> None:
        """Called behind a transaction."""

    def transaction(self) -> AbstractContextManager[None]:
        """All or nothing."""


@dataclass(frozen=True, eq=False)
class RulePanel:
    """A batch's keys `[n, d_k]` and weights `[n]`, and the version of the layer that they were taken at."""

    keys: Tensor
    weights: Tensor
    version: int


class RuleLayer(Layer):
    """What `RLSState` is to the recursive rule, for any other one: the same calls, as far as a rule has them.

    The rule computes in float64; the weight is kept exactly in float32 (float64 for a float64 weight).

    Args:
        weight: `W0 [d_v, d_k]`, any floating dtype.
        prior: what the rule weighs edits against; its anchors are to go on as they are.
        rule: the rule.
        name: of the layer, for the errors.
        in_place: keep `weight` itself current, as in `RLSState`.

    Raises:
        InputError: the weight is wrong, or the prior has anchors with values of their own.
        PriorError: the rule cannot work under this prior.
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
            raise InputError(f"{name}: rule={rule.name!r} cannot give anchors values of their own; only 'rls' can")
        self._prior, self._rule, self._name = prior, rule, name
        self._original = weight.detach().clone(memory_format=torch.contiguous_format)
        self._memory: Any = rule.start(self._original.double(), prior, name)
        self._master = master_of(weight.detach(), self._dtype, in_place=in_place)
        self._edits = 0
        self._version = next(_versions)

    @property
    def rule(self) -> Rule:
        """The rule."""
        return self._rule

    @property
    def objective(self) -> float:
        """NaN: these rules minimise no objective over all edits."""
        return math.nan

    def bounds(self) -> Bounds:
        """None is known: these rules minimise no objective over all edits."""
        return Bounds(weight=math.inf, anchors=math.inf, edits=math.inf)

    def project(self, keys: Tensor, weights: Tensor | None = None) -> RulePanel:
        """A batch's keys, checked.

        Raises:
            InputError: an argument is wrong.
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
        """Writes a batch by the rule; all of it or nothing.

        Raises:
            InputError: an argument is wrong, or the rule cannot do what is asked.
            UpdateError: the batch cannot be solved, or its result is not finite.
        """
        if panel.version != self._version:
            raise InputError(f"the panel was not taken at the present state of {self._name}; call project again.")
        checks.matrix("innovation", innovation, rows=len(panel.keys), columns=self._original.shape[0])
        checks.finite(innovation=innovation)
        wanted = innovation.detach().double()
        keys, before = panel.keys.double(), self.weight.double()
        change, memory = self._rule.change(Batch(keys, wanted, panel.weights.double()), before, self._memory)
        after = before + change
        if not checks.all_finite(after.to(self._dtype)):
            raise UpdateError(
                f"rule {self._rule.name!r} on {self._name}: the weight left the range of {self._dtype}; nothing was "
                "changed. Hold it more firmly (lam, mu, or the rule's own settings)"
            )
        self._master.write(after.to(self._dtype))
        self._memory, self._edits, self._version = memory, self._edits + len(keys), next(_versions)
        left = wanted - keys @ change.T
        share = realized(wanted, left)
        return Step(left.to(self._dtype), share.to(self._dtype), math.nan, float(change.norm()))

    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Writes a batch given by its outputs `V [n, d_v]`.

        Raises:
            InputError: the rule remembers no keys, so that outputs which are there already cannot be held by it.
        """
        if not self._rule.accumulates_keys:
            raise InputError(
                f"rule={self._rule.name!r} keeps nothing of earlier keys, so prompts cannot be protected, nor edits "
                "put back; take 'rls'"
            )
        panel = self.project(keys, weights)
        return self.update_projected(panel, values - self.outputs(panel.keys))

    def monitor(self) -> Monitor:
        """Nothing is kept that could drift."""
        return Monitor(0.0, False, "nothing is kept that could drift.")

    def remove(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Refused: only the recursive rule can take an edit back.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"rule={self._rule.name!r} cannot take an edit back, so it cannot be undone, replaced, or told anew with "
            "another edit of its subject; take rule='rls', or same_subject='separate' and edits of different subjects"
        )

    def refresh(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
        """Refused, as `remove` is."""
        self.remove(keys, values, weights)

    def settle(self) -> None:
        """Nothing waits."""

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Restores weight and memory if the block raises."""
        kept = [tensor.clone() for tensor in self._master.tensors]
        memory, edits, version = self._memory, self._edits, self._version
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for tensor, old in zip(self._master.tensors, kept, strict=True):
                    tensor.copy_(old)
                self._master.settle()
            self._memory, self._edits, self._version = memory, edits, version
            raise
