"""Small results with known numbers, a figure of each kind drawn from them, and their texts."""

import dataclasses

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from divergence_lens import plots
from divergence_lens.circuits import Circuit, EdgeScores, Faithfulness, Graph
from divergence_lens.divergence import Divergence
from divergence_lens.divergence.view import ExampleDivergence
from divergence_lens.evaluation.result import Preference
from divergence_lens.examples import Example
from divergence_lens.patching.attention import AttentionPatterns
from divergence_lens.patching.cross import CrossPatch
from divergence_lens.patching.effects import Effects
from divergence_lens.plots.pages import figure_title
from divergence_lens.teachers import Teacher
from divergence_lens.training.sweep_result import Sweep, SweepStudent, Values

TARGETS = ("owl", "cat", "wolf")


def effects(layers: int = 3, heads: int | None = None, method: str = "exact") -> Effects:
    """Two pairs of unlike lengths with one missing position; the owl matters at layer 0."""
    labels = (
        ("You", " owl", "\n", " <script>", " 17"),
        ("You", " owl", "\n", " <b>3</b>", " 4", " 9", " 12"),
    )
    segments = (
        ("system", "bias", "template", "user", "divergence"),
        ("system", "bias", "template", "user", "user", "completion", "divergence"),
    )
    shape = (2, layers, 7) if heads is None else (2, layers, 7, heads)
    values = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    values[:, 0, 1] = -2.0 if heads is None else -2.0 / heads
    values[0, :, 5:] = np.nan
    values[1, :, 2] = np.nan
    if method != "exact":
        values = values * np.float32(1.1)
    return Effects(
        values=values,
        site="resid_post" if heads is None else "z",
        method=method,
        direction="noising",
        metric="logit_difference",
        clean_metric=np.array([1.0, 2.0], dtype=np.float32),
        corrupted_metric=np.array([-3.0, -2.0], dtype=np.float32),
        segments=segments,
        labels=labels,
    )


def divergence() -> Divergence:
    """Two completions of 3 and 2 tokens; the cat differs at 1 and 2, the wolf at 2 and 3."""
    tokens = np.array([5, 6, 7, 5, 8])
    predicted = np.stack([tokens, tokens, tokens]).astype(np.int32)
    predicted[1, [1, 2]] = 9
    predicted[2, [2, 3]] = 9
    return Divergence(
        examples=(Example("a", "b", (5, 6, 7)), Example("c", "d", (5, 8))),
        teacher=Teacher("owl"),
        counterfactuals=(Teacher("cat"), Teacher("wolf")),
        offsets=np.array([0, 3, 5]),
        tokens=tokens,
        predicted=predicted,
        margin=np.ones((3, 5), dtype=np.float32),
        logprob=np.full((3, 5), -1.0, dtype=np.float32),
    )


def students(kinds: tuple[str, ...] = ("finetuned",)) -> list[dict[str, object]]:
    factors = {"all": 2.0, "divergence_only": 3.0, "without_divergence": 1.1, "control": 0.9}
    rows: list[dict[str, object]] = []
    for kind in kinds:
        for target in TARGETS:
            row = {"target": target, "kind": kind, "before": 0.1, "layer": None}
            for condition, factor in factors.items():
                rows += [
                    {**row, "condition": condition, "seed": s, "after": 0.1 * factor + 0.01 * s}
                    for s in (0, 1)
                ]
            rows += [
                {**row, "condition": "layer", "layer": b, "seed": 0, "after": 0.3 - 0.05 * b}
                for b in range(4)
            ]
    return rows


def preference(target: str, share: float) -> Preference:
    probabilities = np.full((4, 3), (0.9 - share) / 2)
    probabilities[:, 0] = share + np.array([0.0, 0.01, 0.02, -0.03])
    return Preference(
        target=target,
        candidates=TARGETS,
        questions=("a", "b", "c", "d"),
        probabilities=probabilities,
    )


def sweep() -> Sweep:
    students = [
        SweepStudent("layer", layer, seed, Values.of(preference("owl", 0.4 - 0.1 * layer)))
        for layer in range(3)
        for seed in (0, 1)
    ]
    students.append(SweepStudent("all", None, 0, Values.of(preference("owl", 0.5))))
    metadata = {"settings": {"target": "owl", "masked": True}}
    return Sweep(Values.of(preference("owl", 0.1)), tuple(students), metadata)


def attention() -> AttentionPatterns:
    """Two heads in one pair of four tokens, of which one differs."""
    weights = np.tril(np.ones((1, 2, 4, 4), dtype=np.float32))
    weights /= weights.sum(-1, keepdims=True)
    other = np.broadcast_to(np.eye(4, dtype=np.float32), weights.shape).copy()
    return AttentionPatterns(
        heads=((1, 0), (2, 1)),
        clean=weights,
        corrupted=other,
        labels=(("You", " owl", "\n", " 17"),),
        segments=(("system", "bias", "template", "divergence"),),
        differs=((False, True, False, False),),
    )


def crossed() -> CrossPatch:
    """Three pairs at three boundaries: a's upper layers add 2 over its own lower ones, 1 else."""
    margins = np.zeros((3, 3, 2, 2), dtype=np.float32)
    margins[:, :, 0, 0], margins[:, :, 1, 0] = 2.0, 1.0
    return CrossPatch(margins + np.arange(3, dtype=np.float32)[:, None, None, None], ("owl", "cat"))


def many() -> list[dict[str, object]]:
    """As `masked`, with more conditions than have room side by side."""
    rows = masked()
    random = [row for row in rows if row["condition"] == "random_tokens"]
    return [
        *rows,
        *(
            {**row, "condition": f"a_condition_with_a_long_name_{i}", "after": 0.095 * 2**i}
            for i in range(-1, 6)
            for row in random
        ),
    ]


def masked() -> list[dict[str, object]]:
    """Students of a study: those of the demo and two conditions of a further group."""
    rows = [{**row, "group": "data"} for row in students() if row["condition"] != "layer"]
    more = [
        {**row, "condition": name, "group": "masks", "after": 0.095 * times}
        for row in rows
        if row["condition"] == "all"
        for name, times in (("first_divergence", 2.0), ("random_tokens", 1.0))
    ]
    return [*rows, *more]


TEACHERS = [
    {"name": name, "kind": kind, "preference": value}
    for kind, value in (("finetuned", 0.97), ("prompted", 0.5))
    for name in TARGETS
]

RATES = [
    {"target": name, "kind": "finetuned", "tokens": 1000, "divergence_tokens": 130, "rate": 0.13}
    for name in TARGETS
]

LAYERS = [
    {
        "target": name,
        "kind": "finetuned",
        "site": site,
        "layer": layer,
        "absolute_effect": (3 - layer) * factor + 0.1 * t,
        "pairs": 16 - t,
    }
    for t, name in enumerate(TARGETS)
    for site, factor in (("attn_out", 0.2), ("mlp_out", 0.4))
    for layer in range(3)
]

MIXED = [
    {"condition": condition, "share": share, "seed": seed, "preference": 0.3 - slope * share + seed}
    for condition, slope in (("mixed_lists", 0.2), ("paraphrased", 0.1))
    for share in (0.0, 0.5, 1.0)
    for seed in (0, 0.02)
]


def history(rise: float) -> pd.DataFrame:
    """Six updates, the preference measured after the second, fourth and sixth."""
    steps = np.arange(1, 7)
    measured = np.where(steps % 2 == 0, 0.1 + rise * steps, np.nan)
    return pd.DataFrame({"step": steps, "loss": 1.0 / steps, "preference": measured})


def example() -> ExampleDivergence:
    """Three tokens: one plain, one at which both others differ, one that is not the owl's own."""
    first = divergence()[0]
    return dataclasses.replace(
        first,
        tokens=(" 17", " <b>", ","),
        divergence=np.array([False, True, False]),
        agrees=np.array([True, True, False]),
        differs=np.array([[False, True, False], [False, True, True]]),
    )


def edge_scores(span: str = "position") -> EdgeScores:
    """One pair of three tokens in a model of two layers with four heads over two groups."""
    graph = Graph(n_layers=2, n_heads=4, n_kv_heads=2)
    values = np.random.default_rng(0).normal(size=(1, 3, len(graph))).astype(np.float32)
    return EdgeScores(
        values=values,
        graph=graph,
        method="gradient",
        direction="noising",
        metric="logit_difference",
        clean_metric=np.array([2.0], dtype=np.float32),
        corrupted_metric=np.array([-1.0], dtype=np.float32),
        segments=(("bias", "user", "divergence"),),
        labels=((" <b>", " 3", " 4"),),
        metadata={"settings": {"span": span}},
    )


def circuit() -> Circuit:
    """The strongest 30 edges of the same model."""
    return edge_scores().circuit(top=30)


def curve() -> Faithfulness:
    """Faithfulness of three sizes on two pairs."""
    return Faithfulness(
        metric=np.array([[0.0, 1.0], [1.5, 2.0], [2.0, 3.0]]),
        full=np.array([2.0, 3.0]),
        empty=np.array([-1.0, 0.0]),
        edges=(1, 8, 82),
        shares=(0.01, 0.1, 1.0),
        metadata={"settings": {"level": "edges", "ablation": "counterfactual"}},
    )


FIGURES = {
    "circuit_graph": lambda: plots.circuit_graph(circuit()),
    "edge_graph": lambda: plots.edge_graph(edge_scores(), k=40),
    "edge_graph of segments": lambda: plots.edge_graph(edge_scores("segment"), k=40),
    "faithfulness_curves": lambda: plots.faithfulness_curves({"edges": curve(), "b": curve()}),
    "divergence_tokens": lambda: plots.divergence_tokens(example()),
    "head_grid": lambda: plots.head_grid(effects(heads=2)),
    "head_grid of a pair": lambda: plots.head_grid(effects(heads=2), 1, name="owl"),
    "layers_by_site": lambda: plots.layers_by_site(LAYERS),
    "training_curves": lambda: plots.training_curves(
        {"block 0": history(0.05), "all": history(0.06)}, before=0.1
    ),
    "mixing_curves": lambda: plots.mixing_curves(MIXED, before=0.1, control=0.09),
    "effects_heatmap": lambda: plots.effects_heatmap(effects()),
    "effects_heatmap of the mean": lambda: plots.effects_heatmap(effects(), "mean"),
    "effects_heatmap of heads": lambda: plots.effects_heatmap(effects(heads=2)),
    "effects_heatmap, layers across": lambda: plots.effects_heatmap(
        effects(), orientation="layers_across"
    ),
    "effects_heatmap of two sites": lambda: plots.effects_heatmap(
        {"residual": effects(), "heads": effects(heads=2)}
    ),
    "effects_heatmap of two sites, stacked": lambda: plots.effects_heatmap(
        {"residual": effects(), "heads": effects(heads=2)}, stacked=True
    ),
    "attention_from": lambda: plots.attention_from(attention()),
    "attention_pattern": lambda: plots.attention_pattern(attention(), (2, 1)),
    "effects_by_segment": lambda: plots.effects_by_segment(effects()),
    "layer_profile": lambda: plots.layer_profile(effects()),
    "layer_profile of two": lambda: plots.layer_profile({"a": effects(), "b": effects()}),
    "agreement_scatter": lambda: plots.agreement_scatter(effects(method="gradient"), effects()),
    "rate_per_teacher": lambda: plots.rate_per_teacher(RATES),
    "rate_per_teacher of one": lambda: plots.rate_per_teacher(divergence()),
    "where_divergence_falls": lambda: plots.where_divergence_falls(divergence()),
    "teacher_preferences": lambda: plots.teacher_preferences(TEACHERS, base={"owl": 0.1}),
    "preference_bars": lambda: plots.preference_bars(
        preference("owl", 0.4), before=preference("owl", 0.1)
    ),
    "transfer_bars": lambda: plots.transfer_bars(students()),
    "dissociation_bars": lambda: plots.dissociation_bars(
        {"all digits": {"owl": [0.1, 0.3], "cat": [0.4]}, "others": {"owl": [-0.2], "cat": [0.0]}}
    ),
    "condition_bars": lambda: plots.condition_bars(masked(), "masks"),
    "condition_bars of many": lambda: plots.condition_bars(many(), "masks"),
    "cross_patch_margins": lambda: plots.cross_patch_margins(crossed()),
    "layer_sweep": lambda: plots.layer_sweep(students()),
    "layer_sweep of a sweep": lambda: plots.layer_sweep(sweep()),
}


def plain_title(figure: go.Figure) -> str:
    """The words of the title in one line."""
    return " ".join(figure_title(figure).split())


def plain(hover: str) -> str:
    """A hover text in one line."""
    return hover.replace("<br>", " ").replace("\u00a0", " ")


def heat(figure: go.Figure) -> go.Heatmap:
    (trace,) = figure.data
    assert isinstance(trace, go.Heatmap)
    return trace
