"""A tiny model, edits for it, and comparisons of two editors."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
import torch

import rlsedit_fast as rf

WORDS = "Toze Lado Rekuno Fado Veta Voluvu".split()
NAMES = [" ".join(name) for name in itertools.permutations(WORDS, 3)]
PROMPTS = ["{} lives in", "{} works as a", "{} plays the", "{} speaks", "{} is", "Friends know that {} is"]
TARGETS = ["Port Alder", "mason", "organ", "Kubeish", "Old Corran", "clarinet", "Lake Briar"]
ANCHORS = [f"{a} lives in Port Garnet . {b} speaks Nafiish ." for a in NAMES[:20] for b in NAMES[20:24]]


def make_edits(count: int, start: int = 0) -> list[rf.Edit]:
    """Returns edits with different prompts."""
    return [
        rf.Edit(
            PROMPTS[i // len(NAMES) % len(PROMPTS)], NAMES[i % len(NAMES)], TARGETS[i % len(TARGETS)], weight=1 + i % 2
        )
        for i in range(start, start + count)
    ]


def make_tiny(vocabulary: int, dtype: torch.dtype = torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def tiny_config(**changes) -> rf.EditConfig:
    base = {
        "layers": (0, 1),
        "batch_size": 2,
        "contexts": {"prefixes": ("",)},
        "fact_token": "last",
        "prior": {"adherence": 0.9},
        "search": {"steps": 3, "clamp": 4.0},
        "delay": 8,
    }
    return rf.EditConfig(**base).replace(**changes)


@pytest.fixture
def tiny(tokenizer):
    """Factory of identical tiny models."""
    return lambda dtype=torch.float32: make_tiny(len(tokenizer), dtype)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(one, other) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def assert_same(one: rf.Editor, other: rf.Editor) -> None:
    """Compares weights, states and records (except times) bit for bit."""
    assert_same_weights(one.model, other.model)
    for a, b in zip(one._session.layers.states, other._session.layers.states, strict=True):
        first, second = a.saved(), b.saved()
        for name in ("weight", "base", "pending", "signs", "image"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert (first.floor, first.objective, first.edits) == (second.floor, second.objective, second.edits)
    assert history_of(one) == history_of(other)
    ids = one._session.ledger.active
    assert ids == other._session.ledger.active
    for a, b in zip(one._session.ledger.rows(ids), other._session.ledger.rows(ids), strict=True):
        assert a.weight == b.weight
        assert all(map(torch.equal, (*a.keys, *a.values, a.goal), (*b.keys, *b.values, b.goal)))
    assert len(one._session.layers.protected) == len(other._session.layers.protected)
    assert one.protected == other.protected


def history_of(editor: rf.Editor) -> list[tuple]:
    return [tuple(value for name, value in asdict(r).items() if name != "time") for r in editor.history()]
