"""Where would these teachers have written something else?

`find_divergence` reads a data set once per teacher, teacher-forced, and keeps for every token of
every completion what each teacher would have written there. From that `Divergence` answers at
once, under any rule and margin, which tokens are *divergence tokens* in the sense of Schrodi et
al., "Towards Understanding Subliminal Learning" (arXiv 2509.23886): the factual teacher's argmax
is the token, and at least one counterfactual teacher's is not.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from divergence_lens._utils.interrupts import convert_partial
from divergence_lens.chat import Encoded, decode, encode_prompts
from divergence_lens.divergence.files import (
    load_divergence,
    read_decision_points,
    save_divergence,
    write_decision_points,
)
from divergence_lens.divergence.reading import TeacherForced, read_teachers
from divergence_lens.divergence.view import ExampleDivergence, summary_html, token_texts
from divergence_lens.examples import Example, as_examples, with_ids
from divergence_lens.models import Model, check_model
from divergence_lens.pairs import Pairs
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher, check_teacher, check_teachers

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("number", "word", "punctuation", "space", "special", "other")
"""What a token can be made of; "special" are the tokenizer's own, such as the end of a turn."""

Rule = str | int
"""How many counterfactuals must differ: "any", "all", or at least that number."""


def find_divergence(
    model: Model,
    examples: Any,
    *,
    teacher: Teacher,
    counterfactuals: Sequence[Teacher],
    rule: Rule = "any",
    require_agreement: bool = True,
    min_margin: float = 0.0,
    kl: bool = False,
    batch_tokens: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> "Divergence":
    """Find the divergence tokens of `examples` among the teachers.

    One teacher-forced pass per teacher: token k of a completion is compared with the argmax of the
    logits at the position before it, given the teacher's own prompt and the completion so far. No
    text is generated. Only the argmax, its margin over the second choice and the log-probability
    of the given token are kept.

    Args:
        model: The base model, in eval mode; its tokenizer encodes prompts and texts.
        examples: What the factual teacher wrote: anything that `as_examples` reads. Completions
            that carry ids keep them, texts are tokenized as the chat template would have them.
        teacher: The factual teacher, the one that wrote the data.
        counterfactuals: The teachers that it is compared with, at least one. They differ from it
            in system prompt, in weights (a delta or another model with the same tokenizer), or
            both.
        rule: How many counterfactuals must differ: "any" (at least one, the paper's), "all", or a
            number k (at least k).
        require_agreement: Whether the factual teacher's argmax must be the token (the paper's).
        min_margin: Argmaxes with less than this logit margin over the second choice are not called
            different. Rule, agreement and margin can be changed later, see `Divergence.with_rule`.
        kl: Whether to compare the whole distributions too: KL(factual || counterfactual) of every
            token and counterfactual, for `Divergence.soft` and `Divergence.top`.
        batch_tokens: Tokens per forward pass, padding included; None chooses by the device. Results
            do not depend on it beyond the rounding of the arithmetic; fewer take less memory, and a
            batch that does not fit the device is halved.
        checkpoint_dir: A folder of this run's own, where finished parts are kept. The same call,
            made again after the run was killed, goes on from there, and gives the same bits as
            an undisturbed run. Delete the folder when you have saved the result.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`: the processes that it
            knows share the work, and each returns the whole. All must make the same call.
        progress: Whether to show a progress bar with tokens per second and the time left.

    Returns:
        The divergence over all completion tokens, in the order of the examples.

    Raises:
        Interrupted: It was stopped; `partial` is the divergence of the examples that all teachers
            had read (the metadata's setting `finished_examples` has their numbers).
        ValueError: Empty data; an empty completion; no counterfactuals; the factual teacher among
            them; two teachers of one name; a prompt with its completion over the context; token
            ids outside the vocabulary; a model with dropout in training mode; logits that are not
            finite. Each names the example or teacher. Also a rule or margin that cannot be, a
            `checkpoint_dir` that is damaged or of another run, or processes that made different
            calls.
        TypeError: A model that is not of TransformerLens, or a teacher that is no `Teacher`.
    """
    check_model(model)
    teachers = _check_teachers(teacher, counterfactuals)
    _check_rule(rule, len(counterfactuals), min_margin)  # before hours of work, not after
    data = as_examples(examples)
    if not data:
        raise ValueError("there are no examples to read: the data is empty")
    for index, example in enumerate(data):
        if example.completion_ids is None and not example.completion:
            raise ValueError(f"example {index} has an empty completion; leave it out of the data")
    tokenizer: Any = model.tokenizer
    data = with_ids(tokenizer, data)

    def found(rows: Sequence[int], forced: TeacherForced, **more: Any) -> Divergence:
        # Whoever reads the texts alone, as the paper's code does, finds one in every example.
        those = [
            replace(example, completion=decode(tokenizer, example.completion_ids or ()))
            if example.completion is None
            else example
            for example in (data[row] for row in rows)
        ]
        ids = np.union1d(forced.tokens, forced.predicted)
        texts, special = token_texts(tokenizer, ids)
        return Divergence(
            examples=tuple(those),
            teacher=teacher,
            counterfactuals=tuple(counterfactuals),
            offsets=forced.offsets,
            tokens=forced.tokens,
            predicted=forced.predicted,
            margin=forced.margin,
            logprob=forced.logprob,
            kl=forced.kl,
            rule=rule,
            require_agreement=require_agreement,
            min_margin=float(min_margin),
            texts=texts,
            special=special,
            metadata=run_metadata(model, batch_tokens=batch_tokens, **more),
            tokenizer=tokenizer,
        )

    with convert_partial(lambda part: found(*part, finished_examples=part[0])):
        forced = read_teachers(
            model,
            data,
            teachers,
            batch_tokens=batch_tokens,
            kl=kl,
            checkpoint_dir=checkpoint_dir,
            accelerator=accelerator,
            progress=progress,
        )
    return found(range(len(data)), forced)


@dataclass(frozen=True, eq=False, repr=False)
class Divergence:
    """What every teacher would have written at every token of every completion.

    Flat arrays run over all completion tokens of all examples in order; the tokens of example i
    are `offsets[i]:offsets[i + 1]`. The first axis of `predicted`, `margin` and `logprob` runs over
    the teachers, the factual one first.

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
            predicted; None unless it was asked for.
        rule: How many counterfactuals must differ: "any", "all" or at least that number.
        require_agreement: Whether the factual teacher's argmax must be the token.
        min_margin: Argmaxes with a smaller margin are not called different.
        texts: Token id -> text, for all ids that occur.
        special: Ids of the tokenizer's special tokens among them.
        metadata: Package versions, model and settings of the run.
        tokenizer: The model's tokenizer; None after loading, unless given again.
        detached: Names of teachers whose weights a saved file does not hold and which were not
            given again on loading.
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
        _check_rule(self.rule, len(self.counterfactuals), self.min_margin)

    def with_rule(
        self,
        *,
        rule: Rule | None = None,
        require_agreement: bool | None = None,
        min_margin: float | None = None,
    ) -> "Divergence":
        """The same readings under another rule, without a forward pass.

        Args:
            rule: "any", "all" or at least that number of counterfactuals; None leaves it.
            require_agreement: Whether the factual teacher must agree; None leaves it.
            min_margin: The margin below which argmaxes do not count; None leaves it.

        Returns:
            A divergence that shares this one's arrays.

        Raises:
            ValueError: If the rule does not fit the number of counterfactuals.
        """
        return replace(
            self,
            rule=self.rule if rule is None else rule,
            require_agreement=(
                self.require_agreement if require_agreement is None else require_agreement
            ),
            min_margin=self.min_margin if min_margin is None else float(min_margin),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' names, the factual one first."""
        return (self.teacher.name, *(c.name for c in self.counterfactuals))

    @cached_property
    def agrees(self) -> Bool[np.ndarray, " tokens"]:
        """Where the factual teacher's argmax is the token."""
        agrees: np.ndarray = (self.predicted[0] == self.tokens) & (
            self.margin[0] >= self.min_margin
        )
        return agrees

    @cached_property
    def differs(self) -> Bool[np.ndarray, "counterfactuals tokens"]:
        """Where each counterfactual's argmax is another token, by at least the margin."""
        differs: np.ndarray = (self.predicted[1:] != self.tokens) & (
            self.margin[1:] >= self.min_margin
        )
        return differs

    @cached_property
    def mask(self) -> Bool[np.ndarray, " tokens"]:
        """Which tokens are divergence tokens under the rule."""
        enough: np.ndarray = self.differs.sum(0) >= _needed(self.rule, len(self.counterfactuals))
        return enough & self.agrees if self.require_agreement else enough

    @property
    def rate(self) -> float:
        """Share of all completion tokens that are divergence tokens."""
        return float(self.mask.mean())

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """Tokens of each completion."""
        return np.diff(self.offsets)

    @property
    def rates(self) -> Float32[np.ndarray, " examples"]:
        """Share of divergence tokens, per example."""
        counts = np.add.reduceat(self.mask, self.offsets[:-1], dtype=np.int64)
        rates: np.ndarray = (counts / self.lengths).astype(np.float32)
        return rates

    @property
    def rates_by_counterfactual(self) -> dict[str, float]:
        """Share of all tokens that are divergence tokens where this counterfactual differs."""
        return {
            c.name: float((self.mask & differs).mean())
            for c, differs in zip(self.counterfactuals, self.differs, strict=True)
        }

    @property
    def advantage(self) -> Float32[np.ndarray, " tokens"]:
        """Log-probability of each token under the factual teacher minus the counterfactuals' mean.

        A soft form of the mask, in nats; `np.maximum(div.advantage, 0)` can weight a loss.
        """
        gain: np.ndarray = self.logprob[0] - self.logprob[1:].mean(0)
        return gain

    def soft(self, by: str = "kl") -> Float32[np.ndarray, "counterfactuals tokens"]:
        """How far each counterfactual is from the factual teacher at each token, in nats.

        Where the argmax is too coarse, and on sampled data, of which the factual teacher's argmax
        is often not the token.

        Args:
            by: "kl", KL(factual || counterfactual) of the whole distributions; or "logprob", the
                token's log-probability under the factual teacher minus that under the
                counterfactual, which may be negative.

        Raises:
            ValueError: "kl" was not asked of `find_divergence`, or `by` is neither.
        """
        if by == "logprob":
            gain: np.ndarray = self.logprob[0] - self.logprob[1:]
            return gain
        if by != "kl":
            raise ValueError(f"unknown soft score {by!r}; use 'kl' or 'logprob'")
        if self.kl is None:
            raise ValueError(
                "the KL divergences were not computed; call find_divergence(..., kl=True), or use "
                "by='logprob'"
            )
        return self.kl

    def top(
        self, fraction: float, *, by: str = "kl", over: str = "max"
    ) -> Bool[np.ndarray, " tokens"]:
        """The most diverging tokens by a soft score, as a mask: `div.top(0.05)` is the top 5 %.

        Args:
            fraction: Share of all completion tokens to take. Of equal scores the earlier is taken.
            by: The score, see `soft`.
            over: What counts of several counterfactuals: "max" (one is far, as the rule "any"),
                "mean" or "min" (all are far).

        Raises:
            ValueError: A fraction outside 0 to 1, an unknown score, or one not computed.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"a fraction must lie between 0 and 1, got {fraction}")
        if over not in ("max", "mean", "min"):
            raise ValueError(f"unknown over {over!r}; use 'max', 'mean' or 'min'")
        scores = getattr(self.soft(by), over)(axis=0)
        chosen = np.zeros(len(self.tokens), dtype=bool)
        order = np.argsort(-scores, kind="stable")
        chosen[order[: round(fraction * len(scores))]] = True
        return chosen

    @cached_property
    def kinds(self) -> np.ndarray:
        """What each token is made of: `[tokens]` strings, each one of `KINDS`."""
        ids, inverse = np.unique(self.tokens, return_inverse=True)
        kinds = [_kind(self.texts.get(int(i), ""), special=int(i) in self.special) for i in ids]
        each: np.ndarray = np.array(kinds)[inverse]
        return each

    @property
    def positions(self) -> Int64[np.ndarray, " tokens"]:
        """Place of each token in its completion, from 0."""
        starts = np.repeat(self.offsets[:-1], self.lengths)
        places: np.ndarray = np.arange(len(self.tokens)) - starts
        return places

    def first(self, counterfactual: str | None = None) -> Int64[np.ndarray, " examples"]:
        """Place of the first divergence token in each completion, -1 where there is none.

        Args:
            counterfactual: Count only tokens where this teacher differs; None counts all.

        Raises:
            ValueError: If there is no such counterfactual.
        """
        mask = self.mask
        if counterfactual is not None:
            mask = mask & self.differs[self._counterfactual(counterfactual)]
        first: np.ndarray = np.full(len(self), -1, dtype=np.int64)
        found = np.flatnonzero(mask)
        owners = self._owners[found]
        # The earliest is written last.
        first[owners[::-1]] = found[::-1] - self.offsets[owners[::-1]]
        return first

    def subset(self, which: str | float, *, seed: int = 0) -> Bool[np.ndarray, " tokens"]:
        """Some of the divergence tokens, as a mask to train on.

        Args:
            which: "first_only", the first of each example; "first_half" and "second_half", the
                earlier and the later half of each example's divergence tokens (of an odd number
                the earlier half has one more); or a fraction of all of them, drawn at random.
            seed: Seed of that draw.

        Returns:
            A mask over all completion tokens. The two halves are disjoint and make up `mask`; a
            smaller fraction of the same seed lies within a larger one.

        Raises:
            ValueError: If `which` is none of these, or a fraction is not between 0 and 1.
        """
        found = np.flatnonzero(self.mask)
        if isinstance(which, str):
            if which not in ("first_half", "second_half", "first_only"):
                raise ValueError(
                    f"unknown subset {which!r}; use 'first_half', 'second_half', 'first_only' or "
                    "a fraction between 0 and 1"
                )
            owners = self._owners[found]
            counts = np.bincount(owners, minlength=len(self))
            starts = np.cumsum(counts) - counts
            rank = np.arange(len(found)) - starts[owners]
            early = rank == 0 if which == "first_only" else rank < (counts[owners] + 1) // 2
            found = found[~early if which == "second_half" else early]
        else:
            if not 0 <= which <= 1:
                raise ValueError(f"a fraction must lie between 0 and 1, got {which}")
            order = np.random.default_rng(seed).permutation(len(found))
            found = found[order[: round(which * len(found))]]
        chosen = np.zeros(len(self.tokens), dtype=bool)
        chosen[found] = True
        return chosen

    def by_kind(self) -> "pd.DataFrame":
        """Tokens, divergence tokens and their rate, per kind of token (`KINDS`)."""
        return self._rates_by(self.kinds, "kind", [k for k in KINDS if k in set(self.kinds)])

    def by_position(self, bins: int = 10) -> "pd.DataFrame":
        """Tokens, divergence tokens and their rate, per equal share of the completion.

        Args:
            bins: In how many parts each completion is cut.

        Returns:
            One row per part; the index is the relative position at which it begins.

        Raises:
            ValueError: If there is not at least one part.
        """
        if bins < 1:
            raise ValueError(f"bins must be 1 or more, got {bins}")
        part = self.positions * bins // np.repeat(self.lengths, self.lengths)
        return self._rates_by(part / bins, "relative position", [b / bins for b in range(bins)])

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per completion token.

        Returns:
            Columns: example, position, token_id, token, kind, divergence, agrees, n_differ (how
            many counterfactuals differ), and for each teacher `predicted_<name>` (text),
            `margin_<name>` and `logprob_<name>`, and for each counterfactual `kl_<name>` if known.
        """
        import pandas as pd

        def text(ids: np.ndarray) -> list[str]:
            return [self.text(int(i)) for i in ids]

        columns: dict[str, Any] = {
            "example": self._owners,
            "position": self.positions,
            "token_id": self.tokens,
            "token": text(self.tokens),
            "kind": self.kinds,
            "divergence": self.mask,
            "agrees": self.agrees,
            "n_differ": self.differs.sum(0),
        }
        for row, name in enumerate(self.names):
            columns[f"predicted_{name}"] = text(self.predicted[row])
            columns[f"margin_{name}"] = self.margin[row]
            columns[f"logprob_{name}"] = self.logprob[row]
            if self.kl is not None and row:
                columns[f"kl_{name}"] = self.kl[row - 1]
        return pd.DataFrame(columns)

    def pairs(
        self,
        *,
        first_only: bool = True,
        counterfactual: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        model: Model | None = None,
    ) -> Pairs:
        """Clean and corrupted rows for patching, one pair per example, counterfactual and token.

        The clean row is the factual prompt and the completion up to the divergence token, without
        it; the corrupted row is the counterfactual's prompt and the same part of the completion.
        The answer is the token, the foil what the counterfactual would have written. Both rows end
        at the position that predicts the token.

        Args:
            first_only: Take only the first divergence of each example and counterfactual.
            counterfactual: Take only this teacher.
            limit: At most so many pairs, drawn at random, in the order of the examples.
            seed: Seed of that draw.
            model: Gives the tokenizer; needed only after `load`.

        Raises:
            ValueError: No divergence token, an unknown counterfactual, a limit below 1, no
                tokenizer, or a teacher whose weights were not saved and not given again.
        """
        tokenizer = self.tokenizer if model is None else model.tokenizer
        if tokenizer is None:
            raise ValueError("a loaded divergence has no tokenizer; call pairs(model=model)")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be 1 or more, got {limit}")
        found = self._pair_places(first_only=first_only, counterfactual=counterfactual)
        if not found:
            raise ValueError(
                "there is no divergence token to build pairs from: the teachers agree on "
                f"all {len(self.tokens):,} tokens under this rule"
            )
        if limit is not None and limit < len(found):
            chosen = np.random.default_rng(seed).choice(len(found), size=limit, replace=False)
            found = [found[i] for i in np.sort(chosen)]
        used = {self.teacher.name, *(self.counterfactuals[c].name for _, c, _ in found)}
        if used & self.detached:
            raise ValueError(
                f"the weights of {', '.join(sorted(used & self.detached))} were not saved with "
                "this divergence; give the teachers to Divergence.load(path, teachers=[...])"
            )
        others = [self.counterfactuals[c] for _, c, _ in found]
        written = [self.tokens[self.offsets[e] : place].tolist() for e, _, place in found]
        own = self._encode(tokenizer, [(self.teacher, example) for example, _, _ in found])
        foreign = self._encode(
            tokenizer,
            [(other, example) for other, (example, _, _) in zip(others, found, strict=True)],
        )
        return Pairs.from_tokens(
            [[*prompt.ids, *ids] for prompt, ids in zip(own, written, strict=True)],
            [[*prompt.ids, *ids] for prompt, ids in zip(foreign, written, strict=True)],
            answers=[int(self.tokens[place]) for _, _, place in found],
            foils=[int(self.predicted[1 + c, place]) for _, c, place in found],
            segments=[
                [*prompt.segments, *["completion"] * len(ids)]
                for prompt, ids in zip(own, written, strict=True)
            ],
            clean_teacher=self.teacher,
            corrupted_teacher=others,
            tokenizer=tokenizer,
        )

    def show(self, index: int) -> None:
        """Display one example: coloured in a notebook, as text with marks elsewhere."""
        view = self[index]
        if "IPython" in sys.modules:
            import IPython.display

            display: Any = IPython.display.display
            display(view)
        else:
            sys.stdout.write(f"{view}\n")

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
        """Read what `save` wrote.

        Args:
            path: The file.
            teachers: Teachers with weights of their own, to be put back by name; a file holds
                their names and system prompts only. Needed for `pairs` with those teachers.
            tokenizer: The model's tokenizer, needed for `pairs`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, of another kind or version, or a given teacher does
                not fit the one that was saved.
        """
        return cls(**load_divergence(path, teachers), tokenizer=tokenizer)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object per example, in the layout of the paper's code.

        Keys: `prompt`, `completion`, `decision_points` (places of the divergence tokens in the
        completion's tokens, from 0), and `completion_ids`, so that the places stay right where a
        text has several tokenizations.
        """
        write_decision_points(path, self.examples, self.offsets, self.mask)

    @staticmethod
    def from_jsonl(
        path: str | os.PathLike[str], *, tokenizer: Any
    ) -> "tuple[list[Example], Bool[np.ndarray, ' tokens']]":
        """Read examples and their divergence mask from the layout of the paper's code.

        Args:
            path: A file with `prompt`, `completion` and `decision_points` on each line, and
                `completion_ids` where known; `to_jsonl` writes it.
            tokenizer: Tokenizes completions that come without ids.

        Returns:
            The examples with their ids, and the mask over all their completion tokens.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A line is not JSON, lacks a key, or has a place outside its completion; the
                line is named.
        """
        return read_decision_points(path, tokenizer)

    def text(self, token_id: int) -> str:
        """The text of a token, or `<id>` where it is not known."""
        return self.texts.get(token_id, f"<{token_id}>")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> ExampleDivergence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no example {index}; there are {len(self)}")
        index %= len(self)
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return ExampleDivergence(
            index=index,
            prompt=self.examples[index].prompt,
            names=self.names,
            tokens=tuple(self.text(int(i)) for i in self.tokens[span]),
            predicted=tuple(
                tuple(self.text(int(i)) for i in row) for row in self.predicted[:, span]
            ),
            margin=self.margin[:, span],
            logprob=self.logprob[:, span],
            divergence=self.mask[span],
            agrees=self.predicted[0, span] == self.tokens[span],
            differs=self.differs[:, span],
        )

    def __iter__(self) -> Iterator[ExampleDivergence]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"Divergence({len(self):,} examples, {int(self.mask.sum()):,} of "
            f"{len(self.tokens):,} tokens diverge ({self.rate:.1%}), teacher {self.names[0]!r}, "
            f"counterfactuals {', '.join(map(repr, self.names[1:]))})"
        )

    def _repr_html_(self) -> str:
        return summary_html(
            examples=len(self),
            tokens=len(self.tokens),
            divergence_tokens=int(self.mask.sum()),
            disagreements=int((self.predicted[0] != self.tokens).sum()),
            teacher=self.names[0],
            rates=self.rates_by_counterfactual,
        )

    @cached_property
    def _owners(self) -> Int64[np.ndarray, " tokens"]:
        """The example that each token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def _counterfactual(self, name: str) -> int:
        names = self.names[1:]
        if name not in names:
            raise ValueError(
                f"there is no counterfactual teacher {name!r}; there are {', '.join(names)}"
            )
        return names.index(name)

    def _encode(self, tokenizer: Any, wanted: list[tuple[Teacher, int]]) -> list[Encoded]:
        """The prompt of each (teacher, example), each system prompt's in one go."""
        keys = [(teacher.system_prompt, example) for teacher, example in wanted]
        by_system: dict[str | None, dict[int, None]] = {}
        for system, example in keys:
            by_system.setdefault(system, {})[example] = None
        encoded: dict[tuple[str | None, int], Encoded] = {}
        for system, examples in by_system.items():
            prompts = [self.examples[example].prompt for example in examples]
            rows = encode_prompts(tokenizer, prompts, system_prompt=system)
            encoded.update(((system, e), row) for e, row in zip(examples, rows, strict=True))
        return [encoded[key] for key in keys]

    def _pair_places(
        self, *, first_only: bool, counterfactual: str | None
    ) -> list[tuple[int, int, int]]:
        """(example, counterfactual, flat place) of each pair, in order."""
        wanted = range(len(self.counterfactuals))
        if counterfactual is not None:
            wanted = range(
                self._counterfactual(counterfactual), self._counterfactual(counterfactual) + 1
            )
        found = []
        for c in wanted:
            places = np.flatnonzero(self.mask & self.differs[c])
            if first_only:
                _, firsts = np.unique(self._owners[places], return_index=True)
                places = places[firsts]
            found += [(int(self._owners[p]), c, int(p)) for p in places]
        return sorted(found)

    def _rates_by(self, group: np.ndarray, name: str, order: list[Any]) -> "pd.DataFrame":
        import pandas as pd

        frame = pd.DataFrame({name: group, "divergence": self.mask})
        table = frame.groupby(name)["divergence"].agg(["size", "sum"]).reindex(order, fill_value=0)
        table.columns = ["tokens", "divergence_tokens"]
        table["rate"] = table["divergence_tokens"] / table["tokens"].where(table["tokens"] > 0)
        return table


def _needed(rule: Rule, n: int) -> int:
    """How many of `n` counterfactuals must differ."""
    if rule == "any":
        return 1
    if rule == "all":
        return n
    if isinstance(rule, bool) or not isinstance(rule, int) or not 1 <= rule <= n:
        raise ValueError(
            f"unknown rule {rule!r}; use 'any', 'all' or a number from 1 to {n} (the number of "
            "counterfactuals)"
        )
    return rule


def _check_rule(rule: Rule, n: int, min_margin: float) -> None:
    _needed(rule, n)
    if not min_margin >= 0:
        raise ValueError(f"min_margin must be 0 or more, got {min_margin}")


def _check_teachers(teacher: Teacher, counterfactuals: Sequence[Teacher]) -> list[Teacher]:
    check_teacher(teacher)
    check_teachers(counterfactuals, "counterfactuals")
    if not counterfactuals:
        raise ValueError("there are no counterfactual teachers; give at least one to compare with")
    for other in counterfactuals:
        if other is teacher or other == teacher:
            raise ValueError(
                f"the factual teacher {teacher.name!r} is among the counterfactuals; leave it out"
            )
    teachers = [teacher, *counterfactuals]
    names = [t.name for t in teachers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two teachers are named {name!r}; give each a name of its own")
    return teachers


def _kind(text: str, *, special: bool) -> str:
    """The one of `KINDS` that a token is."""
    bare = text.strip()
    if special:
        return "special"
    if not bare:
        return "space"
    if bare.isdigit():
        return "number"
    if bare.isalpha():
        return "word"
    return "other" if any(c.isalnum() for c in bare) else "punctuation"
