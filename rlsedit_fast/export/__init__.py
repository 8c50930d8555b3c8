"""Files of edited models: checkpoint, GGUF file, exact delta, LoRA adapter, sparse patch; model cards and uploads."""

from rlsedit_fast.export.adapter import AdapterReport, ModuleFactors, write_adapter
from rlsedit_fast.export.card import CardContents, CardEdit, make_card
from rlsedit_fast.export.changes import WeightChange, changes_between
from rlsedit_fast.export.checkpoint import CheckpointReport, write_checkpoint
from rlsedit_fast.export.compare import CheckpointDifference, compare_checkpoints
from rlsedit_fast.export.delta import DeltaReport, ModuleDelta, apply_delta, write_delta
from rlsedit_fast.export.engines import VLLM_RANKS, Engine
from rlsedit_fast.export.patch import WeightPatch, patches_of, read_patch, write_patch
from rlsedit_fast.export.push import Pushed, push_folder

__all__ = [
    "VLLM_RANKS",
    "AdapterReport",
    "CardContents",
    "CardEdit",
    "CheckpointDifference",
    "CheckpointReport",
    "DeltaReport",
    "Engine",
    "ModuleDelta",
    "ModuleFactors",
    "Pushed",
    "WeightChange",
    "WeightPatch",
    "apply_delta",
    "changes_between",
    "compare_checkpoints",
    "make_card",
    "patches_of",
    "push_folder",
    "read_patch",
    "write_adapter",
    "write_checkpoint",
    "write_delta",
    "write_patch",
]
