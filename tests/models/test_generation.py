"""Sampling follows the probabilities of the model and its own seed; greedy generation is argmax."""

import pytest
import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.models.generation import greedy, sample
from rlsedit_fast.world.tokens import SPECIAL, build_tokenizer


def test_recorded_probabilities_match_a_full_pass(family, make_model, tokenizer):
    model = make_model(family)
    for drawn in sample(model, tokenizer, texts=3, length=14, seed=0):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([drawn.ids])).logits[0, :-1]
        whole = logits.log_softmax(-1).gather(1, torch.tensor(drawn.ids[1:])[:, None])[:, 0]
        # Cached and full passes sum in different order: float32 rounding of log probabilities of about -10.
        torch.testing.assert_close(torch.tensor(drawn.log_probabilities), whole, rtol=0, atol=2e-4)


def test_token_frequencies_match_the_model(make_model, tokenizer):
    model = make_model("llama")
    texts = 5000
    drawn = torch.tensor([s.ids[1] for s in sample(model, tokenizer, texts=texts, length=2, seed=1)])
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    probabilities[: len(SPECIAL)] = 0
    probabilities /= probabilities.sum()
    frequencies = drawn.bincount(minlength=len(probabilities)) / texts
    for token in probabilities.topk(20).indices.tolist():
        assert abs(frequencies[token] - probabilities[token]) < 5 * (probabilities[token] / texts).sqrt()


def test_seed_is_reproducible_and_isolated(model, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(model, tokenizer, texts=4, length=10, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert sample(model, tokenizer, texts=4, length=10, seed=7) == first
    assert sample(model, tokenizer, texts=4, length=10, seed=8) != first
    assert len({tuple(s.ids) for s in first}) == 4
    assert all(s.ids[0] == tokenizer.bos_token_id for s in first)


def test_samples_end_before_an_end_token_and_have_no_other_special_token(make_model, tokenizer):
    model = make_model("llama").train()
    ends = list(range(20, 220))
    model.generation_config.eos_token_id = ends
    drawn = sample(model, tokenizer, texts=60, length=12, seed=0)
    special = set(tokenizer.all_special_ids) | set(ends)
    assert not any(special & set(s.ids[1:]) for s in drawn)
    lengths = {len(s.ids) for s in drawn}
    assert min(lengths) == 2, "the first sampled token cannot end a text, the second can"
    assert max(lengths) > 4
    assert all(len(s.log_probabilities) == len(s.ids) - 1 for s in drawn)
    assert model.training


def test_samples_without_a_start_token(make_model):
    tokenizer = build_tokenizer()
    tokenizer.bos_token = None
    model = make_model("gpt2")
    drawn = sample(model, tokenizer, texts=30, length=3, seed=0)
    starts = {s.ids[0] for s in drawn}
    torch.manual_seed(1)
    assert sample(model, tokenizer, texts=30, length=3, seed=0) == drawn
    assert len(starts) > 20
    assert not starts & set(tokenizer.all_special_ids)


def test_unused_embedding_rows_are_not_sampled(make_model, tokenizer):
    model = make_model("llama")
    size = len(tokenizer)
    model.resize_token_embeddings(8 * size, mean_resizing=False)
    drawn = sample(model, tokenizer, texts=30, length=6, seed=0)
    assert max(max(s.ids) for s in drawn) < size


def test_nan_probabilities_raise(make_model, tokenizer):
    model = make_model("llama")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        sample(model, tokenizer, texts=2, length=4, seed=0)


def test_greedy_is_argmax_for_any_generation_config(family, make_model):
    model = make_model(family).train()
    rows = [[7, 30, 31], [9, 40], [8, 30, 33], [11]]
    counts = [6, 3, 0, 8]
    plain = greedy(model, rows, counts)
    assert [len(new) for new in plain] == counts
    for row, new in zip(rows, plain, strict=True):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([row + new])).logits[0, len(row) - 1 : -1]
        chosen = logits[: len(new)].gather(1, torch.tensor(new, dtype=torch.long)[:, None])[:, 0]
        # Cached and full passes sum in different order, so either of two nearly equal logits can be the highest.
        torch.testing.assert_close(chosen, logits[: len(new)].max(1).values, rtol=0, atol=2e-4)
    model.train()
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.min_new_tokens = 8
    assert greedy(model, rows, counts) == plain
    assert model.training


def test_greedy_ends_when_all_rows_of_a_batch_are_complete(make_model):
    model = make_model("llama")
    rows = [[7, 30, 31], [9, 40, 41]]
    plain = greedy(model, rows, [6, 6])
    assert greedy(model, rows, [6, 6], enough=lambda i, new: len(new) > i) == [new[:2] for new in plain]
    assert greedy(model, rows, [1, 6], enough=lambda i, new: len(new) > 2) == [plain[0][:1], plain[1][:3]]


def test_greedy_without_new_tokens(make_model):
    assert greedy(make_model("llama"), [[7, 30], [9]], [0, 0]) == [[], []]


def test_greedy_ends_before_an_end_token(make_model):
    model = make_model("llama")
    rows = [[7, 30, 31], [9, 40]]
    first, second = greedy(model, rows, [6, 6])
    cut = first.index(first[3])
    assert greedy(model, rows[:1], [6], ends={first[3]}) == [first[:cut]]
    assert greedy(model, rows, [6, 6], ends={second[0]})[1] == []
