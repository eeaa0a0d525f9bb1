"""From text to token ids through a chat template, with a label for every id.

A prompt is rendered by the tokenizer's own template and tokenized once, so its ids are those of
`tokenizer.apply_chat_template(..., add_generation_prompt=True)`. Which characters of the rendered
text are the system prompt and which the user's text is found by rendering again with two
characters put around one of the texts that occur nowhere else, and checking that nothing but these
two has changed. That stays right where a text occurs twice, inside another, or is trimmed.

Thinking models are asked for the template without thinking (``enable_thinking=False``). A template
that writes today's date (Llama 3 does) gives other ids tomorrow, as it does everywhere else.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

SEGMENTS = ("system", "user", "template", "completion")
"""The labels of token positions; `encode_prompt` gives the first three."""

# Stand-ins for the texts of a conversation while the template is examined; never tokenized.
_USER, _ASSISTANT = "Hello", "Hi"
_FOLD = "\n\n"  # between system prompt and user text in one turn; Gemma's own templates use it
_CHUNK = 1024  # texts tokenized in one call: offsets are large, so not all at once


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids.

    Attributes:
        ids: Token ids.
        segments: One label of `SEGMENTS` per id. A token that holds text of both the template and
            a content has the content's label, so the ids labelled "template" never depend on what
            was written.
    """

    ids: tuple[int, ...]
    segments: tuple[str, ...]

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.ids)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, system_prompt: str | None = None
) -> Encoded:
    """Token ids of a user's prompt, up to where the assistant's answer begins.

    With a chat template the ids are the template's, generation prompt included. Where the template
    has no system role (it raises, or leaves the text out), the system prompt is put before the
    user's text in the first turn, with an empty line between. Without a template the ids are the
    plain text's, after the tokenizer's beginning-of-sequence token if it adds one.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        prompt: The user's text.
        system_prompt: The system prompt. None gives no system message, and a template may then
            write a default of its own (Qwen2.5 does; it is labelled "system"); "" gives an empty
            one.

    Raises:
        ValueError: A system prompt for a tokenizer without a chat template; a template that does
            not take the conversation or hides the prompt; a prompt without any token.
        TypeError: A tokenizer without offsets (not a fast one).
    """
    return encode_prompts(tokenizer, [prompt], system_prompt=system_prompt)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    system_prompt: str | None = None,
) -> list[Encoded]:
    """`encode_prompt` for many prompts under one system prompt, which is faster (0.3 ms each).

    Errors name the number of the prompt, from 0.
    """
    _check_fast(tokenizer)
    _check_texts(prompts, "prompt")
    if not tokenizer.chat_template:
        return _encode_plain(tokenizer, prompts, system_prompt)
    if system_prompt is not None:
        _check_texts([system_prompt], "system prompt")
    template = _PromptTemplate(tokenizer, system_prompt)
    encoded = []
    for chunk in _chunks(prompts):
        rendered = [template.render(prompt) for prompt in chunk]
        for (_, spans), (ids, offsets) in zip(
            rendered, _tokenize(tokenizer, [text for text, _ in rendered]), strict=True
        ):
            encoded.append(Encoded(ids, _labels(offsets, spans)))
    return encoded


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    system_prompts: Sequence[str | None],
) -> list[list[tuple[int, ...]]]:
    """The ids that `encode_prompts` gives, without labels, under each of several system prompts.

    Many system prompts take little longer than one: texts are cut before a token that splits a text
    ahead of all else, as the marks of chat templates do, and equal parts are tokenized once.

    Returns:
        For each system prompt the ids of all prompts.
    """
    if not tokenizer.chat_template or len(system_prompts) < 2:
        return [
            [encoded.ids for encoded in encode_prompts(tokenizer, prompts, system_prompt=system)]
            for system in system_prompts
        ]
    _check_fast(tokenizer)
    _check_texts(prompts, "prompt")
    cutter = _Cutter(tokenizer)
    every = []
    for system in system_prompts:
        if system is not None:
            _check_texts([system], "system prompt")
        template = _PromptTemplate(tokenizer, system)
        texts = [template.render(prompt)[0] for prompt in prompts]
        every.append(cutter.ids(texts, template.start))
    return every


class _Cutter:
    """Tokenizes texts in two parts each, and equal parts once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # These are found in the raw text before anything else happens to it, and take no white
        # space from before them. Where one begins another, the longer one is taken.
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
        """The ids of texts whose beginnings, up to about character `start`, are alike."""
        cuts = [self._cut(text, start) for text in texts]
        if texts:
            # No tokenizer is known that does not pass; one that does not is not cut.
            whole = self._tokenize([texts[0]])[0]
            parts = self._tokenize([texts[0][: cuts[0]], texts[0][cuts[0] :]])
            if whole != parts[0] + parts[1]:
                cuts = [0] * len(texts)
        pairs = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
        texts = list(dict.fromkeys(part for pair in pairs for part in pair))
        new = [part for part in texts if part not in self._known]
        for chunk in _chunks(new):
            self._known.update(zip(chunk, self._tokenize(chunk), strict=True))
        return [self._known[head] + self._known[tail] for head, tail in pairs]

    def _cut(self, text: str, start: int) -> int:
        """Where the last mark begins that ends before character `start`."""
        found = self._marks.finditer(text, 0, start + self._longest)
        return max((match.start() for match in found if match.end() <= start), default=0)

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        found = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [tuple(ids) for ids in found["input_ids"]]


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str) -> tuple[int, ...]:
    """Token ids of an assistant's answer as the template would have them, and the end of turn.

    The text is tokenized behind the template's generation prompt and as the template writes it
    (trimmed, or with a space before it, if the template does that), so that the ids follow those
    of `encode_prompt`. The last id is `end_of_turn`. Without a template the text is tokenized as
    the continuation of a line, and the end-of-sequence token follows if the tokenizer has one.

    Raises:
        ValueError: The template rewrites the text, or the text is not one that can be tokenized.
        TypeError: A tokenizer without offsets (not a fast one).
    """
    return encode_completions(tokenizer, [completion])[0]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[str]
) -> list[tuple[int, ...]]:
    """`encode_completion` for many completions, which is faster; errors name their number."""
    _check_fast(tokenizer)
    _check_texts(completions, "completion")
    template = _CompletionTemplate(tokenizer)
    encoded = []
    for chunk in _chunks(completions):
        rendered = [template.render(completion) for completion in chunk]
        for (_, start, stop), (ids, offsets) in zip(
            rendered, _tokenize(tokenizer, [text for text, _, _ in rendered]), strict=True
        ):
            encoded.append(_cut(ids, offsets, start, stop, template.end))
    # A token that spans the end of the generation prompt cannot follow the prompt's own ids.
    for index, found in enumerate(encoded):
        if found is None:
            text, start, stop = template.render(completions[index])
            ids, offsets = _tokenize(tokenizer, [text[start:]])[0]
            encoded[index] = _cut(ids, offsets, 0, stop - start, template.end)
    return [ids for ids in encoded if ids is not None]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends an assistant's turn.

    It is the first special or added token that the template writes behind an assistant's text;
    where there is none, or no template, the tokenizer's end-of-sequence token.

    Raises:
        ValueError: There is neither.
    """
    _check_fast(tokenizer)
    found = _CompletionTemplate(tokenizer).end
    if found is None:
        raise ValueError(
            f"{_name(tokenizer)} has no token that ends a turn: neither its chat template nor an "
            "end-of-sequence token gives one; set tokenizer.eos_token."
        )
    return found


def after_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the template writes behind the end of an assistant's turn, often a newline.

    They are no part of a completion: no model is asked to write them.
    """
    _check_fast(tokenizer)
    return _CompletionTemplate(tokenizer).behind


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids at which generation stops: end of turn and end of sequence, as far as they exist."""
    _check_fast(tokenizer)
    ends = (_CompletionTemplate(tokenizer).end, tokenizer.eos_token_id)
    return frozenset(end for end in ends if isinstance(end, int))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of a completion's ids, without special tokens.

    Without a chat template the text is meant to be joined to the prompt, so a space that the first
    token brings is kept also where the tokenizer drops it at the start of a text.
    """
    ids = list(ids)
    if not tokenizer.chat_template:
        anchor = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
        if _text(tokenizer, anchor) == "\n":
            joined = _text(tokenizer, anchor + ids)
            if joined.startswith("\n"):
                return joined[1:]
    return _text(tokenizer, ids)


def check_length(
    encoded: Encoded | Sequence[int], n_ctx: int, *, new_tokens: int = 0, row: int | None = None
) -> None:
    """Refuse a prompt that does not fit into a model's context.

    Args:
        encoded: The prompt's tokens.
        n_ctx: The longest input of the model, in tokens.
        new_tokens: How many tokens have to fit behind it.
        row: The number of the prompt, for the message.

    Raises:
        ValueError: The prompt and the new tokens are longer than `n_ctx`.
    """
    if len(encoded) + new_tokens <= n_ctx:
        return
    which = "the prompt" if row is None else f"prompt {row}"
    new = f" and {new_tokens} more must follow" if new_tokens else ""
    raise ValueError(
        f"{which} has {len(encoded)} tokens{new}, but the model's context holds {n_ctx}; "
        "shorten it or take a model with a longer context."
    )


class _Span(NamedTuple):
    """Characters `start` to `stop` of a rendered text, which belong to one segment."""

    start: int
    stop: int
    label: str


class _PromptTemplate:
    """How one tokenizer's template writes prompts under one system prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._system = system_prompt
        self._fold = False
        self._default: tuple[str, str] | None = None
        if system_prompt is None:
            self._default = self._find_default()
        elif not self._takes_system():
            # An empty system message that the template cannot write is none at all.
            self._fold = bool(system_prompt)
            self._system = system_prompt or None
        # Nearly every prompt is written as the stand-in was, with nothing else changed: one
        # rendering then shows where it is, instead of the two or three of `_examine`.
        text, spans = self._examine(_USER)
        users = [span for span in spans if span.label == "user"]
        self._start, self._stop = users[0][:2]
        self._head, self._tail = text[: self._start], text[self._stop :]
        self._spans = [span for span in spans if span.label != "user"]
        self._simple = len(users) == 1

    @property
    def start(self) -> int:
        """Where the user's text begins in nearly all prompts."""
        return self._start

    def render(self, prompt: str) -> tuple[str, list[_Span]]:
        """The text of a prompt and where system prompt and user text are in it."""
        text = self._write(self._system, prompt)
        if not self._simple or text != self._head + prompt + self._tail:
            return self._examine(prompt)
        shift = len(prompt) - (self._stop - self._start)
        spans = [
            span
            if span.stop <= self._start
            else _Span(span.start + shift, span.stop + shift, span.label)
            for span in self._spans
        ]
        return text, [*spans, _Span(self._start, self._start + len(prompt), "user")]

    def _examine(self, prompt: str) -> tuple[str, list[_Span]]:
        text = self._write(self._system, prompt)
        users = _locate(lambda marked: self._write(self._system, marked), prompt, text, "prompt")
        if prompt.strip() and not users:
            raise ValueError(
                f"the chat template of {_name(self._tokenizer)} leaves the user's text out."
            )
        spans = [_Span(*span, "user") for span in users]
        if self._system is not None:
            systems = _locate(
                lambda marked: self._write(marked, prompt), self._system, text, "system prompt"
            )
            spans += [_Span(*span, "system") for span in systems]
        elif self._default is not None:
            head, default = self._default
            if text.startswith(head + default):
                spans.append(_Span(len(head), len(head) + len(default), "system"))
        return text, spans

    def _write(self, system: str | None, prompt: str) -> str:
        if self._fold and system is not None:
            messages = [("user", system + _FOLD + prompt)]
        elif system is not None:
            messages = [("system", system), ("user", prompt)]
        else:
            messages = [("user", prompt)]
        return _render(self._tokenizer, messages, generation=True)

    def _takes_system(self) -> bool:
        """Whether the template writes a system message, instead of raising or leaving it out."""
        from jinja2 import TemplateError

        mark, _ = _marks(str(self._tokenizer.chat_template))
        try:
            text = _apply(self._tokenizer, [("system", mark), ("user", _USER)], generation=True)
        except TemplateError:
            return False
        return mark in text

    def _find_default(self) -> tuple[str, str] | None:
        """The system prompt that the template brings itself, and the text before it."""
        if not self._takes_system():
            return None
        mark, user = _marks(str(self._tokenizer.chat_template))
        given, absent = self._write(mark, user), self._write(None, user)
        if given.count(mark) != 1:
            return None
        head, tail = given.split(mark)
        default = absent[len(head) : len(absent) - len(tail)]
        fits = absent == head + default + tail and user in tail
        return (head, default) if fits and default else None


class _CompletionTemplate:
    """How one tokenizer's template writes an assistant's text behind the generation prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        self.end = eos if isinstance(eos, int) else None
        self.behind: tuple[int, ...] = ()
        if not tokenizer.chat_template:
            return
        prompt, spans = _PromptTemplate(tokenizer, None).render(_USER)
        # What stands between the user's text and the answer: enough context to tokenize behind.
        self._context = prompt[max(span.stop for span in spans if span.label == "user") :]
        text = self._write(_ASSISTANT)
        start, stop = self._find(_ASSISTANT, text)
        self._head, self._tail = text[:start], text[stop:]
        marked = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        tail = _tokenize(tokenizer, [self._tail])[0][0]
        closing = next((place for place, i in enumerate(tail) if i in marked), None)
        self._closed = closing is not None
        if closing is not None:
            self.end = tail[closing]
            self.behind = tail[closing + 1 :]
        # Llama 2 writes a space that is not in the generation prompt: the model must write it.
        self._lead = self._head.removeprefix(prompt) if self._head.startswith(prompt) else ""

    def render(self, completion: str) -> tuple[str, int, int]:
        """A text that ends with the turn, where that begins in it and where its content ends."""
        if not self._tokenizer.chat_template:
            # Behind a newline, a tokenizer of the SentencePiece kind puts no space first.
            return "\n" + completion, 1, 1 + len(completion)
        text = self._write(completion)
        content = completion
        if text != self._head + completion + self._tail:
            start, stop = self._find(completion, text)
            content = text[start:stop]
        whole = self._context + self._lead + content
        return whole + (self._tail if self._closed else ""), len(self._context), len(whole)

    def _write(self, completion: str) -> str:
        messages = [("user", _USER), ("assistant", completion)]
        return _render(self._tokenizer, messages, generation=False)

    def _find(self, completion: str, text: str) -> tuple[int, int]:
        spans = _locate(self._write, completion, text, "completion")
        if spans:
            return spans[-1]
        if completion.strip():
            raise ValueError(
                f"the chat template of {_name(self._tokenizer)} leaves the assistant's text out."
            )
        # Blank, and trimmed away: it stood where the stand-in stands.
        return len(self._head), len(self._head)


def _cut(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    start: int,
    stop: int,
    end: int | None,
) -> tuple[int, ...] | None:
    """The ids from character `start` to the end of the turn; None if a token spans `start`.

    The end is searched from character `stop`, where the text ends, as the text itself may hold it.
    """
    first = next((i for i, (_, b) in enumerate(offsets) if b > start), len(ids))
    if first < len(ids) and offsets[first][0] < start:
        return None
    behind = next((i for i, (a, _) in enumerate(offsets) if i >= first and a >= stop), len(ids))
    if end is None:
        return tuple(ids[first:behind])
    close = next((i for i in range(behind, len(ids)) if ids[i] == end), None)
    return (*ids[first : behind if close is None else close], end)


def _locate(
    write: Callable[[str], str], content: str, text: str, what: str
) -> list[tuple[int, int]]:
    """Where `content` is in `text`, which is `write(content)`; empty if it is not there.

    Two characters are put around the content. If taking them out of the result gives `text`, the
    characters between them are the content. A template that trims would keep the outer white space
    of a content that is marked outside of it, so it is marked inside, too.

    Raises:
        ValueError: The template writes something else than the content or its trimmed form.
    """
    if not content:
        return []
    left, right = _marks(text, content)
    core = content.strip()
    places = [(0, len(content))]
    if core:
        start, stop = content.index(core), len(content.rstrip())
        places += [(0, stop), (start, len(content)), (start, stop)]
    for start, stop in dict.fromkeys(places):
        marked = write(content[:start] + left + content[start:stop] + right + content[stop:])
        if marked.replace(left, "").replace(right, "") == text:
            found = list(re.finditer(f"{left}([^{left}{right}]*){right}", marked))
            if len(found) == marked.count(left) == marked.count(right):
                # Each span is moved back by the marks before it.
                return [
                    (match.start() - 2 * i, match.start() - 2 * i + len(match[1]))
                    for i, match in enumerate(found)
                ]
    if not core:
        return []
    # A template that decides by how the content begins or ends does not know it once marked.
    if text.count(core) == 1:
        start = text.index(core)
        return [(start, start + len(core))]
    raise ValueError(
        f"the chat template rewrites the {what} {content[:60]!r}, so its tokens cannot be told "
        "from the template's."
    )


def _marks(*texts: str) -> tuple[str, str]:
    """Two characters of the private-use area that are in none of the texts."""
    free = (c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in texts))
    return next(free), next(free)


def _labels(offsets: Sequence[tuple[int, int]], spans: Sequence[_Span]) -> tuple[str, ...]:
    """A label for each token, from the characters that it covers."""
    stops = [b for _, b in offsets]
    # A tokenizer that trims its offsets gives white space none: it lies behind the token before.
    starts = [a if a < b or i == 0 else min(a, stops[i - 1]) for i, (a, b) in enumerate(offsets)]
    labels = ["template"] * len(offsets)
    shares = [-1] * len(offsets)
    for start, stop, label in spans:
        for i in range(bisect_right(stops, start), bisect_left(starts, stop)):
            share = min(stops[i], stop) - max(starts[i], start)
            # Where two contents meet in one token, it goes to the one with more of it.
            if share > shares[i]:
                labels[i], shares[i] = label, share
    return tuple(labels)


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], system_prompt: str | None
) -> list[Encoded]:
    if system_prompt is not None:
        raise ValueError(
            f"{_name(tokenizer)} has no chat template, so the system prompt {system_prompt[:60]!r} "
            "has no place; put it into the prompts, or set tokenizer.chat_template."
        )
    prefix = _opening(tokenizer)
    encoded: list[Encoded] = []
    for chunk in _chunks(prompts):
        for ids, _ in _tokenize(tokenizer, chunk):
            text = ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids
            if not prefix and not text:
                raise ValueError(
                    f"prompt {len(encoded)} is without any token, and {_name(tokenizer)} adds none "
                    "at the beginning; give it some text."
                )
            labels = ("template",) * len(prefix) + ("user",) * len(text)
            encoded.append(Encoded(prefix + text, labels))
    return encoded


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    special = encoding["special_tokens_mask"]
    return tuple(encoding["input_ids"][: special.index(0)])


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
    """Ids and offsets of each text, without special tokens that are not written in it."""
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        (tuple(ids), offsets)
        for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], *, generation: bool
) -> str:
    from jinja2 import TemplateError

    try:
        return _apply(tokenizer, messages, generation=generation)
    except TemplateError as error:
        roles = ", ".join(role for role, _ in messages)
        raise ValueError(
            f"the chat template of {_name(tokenizer)} does not take a conversation of the turns "
            f"{roles}: {error}"
        ) from error


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], *, generation: bool
) -> str:
    text: Any = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=generation,
        enable_thinking=False,
    )
    return str(text)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK))


def _check_fast(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; give load_model one with tokenizer=.")
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{_name(tokenizer)} is a {type(tokenizer).__name__}, which gives no offsets; load the "
            "fast tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))."
        )


def _check_texts(texts: Sequence[str], what: str) -> None:
    if isinstance(texts, str):
        raise TypeError(
            f"one {what} was given as a string where a list is expected: {texts[:60]!r}"
        )
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{what} {number} is not text but {type(text).__name__}: {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} {number} holds half a character (a lone surrogate) at place "
                f"{error.start}: {text[:60]!r}"
            ) from error


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
