"""Values from one gradient: the direction, the length, the running scale, and what a record then says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing import EditConfig
from rlsedit_fast.editing.gradient import GradientScale, gradient_values
from rlsedit_fast.editing.requests import prepare
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.world import World, load_demo_model

CASES = world_cases(World.generate(), 12, 0)
CONFIG = EditConfig(
    layers=(0,), values="gradient", context_prefixes=("", "People speak ."), lam=0.1, batch_size=4, refine=0
)


@pytest.fixture
def demo():
    return load_demo_model()


@pytest.fixture
def site(demo):
    decoder = with_prefixes(find_decoder(demo[0]), longest=64)
    return find_site(decoder, decoder.select((0,)))


def gradient_of(model, request):
    """Of the target's mean NLL over contexts, through the whole model; and the state that it belongs to."""
    delta = torch.zeros(128, requires_grad=True)
    place, states, nlls = [0], [], []

    def add(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden[0, place[0]].detach())
        hidden = hidden.index_add(1, torch.tensor(place), delta[None, None])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.model.layers[0].register_forward_hook(add)
    for row in request.contexts:
        place[0] = row.lookup
        scores = model(torch.tensor([row.ids])).logits[0, row.prompt_length - 1 : -1].log_softmax(-1)
        nlls.append(-scores.gather(1, torch.tensor(row.target)[:, None]).mean())
    handle.remove()
    return torch.autograd.grad(torch.stack(nlls).mean(), delta)[0], states[0]


@pytest.mark.parametrize("at_once", [1, 5, 12])
def test_change_is_the_scaled_gradient_of_the_length_asked_for(demo, site, at_once):
    model, tokenizer = demo
    requests = prepare(tokenizer, [case.edit for case in CASES], CONFIG, longest=64)
    before = GradientScale(torch.linspace(0.01, 1, 128))
    with quiet(model):
        values, _, after = gradient_values(site, requests, CONFIG, [[i] for i in range(12)], at_once, before)
        alone = [gradient_of(model, request) for request in requests]
    units = torch.stack([-gradient / gradient.norm() for gradient, _ in alone])
    squares = before.squares + units.square().sum(0)
    torch.testing.assert_close(after.squares, squares, rtol=1e-4, atol=1e-6)
    wanted = units / (squares.sqrt() + squares.sqrt().mean())
    lengths = torch.stack([state.norm() for _, state in alone])
    wanted = 0.6 * lengths[:, None] * wanted / wanted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(values.delta, wanted, rtol=1e-3, atol=1e-4)
    assert values.steps.tolist() == [1] * 12
    assert 0 < int(values.converged.sum()) + int((values.rank > 1).sum()) <= 12


def test_one_forward_and_one_backward_pass_above_the_site(demo, site):
    model, tokenizer = demo
    requests = prepare(tokenizer, [case.edit for case in CASES], replace(CONFIG, kl_factor=0.0), longest=64)
    ran = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda _m, _i: ran.append(torch.is_grad_enabled()))
    with quiet(model):
        gradient_values(site, requests, CONFIG, [[i] for i in range(12)], 12, GradientScale())
    # The first is that of the prefixes, which are run once; the last tells how far the change came.
    assert ran == [False, True, False]


def test_requests_that_share_a_change_get_the_gradient_of_their_sum(demo, site):
    model, tokenizer = demo
    requests = prepare(tokenizer, [case.edit for case in CASES[:3]], CONFIG, longest=64)
    with quiet(model):
        values, _, _ = gradient_values(site, requests, CONFIG, [[0, 2], [1]], 1, GradientScale())
        first, third = (gradient_of(model, requests[i])[0] for i in (0, 2))
    assert torch.equal(values.delta[0], values.delta[2])
    assert not torch.equal(values.delta[0], values.delta[1])
    assert float(torch.cosine_similarity(values.delta[0], -(first + third), dim=0)) > 0.7


def test_editor_keeps_the_scale_of_what_it_made_and_flags_what_fell_short(demo):
    editor = rf.Editor(*demo, config=replace(CONFIG, search_stop_nll=0.3))
    records = editor.edit([case.edit for case in CASES])
    assert {record.search_converged for record in records} == {True, False}, "some take at the first step, most do not"
    assert all(record.search_rank > 1 for record in records if record.search_nll > 3)
    held = editor._session.progress.scale.squares
    assert float(held.sum()) == pytest.approx(12, rel=1e-4)
    editor._session.layers._site.decoder.model.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(rf.errors.RLSEditError):
        editor.edit([case.edit for case in world_cases(World.generate(), 13, 1)[12:]])
    assert torch.equal(editor._session.progress.scale.squares, held)


def test_where_there_is_one_look_a_target_need_be_first_at_one(demo):
    """`search_stop="rank"` asks for several looks in a row, of which there is one here."""
    model, tokenizer = demo
    config = replace(CONFIG, search_stop="rank", unconverged="skip")
    records = rf.Editor(model, tokenizer, config=config).edit([case.edit for case in CASES])
    assert [record.search_converged for record in records] == [record.search_rank == 1 for record in records]
    assert any(record.search_converged for record in records)
