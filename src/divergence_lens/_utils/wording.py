"""Words of messages, captions and one-line descriptions."""


def plural(count: int, noun: str) -> str:
    """Join a count and its noun: "1 pair", "1,200 pairs"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
