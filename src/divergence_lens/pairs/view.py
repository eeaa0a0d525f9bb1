"""The notebook view of pairs."""

from collections.abc import Sequence
from html import escape


def pairs_html(
    count: int,
    labels: Sequence[Sequence[str]],
    segments: Sequence[Sequence[str]],
    underlined: Sequence[Sequence[bool]],
) -> str:
    """Show the clean rows of the first pairs, with their marked tokens underlined.

    Args:
        count: The number of pairs, of which the first may be shown alone.
        labels: The tokens of each shown row.
        segments: The segment of each token, shown as its tooltip.
        underlined: Which tokens to underline.
    """
    rows = []
    for i, columns in enumerate(zip(labels, segments, underlined, strict=True)):
        cells = "".join(
            f'<span title="{escape(segment)}" style="white-space:pre;margin-right:.2em;'
            f'{"text-decoration:underline;font-weight:bold" if marked else ""}">'
            f"{escape(label)}</span>"
            for label, segment, marked in zip(*columns, strict=True)
        )
        rows.append(f"<tr><td>{i}</td><td style='text-align:left'>{cells}</td></tr>")
    return (
        f"<p>{count} pairs; differing tokens and the target position are underlined"
        f"{f' (first {len(rows)} shown)' if len(rows) < count else ''}</p>"
        f"<table><tr><th>pair</th><th>clean row</th></tr>{''.join(rows)}</table>"
    )
