"""The RLS solver: applies edits to one weight matrix. It works on tensors and does not depend on transformers."""

from rlsedit_fast.rls.asymptotics import Asymptotics
from rlsedit_fast.rls.block_panel import BlockPanel
from rlsedit_fast.rls.block_prior import BlockPrior
from rlsedit_fast.rls.block_state import BlockState
from rlsedit_fast.rls.blocks import BlockLayout, BlockMoment
from rlsedit_fast.rls.calibrate import BlockTrialLayer, BlockTrialPanel, TrialLayer, TrialPanel
from rlsedit_fast.rls.forecast import ChangeStatistics, Route, forecast_stream
from rlsedit_fast.rls.monitor import Monitor
from rlsedit_fast.rls.overlap import used_share
from rlsedit_fast.rls.prior import Prior
from rlsedit_fast.rls.results import Bounds, Panel, Saved, Snapshot, Step, Terms
from rlsedit_fast.rls.separate_state import SeparateState
from rlsedit_fast.rls.sharded import ShardedColumns
from rlsedit_fast.rls.shares import amplify_innovation, amplify_values, memit_share, realized_fraction
from rlsedit_fast.rls.state import RLSState

__all__ = [
    "Asymptotics",
    "BlockLayout",
    "BlockMoment",
    "BlockPanel",
    "BlockPrior",
    "BlockState",
    "BlockTrialLayer",
    "BlockTrialPanel",
    "Bounds",
    "ChangeStatistics",
    "Monitor",
    "Panel",
    "Prior",
    "RLSState",
    "Route",
    "Saved",
    "SeparateState",
    "ShardedColumns",
    "Snapshot",
    "Step",
    "Terms",
    "TrialLayer",
    "TrialPanel",
    "amplify_innovation",
    "amplify_values",
    "forecast_stream",
    "memit_share",
    "realized_fraction",
    "used_share",
]
