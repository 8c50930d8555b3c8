"""The value search on a batch finds what each request alone would, and stops each by its own rule."""

import pytest
import torch

from rlsedit_fast.editing import Edit, EditConfig, values
from rlsedit_fast.editing.requests import prepare
from rlsedit_fast.editing.values import search_values
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import find_site

EDITS = [
    Edit("{} lives in", "Toze Lado Rekuno", "Port Alder"),
    Edit("The native language of {} is", "Fado Veta", "Kubeish"),
    Edit("For a living , {} is employed as a", "Lado", "mason"),
]
CONFIG = EditConfig(
    layers=(1, 2),
    context_prefixes=("", "People speak ."),
    # A random model attends everywhere alike, so the subject's token steers little; the last token steers its answer.
    fact_token="last",
    search_steps=20,
    search_stop_nll=1.0,
    clamp=4.0,
    kl_prompts=("{} is a", "{} speaks"),
)


def search(model, tokenizer, edits, config=CONFIG, groups=None):
    decoder = find_decoder(model)
    with quiet(model):
        site = find_site(decoder, decoder.select(config.layers))
        return search_values(site, prepare(tokenizer, edits, config, longest=64), config, groups)


def plain_search(model, tokenizer, edit, config):
    """The same loss written for one request through the whole model, as the field does it."""
    (request,) = prepare(tokenizer, [edit], config, longest=64)
    block = find_decoder(model).blocks[max(config.layers)]
    bare = request.contexts[0]
    with torch.no_grad():
        first = model(torch.tensor([bare.ids])).logits[0, bare.prompt_length - 1].argmax()
        before = {
            i: logits.log_softmax(-1)
            for i, row in enumerate(request.kl)
            for logits in (model(torch.tensor([row.ids])).logits[0, -1],)
            if logits.argmax() != first
        }
    start = []
    handle = block.register_forward_hook(
        lambda _m, _i, out: start.append((out[0] if isinstance(out, tuple) else out)[0, bare.lookup].detach().clone())
    )
    with torch.no_grad():
        model(torch.tensor([bare.ids]))
    handle.remove()
    h = start[0]
    delta = torch.zeros_like(h, requires_grad=True)
    lookup = [0]

    def add(_m, _i, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[0, lookup[0]] += delta
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def logits_of(row):
        lookup[0] = row.lookup
        return model(torch.tensor([row.ids])).logits[0]

    optimizer = torch.optim.Adam([delta], lr=0.1)
    energies = []
    handle = block.register_forward_hook(add)
    try:
        for step in range(config.search_steps + 1):
            nlls, right = [], True
            for row in request.contexts:
                scores = logits_of(row)[row.prompt_length - 1 : -1].log_softmax(-1)
                target = torch.tensor(row.target)
                nlls.append(-scores.gather(1, target[:, None]).mean())
                right &= bool((scores.argmax(-1) == target).all())
            worst = max(float(nll.detach()) for nll in nlls)
            done = right and worst <= config.search_stop_nll
            if done or step == config.search_steps:
                return delta.detach().clone(), step, done
            kls = [
                (was.exp() * (was - logits_of(request.kl[i])[-1].log_softmax(-1))).sum() for i, was in before.items()
            ]
            loss = torch.stack(nlls).mean() + config.weight_decay * delta.norm() / h.norm() ** 2
            if kls:
                loss = loss + config.kl_factor * torch.stack(kls).mean()
            (delta.grad,) = torch.autograd.grad(loss, delta)
            if config.search_descent == "adam":
                optimizer.step()
            with torch.no_grad():
                if config.search_descent == "normalized":
                    energies.append(float(delta.grad.square().sum()))
                    decay = [0.9**age for age in range(len(energies))][::-1]
                    mean = sum(w * e for w, e in zip(decay, energies, strict=True)) / sum(decay)
                    delta -= 0.09 * h.norm() * delta.grad / mean**0.5
                delta *= min(1.0, config.clamp * float(h.norm()) / float(delta.norm()))
    finally:
        handle.remove()


@pytest.mark.parametrize("fact_token", ["last", "subject_last"])
@pytest.mark.parametrize("descent", ["normalized", "adam"])
def test_batched_truncated_search_equals_one_request_through_the_whole_model(model, tokenizer, descent, fact_token):
    config = EditConfig(**{**vars(CONFIG), "search_descent": descent, "fact_token": fact_token})
    found = search(model, tokenizer, EDITS, config)
    ended = set()
    for i, edit in enumerate(EDITS):
        delta, steps, done = plain_search(model, tokenizer, edit, config)
        assert int(found.steps[i]) == steps
        assert bool(found.converged[i]) == done
        # Adam divides by the gradient's own size, so rounding of eps grows with the steps, not with the gradients.
        torch.testing.assert_close(found.delta[i], delta, rtol=2e-3, atol=2e-3 * float(delta.norm()))
        ended.add(steps)
    assert (descent, fact_token) != ("normalized", "last") or len(ended) > 1, (
        "the requests stop at different steps, or this shows nothing of the per-request stop"
    )


def test_value_makes_the_target_likelier(model, tokenizer):
    found = search(model, tokenizer, EDITS)
    untouched = search(model, tokenizer, EDITS, EditConfig(**{**vars(CONFIG), "clamp": 1e-9}))
    assert bool((found.nll < untouched.nll).all())


def test_clamp_bounds_the_change(model, tokenizer):
    tight = EditConfig(**{**vars(CONFIG), "clamp": 0.2, "search_stop_nll": 0.0})
    found = search(model, tokenizer, EDITS, tight)
    loose = search(model, tokenizer, EDITS, EditConfig(**{**vars(tight), "clamp": 100.0}))
    assert bool((found.delta.norm(dim=1) < loose.delta.norm(dim=1)).all())
    assert not bool(found.converged.any())
    assert found.steps.tolist() == [tight.search_steps] * 3


def test_each_change_is_clamped_by_its_own_state(model, tokenizer):
    tight = EditConfig(**{**vars(CONFIG), "clamp": 0.05, "search_stop_nll": 0.0, "fact_token": "subject_last"})
    found = search(model, tokenizer, EDITS, tight)
    lengths = []
    for request in prepare(tokenizer, EDITS, tight, longest=64):
        bare = request.contexts[0]
        with torch.no_grad():
            states = model(torch.tensor([bare.ids]), output_hidden_states=True).hidden_states[max(tight.layers) + 1]
        lengths.append(float(states[0, bare.lookup].norm()))
    assert max(lengths) > 1.05 * min(lengths), "the states differ in length, or this shows nothing"
    torch.testing.assert_close(found.delta.norm(dim=1), 0.05 * torch.tensor(lengths), rtol=1e-4, atol=0)


def test_a_low_nll_is_not_enough_while_another_token_is_ranked_first(model, tokenizer):
    lenient = EditConfig(**{**vars(CONFIG), "search_stop_nll": 50.0})
    found = search(model, tokenizer, EDITS, lenient)
    assert bool((found.steps > 0).all())
    assert bool(found.converged.any())
    # The steps ran out on what is not ranked first even then, and no NLL makes up for it.
    assert found.converged.tolist() == (found.steps < lenient.search_steps).tolist()


def test_requests_that_are_done_leave_the_batch(model, tokenizer):
    rows = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _m, inputs: rows.append(len(inputs[0])))
    found = search(model, tokenizer, EDITS)
    handle.remove()
    assert len(found.steps.unique()) > 1, "they stop at different steps, or this shows nothing"
    searched = rows[-int(found.steps.max()) - 1 :]
    assert searched == sorted(searched, reverse=True)
    assert searched[-1] < searched[0]


def test_kl_term_holds_what_follows_its_prompt(model, tokenizer):
    """A large weight on KL(before || after) keeps the distribution that the search without it changes."""
    held = EditConfig(**{**vars(CONFIG), "kl_factor": 100.0, "search_stop_nll": 0.0})
    free = EditConfig(**{**vars(held), "kl_factor": 0.0})
    decoder = find_decoder(model)

    def moved(config):
        delta = search(model, tokenizer, EDITS, config).delta
        total = 0.0
        for i, request in enumerate(prepare(tokenizer, EDITS, held, longest=64)):
            for row in request.kl:

                def add(_m, _i, out, row=row, i=i):
                    hidden = (out[0] if isinstance(out, tuple) else out).clone()
                    hidden[0, row.lookup] += delta[i]
                    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

                with torch.no_grad():
                    was = model(torch.tensor([row.ids])).logits[0, -1].log_softmax(-1)
                    handle = decoder.blocks[2].register_forward_hook(add)
                    now = model(torch.tensor([row.ids])).logits[0, -1].log_softmax(-1)
                    handle.remove()
                total += float((was.exp() * (was - now)).sum())
        return total

    assert moved(held) < 0.5 * moved(free)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_model_keeps_a_float32_value(make_model, tokenizer, name):
    found = search(make_model(name, torch.bfloat16), tokenizer, EDITS)
    assert found.delta.dtype == torch.float32
    assert bool(found.nll.isfinite().all())


@pytest.mark.parametrize("room", [1, 2, 3, 6])
def test_parts_that_fit_memory_find_what_the_batch_finds(model, tokenizer, monkeypatch, room):
    decoder = find_decoder(model)
    edits = [*EDITS, *(Edit(e.prompt, "Voluvu Lado", e.target) for e in EDITS)]
    groups = [[5, 0], [1], [2], [3], [4]]
    real, sizes = values.search_values, []

    def narrow(site, requests, config, groups):
        sizes.append(len(requests))
        if len(requests) > room and len(groups) > 1:
            raise torch.OutOfMemoryError("no more")
        return real(site, requests, config, groups)

    with quiet(model):
        site = find_site(decoder, decoder.select(CONFIG.layers))
        requests = prepare(tokenizer, edits, CONFIG, longest=64)
        whole = search_values(site, requests, CONFIG, groups)
        monkeypatch.setattr(values, "search_values", narrow)
        found, at_once = values.search_within_memory(site, requests, CONFIG, groups, 6)
    assert at_once == {1: 1, 2: 1, 3: 3, 6: 6}[room]
    assert sizes[0] == 6
    torch.testing.assert_close(found.delta, whole.delta, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.delta[5], found.delta[0])
    assert torch.equal(found.steps, whole.steps)
    assert torch.equal(found.converged, whole.converged)
    torch.testing.assert_close(found.nll, whole.nll, rtol=1e-3, atol=1e-3)


def test_memory_for_not_even_one_is_an_error(model, tokenizer, monkeypatch):
    def fails(*_args):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(values, "search_values", fails)
    decoder = find_decoder(model)
    requests = prepare(tokenizer, EDITS, CONFIG, longest=64)
    with quiet(model):
        site = find_site(decoder, decoder.select(CONFIG.layers))
        with pytest.raises(torch.OutOfMemoryError):
            values.search_within_memory(site, requests, CONFIG, [[0], [1], [2]], 3)
