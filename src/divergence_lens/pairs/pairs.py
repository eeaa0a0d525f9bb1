"""Inputs to patching: clean and corrupted token rows, aligned by position.

A pair holds one prompt under two conditions. Both rows end at the *target position*, the position
whose logits predict the answer: in a causal model, nothing after it matters. Rows of different
lengths ("owl" and "sea turtle") are aligned from the left up to the difference and from the right
after it. A differing span whose two sides have different numbers of tokens is one *unit*.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from divergence_lens._utils.indexing import Index, row_numbers
from divergence_lens._utils.validation import refuse_one_string
from divergence_lens._utils.wording import plural
from divergence_lens.chat import encode_prompt, token_labels
from divergence_lens.deltas import Delta
from divergence_lens.models import Model, check_model
from divergence_lens.pairs.alignment import (
    TEXT,
    alignments,
    pair_segments,
)
from divergence_lens.pairs.answers import (
    Answers,
    TokenRows,
    answer_ids,
    answer_tokens,
    without_padding,
)
from divergence_lens.pairs.disagreements import first_disagreements, second_teacher
from divergence_lens.pairs.inputs import (
    Rows,
    as_rows,
    both_system_prompts,
    check_count,
    check_whole_rows,
    cut_after,
    teacher_per_pair,
)
from divergence_lens.pairs.rows import PairRows
from divergence_lens.pairs.view import pairs_html
from divergence_lens.teachers import Teacher


class Pairs(PairRows):
    """Clean and corrupted rows, with the tokens that the metric compares at their end.

    Build them with `Divergence.pairs`, `Pairs.from_prompts`, `Pairs.from_tokens` or
    `Pairs.from_disagreements`. `pairs[3]`, `pairs[:4]`, `pairs[mask]` and `pairs[[0, 2]]` select
    pairs, and always return `Pairs`.

    Attributes:
        clean: Token ids of each clean row, on the CPU; the last one is the target position.
        corrupted: Token ids of each corrupted row; the last one is its target position.
        answers: `[pairs, tokens]`, the tokens that the clean run is expected to predict after the
            target position: one, or several. `NO_TOKEN` fills shorter rows on the right, and all
            of the row of a pair without an answer.
        foils: `[pairs, foil_tokens]`, the tokens that the corrupted run is expected to predict.
        segments: For each clean row one name per position, of `PAIR_SEGMENTS`: `bias` where a
            system prompt differs between the sides, `divergence` at the target position.
        alignment: For each clean row and position, the corresponding corrupted position, or -1
            inside a unit. `columns` gives the units.
        clean_teacher: The teacher of the clean run; its delta or model, if it has one, is applied.
        corrupted_teacher: The teacher of the corrupted run.
        labels: For each clean row one string per token, for axes and tables.
        corrupted_labels: For each corrupted row one string per token.
        answer_labels: For each answer one string per token, which shows how it was tokenized.
        foil_labels: For each foil one string per token.
        metadata: Metadata of the `Divergence` that the pairs were built from; patching compares
            its model with the one that it patches.
        targets: `[pairs]`, the target position of both rows of each pair where tokens follow it
            (`whole_rows=True`); None where every row ends at its target.
        cut: Whether tokens after a target position were left out; a model that attends in both
            directions would read them.

    Raises:
        ValueError: If the fields do not fit each other, an answer equals its foil, or the two
            runs of a pair are the same.
    """

    @classmethod
    def from_tokens(
        cls,
        clean: Rows,
        corrupted: Rows,
        *,
        answers: TokenRows | None = None,
        foils: TokenRows | None = None,
        target_position: Sequence[int] | Int64[Tensor, " pairs"] | None = None,
        corrupted_target_position: Sequence[int] | Int64[Tensor, " pairs"] | None = None,
        whole_rows: bool = False,
        pad_id: int | None = None,
        segments: Sequence[Sequence[str]] | None = None,
        alignment: Sequence[Sequence[int] | None] | None = None,
        clean_teacher: Sequence[Teacher | None] | Teacher | None = None,
        corrupted_teacher: Sequence[Teacher | None] | Teacher | None = None,
        tokenizer: Any = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> "Pairs":
        """Build pairs from token ids.

        Args:
            clean: Rows of token ids, as one `[rows, pos]` tensor or one sequence per row.
            corrupted: Rows of the other side; their lengths may differ from the clean rows'.
            answers: For each pair a token id or a sequence of token ids, which follow the target
                position; None for metrics that need none, such as `kl` or your own.
            foils: For each pair a token id or a sequence of them, or None.
            target_position: Position in each clean row whose logits predict the answer; the last
                token if not given. The row is cut after it.
            corrupted_target_position: Target position in each corrupted row. If not given, the last
                token, or `target_position` where the two rows have equal lengths.
            whole_rows: Whether the tokens after the target position are part of the rows, for a
                model that attends in both directions. Both rows of a pair then need equal lengths
                and one target.
            pad_id: If given, this id is dropped from the right end of every row.
            segments: One name per position of each clean row, as returned by `chat.encode_prompt`
                (longer rows are cut like the tokens). `system` and `text` become `bias` where the
                two sides differ. All `text` if not given.
            alignment: For each pair, one corrupted position per clean position (after the rows are
                cut), or -1 for a token in a differing span that is patched as one unit; None for
                a pair that the library aligns. A span that is empty on one side takes in the
                token on its left.
            clean_teacher: One teacher for all pairs, or one per pair.
            corrupted_teacher: One teacher for all pairs, or one per pair.
            tokenizer: Decodes the labels; without it they are the ids.
            metadata: Stored with the pairs.

        Returns:
            The pairs, in the order given.

        Raises:
            ValueError: If counts differ, a row is empty, a target lies outside its row or in its
                padding, an answer equals its foil, two runs are identical, or an alignment does
                not fit its rows.
        """
        left, right = as_rows(clean, pad_id, "clean"), as_rows(corrupted, pad_id, "corrupted")
        if len(left) != len(right):
            raise ValueError(
                f"clean has {len(left)} rows and corrupted has {len(right)}; they come in pairs"
            )
        if target_position is not None and corrupted_target_position is None:
            check_count("target_position", len(target_position), len(left))
            same = [len(a) == len(b) for a, b in zip(left, right, strict=True)]
            corrupted_target_position = [
                int(target_position[i]) if equal else len(right[i]) - 1
                for i, equal in enumerate(same)
            ]
        n = len(left)
        ends = cut_after(left, target_position, "clean")
        corrupted_ends = cut_after(right, corrupted_target_position, "corrupted")
        targets = [len(row) - 1 for row in ends]
        cut = [*map(len, (*left, *right))] != [*map(len, (*ends, *corrupted_ends))]
        if whole_rows and alignment is not None:
            raise ValueError(
                "alignment cannot be given with whole_rows=True, whose rows have equal lengths and "
                "are aligned position by position"
            )
        if whole_rows:
            check_whole_rows(left, right, ends, corrupted_ends)
        else:
            left, right = ends, corrupted_ends
        answer_rows = answer_tokens(answers, n, "answers")  # [pairs, tokens]
        foil_rows = answer_tokens(foils, n, "foils")  # [pairs, tokens]
        if segments is None:
            segments = [[TEXT] * len(row) for row in left]
        check_count("segments", len(segments), n)
        aligned = alignments(left, right, alignment)
        return cls(
            clean=left,
            corrupted=right,
            answers=answer_rows,
            foils=foil_rows,
            segments=tuple(
                pair_segments(i, segments[i], left[i], right[i], aligned[i], target=targets[i])
                for i in range(n)
            ),
            alignment=aligned,
            clean_teacher=teacher_per_pair(clean_teacher, n, "clean_teacher"),
            corrupted_teacher=teacher_per_pair(corrupted_teacher, n, "corrupted_teacher"),
            labels=tuple(token_labels(tokenizer, row.tolist()) for row in left),
            corrupted_labels=tuple(token_labels(tokenizer, row.tolist()) for row in right),
            answer_labels=tuple(
                token_labels(tokenizer, ids) for ids in without_padding(answer_rows)
            ),
            foil_labels=tuple(token_labels(tokenizer, ids) for ids in without_padding(foil_rows)),
            metadata=metadata or {},
            targets=torch.tensor(targets) if whole_rows else None,
            cut=cut and not whole_rows,
        )

    @classmethod
    def from_prompts(
        cls,
        model: Model,
        *,
        clean: Sequence[str],
        corrupted: Sequence[str] | None = None,
        answers: Answers | None = None,
        foils: Answers | None = None,
        system_prompt: str | None = None,
        corrupted_system_prompt: str | None = None,
        clean_teacher: Teacher | None = None,
        corrupted_teacher: Teacher | None = None,
        alignment: Sequence[Sequence[int] | None] | None = None,
        chat: bool = True,
    ) -> "Pairs":
        """Build pairs from texts; the answer follows the prompt.

        The sides may differ in their text, in their system prompt, in their weights, or in all:
        `clean_teacher=Teacher("base"), corrupted_teacher=Teacher("tuned", model=other)` compares
        two checkpoints on the same texts.

        Args:
            model: Its tokenizer and chat template encode the prompts.
            clean: One user message per pair, or the plain text if `chat` is False.
            corrupted: Prompts of the other side; the clean texts if not given.
            answers: One text per pair, of one token or more; or a token id, or a sequence of ids.
                None for metrics that need none, such as `kl` or your own. A text is tokenized in
                its context, right after the prompt: as the template writes an assistant's text,
                or without a template as the continuation of the prompt, with a space between two
                words ("is" and "Paris"; see `answer_labels` for the tokens).
            foils: Like `answers`; an answer and its foil may differ in their numbers of tokens.
            system_prompt: System prompt of the clean side, and of the corrupted side unless
                `corrupted_system_prompt` is given.
            corrupted_system_prompt: System prompt of the corrupted side.
            clean_teacher: Teacher of the clean side: its system prompt and its weights, if it has
                them. Use either teachers or the two system prompts above.
            corrupted_teacher: Teacher of the corrupted side.
            alignment: As in `from_tokens`; positions count the tokens of the encoded rows.
            chat: Whether to apply the model's chat template, if it has one. With False the text
                is tokenized without a template, with the special tokens that the tokenizer adds.

        Returns:
            The pairs, in the order given.

        Raises:
            ValueError: If counts differ, an answer holds an unknown token, merges with the prompt
                or is tokenized differently on the two sides, a system prompt is given without a
                chat template or together with a teacher, a teacher's model has another tokenizer,
                or the pairs are not valid.
        """
        check_model(model)
        tokenizer: Any = model.tokenizer
        given = {"clean": clean, "corrupted": corrupted, "answers": answers, "foils": foils}
        for name, texts in given.items():
            refuse_one_string(texts, name)
        corrupted = clean if corrupted is None else corrupted
        if len(clean) != len(corrupted):
            raise ValueError(f"clean has {len(clean)} prompts and corrupted has {len(corrupted)}")
        system_prompts = both_system_prompts(
            model, system_prompt, corrupted_system_prompt, clean_teacher, corrupted_teacher
        )
        if not chat and system_prompts != (None, None):
            raise ValueError(
                "a system prompt needs the chat template; leave chat=True or drop the prompt"
            )

        def encoded(prompt: str, system: str | None) -> tuple[list[int], list[str]]:
            if chat:
                row = encode_prompt(tokenizer, prompt, system_prompt=system)
                return list(row.ids), list(row.segments)
            ids = list(tokenizer(prompt)["input_ids"])
            return ids, [TEXT] * len(ids)

        left, right = (
            [encoded(prompt, system) for prompt in prompts]
            for prompts, system in zip((clean, corrupted), system_prompts, strict=True)
        )
        contexts = None if chat and tokenizer.chat_template else (clean, corrupted)
        return cls.from_tokens(
            [ids for ids, _ in left],
            [ids for ids, _ in right],
            answers=answer_ids(tokenizer, answers, contexts, "answer"),
            foils=answer_ids(tokenizer, foils, contexts, "foil"),
            segments=[names for _, names in left],
            alignment=alignment,
            clean_teacher=clean_teacher,
            corrupted_teacher=corrupted_teacher,
            tokenizer=tokenizer,
        )

    @classmethod
    @torch.no_grad()
    def from_disagreements(
        cls,
        model_a: Model,
        model_b: Model | Delta,
        rows: Rows,
        *,
        start: int = 1,
        batch_rows: int = 32,
    ) -> "Pairs":
        """Build pairs at the first position of each row where two models choose different tokens.

        Args:
            model_a: Its greedy choice is the answer.
            model_b: Its greedy choice is the foil; or a delta over `model_a`.
            rows: Token ids; both models read the same row.
            start: The first token that may count, as a position in the row.
            batch_rows: The maximum number of rows run at once.

        Returns:
            One pair for each row with a disagreement, cut before that token. Both sides hold the
            same prefix; the corrupted teacher has the weights of `model_b`. They fit `cross_patch`.

        Raises:
            ValueError: If `start` is not positive, a row is not longer than it, the models'
                tokenizers differ, or they agree everywhere.
        """
        second = second_teacher(model_b)
        disagreements = list(
            first_disagreements(model_a, second, rows, start=start, batch_rows=batch_rows)
        )
        if not disagreements:
            raise ValueError(f"the two models choose the same tokens in all {len(rows)} rows")
        prefixes, answers, foils = (list(column) for column in zip(*disagreements, strict=True))
        return cls.from_tokens(
            prefixes,
            prefixes,
            answers=answers,
            foils=foils,
            corrupted_teacher=second,
            tokenizer=model_a.tokenizer,
        )

    def __getitem__(self, index: Index) -> "Pairs":
        """Select pairs by number, slice, boolean mask or list of numbers, in that order.

        Raises:
            IndexError: If a number is out of range, or a mask has another length.
            ValueError: If nothing is selected.
        """
        chosen = row_numbers(index, len(self), "pair")
        if not chosen:
            raise ValueError(f"the index selects none of the {len(self)} pairs")
        return Pairs(
            clean=tuple(self.clean[i] for i in chosen),
            corrupted=tuple(self.corrupted[i] for i in chosen),
            answers=answer_tokens(self.answers[chosen], len(chosen), "answers"),
            foils=answer_tokens(self.foils[chosen], len(chosen), "foils"),
            segments=tuple(self.segments[i] for i in chosen),
            alignment=tuple(self.alignment[i] for i in chosen),
            clean_teacher=tuple(self.clean_teacher[i] for i in chosen),
            corrupted_teacher=tuple(self.corrupted_teacher[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            corrupted_labels=tuple(self.corrupted_labels[i] for i in chosen),
            answer_labels=tuple(self.answer_labels[i] for i in chosen),
            foil_labels=tuple(self.foil_labels[i] for i in chosen),
            metadata=self.metadata,
            targets=None if self.targets is None else self.targets[chosen],
            cut=self.cut,
        )

    def __repr__(self) -> str:
        """The number of pairs and of spans of unequal length, the longest row, and the teachers."""
        names = {t.name for t in (*self.clean_teacher, *self.corrupted_teacher) if t is not None}
        among = f", teachers {', '.join(sorted(names))}" if names else ""
        longest = max(len(row) for row in self.clean)
        tokens = max(map(len, (*self.answer_labels, *self.foil_labels)))
        answers = f", answers of up to {tokens} tokens" if tokens > 1 else ""
        unlike = sum(bool(self.units(i)) for i in range(len(self)))
        spans = f", {unlike} with differing spans of unequal length" if unlike else ""
        size = f"{plural(len(self), 'pair')} of up to {plural(longest, 'token')}"
        return f"Pairs({size}{spans}{answers}{among})"

    def _repr_html_(self) -> str:
        marked = [self.differs(i) for i in range(min(len(self), 5))]
        for row, target in zip(marked, self.target_position.tolist(), strict=False):
            row[target] = True
        answers = (self.answer_labels[:5], self.foil_labels[:5])
        return pairs_html(len(self), self.labels[:5], self.segments[:5], marked, answers)


def check_pairs(pairs: object) -> None:
    """Refuse anything but pairs, such as a list of prompts.

    Raises:
        TypeError: Names its type and the ways to build pairs.
    """
    if not isinstance(pairs, Pairs):
        raise TypeError(
            f"pairs is a {type(pairs).__name__}; build them with Pairs.from_prompts, "
            "Pairs.from_tokens or the method pairs() of a Divergence"
        )
