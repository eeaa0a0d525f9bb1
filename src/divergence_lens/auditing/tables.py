"""Tables of an audit, its verdict in words, and its JSON."""

from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float32

from divergence_lens._utils.statistics import bootstrap_interval, resampled_means
from divergence_lens.chat import row_texts

if TYPE_CHECKING:
    import pandas as pd

    from divergence_lens.auditing.result import Audit

_RESAMPLES = 1000
# Resampling takes 16 bytes for each row and resample: 16 GB for a million rows.
_MOST_RESAMPLED = 20_000


def candidate_table(audit: "Audit") -> "pd.DataFrame":
    """Return one row per candidate, as documented in `Audit.to_dataframe`."""
    import pandas as pd

    scores = audit.scores
    best = audit.by_row[scores.kind, np.arange(len(audit.candidates))]  # [candidates, rows]
    low, high = _interval(best, 1 - audit.alpha)
    shift = audit.null.shift[scores.kind, np.arange(len(audit.candidates))]  # [candidates]
    table = pd.DataFrame(
        {
            "candidate": audit.candidates,
            "kind": [audit.kinds[kind] for kind in scores.kind],
            "score": scores.score,
            "low": low - shift,
            "high": high - shift,
            "z": scores.z,
            "p": scores.p,
            "p_holm": scores.holm,
            "p_fdr": scores.fdr,
        }
    )
    return table.sort_values("z", ascending=False, kind="stable", ignore_index=True)


def _interval(
    rows: Float[np.ndarray, "candidates rows"], level: float
) -> tuple[Float[np.ndarray, " candidates"], Float[np.ndarray, " candidates"]]:
    """Bootstrap interval of the means; of many rows the normal one, which it approaches."""
    n = rows.shape[-1]
    if n <= _MOST_RESAMPLED:
        return bootstrap_interval(resampled_means(rows.T, _RESAMPLES), level=level, seed=0)
    mean = rows.mean(-1)
    margin = NormalDist().inv_cdf(0.5 + level / 2) * rows.std(-1, ddof=1) / n**0.5
    return mean - margin, mean + margin


def row_table(
    audit: "Audit", score: Float[np.ndarray, " rows"], most: int | None = None
) -> "pd.DataFrame":
    """Return the rows by a score, as documented in `Audit.rows`."""
    import pandas as pd

    order = np.argsort(-score, kind="stable")[:most]
    return pd.DataFrame(
        {
            "row": order,
            "score": score[order],
            "prompt": [str(audit.examples[row].prompt) for row in order],
            "completion": [_completion(audit, int(row)) for row in order],
        }
    )


def token_table(audit: "Audit", score: Float32[np.ndarray, " tokens"]) -> "pd.DataFrame":
    """Return the tokens by a score, as documented in `Audit.tokens`."""
    import pandas as pd

    owners = np.repeat(np.arange(len(audit)), np.diff(audit.offsets))
    order = np.argsort(-score, kind="stable")
    ids = np.union1d(audit.token_ids, audit.choice)
    texts = {int(i): row_texts(audit.texts, [int(i)])[0] for i in ids}
    return pd.DataFrame(
        {
            "row": owners[order],
            "position": order - audit.offsets[owners[order]],
            "token": [texts[int(i)] for i in audit.token_ids[order]],
            "score": score[order],
            "baseline": [texts[int(i)] for i in audit.choice[order]],
        }
    )


def explain(audit: "Audit") -> str:
    """State the verdict in one or two sentences, with its numbers."""
    if not audit.baseline.fits:
        return (
            f"The base model could not have written these data, even with a small bias: "
            f"{audit.baseline.misfit}. So there is nothing to compare them with; check that it is "
            "the base of the teacher and of the student."
        )
    return _biased(audit) if audit.biased else _not_biased(audit)


def _biased(audit: "Audit") -> str:
    c = audit.candidates.index(audit.best)
    scores = audit.scores
    others = [name for name in audit.biased if name != audit.best]
    also = f"; also above chance, perhaps because alike: {', '.join(others)}" if others else ""
    return (
        f"The data favor {audit.best!r} (z {scores.z[c]:.1f}, corrected p "
        f"{scores.holm[c]:.2g}){also}."
    )


def _not_biased(audit: "Audit") -> str:
    n, needed = int(audit.independent_rows), audit.power.rows_needed(audit.share)
    there = f"{n:,}" if n == len(audit) else f"{len(audit):,}, worth {n:,} because of copies"
    nobody = "No candidate stands out"
    if audit.verdict == "nothing found":
        return (
            f"{nobody} (largest z {audit.scores.z.max():.1f}, {audit.best!r}). {needed:,} rows are "
            f"enough to detect {audit.share:.0%} of rows by a teacher like the auditors, and there "
            f"are {there}."
        )
    if n < 2:
        return f"{nobody}, but an audit needs two different rows or more."
    if np.isnan(needed):
        return f"{nobody}, but without calibration lists the power is unknown."
    if np.isinf(needed):
        return (
            f"{nobody}, but these auditors cannot detect {audit.share:.0%} of rows by a teacher "
            "like them in any number of rows; if you know the data's system prompt, give it as the "
            "baseline."
        )
    return (
        f"{nobody}, but it takes {needed:,} rows to detect {audit.share:.0%} of rows by a teacher "
        f"like the auditors, and there are {there}."
    )


def as_json(audit: "Audit") -> dict[str, Any]:
    """Return the verdict and the table as JSON values, as documented in `Audit.to_dict`."""
    needed = audit.power.rows_needed(audit.share)
    rows = audit.to_dataframe().replace([np.inf, -np.inf], np.nan).astype(object)
    return {
        "verdict": audit.verdict,
        "biased": list(audit.biased),
        "explanation": audit.explanation,
        "rows": len(audit),
        "independent_rows": audit.independent_rows,
        "tokens": len(audit.token_ids),
        "alpha": audit.alpha,
        "share": audit.share,
        "rows_needed": int(needed) if np.isfinite(needed) else None,
        "baseline": audit.baseline.teacher.name,
        "temperature": audit.baseline.temperature,
        "fits": audit.baseline.fits,
        "surprise": audit.baseline.surprise,
        "candidates": rows.where(rows.notna(), None).to_dict("records"),
        "metadata": dict(audit.metadata),
    }


def _completion(audit: "Audit", row: int) -> str:
    text = audit.examples[row].completion
    span = audit.token_ids[audit.offsets[row] : audit.offsets[row + 1]]
    return "".join(row_texts(audit.texts, span)) if text is None else text
