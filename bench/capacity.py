"""Compares the forecast of a stream of edits with the stream: drift per layer, and what edits keep by age.

    python bench/capacity.py measure smollm2 --edits 300 --data counterfact-10k.json --text DIR --work build/capacity
    python bench/capacity.py compare smollm2 --keys 1000 --data counterfact-10k.json --text DIR --work build/capacity \
        --json bench/results/capacity-smollm2.json
    python bench/capacity.py measure demo --edits 3000 --work build/capacity
    python bench/capacity.py compare demo --edits 3000 --work build/capacity --json bench/results/capacity-demo.json \
        --plot docs/assets/capacity.svg
    python bench/capacity.py against smollm2 --store build/real/smollm2-no-chat-1000 --data counterfact-10k.json \
        --results bench/results/real/smollm2-no-chat-300.json bench/results/real/smollm2-no-chat-1000.json \
        --json bench/results/capacity-smollm2-1000.json
    python bench/capacity.py held-out --json bench/results/held-out.json

`measure` applies the edits with the default settings (`demo`: those of the demo, in batches of 100) and records keys,
target changes and weight changes of every batch in `--work`; it resumes after an interruption. `compare` reads the keys
of the planned edits in the unedited model, runs the forecast with the prior of the stream and the target changes of its
first `--pilot` edits, and compares it with what was recorded. The keys of 3,000 people of the demo's world are enough
to pass its 1,536 features; a thousand of these people are unknown to the model. `against` compares the forecast with
the drift in results of `real_stream.py`; the target changes are those of the first batch of its store. `held-out`
measures how much smaller the change on the anchor tokens is than on other tokens, by the number of anchor tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recording import add_json, record
from torch import Tensor

import rlsedit_fast as rf
from rlsedit_fast.editing import layers as edited_layers
from rlsedit_fast.editing.capacity.forecast import Forecaster
from rlsedit_fast.editing.rows import row_weights
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.rls import ChangeStatistics, Prior, RLSState, Route, forecast_stream
from rlsedit_fast.statistics.sources import GivenTexts

BATCH = 100
ANCHOR_TOKENS = 50_000


def open_editor(options: argparse.Namespace, store: Path | None) -> tuple[rf.Editor, list[rf.Edit], Any]:
    """Returns the editor, the edits, and the anchors, which are not set yet."""
    if options.model == "demo":
        from rlsedit_fast.evaluation.cases import world_cases
        from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
        from rlsedit_fast.world import World, load_demo_model

        count = max(options.edits, options.keys or 0)
        cases = world_cases(World.generate(people=max(3000, count)), count, 0)
        editor = rf.Editor(*load_demo_model(), config=CONFIG.replace(batch_size=BATCH), store=store)
        return editor, [case.edit for case in cases], GivenTexts(anchor_texts(World.generate(), 0))
    from real_models import checkpoint
    from real_stream import edit_of, facts, paragraphs

    edits = [edit_of(one) for one in facts(options.data, max(options.edits, options.keys or 0))]
    # The recorded streams were made before contexts in a chat were the default.
    config = rf.EditConfig(batch_size=BATCH, contexts={"chat": ()})
    editor = rf.Editor.from_pretrained(checkpoint(options.model), store=store, config=config)
    return editor, edits, GivenTexts(paragraphs(options.text / "wikitext2-valid.txt"))


class Recording:
    """Records the rows of every write."""

    def __init__(self) -> None:
        self.missing: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.asked: list[Tensor] = []
        self.delta = torch.zeros(0)
        share, update, write = (
            edited_layers.memit_share,
            RLSState.update_projected,
            edited_layers.EditedLayers.write,
        )

        def shared(missing: Tensor, index: int, count: int) -> Tensor:
            self.missing.append(missing.detach().cpu().clone())
            return share(missing, index, count)

        def updated(state: RLSState, panel: Any, innovation: Tensor) -> Any:
            self.keys.append(panel.keys.detach().cpu().clone())
            self.asked.append(innovation.detach().cpu().clone())
            return update(state, panel, innovation)

        def written(layers: Any, requests: Any, values: Any, *args: Any, **named: Any) -> Any:
            self.missing, self.keys, self.asked = [], [], []
            self.delta = values.delta.detach().cpu().clone()
            return write(layers, requests, values, *args, **named)

        edited_layers.memit_share = shared
        RLSState.update_projected = updated  # type: ignore[method-assign]
        edited_layers.EditedLayers.write = written  # type: ignore[method-assign]


def changes_of(editor: rf.Editor) -> list[Tensor]:
    """Returns `W - W0` of each edited layer, float32."""
    pairs = [state.weights()[0] for _, state in editor._session.edited]
    return [pair[1].float() - pair[0].float() for pair in pairs if pair is not None]


def measure(options: argparse.Namespace) -> None:
    folder = options.work / options.model
    folder.mkdir(parents=True, exist_ok=True)
    editor, edits, anchors = open_editor(options, None if options.model == "demo" else folder / "store")
    if not editor.priors:
        editor.anchor(anchors, tokens=None if options.model == "demo" else ANCHOR_TOKENS)
    recording = Recording()

    def on_batch(records: list[rf.EditRecord]) -> None:
        last = records[-1].id
        realized = sum(one.realized for one in records) / len(records)
        kept = {"missing": recording.missing, "keys": recording.keys, "asked": recording.asked}
        contents = kept | {"delta": recording.delta, "realized": realized, "changes": changes_of(editor)}
        torch.save(contents, folder / f"batch-{last}.pt")
        print(f"{last} edits, realized {realized:.3f}", [round(float(one.norm()), 2) for one in contents["changes"]])

    done = len(editor.history())
    if done < options.edits:
        editor.edit(edits[done : options.edits], on_batch=on_batch)
    priors = [
        {"lam": one.lam, "mu": one.mu, "moment": one.anchor_moment} for one in editor.priors if isinstance(one, Prior)
    ]
    torch.save({"priors": priors, "changes": changes_of(editor), "edits": options.edits}, folder / "end.pt")


def batches(folder: Path) -> list[Path]:
    """Returns the recorded batches in order."""
    return sorted(folder.glob("batch-*.pt"), key=lambda path: int(path.stem.partition("-")[2]))


def kept_by_age(paths: Sequence[Path], layers: int) -> list[list[list[float]]]:
    """Returns per layer and number of batches, for each batch so far, what the layer has of what was written."""
    loaded = [torch.load(path) for path in paths]
    found: list[list[list[float]]] = [[] for _ in range(layers)]
    for layer in range(layers):
        for now in range(len(loaded)):
            shares = []
            for at in range(now + 1):
                one, before = loaded[at], loaded[at - 1]["changes"][layer] if at else 0.0
                each = len(one["keys"][layer]) // len(one["delta"])
                keys, asked = one["keys"][layer][::each].float(), one["asked"][layer][::each].float()
                left = asked - keys @ (loaded[now]["changes"][layer] - before).T
                shares.append(float((1 - left.norm(dim=1) / asked.norm(dim=1)).clamp_min(0).mean()))
            found[layer].append(shares)
    return found


def compare(options: argparse.Namespace) -> None:
    folder = options.work / options.model
    paths = batches(folder)
    counts = [int(path.stem.partition("-")[2]) for path in paths]
    end = torch.load(folder / "end.pt")
    editor, edits, _ = open_editor(options, None)
    planned = edits[: options.keys or options.edits]
    forecaster = Forecaster(editor.context, None, None)
    with quiet(editor.model):
        keys = forecaster.keys(editor.context.prepare(planned), lambda *_: None)
    priors = [Prior(lam=one["lam"], mu=one["mu"], anchor_moment=one["moment"]) for one in end["priors"]]
    pilot = [torch.load(path) for path in paths[: max(1, options.pilot // BATCH)]]
    changes = ChangeStatistics.of(torch.cat([one["delta"] for one in pilot]))
    rows = keys[0].shape[1]
    weights = torch.tensor(row_weights(rows, editor.config.contexts.bare_weight)).repeat(len(planned), 1)
    points = forecast_stream(
        keys,
        weights,
        changes.draw(max(counts[-1], len(planned))),
        priors,
        routes=routes_of(pilot[0], rows),
        batch_size=BATCH,
        share=editor.config.prior.adherence,
        common_first=True,
        points=counts,
    )
    measured_kept = kept_by_age(paths, len(priors))
    table = []
    for at, (count, path) in enumerate(zip(counts, paths, strict=True)):
        point, one = next(p for p in points if p.edits == count), torch.load(path)
        for layer, (index, forecast) in enumerate(zip(editor.layers, point.layers, strict=True)):
            weight = float(one["changes"][layer].norm())
            kept = measured_kept[layer][at]
            table.append(
                {
                    "edits": count,
                    "layer": index,
                    "weight": weight,
                    "weight_forecast": forecast.weight,
                    "ratio": forecast.weight / weight,
                    "kept_first": kept[0],
                    "kept_first_forecast": forecast.realized[0],
                    "kept_last": kept[-1],
                    "kept_last_forecast": forecast.realized[-1],
                }
            )
        print(count, [round(row["ratio"], 3) for row in table if row["edits"] == count], flush=True)
    final = [float(one.norm()) for one in end["changes"]]
    record(
        options.json,
        "Forecast of a stream of edits from their keys, compared with the stream",
        model=options.model,
        keys=len(planned),
        pilot=len(pilot) * BATCH,
        adherence=editor.config.prior.adherence,
        mu=priors[0].mu,
        common=changes.common,
        rows=table,
        weight_after_final_refinement=dict(zip(map(str, editor.layers), final, strict=True)),
        further=[
            {"edits": point.edits, "weight_forecast": [layer.weight for layer in point.layers]}
            for point in points
            if point.edits > counts[-1]
        ],
    )
    if options.plot:
        draw(options.plot, table, editor.layers[-1], keys[-1], priors[-1], changes)


def first_batch(store: Path, originals: Sequence[Tensor]) -> tuple[dict[str, Any], list[Prior]]:
    """Returns the first batch of a store, as `measure` records it, and the priors."""
    from rlsedit_fast.store import Store

    with Store(store, write=False) as held:
        start, batch = held.entries[:2]
        tensors, rows = held.tensors(start), held.tensors(batch)
    priors = [
        Prior(lam=about["lam"], mu=about["mu"], anchor_moment=tensors[f"moment.{at}"])
        for at, about in enumerate(start.about["priors"])
    ]
    layers, each = len(priors), batch.about["rows"][0]
    keys, asked, missing, changes = [], [], [], []
    for at, (original, prior) in enumerate(zip(originals, priors, strict=True)):
        state = RLSState(original, prior)
        keys.append(rows[f"keys.{at}"])
        asked.append(rows[f"values.{at}"] - keys[-1] @ original.T)
        missing.append(asked[-1] * (layers - at))
        weights = torch.tensor(row_weights(each, 0.5)).repeat(len(keys[-1]) // each)
        state.update(keys[-1], rows[f"values.{at}"], weights)
        changes.append(state.weight - original)
    return {"keys": keys, "missing": missing, "changes": changes, "delta": missing[0][::each]}, priors


def against(options: argparse.Namespace) -> None:
    """Compares the forecast with results of `real_stream.py`."""
    editor, edits, _ = open_editor(options, None)
    first, priors = first_batch(options.store, [projection.blocks[0] for projection in editor.context.projections])
    forecaster = Forecaster(editor.context, None, None)
    with quiet(editor.model):
        keys = forecaster.keys(editor.context.prepare(edits), lambda *_: None)
    rows = keys[0].shape[1]
    changes = ChangeStatistics.of(first["delta"])
    results = [json.loads(path.read_text()) for path in options.results]
    weights = torch.tensor(row_weights(rows, editor.config.contexts.bare_weight)).repeat(len(edits), 1)
    points = forecast_stream(
        keys,
        weights,
        changes.draw(len(edits)),
        priors,
        routes=routes_of(first, rows),
        batch_size=BATCH,
        share=editor.config.prior.adherence,
        common_first=True,
        points=[one["edits"] for one in results],
    )
    table = []
    for one in results:
        point = next(p for p in points if p.edits == one["edits"])
        for layer, forecast in zip(editor.layers, point.layers, strict=True):
            weight = one["after"]["edited"]["deviation"][str(layer)]
            ratio = forecast.weight / weight
            table.append(
                {
                    "edits": one["edits"],
                    "layer": layer,
                    "weight": weight,
                    "weight_forecast": forecast.weight,
                    "ratio": ratio,
                }
            )
        realized = one["after"]["edited"]["realized_when_written"]
        written = sum(point.realized[-1:]) if point.realized else 0.0
        table.append({"edits": one["edits"], "realized_when_written": realized, "last_batch_forecast": written})
        print(
            one["edits"], [round(row["ratio"], 3) for row in table if row["edits"] == one["edits"] and "ratio" in row]
        )
    record(
        options.json,
        "Forecast from the keys of planned edits, compared with the drift of a stream of real_stream.py",
        model=options.model,
        keys=len(edits),
        pilot=len(first["delta"]),
        common=changes.common,
        mean_norm=float(changes.norms.mean()),
        routes=[{"gain": one.gain, "spill": one.spill} for one in routes_of(first, rows)],
        mu=priors[0].mu,
        rows=table,
    )


def routes_of(first: dict[str, Any], rows: int) -> list[Route]:
    """Returns how the outputs of the layers reached the edited hidden state in the first batch."""
    bare = [missing[:, 0] if missing.ndim == 3 else missing[::rows] for missing in first["missing"]]
    added = [keys[::rows].float() @ change.T for keys, change in zip(first["keys"], first["changes"], strict=True)]
    arrived = [one - other for one, other in itertools.pairwise(bare)]
    return [*(Route.of(one, other) for one, other in zip(added, arrived, strict=False)), Route()]


def draw(
    path: Path, table: list[dict[str, Any]], layer: int, keys: Tensor, prior: Prior, changes: ChangeStatistics
) -> None:
    """Draws forecast and measurement, and fixed values, whose drift peaks where the rows reach d_k."""
    from matplotlib.figure import Figure

    rows = [row for row in table if row["layer"] == layer]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    edits = [row["edits"] for row in rows]
    left.plot(edits, [row["weight"] for row in rows], "o", markersize=3, color="C0", label="measured")
    left.plot(edits, [row["weight_forecast"] for row in rows], "-", color="C1", label="forecast from the keys")
    right.plot(edits, [row["kept_first"] for row in rows], "o", markersize=3, color="C0")
    right.plot(edits, [row["kept_first_forecast"] for row in rows], "-", color="C1")
    for ridge, color, label in ((1.0, "C2", "fixed values"), (1e-3, "C3", "fixed values, lam and mu 1/1000")):
        weaker = Prior(lam=prior.lam * ridge, mu=prior.mu * ridge, anchor_moment=prior.anchor_moment)
        left.plot(edits, fixed_values(keys[:, 0], weaker, changes, edits), "--", color=color, label=label)
    left.axvline(keys.shape[-1], color="0.6", linewidth=0.8)
    right.axvline(keys.shape[-1], color="0.6", linewidth=0.8)
    left.set(xlabel="edits", ylabel="||W - W0||", yscale="log")
    right.set(xlabel="edits", ylabel="kept by the first 100 edits", ylim=(0, 1.03))
    left.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def fixed_values(keys: Tensor, prior: Prior, changes: ChangeStatistics, counts: Sequence[int]) -> list[float]:
    """Returns `||W - W0||` of the least-squares problem with the values `K W0^T` plus drawn changes."""
    values = changes.draw(len(keys), dimensions=64)
    state = RLSState(torch.zeros(64, keys.shape[1], dtype=torch.float64), prior)
    found, before = [], 0
    for count in counts:
        state.update(keys[before:count].double(), values[before:count])
        found.append(state.deviation())
        before = count
    return found


def held_out(options: argparse.Namespace) -> None:
    """Measures the change on unseen tokens relative to that on the anchors, for several numbers of anchor tokens."""
    from rlsedit_fast.evaluation.cases import world_cases
    from rlsedit_fast.evaluation.demo import CONFIG
    from rlsedit_fast.world import World, load_demo_model

    world = World.generate()
    edits = [case.edit for case in world_cases(world, 100, 0)]
    texts = [f"{prompt.format(name)} {answer} ." for prompt, name, answer in world.sentences()]
    texts = [texts[at] for at in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()]
    rows = []
    for per_dimension in (1, 2, 4, 8, 16):
        model, tokenizer = load_demo_model()
        editor = rf.Editor(model, tokenizer, config=CONFIG.replace(batch_size=BATCH, refine=0))
        width = editor.context.projections[0].key_width
        tokens = per_dimension * width
        editor.anchor(texts, tokens=round(tokens / 0.8), held_out=0.2)
        editor.edit(edits)
        (layer,) = editor.status(sample=0).layers
        rows.append({"tokens_per_dimension": per_dimension, "anchors": layer.anchors, "held_out": layer.held_out})
        rows[-1]["ratio"] = layer.held_out / layer.anchors if layer.held_out and layer.anchors else None
        print(rows[-1], flush=True)
    record(
        options.json,
        "Change on held-out tokens relative to that on the anchors, 100 edits of the demo model",
        rows=rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("measure", "compare", "against", "held-out"))
    parser.add_argument("model", nargs="?", choices=("smollm2", "demo"), default="demo")
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--keys", type=int, help="number of planned edits whose keys are read (default: --edits)")
    parser.add_argument("--pilot", type=int, default=BATCH, help="edits whose target changes are used (default 100)")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--text", type=Path, metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("build/capacity"), metavar="DIR")
    parser.add_argument("--store", type=Path, metavar="DIR", help="store of real_stream.py")
    parser.add_argument("--results", type=Path, nargs="*", default=[], metavar="FILE", help="results of real_stream.py")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    add_json(parser)
    options = parser.parse_args()
    actions = {"measure": measure, "compare": compare, "against": against, "held-out": held_out}
    actions[options.action](options)


if __name__ == "__main__":
    main()
