"""The notebook view of pairs."""

from collections.abc import Sequence
from html import escape

from divergence_lens._utils.wording import plural


def pairs_html(
    count: int,
    labels: Sequence[Sequence[str]],
    segments: Sequence[Sequence[str]],
    underlined: Sequence[Sequence[bool]],
    answers: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
) -> str:
    """Show the clean rows of the first pairs, with their marked tokens underlined.

    Args:
        count: The number of pairs, of which the first may be shown alone.
        labels: The tokens of each shown row.
        segments: The segment of each token, shown as its tooltip.
        underlined: Which tokens to underline.
        answers: The tokens of each shown row's answer, and those of its foil.
    """
    rows = []
    for i, columns in enumerate(zip(labels, segments, underlined, strict=True)):
        cells = "".join(
            f'<span title="{escape(segment)}" style="white-space:pre;margin-right:.2em;'
            f'{"text-decoration:underline;font-weight:bold" if marked else ""}">'
            f"{escape(label)}</span>"
            for label, segment, marked in zip(*columns, strict=True)
        )
        left = "<td style='text-align:left'>"
        shown = "".join(f"{left}{token_boxes(side[i])}</td>" for side in answers)
        rows.append(f"<tr><td>{i}</td>{left}{cells}</td>{shown}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in ("pair", "clean row", "answer", "foil"))
    return (
        f"<p>{plural(count, 'pair')}; differing tokens and the target position are underlined"
        f"{f' (first {len(rows)} shown)' if len(rows) < count else ''}</p>"
        f"<table><tr>{heads}</tr>{''.join(rows)}</table>"
    )


def token_boxes(tokens: Sequence[str]) -> str:
    """Tokens in frames, so that spaces and the borders between tokens are visible."""
    return "".join(
        f'<span style="white-space:pre;border:1px solid #bbb">{escape(token)}</span>'
        for token in tokens
    )
