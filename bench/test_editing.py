"""pytest-benchmark cases of the parts of an edit, on the demo model.

pytest bench/test_editing.py --benchmark-only --benchmark-autosave
"""

from __future__ import annotations

import pytest
from values import one_by_one

from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.requests import prepare
from rlsedit_fast.editing.search.value_search import search_values
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.world import World, load_demo_model

COUNTS = (1, 10, 100)


@pytest.fixture(scope="module")
def site():
    model, _ = load_demo_model()
    with quiet(model):
        decoder = with_prefixes(find_decoder(model))
        yield find_site(decoder, decoder.select((0,)))


@pytest.fixture(scope="module")
def requests():
    _, tokenizer = load_demo_model()
    edits = [case.edit for case in world_cases(World.generate(), max(COUNTS), 0)]
    return prepare(tokenizer, edits, CONFIG, longest=None)


@pytest.mark.parametrize("count", COUNTS)
def test_search(benchmark, site, requests, count):
    found = benchmark(search_values, site, requests[:count], CONFIG.search)
    assert bool(found.converged.all())


@pytest.mark.parametrize("count", COUNTS)
def test_search_as_published(benchmark, site, requests, count):
    published = CONFIG.replace(search={"optimizer": "adam", "steps": 25, "stop": "loss"})
    found = benchmark(search_values, site, requests[:count], published.search)
    assert bool(found.nll.isfinite().all())


def test_one_request_through_the_whole_model(benchmark, site, requests):
    config = CONFIG.replace(search={"optimizer": "normalized", "steps": 25})
    assert bool(benchmark(one_by_one, site.decoder, requests[0], config).isfinite().all())


@pytest.mark.parametrize("count", COUNTS)
def test_key_pass(benchmark, site, requests, count):
    (keys,), _ = benchmark(request_keys, site.decoder, [site.projection], requests[:count])
    assert keys.shape == (count, 1, 1536)


@pytest.mark.parametrize("count", COUNTS)
def test_tokenizing(benchmark, requests, count):
    _, tokenizer = load_demo_model()
    edits = [request.edit for request in requests[:count]]
    assert len(benchmark(prepare, tokenizer, edits, CONFIG, longest=None)) == count
