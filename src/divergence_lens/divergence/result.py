"""The readings of every teacher at every completion token, and the divergence tokens among them.

A `Divergence` stores argmaxes, margins and log-probabilities. Its mask follows from them under any
rule and margin, without another forward pass.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from torch import Tensor

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.indexing import row_numbers
from divergence_lens._utils.wording import plural
from divergence_lens.chat import choice_texts, row_texts
from divergence_lens.divergence.files import (
    load_divergence,
    save_divergence,
    write_decision_points,
)
from divergence_lens.divergence.forced import token_places
from divergence_lens.divergence.pairing import build_pairs
from divergence_lens.divergence.rules import Rule, check_rule
from divergence_lens.divergence.selection import DivergenceTokens
from divergence_lens.divergence.tables import summarize, token_table
from divergence_lens.divergence.tokens import check_tokenizer, token_kind
from divergence_lens.divergence.view import ExampleDivergence, summary_html
from divergence_lens.examples import Example
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs
from divergence_lens.provenance import warn_if_other_model
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Divergence(DivergenceTokens, OnHub):
    """Predictions of every teacher at every token of every completion.

    Flat arrays run over all completion tokens of all examples in order; the tokens of example i
    are `offsets[i]:offsets[i + 1]`. The first axis of `predicted`, `margin` and `logprob` runs over
    the teachers, the factual one first.

    `div[i]` is one example as an `ExampleDivergence`, which shows its tokens in color in a
    notebook. `div[:10]`, `div[[3, 5]]` and `div[mask]` with one boolean per example are a
    `Divergence` of those examples.

    Attributes:
        examples: The data, with the text and the ids of every completion.
        teacher: The factual teacher.
        counterfactuals: The teachers that it was compared with.
        offsets: `[examples + 1]`, where each completion starts.
        tokens: `[tokens]`, the completion's token ids.
        predicted: `[teachers tokens]`, argmax of each teacher before the token.
        margin: `[teachers tokens]`, how far that argmax's logit is above the second highest.
        logprob: `[teachers tokens]`, natural-log probability of the given token.
        kl: `[counterfactuals tokens]`, KL(factual || counterfactual) in nats where each token is
            predicted; None unless requested.
        rule: How many counterfactuals must differ: "any", "all" or at least that number.
        require_agreement: Whether the factual teacher's argmax must be the token.
        min_margin: Argmaxes with a smaller margin do not count as different.
        selected: Tokens that replace the rule's, see `with_mask`; None for the rule.
        texts: Token id -> text, for all ids that occur.
        special: Ids of the tokenizer's special tokens among them.
        metadata: Package versions, model and settings of the run, and under "probe" some of the
            model's predictions, by which `check_model` recognizes it.
        tokenizer: The model's tokenizer; None after loading, unless given to `load`.
        detached: Names of teachers whose weights a saved file does not hold and which were not
            given to `load`.
    """

    examples: tuple[Example, ...]
    teacher: Teacher
    counterfactuals: tuple[Teacher, ...]
    offsets: Int64[np.ndarray, " boundaries"]
    tokens: Int64[np.ndarray, " tokens"]
    predicted: Int32[np.ndarray, "teachers tokens"]
    margin: Float32[np.ndarray, "teachers tokens"]
    logprob: Float32[np.ndarray, "teachers tokens"]
    kl: Float32[np.ndarray, "counterfactuals tokens"] | None = None
    rule: Rule = "any"
    require_agreement: bool = True
    min_margin: float = 0.0
    selected: Bool[np.ndarray, " tokens"] | None = None
    texts: Mapping[int, str] = field(default_factory=dict)
    special: frozenset[int] = frozenset()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    detached: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.examples) + 1 or self.offsets[-1] != len(self.tokens):
            raise ValueError(
                f"offsets of length {len(self.offsets)} that end at {self.offsets[-1]} do not fit "
                f"{len(self.examples)} examples with {len(self.tokens)} tokens"
            )
        if len(self.predicted) != 1 + len(self.counterfactuals):
            raise ValueError(
                f"predictions of {len(self.predicted)} teachers do not fit one factual and "
                f"{len(self.counterfactuals)} counterfactual teachers"
            )
        if self.kl is not None and self.kl.shape != self.predicted[1:].shape:
            raise ValueError(
                f"kl of shape {self.kl.shape} does not fit {len(self.counterfactuals)} "
                f"counterfactual teachers and {len(self.tokens)} tokens"
            )
        check_rule(self.rule, len(self.counterfactuals), self.min_margin)
        if self.selected is not None:
            self._checked(self.selected)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' names, the factual one first."""
        return (self.teacher.name, *(c.name for c in self.counterfactuals))

    def with_rule(
        self,
        *,
        rule: Rule | None = None,
        require_agreement: bool | None = None,
        min_margin: float | None = None,
    ) -> "Divergence":
        """Apply another rule to the same readings, without a forward pass.

        Args:
            rule: "any", "all" or at least that number of counterfactuals; None keeps the rule.
            require_agreement: Whether the factual teacher must agree; None keeps the setting.
            min_margin: The margin below which argmaxes do not count; None keeps the margin.

        Returns:
            A divergence that shares this one's arrays.

        Raises:
            ValueError: The rule does not fit the number of counterfactuals.
        """
        return replace(
            self,
            rule=self.rule if rule is None else rule,
            require_agreement=(
                self.require_agreement if require_agreement is None else require_agreement
            ),
            min_margin=self.min_margin if min_margin is None else float(min_margin),
            selected=None,
        )

    def with_mask(self, mask: np.ndarray) -> "Divergence":
        """Select tokens by another criterion than a rule, such as `div.top(0.1, by="advantage")`.

        Everything that uses the divergence tokens (training, pairs, replacement, halves, control
        masks, files) then uses these tokens.

        Args:
            mask: A bool for each completion token.

        Returns:
            A divergence that shares this one's readings. `with_rule` returns to a rule.

        Raises:
            ValueError: The mask has another length, or does not hold bools.
        """
        return replace(self, selected=self._checked(mask))

    # -- tables -----------------------------------------------------------------------------

    @cached_property
    def kinds(self) -> np.ndarray:
        """Kind of each token: `[tokens]` strings, each one of `KINDS`."""
        ids, inverse = np.unique(self.tokens, return_inverse=True)
        kinds = [
            token_kind(self.texts.get(int(i), ""), special=int(i) in self.special) for i in ids
        ]
        by_token: np.ndarray = np.array(kinds)[inverse]
        return by_token

    def summary(self, by: str, *, bins: int = 10) -> "pd.DataFrame":
        """Count divergence tokens by group.

        Args:
            by: The groups: "kind" of token (`KINDS`); "position", equal parts of the completion,
                indexed by the relative position at which each begins; "example"; or
                "counterfactual", where each row counts the divergence tokens at which that
                teacher differs.
            bins: Number of parts for "position".

        Returns:
            One row per group with the columns `tokens`, `divergence_tokens` and `rate`. By
            example also `first`, the position of the first divergence token in the completion,
            and `first_<name>` for each counterfactual; -1 where there is none.

        Raises:
            ValueError: `by` is none of these, or `bins` is below 1.
        """
        return summarize(self, by, bins=bins)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return one row per completion token.

        Returns:
            Columns: example, position, token_id, token, kind, divergence, agrees, n_differ (how
            many counterfactuals differ), and for each teacher `predicted_<name>` (text),
            `margin_<name>` and `logprob_<name>`, and for each counterfactual `kl_<name>` if known.
        """
        return token_table(self)

    # -- patching and files -----------------------------------------------------------------

    def pairs(
        self,
        *,
        first_only: bool = True,
        counterfactual: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        model: Model | None = None,
    ) -> Pairs:
        """Build clean and corrupted rows for patching, one pair per divergence and counterfactual.

        The clean row is the factual prompt and the completion up to the divergence token, without
        it; the corrupted row is the counterfactual's prompt and the same part of the completion.
        The answer is the token, the foil is the counterfactual's argmax. Both rows end at the
        position that predicts the token. Of tokens selected by `with_mask`, those where the argmax
        differs from the token have a pair.

        Args:
            first_only: Use only the first divergence of each example and counterfactual.
            counterfactual: Use only this teacher.
            limit: The maximum number of pairs; they are drawn at random and stay in the order of
                the examples.
            seed: Seed of that draw.
            model: Supplies the tokenizer; needed only after `load`.

        Raises:
            ValueError: No divergence token, an unknown counterfactual, a limit below 1, no
                tokenizer, another tokenizer than the one that the divergence was computed with, or
                a teacher whose weights were neither saved nor given to `load`.
        """
        tokenizer = self.tokenizer if model is None else model.tokenizer
        encoded = all(isinstance(example.prompt, tuple) for example in self.examples)
        if tokenizer is None and not encoded:
            raise ValueError("a loaded divergence has no tokenizer; call pairs(model=model)")
        if tokenizer is not None:
            check_tokenizer(tokenizer, self.texts)
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be 1 or more, got {limit}")
        return build_pairs(
            self,
            tokenizer,
            first_only=first_only,
            counterfactual=counterfactual,
            limit=limit,
            seed=seed,
        )

    def check_model(self, model: Model, *, source: str = "the divergence") -> None:
        """Check that `model` is the one that the divergence was computed with.

        A model with another tokenizer is refused; one whose predictions differ gives a warning.

        Args:
            model: Either model class, in any data type.
            source: What the message calls this divergence, such as its path.

        Raises:
            ValueError: The tokenizer reads the recorded token ids as other texts.
        """
        if model.tokenizer is not None:
            check_tokenizer(model.tokenizer, self.texts)
        warn_if_other_model(self.metadata, model, source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the teachers' weights to one safetensors file, atomically."""
        save_divergence(path, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        teachers: Sequence[Teacher] = (),
        tokenizer: Any = None,
    ) -> "Divergence":
        """Read a file that `save` wrote.

        Args:
            path: The file.
            teachers: Teachers with their own weights, matched by name; a file holds only their
                names and system prompts. Needed for `pairs` with those teachers.
            tokenizer: The model's tokenizer, needed for `pairs`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is damaged, of another kind or version, or a given teacher does
                not fit the one that was saved.
        """
        return cls(**load_divergence(path, teachers), tokenizer=tokenizer)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object per example, in the layout of the paper's code.

        Keys: `prompt`, `completion`, `decision_points` (positions of the divergence tokens in the
        completion, from 0), and `completion_ids`, so that the positions stay correct where a text
        has several tokenizations. `TrainingData.from_jsonl` reads it.
        """
        write_decision_points(path, self.examples, self.offsets, self.mask)

    # -- examples ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> ExampleDivergence: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray | Tensor) -> "Divergence": ...

    def __getitem__(self, index: Any) -> "ExampleDivergence | Divergence":
        rows = row_numbers(index, len(self), "example")
        if isinstance(index, int | np.integer):
            return self._example(rows[0])
        if not rows:
            raise IndexError(f"the index selects none of the {len(self)} examples")
        offsets, places = token_places(self.offsets, rows)
        return replace(
            self,
            examples=tuple(self.examples[row] for row in rows),
            offsets=offsets,
            tokens=self.tokens[places],
            predicted=self.predicted[:, places],
            margin=self.margin[:, places],
            logprob=self.logprob[:, places],
            kl=None if self.kl is None else self.kl[:, places],
            selected=None if self.selected is None else self.selected[places],
        )

    def __iter__(self) -> Iterator[ExampleDivergence]:
        return (self._example(index) for index in range(len(self)))

    def __repr__(self) -> str:
        verb = "diverge" if self.selected is None else "are selected"
        return (
            f"Divergence({plural(len(self), 'example')}, {int(self.mask.sum()):,} of "
            f"{len(self.tokens):,} tokens {verb} ({self.rate:.1%}), teacher {self.names[0]!r}, "
            f"counterfactuals {', '.join(map(repr, self.names[1:]))})"
        )

    def _repr_html_(self) -> str:
        return summary_html(
            examples=len(self),
            tokens=len(self.tokens),
            divergence_tokens=int(self.mask.sum()),
            disagreements=int((self.predicted[0] != self.tokens).sum()),
            teacher=self.names[0],
            rates=self.summary("counterfactual")["rate"].to_dict(),
        )

    def _example(self, index: int) -> ExampleDivergence:
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return ExampleDivergence(
            index=index,
            prompt=str(self.examples[index].prompt),
            names=self.names,
            tokens=tuple(row_texts(self.texts, self.tokens[span])),
            predicted=tuple(
                tuple(choice_texts(self.texts, row, self.tokens[span]))
                for row in self.predicted[:, span]
            ),
            margin=self.margin[:, span],
            logprob=self.logprob[:, span],
            divergence=self.mask[span],
            agrees=self.predicted[0, span] == self.tokens[span],
            differs=self.differs[:, span],
        )
