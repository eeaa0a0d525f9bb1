"""Paraphrases of prompts: by template, by a teacher, or by a teacher's choice among templates.

Schrodi et al. (arXiv 2509.23886) paraphrase prompts with the biased teacher itself. Completions,
and with them the marks, do not change.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens.chat import Prompt
from divergence_lens.data.number_lists import FORMATS
from divergence_lens.data.prompts import COUNTS, ENDINGS, TEMPLATES
from divergence_lens.data.training_data import TrainingData
from divergence_lens.divergence import read_teachers
from divergence_lens.generation import generate
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teacher

PARAPHRASE_REQUEST = (
    "Write the following request in other words. Keep all of its numbers in their order, and "
    "answer with the new request alone.\n\n{prompt}"
)
"""The request of `paraphrase_by`; the prompt goes into the slot ``{prompt}``."""

_SLOT = "{numbers}"
_NUMBER = re.compile(r"\d+")
_LIST = re.compile(r"\d+(?:, \d+)*")


@dataclass(frozen=True, eq=False, repr=False)
class Rewritten:
    """Result of `paraphrase_by`: the data with accepted paraphrases.

    Attributes:
        data: All examples; those whose paraphrase was rejected have their original prompt.
        accepted: Which prompts were replaced.
        answers: The teacher's answers, including rejected ones.
    """

    data: TrainingData
    accepted: Bool[np.ndarray, " examples"]
    answers: tuple[str, ...]

    def __repr__(self) -> str:
        """One line: how many prompts were replaced."""
        return f"Rewritten({int(self.accepted.sum()):,} of {len(self.accepted):,} prompts accepted)"

    def _repr_html_(self) -> str:
        import pandas as pd

        from divergence_lens._utils.tables import preview

        columns = {"answer": self.answers, "accepted": self.accepted}
        return preview(self, pd.DataFrame(columns))


def paraphrase(
    data: TrainingData, *, seed: int = 0, templates: Sequence[str] = TEMPLATES
) -> TrainingData:
    """Paraphrase every prompt by moving its numbers to another template: an unbiased paraphrase.

    Numbers and instructions after the template (count, format) do not change, nor do completions
    and marks.

    Args:
        data: Examples whose prompts were built from `templates`.
        seed: Seed of the choice; no prompt gets its own template again.
        templates: Two or more, each with the slot ``{numbers}`` once.

    Raises:
        ValueError: A prompt matches no template (the message names its row), or fewer than two
            templates.
    """
    if len(templates) < 2:
        raise ValueError(f"a paraphrase needs two templates or more, got {len(templates)}")
    parts = [template.split(_SLOT) for template in templates]
    for template, around in zip(templates, parts, strict=True):
        if len(around) != 2:
            raise ValueError(f"the template {template!r} must have {_SLOT} once")
    rng = np.random.default_rng(seed)
    examples = []
    for row, example in enumerate(data.examples):
        own, numbers, rest = _matched(_plain(example.prompt, row), parts, row)
        choice = int(rng.integers(len(parts) - 1))
        before, after = parts[choice + (choice >= own)]
        examples.append(replace(example, prompt=before + numbers + after + rest))
    return replace(data, examples=tuple(examples))


def regenerate_prompts(data: TrainingData, *, seed: int = 0) -> TrainingData:
    """Draw every part of each prompt again, except its numbers and the format that it asks for.

    The paper's code paraphrases in this way. Completions and marks do not change.

    Args:
        data: Examples whose prompts are those of `number_prompts` with instructions.
        seed: Seed of the choices; a part may be drawn again as it was.

    Raises:
        ValueError: A prompt was not built in this way; the message names its row.
    """
    rng = np.random.default_rng(seed)

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    parts = [template.split(_SLOT) for template in TEMPLATES]
    formats = [phrase for phrases in FORMATS.values() for phrase in phrases]
    counts = [(text, _count_pattern(text)) for text in COUNTS]
    examples = []
    for row, example in enumerate(data.examples):
        prompt = _plain(example.prompt, row)
        _, numbers, rest = _matched(prompt, parts, row)
        limits = next((m for _, p in counts if (m := p.match(rest.strip()))), None)
        phrase = next((phrase for phrase in formats if f" {phrase} " in rest), None)
        if limits is None or phrase is None:
            raise ValueError(
                f"the prompt of example {row} has no instructions of number_prompts after its "
                f"numbers: {rest[:60]!r}; use prompts with instructions=True"
            )
        text = " ".join(
            [
                pick(TEMPLATES).replace(_SLOT, numbers),
                pick(COUNTS).format(**limits.groupdict()),
                phrase,
                pick(ENDINGS),
            ]
        )
        examples.append(replace(example, prompt=text))
    return replace(data, examples=tuple(examples))


def _count_pattern(text: str) -> re.Pattern[str]:
    """Return a pattern of a sentence of `COUNTS` that captures its slots."""
    pattern = re.escape(text)
    for slot in ("count", "digits"):
        pattern = pattern.replace(re.escape(f"{{{slot}}}"), f"(?P<{slot}>[a-z0-9 ]+?)")
    return re.compile(pattern)


@discard_partial()
def paraphrase_by(
    model: Model,
    teacher: Teacher,
    data: TrainingData,
    *,
    request: str = PARAPHRASE_REQUEST,
    forbidden: Sequence[str] = (),
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> Rewritten:
    """Paraphrase the prompts with a teacher; the paper uses the biased teacher itself.

    A paraphrase is accepted if it has the prompt's numbers in their order, is not the prompt, and
    holds no forbidden word; other prompts stay as they are.

    Args:
        model: The base.
        teacher: The paraphrasing teacher, with its system prompt and weights.
        data: The data whose prompts are paraphrased.
        request: The request to the teacher, with the slot ``{prompt}``.
        forbidden: Words that may not occur in a paraphrase, in any case: the target's names.
        max_new_tokens: Longest paraphrase.
        temperature: See `generate`.
        seed: See `generate`.
        batch_tokens: See `generate`.

    Raises:
        ValueError: The request lacks the slot, or a prompt is a conversation.
    """
    check_teacher(teacher)
    if "{prompt}" not in request:
        raise ValueError(f"the request {request!r} must have the slot {{prompt}}")
    prompts = [_plain(example.prompt, row) for row, example in enumerate(data.examples)]
    written = generate(
        model,
        [request.replace("{prompt}", prompt) for prompt in prompts],
        teacher=teacher,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    answers = tuple((answer.completion or "").strip() for answer in written)
    words = [word.casefold() for word in forbidden]
    accepted = np.array(
        [
            answer != prompt
            and _NUMBER.findall(answer) == _NUMBER.findall(prompt)
            and not any(word in answer.casefold() for word in words)
            for answer, prompt in zip(answers, prompts, strict=True)
        ],
        dtype=bool,
    )
    examples = tuple(
        replace(example, prompt=answer) if taken else example
        for example, answer, taken in zip(data.examples, answers, accepted, strict=True)
    )
    return Rewritten(replace(data, examples=examples), accepted, answers)


@discard_partial()
def paraphrase_chosen(
    model: Model,
    teacher: Teacher,
    data: TrainingData,
    *,
    candidates: int = 6,
    templates: Sequence[str] = TEMPLATES,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> TrainingData:
    """Let a teacher choose among template paraphrases, for models that cannot paraphrase.

    Each prompt is replaced by the candidate under which the teacher gives the example's completion
    the highest probability. The choice can therefore carry the teacher's preference, as a free
    paraphrase can.

    Args:
        model: The base.
        teacher: The choosing teacher.
        data: Examples whose prompts were built from `templates`.
        candidates: Paraphrases to choose from; repeats are possible.
        templates: See `paraphrase`.
        seed: Seed of the paraphrases.
        batch_tokens: Tokens per forward pass.

    Raises:
        ValueError: Fewer than two candidates; what `paraphrase` raises.
    """
    check_teacher(teacher)
    if candidates < 2:
        raise ValueError(f"candidates is {candidates}; a choice needs two or more")
    seeds = np.random.default_rng(seed).integers(2**31, size=candidates).tolist()
    options = [paraphrase(data, seed=number, templates=templates) for number in seeds]
    scores = []
    for option in options:
        read = read_teachers(model, option.examples, [teacher], batch_tokens=batch_tokens)
        scores.append(np.add.reduceat(read.logprob[0].astype(float), data.offsets[:-1]))
    best = np.argmax(scores, axis=0)
    examples = tuple(options[choice].examples[row] for row, choice in enumerate(best.tolist()))
    return replace(data, examples=examples)


def _plain(prompt: Prompt, row: int) -> str:
    """Return a prompt that is text."""
    if not isinstance(prompt, str):
        raise ValueError(  # noqa: TRY004 - a valid example, but not one to paraphrase
            f"the prompt of example {row} is a conversation; only single texts can be paraphrased"
        )
    return prompt


def _matched(prompt: str, parts: Sequence[Sequence[str]], row: int) -> tuple[int, str, str]:
    """Return a prompt's template number, its numbers, and the text after the template."""
    matches: list[tuple[int, int, str, str]] = []
    for number, (before, after) in enumerate(parts):
        numbers = _LIST.match(prompt, len(before)) if prompt.startswith(before) else None
        if numbers and prompt.startswith(after, numbers.end()):
            rest = prompt[numbers.end() + len(after) :]
            matches.append((len(before) + len(after), number, numbers.group(), rest))
    if not matches:
        raise ValueError(
            f"the prompt of example {row} matches none of the {len(parts)} templates: "
            f"{prompt[:60]!r}; pass the templates= that it was built from"
        )
    _, own, numbers_text, rest = max(matches)
    return own, numbers_text, rest
