"""Evaluation of edited models: cases and data sets, metrics by their published definitions, streams of edits, and runs.

`world_cases`, `counterfact_cases`, `zsre_cases` and `mquake_cases` create cases; `score_before` and `evaluate` measure
them. `TextProbe` measures perplexity and drift on text, `evaluate_task` the accuracy on GLUE and MMLU. `search_layers`
compares layers. `run_jobs` executes streams of edits (`Plan`) on a model with data (`GroundSpec`) and writes result
files.
"""

from rlsedit_fast.evaluation.ages import AGE
from rlsedit_fast.evaluation.cases import Case, MultiHop, Question, edited_twice, related_cases, world_cases
from rlsedit_fast.evaluation.chat import ANSWER_TOKENS, ChatOutcome, chat_neighbors, contains_answer, evaluate_chat
from rlsedit_fast.evaluation.consistency import TextSimilarity
from rlsedit_fast.evaluation.datasets import counterfact_cases, counterfact_record, zsre_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.evaluation.figures import Spread, over_seeds, pareto, spread
from rlsedit_fast.evaluation.gate_results import GateReport, GateResult
from rlsedit_fast.evaluation.gates import BoundGates, Gates
from rlsedit_fast.evaluation.generation import continuations, free_accuracy, matches_answer, n_gram_entropy
from rlsedit_fast.evaluation.generic_facts import generic_edits
from rlsedit_fast.evaluation.grounds import DEMO, GroundSpec, make_cases, make_ground, running_text
from rlsedit_fast.evaluation.layers import (
    LayerSearch,
    Trial,
    Trials,
    choose,
    compare,
    search_layers,
    single_layers,
    windows,
)
from rlsedit_fast.evaluation.metrics import Metric, Report, evaluate, harmonic_mean, score_before
from rlsedit_fast.evaluation.mquake import mquake_cases
from rlsedit_fast.evaluation.outcome import CollectedAnswers, Outcome, Share, collect_answers, compute_outcome
from rlsedit_fast.evaluation.plan import Plan
from rlsedit_fast.evaluation.relations import RelationQuestions, questions_about, relation_questions, subject_of
from rlsedit_fast.evaluation.runs import Job, load_result, result_path, run_jobs, value
from rlsedit_fast.evaluation.scoring import Score, score
from rlsedit_fast.evaluation.stability import Stability, TextProbe
from rlsedit_fast.evaluation.stream import Ground
from rlsedit_fast.evaluation.tasks import Item, TaskResult, evaluate_task, read_task

__all__ = [
    "AGE",
    "ANSWER_TOKENS",
    "CONFIG",
    "DEMO",
    "BoundGates",
    "Case",
    "ChatOutcome",
    "CollectedAnswers",
    "GateReport",
    "GateResult",
    "Gates",
    "Ground",
    "GroundSpec",
    "Item",
    "Job",
    "LayerSearch",
    "Metric",
    "MultiHop",
    "Outcome",
    "Plan",
    "Question",
    "RelationQuestions",
    "Report",
    "Score",
    "Share",
    "Spread",
    "Stability",
    "TaskResult",
    "TextProbe",
    "TextSimilarity",
    "Trial",
    "Trials",
    "anchor_texts",
    "chat_neighbors",
    "choose",
    "collect_answers",
    "compare",
    "compute_outcome",
    "contains_answer",
    "continuations",
    "counterfact_cases",
    "counterfact_record",
    "edited_twice",
    "evaluate",
    "evaluate_chat",
    "evaluate_task",
    "free_accuracy",
    "generic_edits",
    "harmonic_mean",
    "load_result",
    "make_cases",
    "make_ground",
    "matches_answer",
    "mquake_cases",
    "n_gram_entropy",
    "over_seeds",
    "pareto",
    "questions_about",
    "read_task",
    "related_cases",
    "relation_questions",
    "result_path",
    "run_jobs",
    "running_text",
    "score",
    "score_before",
    "search_layers",
    "single_layers",
    "spread",
    "subject_of",
    "value",
    "windows",
    "world_cases",
    "zsre_cases",
]
