"""Files of edited models: checkpoint, GGUF file, exact delta, LoRA adapter; their model cards and uploads."""

from rlsedit_fast.export.adapter import AdapterReport, ModuleFactors, write_adapter
from rlsedit_fast.export.card import CardContents, CardEdit, make_card
from rlsedit_fast.export.changes import WeightChange, changes_between
from rlsedit_fast.export.checkpoint import write_checkpoint
from rlsedit_fast.export.delta import DeltaReport, ModuleDelta, apply_delta, write_delta
from rlsedit_fast.export.push import Pushed, push_folder

__all__ = [
    "AdapterReport",
    "CardContents",
    "CardEdit",
    "DeltaReport",
    "ModuleDelta",
    "ModuleFactors",
    "Pushed",
    "WeightChange",
    "apply_delta",
    "changes_between",
    "make_card",
    "push_folder",
    "write_adapter",
    "write_checkpoint",
    "write_delta",
]
