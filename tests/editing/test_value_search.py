"""The value search on a batch gives each request the result of its own search, and stops each by its own rule."""

import math

import pytest
import torch

from rlsedit_fast import Edit, EditConfig, Editor, ValueSearchConfig
from rlsedit_fast.editing.requests import prepare
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.editing.search.value_search import search_values
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import find_site

EDITS = [
    Edit("{} lives in", "Toze Lado Rekuno", "Port Alder"),
    Edit("The native language of {} is", "Fado Veta", "Kubeish"),
    Edit("For a living , {} is employed as a", "Lado", "mason"),
]
CONFIG = EditConfig(
    layers=(1, 2),
    contexts={"prefixes": ("", "People speak .")},
    fact_token="last",
    search={"steps": 20, "stop_nll": 1.0, "clamp": 4.0, "kl_prompts": ("{} is a", "{} speaks")},
)


def search(model, tokenizer, edits, config=CONFIG, groups=None):
    decoder = find_decoder(model)
    with quiet(model):
        site = find_site(with_prefixes(decoder, longest=64), decoder.select(config.layers))
        assert site.decoder.prefixed
        return search_values(site, prepare(tokenizer, edits, config, longest=64), config.search, groups)


def plain_search(model, tokenizer, edit, config, place=None):
    """The same search for one request through the whole model, with the KL term at every step."""
    (request,) = prepare(tokenizer, [edit], config, longest=64)
    place = place or find_decoder(model).blocks[max(config.layers)]
    bare = request.contexts[0]
    changed = [bare.lookup]
    delta = torch.zeros(64, requires_grad=True)
    start = []

    def add(_m, _i, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        row = hidden.reshape(-1, 64)  # one row; OPT's blocks flatten rows and tokens
        start.append(row[changed[0]].detach().clone())
        row = row.index_add(0, torch.tensor(changed), delta[None])
        return (row.reshape(hidden.shape), *out[1:]) if isinstance(out, tuple) else row.reshape(hidden.shape)

    def logits_of(row):
        changed[0] = row.lookup
        return model(torch.tensor([row.ids])).logits[0]

    handle = place.register_forward_hook(add)
    try:
        with torch.no_grad():
            first = logits_of(bare)[bare.prompt_length - 1].argmax()
            h = start[0]
            candidates = [(row, logits_of(row)[-1].log_softmax(-1)) for row in request.kl]
            before = [(row, scores) for row, scores in candidates if scores.argmax() != first]
        rule, stop = steps_of(config, delta, h), stop_of(config)
        for step in range(config.search.steps + 1):
            nlls, rank = [], 1
            for row in request.contexts:
                scores = logits_of(row)[row.prompt_length - 1 : -1].log_softmax(-1)
                target_scores = scores.gather(1, torch.tensor(row.target)[:, None])
                nlls.append(-target_scores.mean())
                rank = max(rank, int((scores > target_scores).sum(1).max()) + 1)
            kls = [(was.exp() * (was - logits_of(row)[-1].log_softmax(-1))).sum() for row, was in before]
            fit = torch.stack(nlls).mean()
            kl = config.search.loss.kl_factor * torch.stack(kls).mean() if kls else None
            decay = config.search.loss.weight_decay * delta.norm() / h.norm() ** 2
            worst = max(float(nll.detach()) for nll in nlls)
            done = stop(rank, worst, float((fit + decay + (0 if kl is None else kl)).detach()))
            if done or step == config.search.steps:
                return delta.detach().clone(), step, done or (config.search.stop == "loss" and rank == 1)
            towards, away, shorter = (
                torch.zeros(64) if term is None else torch.autograd.grad(term, delta)[0] for term in (fit, kl, decay)
            )
            with torch.no_grad():
                rule(step, towards, away if kl is not None else None, shorter, worst, float(fit))
                delta *= min(1.0, config.search.clamp * float(h.norm()) / float(delta.norm()))
    finally:
        handle.remove()


def stop_of(config):
    """The stopping rules, for one request."""
    row = [0]

    def rank_in_a_row(rank, _worst, _loss):
        row[0] = row[0] + 1 if rank == 1 else 0
        return row[0] >= config.search.stop_evaluations

    return {
        "nll": lambda rank, worst, _loss: rank == 1 and worst <= config.search.stop_nll,
        "rank": rank_in_a_row,
        "loss": lambda _rank, _worst, loss: loss < config.search.stop_loss,
    }[config.search.stop]


def steps_of(config, delta, h):
    """The optimizers, for one request."""
    optimizer = torch.optim.Adam([delta], lr=0.1)
    energies, seen = [], [torch.zeros(64), torch.zeros(64)]
    goal = min(0.35, {"nll": config.search.stop_nll, "rank": 1, "loss": config.search.stop_loss}[config.search.stop])

    def adam(_step, towards, away, shorter, _worst, _fit):
        delta.grad = towards + shorter + (0 if away is None else away)
        optimizer.step()

    def normalized(_step, towards, away, shorter, _worst, _fit):
        gradient = towards + shorter + (0 if away is None else away)
        energies.append(float(gradient.square().sum()))
        decay = [0.9**age for age in range(len(energies))][::-1]
        mean = sum(w * e for w, e in zip(decay, energies, strict=True)) / sum(decay)
        delta.sub_(0.09 * h.norm() * gradient / mean**0.5)

    def constrained(step, towards, away, _shorter, worst, fit):
        longest = 0.11 * float(h.norm())
        direction = -towards / towards.norm()
        odds = [-math.log(math.expm1(max(nll, 1e-6))) for nll in (0.85 * goal, worst)]
        newton = (odds[0] - odds[1]) * -math.expm1(-fit) / float(towards.norm())
        move = min(max(newton, 0.05 * longest), longest) * direction
        measures_kl = step > 0 if config.search.stop == "loss" else step in range(3, 1000, 2)
        if away is not None and measures_kl:
            moved, bent = delta - seen[0], away - seen[1]
            seen[:] = delta.detach().clone(), away
            along = away - (away @ direction) * direction
            length = max(0.0, float(moved @ bent / bent.square().sum())) * float(along.norm())
            move = move - min(length, 0.5 * longest) * along / along.norm()
        delta.add_(move)

    return {"adam": adam, "normalized": normalized, "constrained": constrained}[config.search.optimizer]


def compare(model, tokenizer, config, place=None):
    """Compares a batch with each request alone; returns the steps at which they stopped."""
    found = search(model, tokenizer, EDITS, config)
    for i, edit in enumerate(EDITS):
        delta, steps, done = plain_search(model, tokenizer, edit, config, place)
        assert int(found.steps[i]) == steps
        assert bool(found.converged[i]) == done
        # Adam divides by the gradient's magnitude, so rounding errors grow with the steps, not with the gradients.
        torch.testing.assert_close(found.delta[i], delta, rtol=2e-3, atol=2e-3 * float(delta.norm()))
    return found.steps.tolist()


@pytest.mark.parametrize(
    ("optimizer", "fact_token"),
    [("constrained", "last"), ("constrained", "subject_last"), ("normalized", "last"), ("adam", "subject_last")],
)
def test_a_batched_search_equals_single_requests_through_the_whole_model(model, tokenizer, optimizer, fact_token):
    steps = compare(model, tokenizer, CONFIG.replace(search={"optimizer": optimizer}, fact_token=fact_token))
    assert fact_token != "last" or optimizer == "adam" or len(set(steps)) > 1, (
        "precondition: the requests stop at different steps"
    )


def test_a_batched_search_equals_single_requests_in_every_family(make_model, tokenizer, family, monkeypatch):
    padding_side = "left" if len(family) % 2 else "right"
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    model = make_model(family)
    config = CONFIG.replace(
        layers=(1,), search={"steps": 9, "optimizer": "normalized" if padding_side == "left" else "constrained"}
    )
    with quiet(model):
        decoder = find_decoder(model)
        site = find_site(decoder, decoder.select((1,)))
        compare(model, tokenizer, config, site.module)


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        ("constrained", {"stop": "rank", "stop_evaluations": 1}),
        ("normalized", {"stop": "rank", "stop_evaluations": 1}),
        ("constrained", {"stop": "rank", "stop_evaluations": 3}),
        ("normalized", {"stop": "rank", "stop_evaluations": 3}),
        ("normalized", {"stop": "loss", "stop_loss": 1.0}),
    ],
)
def test_every_stopping_rule_stops_each_request_separately(make_model, tokenizer, rule, optimizer):
    model = make_model("llama")
    steps = compare(model, tokenizer, CONFIG.replace(search={"optimizer": optimizer, **rule}))
    assert min(steps) < CONFIG.search.steps


def test_the_rank_rule_waits_until_the_target_stays_first(model, tokenizer):
    once, three_times = (
        search(model, tokenizer, EDITS, CONFIG.replace(search={"stop": "rank", "stop_evaluations": count}))
        for count in (1, 3)
    )
    converged = three_times.converged
    assert bool(converged.any())
    assert bool((three_times.steps[converged] >= once.steps[converged] + 2).all())
    assert bool((three_times.rank[converged] == 1).all())


def test_with_the_loss_rule_a_target_ranked_first_counts_as_converged(model, tokenizer):
    config = CONFIG.replace(search={"optimizer": "normalized", "stop": "loss", "stop_loss": 0.0})
    found = search(model, tokenizer, EDITS, config)
    assert found.steps.tolist() == [config.search.steps] * 3
    assert found.converged.tolist() == (found.rank == 1).tolist()
    assert bool(found.converged.any())


@pytest.mark.parametrize(
    ("optimizer", "weight_decay"),
    [("constrained", 0.5), ("normalized", 0.0), ("normalized", 0.5), ("adam", 0.0), ("adam", 0.5)],
)
def test_the_search_works_with_small_hidden_states(model, tokenizer, optimizer, weight_decay):
    """At a change of zero the gradient of the weight decay is 0, for any length of the state."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1 if parameter.ndim > 1 else 1.0)
    found = search(
        model, tokenizer, EDITS, CONFIG.replace(search={"optimizer": optimizer, "loss": {"weight_decay": weight_decay}})
    )
    assert bool((found.start.norm(dim=-1) < 1).all())
    assert bool(found.delta.isfinite().all())
    assert bool((found.delta.norm(dim=1) > 0).all())
    assert bool(found.nll.isfinite().all())


def test_the_value_makes_the_target_more_likely(model, tokenizer):
    found = search(model, tokenizer, EDITS)
    untouched = search(model, tokenizer, EDITS, CONFIG.replace(search={"clamp": 1e-9}))
    assert bool((found.nll < untouched.nll).all())


def test_the_clamp_bounds_the_change(model, tokenizer):
    tight = CONFIG.replace(search={"clamp": 0.2, "stop_nll": 0.0})
    found = search(model, tokenizer, EDITS, tight)
    loose = search(model, tokenizer, EDITS, tight.replace(search={"clamp": 100.0}))
    assert bool((found.delta.norm(dim=1) < loose.delta.norm(dim=1)).all())
    assert not bool(found.converged.any())
    assert found.steps.tolist() == [tight.search.steps] * 3


def test_each_change_is_clamped_relative_to_its_own_state(model, tokenizer):
    tight = CONFIG.replace(search={"clamp": 0.05, "stop_nll": 0.0}, fact_token="subject_last")
    found = search(model, tokenizer, EDITS, tight)
    lengths = []
    for request in prepare(tokenizer, EDITS, tight, longest=64):
        bare = request.contexts[0]
        with torch.no_grad():
            states = model(torch.tensor([bare.ids]), output_hidden_states=True).hidden_states[max(tight.layers) + 1]
        lengths.append(float(states[0, bare.lookup].norm()))
    assert max(lengths) > 1.05 * min(lengths), "precondition: the states differ in length"
    torch.testing.assert_close(found.delta.norm(dim=1), 0.05 * torch.tensor(lengths), rtol=1e-4, atol=0)


def test_a_low_nll_is_not_enough_while_another_token_is_ranked_first(model, tokenizer):
    lenient = CONFIG.replace(search={"stop_nll": 50.0})
    found = search(model, tokenizer, EDITS, lenient)
    assert bool((found.steps > 0).all())
    assert bool(found.converged.any())
    # Requests that are not ranked first use all steps, at any NLL.
    assert found.converged.tolist() == (found.steps < lenient.search.steps).tolist()


def test_converged_requests_leave_the_batch(model, tokenizer):
    rows = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _m, inputs: rows.append(len(inputs[0])))
    found = search(model, tokenizer, EDITS, CONFIG.replace(search={"kl_prompts": ()}))
    handle.remove()
    assert len(found.steps.unique()) > 1, "precondition: they stop at different steps"
    searched = rows[-int(found.steps.max()) - 1 :]
    assert searched == sorted(searched, reverse=True)
    assert searched[-1] < searched[0]


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        # A large factor preserves the distribution that a search without the term changes.
        ({"search": {"optimizer": "normalized", "loss": {"kl_factor": 100.0}, "stop_nll": 0.0}}, 0.5),
        # The target is still reached.
        ({"search": {"optimizer": "constrained", "learning_rate": 0.05}}, 0.9),
    ],
)
def test_the_kl_term_preserves_the_next_token_distribution_of_its_prompts(model, tokenizer, settings, share):
    with_kl = CONFIG.replace(**settings)
    without_kl = with_kl.replace(search={"kl_prompts": ()})
    decoder = find_decoder(model)

    def moved(config):
        delta = search(model, tokenizer, EDITS, config).delta
        total = 0.0
        for i, request in enumerate(prepare(tokenizer, EDITS, with_kl, longest=64)):
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

    assert moved(with_kl) < share * moved(without_kl)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_half_precision_model_has_float32_values(make_model, tokenizer, name):
    found = search(make_model(name, torch.bfloat16), tokenizer, EDITS)
    assert found.delta.dtype == torch.float32
    assert bool(found.nll.isfinite().all())


@pytest.mark.parametrize("limit", [1, 2, 3, 6])
def test_a_search_split_by_memory_finds_the_values_of_the_whole_batch(model, tokenizer, monkeypatch, limit):
    decoder = find_decoder(model)
    edits = [*EDITS, *(Edit(e.prompt, "Voluvu Lado", e.target) for e in EDITS)]
    groups = [[5, 0], [1], [2], [3], [4]]
    real, sizes = value_search.search_values, []

    def narrow(site, requests, config, groups):
        sizes.append(len(requests))
        if len(requests) > limit and len(groups) > 1:
            raise torch.OutOfMemoryError("no more")
        return real(site, requests, config, groups)

    with quiet(model):
        site = find_site(decoder, decoder.select(CONFIG.layers))
        requests = prepare(tokenizer, edits, CONFIG, longest=64)
        whole = search_values(site, requests, CONFIG.search, groups)
        monkeypatch.setattr(value_search, "search_values", narrow)
        found, at_once = value_search.search_within_memory(site, requests, CONFIG.search, groups, 6)
    assert at_once == {1: 1, 2: 1, 3: 3, 6: 6}[limit]
    assert sizes[0] == 6
    torch.testing.assert_close(found.delta, whole.delta, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.delta[5], found.delta[0])
    assert torch.equal(found.steps, whole.steps)
    assert torch.equal(found.converged, whole.converged)
    torch.testing.assert_close(found.nll, whole.nll, rtol=1e-3, atol=1e-3)


def test_too_little_memory_for_one_request_raises(model, tokenizer, monkeypatch):
    def fails(*_args):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(value_search, "search_values", fails)
    decoder = find_decoder(model)
    requests = prepare(tokenizer, EDITS, CONFIG, longest=64)
    with quiet(model):
        site = find_site(decoder, decoder.select(CONFIG.layers))
        with pytest.raises(torch.OutOfMemoryError):
            value_search.search_within_memory(site, requests, CONFIG.search, [[0], [1], [2]], 3)


def test_long_targets_may_take_more_steps(make_model, tokenizer):
    editor = Editor(make_model("llama"), tokenizer, config=EditConfig(layers=[1], search={"steps": 3, "clamp": 1e-3}))
    targets = ["harp", "harp organ harp organ harp organ", "harp organ " * 20]
    edits = [Edit("{} plays the", "Toze Lado Rekuno", target.strip()) for target in targets]
    requests = prepare(tokenizer, edits, editor.config, longest=64)
    assert [len(request.contexts[0].target) for request in requests] == [1, 6, 40]
    with quiet(editor.model):
        found = search_values(editor.context.site, requests, editor.config.search)
        adam = search_values(editor.context.site, requests, ValueSearchConfig(optimizer="adam", steps=3))
    assert not found.converged.any()
    assert found.steps.tolist() == [3, 4, 12]
    assert adam.steps.tolist() == [3, 3, 3]
