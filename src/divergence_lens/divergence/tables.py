"""Tables of a `Divergence`: divergence tokens counted by group, and one row per token."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int64

from divergence_lens.chat import choice_texts, row_texts
from divergence_lens.divergence.forced import token_owners
from divergence_lens.divergence.tokens import KINDS

if TYPE_CHECKING:
    import pandas as pd

    from divergence_lens.divergence.result import Divergence


def summarize(divergence: "Divergence", by: str, *, bins: int) -> "pd.DataFrame":
    """Count divergence tokens by group, as documented in `Divergence.summary`."""
    if by == "kind":
        present = set(divergence.kinds)
        return _grouped(divergence, divergence.kinds, by, [k for k in KINDS if k in present])
    if by == "position":
        if bins < 1:
            raise ValueError(f"bins must be 1 or more, got {bins}")
        owners = token_owners(divergence.offsets)
        lengths = np.diff(divergence.offsets)[owners]  # [tokens]
        part = _positions(divergence) * bins // lengths
        order = [b / bins for b in range(bins)]
        return _grouped(divergence, part / bins, "relative position", order)
    if by == "example":
        owners = token_owners(divergence.offsets)
        table = _grouped(divergence, owners, by, list(range(len(divergence))))
        table["first"] = _first(divergence, divergence.mask)
        for name, differs in zip(divergence.names[1:], divergence.differs, strict=True):
            table[f"first_{name}"] = _first(divergence, divergence.mask & differs)
        return table
    if by == "counterfactual":
        return _by_counterfactual(divergence)
    raise ValueError(f"unknown group {by!r}; use 'kind', 'position', 'example' or 'counterfactual'")


def token_table(divergence: "Divergence") -> "pd.DataFrame":
    """Return one row per completion token, as documented in `Divergence.to_dataframe`."""
    import pandas as pd

    ends = divergence.offsets[1:-1]
    rows = np.split(divergence.tokens, ends)  # per example: parts of a character stay in one text
    columns: dict[str, Any] = {
        "example": token_owners(divergence.offsets),
        "position": _positions(divergence),
        "token_id": divergence.tokens,
        "token": [text for row in rows for text in row_texts(divergence.texts, row)],
        "kind": divergence.kinds,
        "divergence": divergence.mask,
        "agrees": divergence.agrees,
        "n_differ": divergence.differs.sum(0),
    }
    for row, name in enumerate(divergence.names):
        columns[f"predicted_{name}"] = [
            text
            for choices, own in zip(np.split(divergence.predicted[row], ends), rows, strict=True)
            for text in choice_texts(divergence.texts, choices, own)
        ]
        columns[f"margin_{name}"] = divergence.margin[row]
        columns[f"logprob_{name}"] = divergence.logprob[row]
        if divergence.kl is not None and row:
            columns[f"kl_{name}"] = divergence.kl[row - 1]
    return pd.DataFrame(columns)


def _positions(divergence: "Divergence") -> Int64[np.ndarray, " tokens"]:
    """Return the position of each token in its completion, from 0."""
    starts = divergence.offsets[token_owners(divergence.offsets)]
    positions: np.ndarray = np.arange(len(divergence.tokens)) - starts
    return positions


def _first(
    divergence: "Divergence", mask: Bool[np.ndarray, " tokens"]
) -> Int64[np.ndarray, " examples"]:
    """Return the position of the first token of a mask in each completion, -1 for none."""
    first: np.ndarray = np.full(len(divergence), -1, dtype=np.int64)
    places = np.flatnonzero(mask)
    owners, earliest = np.unique(token_owners(divergence.offsets)[places], return_index=True)
    first[owners] = places[earliest] - divergence.offsets[owners]
    return first


def _by_counterfactual(divergence: "Divergence") -> "pd.DataFrame":
    import pandas as pd

    counts = (divergence.mask & divergence.differs).sum(1)  # [counterfactuals]
    n = len(divergence.tokens)
    return pd.DataFrame(
        {"tokens": n, "divergence_tokens": counts, "rate": counts / n},
        index=pd.Index(divergence.names[1:], name="counterfactual"),
    )


def _grouped(
    divergence: "Divergence", group: np.ndarray, name: str, order: list[Any]
) -> "pd.DataFrame":
    """Count tokens and divergence tokens per group, with groups in the given order."""
    import pandas as pd

    frame = pd.DataFrame({name: group, "divergence": divergence.mask})
    table = frame.groupby(name)["divergence"].agg(["size", "sum"]).reindex(order, fill_value=0)
    table.columns = ["tokens", "divergence_tokens"]
    table["rate"] = table["divergence_tokens"] / table["tokens"].where(table["tokens"] > 0)
    return table
