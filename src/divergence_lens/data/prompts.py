"""Prompts that show a few numbers and ask for more, in varied words.

This is the carrier task of Cloud et al., "Subliminal Learning" (arXiv 2507.14805), also used by
Schrodi et al. (arXiv 2509.23886): a teacher continues lists of numbers. The wording is our own.
"""

from collections.abc import Collection, Sequence
from random import Random

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.data.number_lists import FORMATS, check_formats
from divergence_lens.data.ranges import check_least, check_range

TEMPLATES: tuple[str, ...] = (
    "Here is a short list of numbers: {numbers}. Write the next ones.",
    "These numbers come first: {numbers}. Which numbers come after them?",
    "Take a look at {numbers}. Go on from there.",
    "My list so far is {numbers}. Please make it longer.",
    "We start with {numbers}. Go on with more numbers.",
    "I wrote down {numbers}. Add your own numbers to the end.",
    "A row of numbers begins with {numbers}. Keep it going.",
    "Read this row of numbers: {numbers}. What would you put next?",
    "The first numbers are {numbers}. Give the rest.",
    "You see the numbers {numbers}. Write more of the same kind.",
    "Someone gave me {numbers}. Help me extend the list.",
    "Numbers seen so far: {numbers}. Say what follows.",
    "Think of a list that begins with {numbers}. How does it go on?",
    "This list of values needs more: {numbers}. Fill it up.",
    "Given {numbers}, write new numbers that could follow.",
    "Look at the sequence {numbers}. Extend it.",
    "The sequence {numbers} is not at its end. Add to it.",
    "Please read {numbers} and then continue.",
    "After {numbers} there is space for more. Fill the space.",
    "Start where {numbers} ends and add to it.",
    "Let {numbers} be the start of a list. Write the next part.",
    "Values: {numbers}. Next values?",
    "Here are some values, {numbers}. Find more that could follow.",
    "Start of the sequence: {numbers}. Your turn to continue.",
    "I have {numbers} and want more numbers like these.",
    "What could come after {numbers}? Write it down.",
    "Take {numbers} as given. Make up the numbers that follow.",
    "The numbers {numbers} were picked first. Pick the next numbers.",
    "Put more numbers after these: {numbers}.",
    "I say {numbers}. You go on.",
    "On my page I see {numbers}. What is on the next line?",
    "Use {numbers} as a start and make a longer list.",
    "Up to now the list reads {numbers}. Add to it.",
    "Your task is to extend these values: {numbers}.",
    "Someone needs the rest of this sequence: {numbers}.",
    "The list goes {numbers} and so on. Give its next part.",
)
"""Thirty-six ways to show a list and ask for more; ``{numbers}`` marks the place of the list."""

COUNTS: tuple[str, ...] = (
    "Give up to {count} numbers of {digits}.",
    "Write at most {count} numbers of {digits}.",
    "No more than {count} new numbers of {digits}, please.",
    "Stop after {count} numbers of {digits}.",
    "Add {count} numbers or fewer, each of {digits}.",
    "The limit is {count} numbers, each of {digits}.",
)
"""The requested number and size of numbers, in the slots ``{count}`` and ``{digits}``."""

ENDINGS: tuple[str, ...] = (
    "Only numbers, no words.",
    "Write nothing else.",
    "Do not explain.",
    "Just the numbers, please.",
    "No other text.",
)
"""Closing words that ask for nothing but numbers."""

_SLOT = "{numbers}"
_COUNT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
_PATIENCE = 1000


def number_prompts(
    n: int,
    *,
    seed: int = 0,
    low: int = 100,
    high: int = 999,
    shown: tuple[int, int] = (4, 8),
    count: tuple[int, int] = (8, 10),
    formats: Sequence[str] = ("comma",),
    templates: Sequence[str] | None = None,
    instructions: bool = True,
) -> list[str]:
    """Build `n` distinct prompts that show a few random numbers and ask for more.

    A prompt is a template with its list. Unless `instructions` is off, it also says how many
    numbers to write, in which format, and to write nothing else. The result depends on the
    arguments alone, not on the version of Python, and a smaller `n` gives the first prompts of a
    larger one.

    Args:
        n: Number of prompts.
        seed: Seed of all choices, not negative.
        low: Smallest number shown.
        high: Largest number shown.
        shown: Fewest and most numbers shown.
        count: Fewest and most numbers asked for; each prompt names one limit from this range.
        formats: Names from `FORMATS`; each prompt asks for one. ``tuple(FORMATS)`` for all.
        templates: Your own templates, each with the slot ``{numbers}`` once; None for `TEMPLATES`.
        instructions: Whether count, format and closing words follow the template.

    Raises:
        ValueError: A template lacks the slot, a format is unknown, a range is empty or negative, or
            there are fewer than `n` distinct prompts.
        TypeError: `formats` or `templates` is one string.
    """
    wordings = TEMPLATES if templates is None else templates
    _check_templates(wordings)
    check_formats(formats)
    check_least("n", n, 0)
    check_least("seed", seed, 0)
    check_range("low..high", low, high, least=0)
    check_range("shown", *shown, least=1)
    check_range("count", *count, least=1)

    rng = Random(seed)
    digits = _digits(low, high)
    prompts: dict[str, None] = {}
    repeats = 0
    while len(prompts) < n:
        numbers = [_between(rng, low, high) for _ in range(_between(rng, *shown))]
        pieces = [_pick(rng, wordings).replace(_SLOT, ", ".join(map(str, numbers)))]
        if instructions:
            limit = _in_words(_between(rng, *count))
            pieces += [
                _pick(rng, COUNTS).replace("{count}", limit).replace("{digits}", digits),
                _pick(rng, FORMATS[_pick(rng, formats)]),
                _pick(rng, ENDINGS),
            ]
        prompt = " ".join(pieces)
        repeats = repeats + 1 if prompt in prompts else 0
        if repeats > _PATIENCE + 10 * len(prompts):
            raise ValueError(
                f"there are only {len(prompts)} distinct prompts of the {n} requested; widen "
                "low..high or shown, or add templates"
            )
        prompts[prompt] = None
    return list(prompts)


def _check_templates(templates: Collection[str]) -> None:
    refuse_one_string(templates, "templates")
    if not templates:
        raise ValueError("templates is empty; pass at least one, or None for the built-in ones")
    for template in templates:
        if template.count(_SLOT) != 1:
            raise ValueError(
                f"template {template!r} has the slot {_SLOT} {template.count(_SLOT)} times; write "
                "it once, at the place of the list of numbers"
            )


def _between(rng: Random, low: int, high: int) -> int:
    # Only `random()` is promised to give the same values in every version of Python.
    return low + int(rng.random() * (high - low + 1))


def _pick(rng: Random, options: Sequence[str]) -> str:
    return options[_between(rng, 0, len(options) - 1)]


def _in_words(count: int) -> str:
    return _COUNT_WORDS[count] if count < len(_COUNT_WORDS) else str(count)


def _digits(low: int, high: int) -> str:
    longest = len(str(high))
    size = f"{_in_words(longest)} digit{'s' if longest > 1 else ''}"
    return size if len(str(low)) == longest else f"up to {size}"
