"""Build `Pairs` for patching from the divergence tokens of a `Divergence`.

Each pair is one (example, counterfactual, divergence token). The clean row is the factual prompt
plus the completion before the token; the corrupted row is the counterfactual's prompt plus the same
part of the completion. Both rows end at the position that predicts the token.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from divergence_lens.chat import Encoded, encode_prompts
from divergence_lens.divergence.forced import token_owners
from divergence_lens.pairs import Pairs
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    from divergence_lens.divergence.result import Divergence


class _Place(NamedTuple):
    """A divergence token at which one counterfactual differs; `token` indexes the flat arrays."""

    example: int
    counterfactual: int
    token: int


def build_pairs(
    divergence: "Divergence",
    tokenizer: Any,
    *,
    first_only: bool,
    counterfactual: str | None,
    limit: int | None,
    seed: int,
) -> Pairs:
    """Build pairs as documented in `Divergence.pairs`."""
    places = _places(divergence, first_only=first_only, counterfactual=counterfactual)
    if not places:
        raise ValueError(
            "there is no divergence token to build pairs from: no counterfactual's argmax differs "
            f"at any of the {int(divergence.mask.sum()):,} chosen of {len(divergence.tokens):,} "
            "tokens"
        )
    if limit is not None and limit < len(places):
        drawn = np.random.default_rng(seed).choice(len(places), size=limit, replace=False)
        places = [places[i] for i in np.sort(drawn)]
    others = [divergence.counterfactuals[place.counterfactual] for place in places]
    missing = {divergence.teacher.name, *(other.name for other in others)} & divergence.detached
    if missing:
        raise ValueError(
            f"the weights of {', '.join(sorted(missing))} were not saved with "
            "this divergence; give the teachers to Divergence.load(path, teachers=[...])"
        )
    # Completion ids before each divergence token: the shared end of the clean and corrupted rows.
    before = [
        divergence.tokens[divergence.offsets[place.example] : place.token].tolist()
        for place in places
    ]
    rows = [place.example for place in places]
    clean = _encode(divergence, tokenizer, [divergence.teacher] * len(rows), rows)
    corrupted = _encode(divergence, tokenizer, others, rows)
    return Pairs.from_tokens(
        [[*prompt.ids, *ids] for prompt, ids in zip(clean, before, strict=True)],
        [[*prompt.ids, *ids] for prompt, ids in zip(corrupted, before, strict=True)],
        answers=[int(divergence.tokens[place.token]) for place in places],
        foils=[
            int(divergence.predicted[1 + place.counterfactual, place.token]) for place in places
        ],
        segments=[
            [*prompt.segments, *["completion"] * len(ids)]
            for prompt, ids in zip(clean, before, strict=True)
        ],
        clean_teacher=divergence.teacher,
        corrupted_teacher=others,
        tokenizer=tokenizer,
        metadata=divergence.metadata,
    )


def counterfactual_index(divergence: "Divergence", name: str) -> int:
    """Return the row of a counterfactual teacher among the counterfactuals.

    Raises:
        ValueError: There is no counterfactual teacher with this name.
    """
    names = divergence.names[1:]
    if name not in names:
        raise ValueError(
            f"there is no counterfactual teacher {name!r}; there are {', '.join(names)}"
        )
    return names.index(name)


def _places(
    divergence: "Divergence", *, first_only: bool, counterfactual: str | None
) -> list[_Place]:
    """Return the places of all pairs, sorted by example, counterfactual and token."""
    rows = list(range(len(divergence.counterfactuals)))
    if counterfactual is not None:
        rows = [counterfactual_index(divergence, counterfactual)]
    owners = token_owners(divergence.offsets)
    places: list[_Place] = []
    for row in rows:
        tokens = np.flatnonzero(divergence.mask & divergence.differs[row])
        if first_only:
            _, firsts = np.unique(owners[tokens], return_index=True)
            tokens = tokens[firsts]
        places += [_Place(int(owners[token]), row, int(token)) for token in tokens]
    return sorted(places)


def _encode(
    divergence: "Divergence", tokenizer: Any, teachers: list[Teacher], rows: list[int]
) -> list[Encoded]:
    """Encode the prompt of each (teacher, example), in one batch per system prompt."""
    keys = [(teacher.system_prompt, row) for teacher, row in zip(teachers, rows, strict=True)]
    by_system: dict[str | None, dict[int, None]] = {}
    for system, row in keys:
        by_system.setdefault(system, {})[row] = None
    encoded: dict[tuple[str | None, int], Encoded] = {}
    for system, members in by_system.items():
        prompts = [divergence.examples[row].prompt for row in members]
        batch = encode_prompts(tokenizer, prompts, system_prompt=system)
        encoded.update(((system, row), one) for row, one in zip(members, batch, strict=True))
    return [encoded[key] for key in keys]
