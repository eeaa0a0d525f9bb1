"""Exact probabilities of answers, by teacher forcing.

An answer counts for a candidate if it begins with one of its surface forms as a whole word. The
tokens of every form run after every question, on the question's keys and values:

    p(form) = prod_k p(token k | question, tokens before k) * p(the next token ends the word)

Forms that begin with the same tokens are branches of one tree, and a tree is one short pass.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from divergence_lens._utils.batching import length_batches, pad_right, shared_prefix
from divergence_lens._utils.checkpoints import Processes
from divergence_lens._utils.memory import run_halved
from divergence_lens.chat import decode, encode_completions, encode_prompts, stop_ids
from divergence_lens.data import Choice, surface_forms
from divergence_lens.divergence import read_teachers
from divergence_lens.engine import Engine, KeyValues, chunk_rows, get_engine, in_chunks
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher

# Number of stored positions that take as much memory as one position of a forward pass.
_STORED_PER_TOKEN = 4

# A shared prefix shorter than this saves less than the extra pass costs.
_SHORTEST_PREFIX = 16

# How byte-level and SentencePiece tokenizers write the space before a word.
_SPACES = frozenset("Ġ▁")


def exact_probabilities(
    model: Model,
    teacher: Teacher,
    questions: tuple[str, ...],
    candidates: tuple[str, ...],
    *,
    prefix: str = "",
    batch_tokens: int,
    accelerator: Any = None,
) -> Float64[np.ndarray, "questions candidates"]:
    """Compute the probability that an answer continues `prefix` with a form of each candidate.

    Each process of `accelerator` reads every n-th question.
    """
    tokenizer: Any = model.tokenizer
    begun = _prefix_ids(tokenizer, prefix)
    forms, owners = form_ids(tokenizer, candidates, prefix=prefix)
    prompts = [
        (*encoded.ids, *begun)
        for encoded in encode_prompts(tokenizer, questions, system_prompt=teacher.system_prompt)
    ]
    processes = Processes(accelerator)
    inputs = json.dumps([prompts, forms])
    processes.agree(hashlib.sha256(inputs.encode()).hexdigest())
    own = slice(processes.index, None, processes.count)
    events = np.zeros((len(questions), len(forms)))
    with (
        processes.together(),
        teacher.applied(model) as applied,
        get_engine(applied).packed(),
        torch.no_grad(),
    ):
        engine = get_engine(applied)
        longest = max(map(len, prompts)) + max(map(len, forms))
        if longest > engine.n_ctx:
            raise ValueError(
                f"the longest question and answer have {longest} tokens, over the context of "
                f"{engine.n_ctx}; shorten the questions, the prefix or the system prompt"
            )
        continues = continuations(tokenizer, engine.d_vocab)
        if prompts[own]:
            events[own] = form_events(engine, prompts[own], forms, continues, batch_tokens)
    processes.add_up([events])
    if np.isnan(events).any():
        question = int(np.flatnonzero(np.isnan(events).any(1))[0])
        raise ValueError(
            f"the logits behind question {question} ({questions[question]!r}) are not finite; "
            "check the model's weights, or load it in a wider dtype"
        )
    _take_off_longer(events, forms, continues)
    probabilities = np.zeros((len(questions), len(candidates)))
    for column, owner in enumerate(owners):
        probabilities[:, owner] += events[:, column]
    # Differences of nearly equal sums can be slightly negative from rounding.
    return probabilities.clip(min=0.0)


def choice_probabilities(
    model: Model,
    teacher: Teacher,
    choices: Sequence[Choice],
    candidates: tuple[str, ...],
    *,
    batch_tokens: int,
    accelerator: Any = None,
) -> Float64[np.ndarray, "questions candidates"]:
    """Compute the probability of each candidate's whole answer to each question.

    Raises:
        ValueError: A question has no answer for a candidate, and what `read_teachers` refuses.
    """
    for choice in choices:
        for name in candidates:
            if name not in choice.answers:
                raise ValueError(f"the question {choice.question!r} has no answer for {name!r}")
    tokenizer: Any = model.tokenizer
    examples = [Example(c.question, c.answers[name]) for c in choices for name in candidates]
    forced = read_teachers(
        model,
        with_ids(tokenizer, examples),
        [teacher],
        batch_tokens=batch_tokens,
        accelerator=accelerator,
    )
    # log p(answer) is the sum over its tokens, the end of the turn included.
    sums = np.add.reduceat(forced.logprob[0].astype(np.float64), forced.offsets[:-1])
    return np.exp(sums).reshape(len(choices), len(candidates))


def _prefix_ids(tokenizer: Any, prefix: str) -> tuple[int, ...]:
    """The token ids of an answer's beginning."""
    if not prefix:
        return ()
    return _without_end(encode_completions(tokenizer, [prefix])[0], stop_ids(tokenizer))


def _without_end(ids: tuple[int, ...], ends: Collection[int]) -> tuple[int, ...]:
    return ids[:-1] if ids[-1] in ends else ids


def form_ids(
    tokenizer: Any, candidates: Sequence[str], *, prefix: str = ""
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different token sequences of all forms, and the candidate that each belongs to.

    After a prefix, a form is the tokens that follow the prefix's own in "prefix form". Forms that
    the tokenizer cannot write (unknown words or letters), or only by merging their beginning with
    the prefix, are left out.
    """
    begun, ends = _prefix_ids(tokenizer, prefix), stop_ids(tokenizer)
    texts = [(form, i) for i, name in enumerate(candidates) for form in surface_forms(name)]
    encoded = encode_completions(
        tokenizer, [f"{prefix} {text}" if prefix else text for text, _ in texts]
    )
    owners: dict[tuple[int, ...], int] = {}
    for (text, owner), ids in zip(texts, encoded, strict=True):
        whole = _without_end(ids, ends)
        if whole[: len(begun)] != begun:
            continue
        bare = whole[len(begun) :]
        if decode(tokenizer, bare).strip().casefold() != text.strip().casefold():
            continue
        if owners.setdefault(bare, owner) != owner:
            raise ValueError(
                f"{candidates[owners[bare]]!r} and {candidates[owner]!r} share the answer {text!r} "
                "in this tokenizer; drop one of them"
            )
    for i, name in enumerate(candidates):
        if i not in owners.values():
            after = f" after the prefix {prefix!r}" if prefix else ""
            raise ValueError(
                f"this tokenizer cannot write {name!r} in any form "
                f"({', '.join(surface_forms(name))}){after}; give candidates= that it knows"
            )
    return list(owners), list(owners.values())


def continuations(tokenizer: Any, d_vocab: int) -> np.ndarray:
    """Return for each id whether it would continue the word at the end of an answer."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(d_vocab, len(tokenizer)))))
    special = set(tokenizer.all_special_ids)
    starts = {piece[:1] for piece in pieces}
    if starts & _SPACES:
        # Pieces that begin a word carry a mark for the space; all others continue a word.
        continuing = [_begins_within(tokenizer, piece) for piece in pieces]
    elif any(piece.startswith("##") for piece in pieces):
        continuing = [piece.startswith("##") and piece[2:3].isalnum() for piece in pieces]
    else:
        # No marks: either whole words, separated when decoded, or pieces that are concatenated.
        words = [i for i, piece in enumerate(pieces) if piece.isalpha() and i not in special][:2]
        text = tokenizer.decode(words * 2) if words else " "
        glued = not any(character.isspace() for character in text)
        continuing = [glued and piece[:1].isalnum() for piece in pieces]
    marks = np.zeros(d_vocab, dtype=bool)
    marks[: len(pieces)] = continuing
    marks[[i for i in special if i < d_vocab]] = False
    return marks


def _begins_within(tokenizer: Any, piece: str) -> bool:
    """Return whether a piece begins with a letter or digit that continues the text before it."""
    first = piece[:1]
    if first in _SPACES:
        return False
    if first.isascii():
        return first.isalnum()
    # Byte-level tokenizers write line breaks and parts of characters as letters of their own.
    return str(tokenizer.convert_tokens_to_string([piece]))[:1].isalnum()


def _take_off_longer(
    events: Float64[np.ndarray, "questions forms"],
    forms: list[tuple[int, ...]],
    continues: np.ndarray,
) -> None:
    """Turn "begins with this form" into "this is the longest form that it begins with", in place.

    The event "polar bear" is part of the event "polar" where both are forms. It is subtracted from
    the longest shorter form that contains it, whose own event was subtracted from shorter ones.
    """
    column = {ids: place for place, ids in enumerate(forms)}
    whole = events.copy()
    for ids, place in column.items():
        for length in range(len(ids) - 1, 0, -1):
            holder = column.get(ids[:length])
            if holder is not None and not continues[ids[length]]:
                events[:, holder] -= whole[:, place]
                break


def form_events(
    engine: Engine,
    prompts: list[tuple[int, ...]],
    forms: list[tuple[int, ...]],
    continues: np.ndarray,
    batch_tokens: int,
) -> Float64[np.ndarray, "questions forms"]:
    """Compute the probability that an answer begins with each form and that the word ends there.

    1. Run the tokens that all questions begin with once, and the rest of the questions as padded
       batches on those keys and values. The last hidden states give every form's first token.
    2. Run the tree of all forms on the keys and values of each question; forms that begin with the
       same tokens share them. This gives the later tokens and the end of the word. Where no token
       can continue a word (a tokenizer of whole words) and every form is one token, one padded
       batch of the whole questions is enough.
    """
    tree = _FormTree.of(forms, continues)
    lengths = np.array([len(ids) for ids in prompts])
    shared = min(shared_prefix(prompts), int(lengths.min()) - 1)
    prefix: KeyValues | None = None
    # Without a tree (small models with whole words), the prefix costs less than one more pass.
    if tree is not None and shared >= _SHORTEST_PREFIX and len(prompts) > 1:
        _, prefix = engine.prefill(torch.tensor([prompts[0][:shared]], device=engine.device))
    else:
        shared = 0
    first = torch.tensor([ids[0] for ids in forms], device=engine.device)
    events = np.zeros((len(prompts), len(forms)))

    def read(part: np.ndarray) -> None:
        rows = pad_right([prompts[question][shared:] for question in part], engine.device)
        past: KeyValues | None = None
        if tree is None:
            hidden = engine.final(rows, prefix)  # [questions, pos, d_model]
        else:
            hidden, past = engine.extend(rows, prefix)
        ends = torch.from_numpy(lengths[part] - shared - 1)
        last = hidden[torch.arange(len(part)), ends]  # [questions, d_model]
        logp = engine.unembed(last).float().log_softmax(-1)[:, first].double().cpu()
        if tree is not None and past is not None:
            # A node's position depends on the length of the question, so equal lengths run at once.
            for length in sorted(set(lengths[part].tolist())):
                group = np.flatnonzero(lengths[part] == length)
                # The keys and values of the questions take memory, too.
                size = max(1, batch_tokens // (len(tree.tokens) + length // _STORED_PER_TOKEN))
                for chosen in np.split(group, range(size, len(group), size)):
                    index = torch.from_numpy(chosen).to(engine.device)
                    logp[chosen] += _log_rest(engine, past.select(index).upto(length), tree).cpu()
        events[part] = logp.exp().numpy()

    for batch in length_batches(lengths - shared, batch_tokens):
        run_halved(batch, read)
    return events


@dataclass(frozen=True)
class _FormTree:
    """The tokens of all forms as a tree: one node for each distinct beginning of a form.

    Attributes:
        tokens: The last token of each node's beginning.
        parents: The index of each node's parent, which comes before it; -1 for first tokens.
        targets: The ids that can follow each node in a form, padded with 0.
        readings: For each form, the columns of `[nodes * (1 + children)]` to add up: the end of
            the word (column 0 of its last node) and the later tokens (other columns of the nodes
            before it). Padded with the number of columns.
        ends: 1 for the ids that end a word, otherwise 0.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    targets: Int64[np.ndarray, "nodes children"]
    readings: Int64[np.ndarray, "forms width"]
    ends: Float32[np.ndarray, " d_vocab"]

    @classmethod
    def of(cls, forms: list[tuple[int, ...]], continues: np.ndarray) -> "_FormTree | None":
        """Build the tree, or return None if the first token of each form tells all."""
        if not continues.any() and all(len(ids) == 1 for ids in forms):
            return None
        nodes = sorted({ids[:end] for ids in forms for end in range(1, len(ids) + 1)})
        place = {beginning: index for index, beginning in enumerate(nodes)}
        parents = [place.get(beginning[:-1], -1) for beginning in nodes]
        children: list[list[int]] = [[] for _ in nodes]
        for node, parent in enumerate(parents):
            if parent >= 0:
                children[parent].append(node)
        width = 1 + max(map(len, children))
        targets = np.zeros((len(nodes), width - 1), dtype=np.int64)
        column = np.zeros(len(nodes), dtype=np.int64)  # where each node is read after its parent
        for parent, members in enumerate(children):
            targets[parent, : len(members)] = [nodes[node][-1] for node in members]
            column[members] = parent * width + 1 + np.arange(len(members))
        readings = np.full((len(forms), max(map(len, forms))), len(nodes) * width)
        for row, ids in enumerate(forms):
            readings[row, 0] = place[ids] * width
            later = [column[place[ids[:end]]] for end in range(2, len(ids) + 1)]
            readings[row, 1 : len(ids)] = later
        return cls(
            tokens=tuple(beginning[-1] for beginning in nodes),
            parents=tuple(parents),
            targets=targets,
            readings=readings,
            ends=(~continues).astype(np.float32),
        )


def _log_rest(
    engine: Engine, past: KeyValues, tree: _FormTree
) -> Float64[Tensor, "questions forms"]:
    """Compute the log-probability of the rest of each form and of the word's end."""
    tokens = torch.tensor(tree.tokens, device=engine.device)
    hidden = engine.branch(tokens.expand(past.batch, -1), tree.parents, past)
    flat = rearrange(hidden, "question node d_model -> (question node) d_model")
    targets = torch.from_numpy(tree.targets).to(engine.device).repeat(past.batch, 1)
    ends = torch.from_numpy(tree.ends).to(engine.device)

    def read(rows: slice) -> Float64[Tensor, "rows columns"]:
        # softmax = exp(logits - top) / sum(exp(logits - top)), in the memory of the logits.
        logits = engine.unembed(flat[rows]).float()  # [rows, d_vocab]
        logits.sub_(logits.amax(-1, keepdim=True))
        following = logits.gather(-1, targets[rows])  # [rows, children]
        weights = logits.exp_()
        at_end = (weights @ ends).log()[:, None]  # [rows, 1]
        total = weights.sum(-1, keepdim=True).log()
        return torch.cat([at_end, following], 1).double() - total.double()

    read_rows = torch.cat(in_chunks(len(flat), chunk_rows(engine), read))
    by_question = rearrange(
        read_rows, "(question node) column -> question (node column)", node=len(tree.tokens)
    )
    padded = torch.nn.functional.pad(by_question, (0, 1))  # the added column is 0
    return padded[:, torch.from_numpy(tree.readings).to(engine.device)].sum(-1)
