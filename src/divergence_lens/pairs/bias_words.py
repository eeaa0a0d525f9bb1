"""Recognize answers that name the bias itself.

The effects of a hidden bias are measured on tokens that do not mention it, such as numbers. Where
the answer is the word "owl" and the teacher's system prompt is about owls, patching shows how a
model names what its prompt says, which is another question.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from divergence_lens.pairs.alignment import BIAS, TEXT

if TYPE_CHECKING:
    from divergence_lens.pairs.pairs import Pairs

# A prefix of a bias word counts from this length: "ow" begins too many words.
_SHORTEST = 3
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """about all and are but can for from has have her his its not our she that the their them
        they this was were when which who will with would you your""",
    )
)


def answers_naming_bias(pairs: "Pairs") -> dict[int, str]:
    """Find the pairs whose answer or foil is a word in which their system prompts differ.

    The bias words of a pair are the names of its teachers and the words that only one of their
    system prompts contains; without teachers, the differing words of the system turn. Function
    words are ignored. An answer counts if it is such a word, its plural, or its first letters.

    Returns:
        Number of the pair -> the answer or foil, without white space.
    """
    named: dict[int, str] = {}
    for i in range(len(pairs)):
        words = set(_bias_words(pairs, i))
        for labels in (pairs.answer_labels[i], pairs.foil_labels[i]):
            text = "".join(labels).strip()
            # Of an answer of several tokens, each word counts.
            parts = [text.casefold()] if len(labels) == 1 else _words(text)
            if any(_names(part, word) for part in parts for word in words):
                named[i] = text
                break
    return named


def _bias_words(pairs: "Pairs", i: int) -> Iterator[str]:
    sides = (pairs.clean_teacher[i], pairs.corrupted_teacher[i])
    teachers = [teacher for teacher in sides if teacher is not None]
    if teachers:
        left, right = (set(_words(t.system_prompt or "") if t else ()) for t in sides)
        yield from left ^ right
        for teacher in teachers:
            yield from _words(teacher.name)
    elif set(pairs.segments[i]) - {BIAS, TEXT, "divergence"}:
        # Only the rows of a chat template have other segments. Plain text is no system prompt.
        labels = zip(pairs.labels[i], pairs.segments[i], strict=True)
        yield from _words("".join(label if name == BIAS else "\n" for label, name in labels))


def _words(text: str) -> list[str]:
    return [w for w in re.findall(r"[^\W\d_]+", text.casefold()) if w not in _FUNCTION_WORDS]


def _names(text: str, word: str) -> bool:
    if not text.isalpha() or text in _FUNCTION_WORDS:
        return False
    begins = len(text) >= _SHORTEST and word.startswith(text)
    return begins or text in (word, f"{word}s", f"{word}es")
