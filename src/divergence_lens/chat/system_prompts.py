"""Prompt ids under many system prompts at little more than the cost of one.

1. Render every prompt under every system prompt.
2. Cut each text before a special token that splits a text ahead of all else, as the marks of chat
   templates do, near where the user's text begins.
3. Tokenize equal parts once: the heads repeat over prompts, the tails over system prompts.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from divergence_lens.chat.conversations import Prompt, as_prompt, raw_ids
from divergence_lens.chat.prompts import PromptTemplates, encode_prompts
from divergence_lens.chat.rendering import check_fast, chunks


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    system_prompts: Sequence[str | None],
) -> list[list[tuple[int, ...]]]:
    """Return the ids of `encode_prompts`, without labels, under each system prompt.

    Returns:
        For each system prompt the ids of all prompts.
    """
    plain = any(map(raw_ids, prompts)) or len(system_prompts) < 2
    if plain or not check_fast(tokenizer).chat_template:
        return [
            [encoded.ids for encoded in encode_prompts(tokenizer, prompts, system_prompt=system)]
            for system in system_prompts
        ]
    tokenizer = check_fast(tokenizer)
    checked = [as_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    cutter = _Cutter(tokenizer)
    rows = []
    for system in system_prompts:
        templates = PromptTemplates(tokenizer, system)
        texts = [templates.render(prompt, number)[0] for number, prompt in enumerate(checked)]
        rows.append(cutter.ids(texts, templates.start))
    return rows


class _Cutter:
    """Tokenizes texts in two parts each, and equal parts once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # The tokenizer splits the raw text at these before anything else, and takes no white space
        # before them. Where one begins another, it takes the longer one.
        marks = sorted(
            (
                token.content
                for token in tokenizer.added_tokens_decoder.values()
                if not (token.normalized or token.lstrip or token.single_word)
            ),
            key=lambda mark: -len(mark),
        )
        self._longest = len(marks[0]) if marks else 0
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        self._known: dict[str, tuple[int, ...]] = {"": ()}

    def ids(self, texts: Sequence[str], start: int) -> list[tuple[int, ...]]:
        """Tokenize texts whose beginnings, up to about character `start`, are alike."""
        cuts = [self._cut(text, start) for text in texts]
        if texts:
            # All known tokenizers pass this test; the texts of one that does not are not cut.
            whole = self._tokenize([texts[0]])[0]
            parts = self._tokenize([texts[0][: cuts[0]], texts[0][cuts[0] :]])
            if whole != parts[0] + parts[1]:
                cuts = [0] * len(texts)
        pairs = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
        new = dict.fromkeys(part for pair in pairs for part in pair if part not in self._known)
        for chunk in chunks(list(new)):
            self._known.update(zip(chunk, self._tokenize(chunk), strict=True))
        return [self._known[head] + self._known[tail] for head, tail in pairs]

    def _cut(self, text: str, start: int) -> int:
        """Return where the last mark begins that ends before character `start`."""
        marks = self._marks.finditer(text, 0, start + self._longest)
        return max((mark.start() for mark in marks if mark.end() <= start), default=0)

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        encoding = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [tuple(ids) for ids in encoding["input_ids"]]
