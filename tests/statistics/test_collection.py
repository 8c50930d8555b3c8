"""A collection gives the mean over exactly the requested tokens, also after interruptions."""

import signal

import pytest
import torch

from rlsedit_fast import ops
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.passes import read_keys
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.statistics import KeyStatistics, collect, collection
from rlsedit_fast.statistics.sources import GivenTexts, SelfGenerated, TextFile

LAYERS = (1, 2)
WORDS = ("Lado", "speaks", "Kubeish", ".", "Veta", "plays", "the", "organ", "and", "Fado")
TEXTS = [" ".join(WORDS[(3 * i + j) % 10] for j in range(2 + 5 * i % 17)) for i in range(60)]


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sets sizes with several passes per window, and several windows for sixty texts."""
    monkeypatch.setattr(collection, "_PASS", 64)
    monkeypatch.setattr(collection, "_WINDOW", 200)


@pytest.fixture
def decoder(make_model):
    return find_decoder(make_model("llama"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(TEXTS))
    return TextFile(path)


def run(decoder, tokenizer, source, layers=LAYERS, **options):
    return collect(decoder, tokenizer, decoder.select(layers), source, longest=options.pop("longest", 64), **options)


def expected(decoder, tokenizer, layer, tokens=None, held_out=0.0):
    """Computes in float64 the sum of `k k^T` over texts that are used and over those that are held out."""
    sums, counts, left = [0.0, 0.0], [0, 0], tokens
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])[:, :left]
        if not ids.numel():
            break
        left = None if left is None else left - ids.numel()
        keys = read_keys(decoder, decoder.select([layer]), {"input_ids": ids})[0][layer][0].double()
        held = counts[1] + len(keys) <= held_out * (sum(counts) + len(keys))
        sums[held] = sums[held] + keys.T @ keys
        counts[held] += len(keys)
    return sums, counts


def interrupted(decoder, tokenizer, source, checkpoint, at, error=KeyboardInterrupt, **options):
    """Runs up to pass `at`; returns the number of tokens that were read."""
    done = []

    def progress(tokens, _):
        done.append(tokens)
        if len(done) == at:
            raise error

    with pytest.raises(error):
        run(decoder, tokenizer, source, checkpoint=checkpoint, progress=progress, **options)
    return done[-1]


def assert_equal(one, other):
    assert (one.tokens, one.fingerprint, one.source) == (other.tokens, other.fingerprint, other.source)
    assert list(one.moments) == list(other.moments)
    assert all(torch.equal(one.moments[layer], other.moments[layer]) for layer in one.moments)
    assert one.held_out_tokens == other.held_out_tokens
    assert list(one.held_out) == list(other.held_out)
    assert all(torch.equal(one.held_out[layer], other.held_out[layer]) for layer in one.held_out)


def assert_mean(found, total, count):
    """A key that is in a pass with rows of other lengths rounds differently by some units of its largest entry."""
    assert found.dtype == torch.float32
    assert (found - total / count).abs().max() < 100 * 2**-24 * (total / count).diagonal().max()


@pytest.mark.parametrize("tokens", [None, 1, 77, 200, 341])
def test_moments_are_the_mean_over_exactly_the_requested_tokens(model, tokenizer, file, tokens):
    decoder = find_decoder(model)
    found = run(decoder, tokenizer, file, tokens=tokens, held_out=0.0)
    assert list(found.moments) == list(LAYERS)
    assert found.source == file.name
    assert found.fingerprint == fingerprint(model)
    for layer in LAYERS:
        (total, _), (count, _) = expected(decoder, tokenizer, layer, tokens)
        assert found.tokens == count
        assert_mean(found.moments[layer], total, count)
    assert (found.held_out, found.held_out_tokens) == ({}, 0)


@pytest.mark.parametrize(("tokens", "held_out"), [(None, 0.1), (341, 0.1), (None, 0.5)])
def test_whole_texts_are_held_out_and_are_not_in_the_moments(decoder, tokenizer, file, tokens, held_out):
    found = run(decoder, tokenizer, file, tokens=tokens, held_out=held_out)
    for layer in LAYERS:
        sums, counts = expected(decoder, tokenizer, layer, tokens, held_out)
        assert [found.tokens, found.held_out_tokens] == counts
        assert held_out * sum(counts) - 20 < counts[1] <= held_out * sum(counts)
        assert_mean(found.moments[layer], sums[0], counts[0])
        assert_mean(found.held_out[layer], sums[1], counts[1])


def test_a_single_row_is_not_held_out(decoder, tokenizer):
    found = run(decoder, tokenizer, GivenTexts(TEXTS[:1]))
    assert (found.held_out, found.held_out_tokens) == ({}, 0)


@pytest.mark.parametrize("held_out", [-0.1, 1, True, float("nan")])
def test_an_invalid_fraction_raises(decoder, tokenizer, file, held_out):
    with pytest.raises(InputError, match=f"held_out={held_out}: expected a fraction"):
        run(decoder, tokenizer, file, held_out=held_out)


def test_forwards_smaller_than_a_pass_give_the_same_moments(decoder, tokenizer, file, monkeypatch):
    widths, real = [], collection.read_keys
    monkeypatch.setattr(
        collection, "read_keys", lambda *args: widths.append(args[2]["input_ids"].numel()) or real(*args)
    )
    whole, passes = run(decoder, tokenizer, file), len(widths)
    monkeypatch.setattr(collection, "_CPU_FORWARD", 32)
    widths.clear()
    parts = run(decoder, tokenizer, file)
    assert len(widths) > passes
    assert max(widths) <= 32
    assert parts.tokens == whole.tokens
    for layer in LAYERS:
        error = (parts.moments[layer] - whole.moments[layer]).abs().max()
        assert error < 100 * 2**-24 * whole.moments[layer].diagonal().max()


def test_less_text_than_requested_is_reported(decoder, tokenizer, file, caplog):
    found = run(decoder, tokenizer, file, tokens=10_000)
    count = found.tokens + found.held_out_tokens
    assert f"after {count} of 10000 tokens" in caplog.text
    caplog.clear()
    run(decoder, tokenizer, file, tokens=count)
    assert not caplog.text


def test_no_text_raises(decoder, tokenizer):
    for texts in ([], ["", " \n"]):
        with pytest.raises(InputError, match="all are blank"):
            run(decoder, tokenizer, GivenTexts(texts))
    with pytest.raises(InputError, match="tokens=0"):
        run(decoder, tokenizer, GivenTexts(TEXTS), tokens=0)


def test_passes_are_bounded_and_the_text_streams(decoder, tokenizer, monkeypatch):
    shapes, taken, ahead, done = [], [], [], []

    def spy(decoder, projections, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return read_keys(decoder, projections, inputs)

    def endless():
        while True:
            taken.append(0)
            yield TEXTS[len(taken) % len(TEXTS)]

    def progress(tokens, total):
        assert total == 3000
        done.append(tokens)
        ahead.append(len(taken) * 8 - tokens)

    monkeypatch.setattr(collection, "read_keys", spy)
    run(decoder, tokenizer, GivenTexts(endless()), tokens=3000, longest=12, progress=progress)
    assert max(rows * width for rows, width in shapes) <= 64
    assert max(width for _, width in shapes) == 12, "longer texts are read in pieces"
    assert sum(rows * width for rows, width in shapes) < 1.2 * 3000, "rows of similar length share a pass"
    assert done == sorted(set(done))
    assert done[-1] == 3000
    assert max(ahead) < 64 * 10 + 200, "at most one call of the tokenizer and one window is read ahead"


@pytest.mark.parametrize("kind", ["file", "self"])
def test_an_interrupted_collection_resumes_bit_for_bit(decoder, tokenizer, file, tmp_path, kind):
    source = file if kind == "file" else SelfGenerated(decoder.model, seed=2, length=12, batch=12)
    whole = run(decoder, tokenizer, source, tokens=450)
    for at in (1, 3, 4, 5, 7):
        checkpoint = tmp_path / f"{at}.partial"
        done = interrupted(decoder, tokenizer, source, checkpoint, at, tokens=450)
        rest = []
        found = run(
            decoder,
            tokenizer,
            source,
            tokens=450,
            checkpoint=checkpoint,
            progress=lambda n, _, rest=rest: rest.append(n),
        )
        assert_equal(found, whole)
        assert rest[0] > done, "nothing is read twice"


def test_a_collection_may_be_interrupted_repeatedly(decoder, tokenizer, file, tmp_path):
    checkpoint = tmp_path / "c.partial"
    whole = run(decoder, tokenizer, file)
    done = [interrupted(decoder, tokenizer, file, checkpoint, 2, error) for error in (KeyboardInterrupt, Stop, Stop)]
    assert done == sorted(set(done))
    assert_equal(run(decoder, tokenizer, file, checkpoint=checkpoint), whole)


def test_an_interrupt_waits_until_all_layers_have_the_pass(decoder, tokenizer, file, tmp_path, monkeypatch):
    whole = run(decoder, tokenizer, file)
    calls = []

    def interrupting(moment, rows):
        calls.append(0)
        if len(calls) == 5:  # the first layer of the third pass
            signal.raise_signal(signal.SIGINT)
        ops.reference.moment_(moment, rows)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "moment_", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(decoder, tokenizer, file, checkpoint=tmp_path / "c.partial")
    assert len(calls) == 6
    assert signal.getsignal(signal.SIGINT) is before
    assert_equal(run(decoder, tokenizer, file, checkpoint=tmp_path / "c.partial"), whole)


def test_a_failure_within_a_pass_keeps_the_previous_checkpoint(decoder, tokenizer, file, tmp_path, monkeypatch):
    whole = run(decoder, tokenizer, file)
    monkeypatch.setattr(collection, "_SAVE_SECONDS", 0.0)
    calls = []

    def failing(moment, rows):
        calls.append(0)
        if len(calls) == 6:  # the third pass, after the first layer and before the second
            raise Stop
        ops.reference.moment_(moment, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "moment_", failing)
        with pytest.raises(Stop):
            run(decoder, tokenizer, file, checkpoint=tmp_path / "c.partial")
    done = []
    found = run(decoder, tokenizer, file, checkpoint=tmp_path / "c.partial", progress=lambda n, _: done.append(n))
    assert_equal(found, whole)
    assert done[0] > 64, "two passes were saved"


def test_a_finished_checkpoint_gives_its_result_without_a_pass(decoder, tokenizer, file, tmp_path):
    whole = run(decoder, tokenizer, file, checkpoint=tmp_path / "c.partial")
    done = []
    again = run(decoder, tokenizer, file, checkpoint=tmp_path / "c.partial", progress=lambda n, _: done.append(n))
    assert_equal(again, whole)
    assert not done


def test_a_checkpoint_of_another_collection_raises(decoder, make_model, tokenizer, file, tmp_path):
    checkpoint = tmp_path / "c.partial"
    interrupted(decoder, tokenizer, file, checkpoint, 3, tokens=300)
    before = checkpoint.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("Lado speaks")
    others = {
        "fingerprint": (find_decoder(make_model("qwen2")), file, {"tokens": 300}),
        "source": (decoder, TextFile(other), {"tokens": 300}),
        "requested tokens": (decoder, file, {"tokens": 301}),
        "tokens of a row": (decoder, file, {"tokens": 300, "longest": 63}),
        "held out": (decoder, file, {"tokens": 300, "held_out": 0.2}),
        "layers": (decoder, file, {"tokens": 300, "layers": (1,)}),
    }
    for what, (decoder_, source, options) in others.items():
        with pytest.raises(
            InputError, match=rf"c\.partial' belongs to another collection \({what} mismatch\); delete it"
        ):
            run(decoder_, tokenizer, source, checkpoint=checkpoint, **options)
        assert checkpoint.read_bytes() == before
    checkpoint.write_bytes(before[:-1])
    with pytest.raises(InputError, match="is damaged"):
        run(decoder, tokenizer, file, checkpoint=checkpoint, tokens=300)


def test_texts_that_cannot_be_read_again_do_not_support_a_checkpoint(decoder, tokenizer, tmp_path):
    with pytest.raises(InputError, match="cannot be read again"):
        run(decoder, tokenizer, GivenTexts(iter(TEXTS)), checkpoint=tmp_path / "c.partial")


def test_keys_that_are_not_finite_raise_and_are_not_saved(decoder, tokenizer, file, tmp_path):
    decoder.model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.down_proj: .* NaN/Inf"):
        run(decoder, tokenizer, file, checkpoint=tmp_path / "c.partial")
    assert not (tmp_path / "c.partial").exists()


def test_the_model_runs_in_evaluation_mode_and_is_not_changed(make_model, tokenizer, file):
    model = make_model("gpt2").train()  # its dropout is on
    decoder = find_decoder(model)
    first, second = (run(decoder, tokenizer, file) for _ in range(2))
    assert_equal(first, second)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_float32_sums_over_many_passes_keep_their_digits(decoder, tokenizer, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(collection, "_WINDOW", 64 * 64)
    passes, exact = [], torch.zeros(96, 96, dtype=torch.float64)

    def keys(_decoder, projections, inputs):
        seen = torch.randn(*inputs["input_ids"].shape, 96) * torch.logspace(0, -3, 96) + 0.2
        passes.append(0)
        exact.addmm_(seen.flatten(0, 1).double().T, seen.flatten(0, 1).double())
        return {projections[0].layer: seen}, None

    monkeypatch.setattr(collection, "read_keys", keys)
    endless = (" ".join(WORDS[:7]) for _ in iter(int, 1))  # with the first token, 8 tokens per text
    found = run(decoder, tokenizer, GivenTexts(endless), layers=(1,), tokens=64 * 1000, held_out=0.0)
    assert len(passes) == 1000
    scale = exact.diagonal().sqrt()
    error = (found.moments[1].double() * found.tokens - exact) / (scale[:, None] * scale)
    # A thousand roundings of up to half a unit in the last place, in random directions, of a growing sum.
    assert float(error.square().mean().sqrt()) < 2**-24 * 1000**0.5


def test_another_model_and_missing_layers_raise():
    statistics = KeyStatistics({layer: torch.zeros(2, 2) for layer in (4, 11)}, 9, "ab" * 32, "text")
    statistics.check("ab" * 32, [4])
    statistics.check("ab" * 32, [11, 4])
    with pytest.raises(InputError, match=r"with the fingerprint abababababab, and this model has cdcdcdcdcdcd"):
        statistics.check("cd" * 32, [4])
    with pytest.raises(InputError, match=r"layers \[4, 11\] and lack \[5\]"):
        statistics.check("ab" * 32, [4, 5])
