"""Tables of a study whose findings are known."""

import itertools

import pandas as pd

TARGETS = ("wolf", "lion", "eagle", "panda")


def study_tables(after, *, rank=1, rate=0.12, targets=TARGETS):
    """Tables of targets that differ by some per cent; `after` maps condition to preference."""
    wobble = dict(zip(targets, (0.97, 1.0, 1.02, 1.05, 0.99, 1.01), strict=False))
    students = [
        {
            "target": target,
            "kind": "finetuned",
            "condition": condition.split("-")[0],
            "layer": int(condition.split("-")[1]) if "-" in condition else None,
            "seed": seed,
            "before": 0.08,
            # The noise of a condition and a target, so that ratios do not come out exact.
            "after": value * wobble[target] ** (1 + i % 3),
            "rank": rank,
        }
        for (i, (condition, value)), target, seed in itertools.product(
            enumerate(after.items()), targets, (0, 1)
        )
    ]
    one_per_target = {"target": list(targets), "kind": ["finetuned"] * len(targets)}
    layers = [
        {"target": t, "kind": "finetuned", "site": site, "layer": layer, "absolute_effect": size}
        for t in targets
        for site in ("attn_out", "mlp_out")
        for layer, size in enumerate((3.0, 1.0, 0.5, wobble[t]))
    ]
    return {
        "divergence": pd.DataFrame(one_per_target | {"rate": [rate * wobble[t] for t in targets]}),
        "students": pd.DataFrame(students),
        "layers": pd.DataFrame(layers),
        "agreement": pd.DataFrame(
            one_per_target
            | {
                "method": ["integrated"] * len(targets),
                "pearson": [0.95 * wobble[t] for t in targets],
                "inner_pearson": [0.9 * wobble[t] for t in targets],
            }
        ),
    }


PAPER_LIKE = {
    "all": 0.2,
    "divergence_only": 0.3,
    "without_divergence": 0.08,
    "control": 0.08,
    "layer-0": 0.28,
    "layer-3": 0.08,
}

SIX = (*TARGETS, "fox", "horse")
