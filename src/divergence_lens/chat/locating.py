"""Positions of texts in a rendered conversation, and segment labels of its tokens.

1. Render again with a private-use character before and after one text. If removing the two
   characters gives the original rendering, the text lies between them. This is right also where a
   text occurs twice, inside another, or is trimmed.
2. Where a template rewrites a text (it may drop the think block of an earlier answer), render with
   one private-use character instead of the text. The original rendering has the rewritten text
   between what comes before and after that character.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Characters `start` to `stop` of a rendered text, which belong to one segment."""

    start: int
    stop: int
    label: str


def locate(
    write: Callable[[str], str], content: str, text: str, name: str
) -> list[tuple[int, int]]:
    """Return the spans of `content` in `text`, which is `write(content)`; empty if it is absent.

    A template that trims would preserve the outer white space of a content that is marked around
    it, so inner positions of the marks are tried, too.

    Raises:
        ValueError: The template writes something other than the content or its trimmed form.
    """
    if not content:
        return []
    left, right = unused_characters(text, content)
    core = content.strip()
    places = [(0, len(content))]
    if core:
        start, stop = content.index(core), len(content.rstrip())
        places += [(0, stop), (start, len(content)), (start, stop)]
    for start, stop in dict.fromkeys(places):
        marked = write(content[:start] + left + content[start:stop] + right + content[stop:])
        if marked.replace(left, "").replace(right, "") == text:
            matches = list(re.finditer(f"{left}([^{left}{right}]*){right}", marked))
            if len(matches) == marked.count(left) == marked.count(right):
                # Each span moves back by the marks before it.
                return [
                    (match.start() - 2 * i, match.start() - 2 * i + len(match[1]))
                    for i, match in enumerate(matches)
                ]
    if not core:
        return []
    # A template that decides by how the content begins or ends does not recognize it once marked.
    if text.count(core) == 1:
        start = text.index(core)
        return [(start, start + len(core))]
    raise ValueError(
        f"the chat template rewrites {name} {content[:60]!r}, so its tokens cannot be told from "
        "the template's."
    )


def locate_rewritten(write: Callable[[str], str], text: str) -> list[tuple[int, int]]:
    """Return the span of a content that the template may have rewritten; empty if it is absent."""
    (mark,) = unused_characters(text, count=1)
    marked = write(mark)
    if marked.count(mark) != 1:
        return []
    head, tail = marked.split(mark)
    stop = len(text) - len(tail)
    fits = text.startswith(head) and text.endswith(tail) and stop > len(head)
    return [(len(head), stop)] if fits else []


def unused_characters(*texts: str, count: int = 2) -> tuple[str, ...]:
    """Return characters of the private-use area that are in none of the texts."""
    free = (c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in texts))
    return tuple(next(free) for _ in range(count))


def segment_labels(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> tuple[str, ...]:
    """Label each token by the characters that it covers."""
    stops = [b for _, b in offsets]
    # A tokenizer that trims its offsets gives white space none: it follows the token before.
    starts = [a if a < b or i == 0 else min(a, stops[i - 1]) for i, (a, b) in enumerate(offsets)]
    labels = ["template"] * len(offsets)
    shares = [-1] * len(offsets)
    for start, stop, label in spans:
        for i in range(bisect_right(stops, start), bisect_left(starts, stop)):
            share = min(stops[i], stop) - max(starts[i], start)
            # Where two contents meet in one token, the one with more characters gets it.
            if share > shares[i]:
                labels[i], shares[i] = label, share
    return tuple(labels)
