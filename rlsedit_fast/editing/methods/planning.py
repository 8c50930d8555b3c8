"""The methods of an editor that choose the priors and forecast a stream of edits before the first one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlsedit_fast.baselines import RECURSIVE
from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.capacity.forecast import ADHERENCES, LEAST_REALIZED, Forecast, Forecaster, Report
from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.priors import Tradeoff, tabulate
from rlsedit_fast.editing.session import PILOT, EditSession
from rlsedit_fast.editing.status import DEFAULT_BUDGET
from rlsedit_fast.errors import InputError
from rlsedit_fast.interrupts import interrupts_deferred
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.rls import BlockPrior, Prior

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlsedit_fast.editing.config import EditConfig


class Planning:
    """Base class of `Editor`: sets the priors, and compares and forecasts them."""

    model: PreTrainedModel
    context: ModelContext
    _session: EditSession

    @property
    def config(self) -> EditConfig:
        """The settings, with sampled context prefixes."""
        return self.context.config

    @property
    def priors(self) -> list[Prior | BlockPrior]:
        """The prior of each edited layer; empty before the calibration or the first edit."""
        return self._session.priors

    def calibrate(self, edits: Iterable[Edit | Mapping[str, Any]]) -> list[Prior | BlockPrior]:
        """Sets the prior of each layer with a pilot batch; the model is not modified, except by wanted continuations.

        `config.prior.lam` and `config.prior.mu` are used if given. Otherwise they are chosen such that the pilot
        realizes the fraction `config.prior.adherence` of its target changes.

        Args:
            edits: the pilot: edits similar to later ones; a hundred are enough.

        Returns:
            The priors, in the order of `layers`, which apply to all edits from now on.

        Raises:
            InputError: the priors are already set, or `mu` is given and there are no anchors.
            RequestError: an edit of the pilot is invalid.
            ResourceError: there is not enough memory.
        """
        self._check_not_started("calibrate")
        requests = self.context.prepare(edits)
        with self.context.processes.operation(), quiet(self.model):
            self._session.start(requests)
        with interrupts_deferred():
            self._session.write_start()
        return self.priors

    def assess(self, edits: Iterable[Edit | Mapping[str, Any]], adherences: Sequence[float]) -> list[Tradeoff]:
        """Returns the priors that `calibrate` would choose for several adherences, and their effect on the pilot.

        Nothing is set. Arguments and errors are those of `calibrate`.
        """
        self._check_not_started("assess")
        with self.context.processes.operation(), quiet(self.model):
            pilot = self._session.pilot(self.context.prepare(edits))
            return tabulate(self.config, self._session.used_moments, pilot, adherences)

    def forecast(
        self,
        edits: Iterable[Edit | Mapping[str, Any]],
        *,
        adherences: Sequence[float] | None = None,
        count: int | None = None,
        pilot: int = PILOT,
        max_drift: float = DEFAULT_BUDGET,
        min_realized: float = LEAST_REALIZED,
        progress: Report | None = None,
    ) -> Forecast:
        """Forecasts what planned edits would do, by number of edits, and proposes settings; nothing is modified or set.

        The values of the first edits are searched, as in `calibrate`. Of all others only the keys are read, and run
        through the solver with changes drawn from the searched ones. Refinement and the change of the keys by earlier
        edits are not included.

        Args:
            edits: the planned edits, in order, or similar ones; a thousand are enough to forecast many more.
            adherences: adherences to compare; by default `config.prior.adherence` and those in `ADHERENCES`.
            count: number of edits to forecast; by default all given. Beyond those it is extrapolated.
            pilot: number of edits whose values are searched.
            max_drift: allowed relative change of the outputs on held-out tokens of the anchor text; without them on the
                anchors, without anchors of the weights.
            min_realized: fraction of its target changes that the oldest batch must keep.
            progress: called with what is done, the number of edits done, and of how many.

        Raises:
            InputError: the priors are already set, the rule is not `rls`, or an argument is invalid.
            ModelError: the model contains mixtures of experts.
            RequestError: an edit is invalid.

        Example:
            >>> from rlsedit_fast import Edit, EditConfig, Editor
            >>> from rlsedit_fast.world import World, load_demo_model
            >>> config = EditConfig(layers=[0], contexts={"prefixes": [""]}, search={"steps": 5})
            >>> editor = Editor(*load_demo_model(), config=config)
            >>> planned = [Edit("{} plays the", person.name, "harp") for person in World.generate(people=40).people]
            >>> forecast = editor.forecast(planned, adherences=[0.8], pilot=10)
            >>> forecast.keys, forecast.settings[0].points[-1].edits
            (40, 40)
        """
        self._check_not_started("forecast")
        if self.config.rule != RECURSIVE:
            raise InputError(
                f"forecast(): rule={self.config.rule!r} is not forecast; use rule={RECURSIVE!r}",
                hint="compare adherences on a pilot with Editor.assess",
            )
        if isinstance(pilot, bool) or pilot < 1:
            raise InputError(f"pilot={pilot!r}: expected at least 1")
        if adherences is None:
            adherences = sorted({*ADHERENCES, self.config.prior.adherence})
        requests = self.context.prepare(edits)
        with self.context.processes.operation(), quiet(self.model):
            forecaster = Forecaster(self.context, self._session.used_moments, self._session.held_out_moments)
            searched = self._session.pilot(requests[:pilot])
            return forecaster.run(
                requests,
                searched,
                adherences=adherences,
                count=count,
                max_drift=max_drift,
                min_realized=min_realized,
                report=progress,
            )

    def _check_not_started(self, method: str) -> None:
        if self._session.layers:
            raise InputError(f"{method}(): the priors are already set and apply to all edits; create a new editor")
