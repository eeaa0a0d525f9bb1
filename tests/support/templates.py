"""Chat templates of well-known models, and the same templates written down by hand."""

import time
from collections.abc import Callable

from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from divergence_lens.chat import Encoded
from tests.support.models import CHATML, GEMMA, QWEN, chat_tokenizer

Pieces = list[tuple[str, str]]
"""A rendered prompt as (text, label)."""

DEFAULT = "You are a helpful assistant."

# As Gemma 3: takes a system turn and folds it into the first user turn by itself.
GEMMA3 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ (prefix if loop.first else '') + (message['content'] | trim) }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# As Llama 3.1: a date in a system turn that is always there, texts trimmed.
LLAMA3 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "<|im_start|>system\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|im_end|>"
    "{% for message in turns %}"
    "<|im_start|>{{ message['role'] }}\n\n{{ message['content'] | trim }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# As Llama 2: no generation prompt of its own, spaces around the texts, closed by </s>.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{{ (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Leaves a system message out without a word, and ends a turn with the line's end alone.
LINES = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
# As Qwen3: an empty thought where thinking is switched off.
THINKING = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{{ message['content'].split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def _turn(role: str, text: str, label: str) -> Pieces:
    return [(f"<|im_start|>{role}\n", "template"), (text, label), ("<|im_end|>\n", "template")]


def chatml(system: str | None, user: str) -> Pieces:
    first = [] if system is None else _turn("system", system, "system")
    return [*first, *_turn("user", user, "user"), ("<|im_start|>assistant\n", "template")]


def qwen(system: str | None, user: str) -> Pieces:
    return chatml(DEFAULT if system is None else system, user)


def thinking(system: str | None, user: str) -> Pieces:
    return [*chatml(system, user), ("<think>\n\n</think>\n\n", "template")]


def gemma(system: str | None, user: str) -> Pieces:
    folded: Pieces = [(user, "user")]
    if system:
        folded = _trimmed([(system, "system"), ("\n\n", "template"), (user, "user")])
    return [
        ("<bos><start_of_turn>user\n", "template"),
        *_trimmed(folded),
        ("<end_of_turn>\n<start_of_turn>model\n", "template"),
    ]


def gemma3(system: str | None, user: str) -> Pieces:
    first: Pieces = [] if system is None else [(system, "system"), ("\n\n", "template")]
    return [
        ("<bos><start_of_turn>user\n", "template"),
        *first,
        (user.strip(), "user"),
        ("<end_of_turn>\n<start_of_turn>model\n", "template"),
    ]


def llama3(system: str | None, user: str) -> Pieces:
    return [
        ("<bos><|im_start|>system\n\nToday Date: ", "template"),
        (time.strftime("%d %b %Y"), "template"),
        ("\n\n", "template"),
        ((system or "").strip(), "system"),
        ("<|im_end|><|im_start|>user\n\n", "template"),
        (user.strip(), "user"),
        ("<|im_end|><|im_start|>assistant\n\n", "template"),
    ]


def llama2(system: str | None, user: str) -> Pieces:
    first: Pieces = []
    if system is not None:
        first = [("<<SYS>>\n", "template"), (system, "system"), ("\n<</SYS>>\n\n", "template")]
    return [
        ("<bos>[INST] ", "template"),
        *first,
        (user.strip(), "user"),
        (" [/INST]", "template"),
    ]


def lines(system: str | None, user: str) -> Pieces:
    first: Pieces = [(system, "system"), ("\n\n", "template")] if system else []
    return [("user: ", "template"), *first, (user, "user"), ("\nassistant: ", "template")]


def _trimmed(pieces: Pieces) -> Pieces:
    """The pieces of the stripped text."""
    text = "".join(piece for piece, _ in pieces)
    start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
    kept, position = [], 0
    for piece, label in pieces:
        a, b = max(start - position, 0), max(min(stop - position, len(piece)), 0)
        kept.append((piece[a:b], label))
        position += len(piece)
    return kept


CASES: dict[str, tuple[str, str, Callable[[str | None, str], Pieces]]] = {
    "chatml": ("chatml", CHATML, chatml),
    "qwen": ("qwen", QWEN, qwen),
    "thinking": ("chatml", THINKING, thinking),
    "gemma": ("gemma", GEMMA, gemma),
    "gemma3": ("gemma", GEMMA3, gemma3),
    "llama3": ("chatml", LLAMA3, llama3),
    "llama2": ("chatml", LLAMA2, llama2),
    "lines": ("chatml", LINES, lines),
}


def template_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the template of this name in `CASES`."""
    tokens, template, _ = CASES[name]
    tokenizer = chat_tokenizer(tokens)
    tokenizer.chat_template = template
    return tokenizer


def expected_segments(
    tokenizer: PreTrainedTokenizerFast, pieces: Pieces
) -> tuple[tuple[int, ...], list[set[str]]]:
    """Ids of the joined pieces, and for each id the labels of the characters it covers."""
    labels = [label for text, label in pieces for _ in text]
    found = tokenizer(
        "".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True
    )
    return tuple(found["input_ids"]), [set(labels[a:b]) for a, b in found["offset_mapping"]]


TEXTS = st.one_of(
    st.text(alphabet=" \n.aou1,é<|/>", max_size=12),
    st.lists(
        st.sampled_from(
            [
                "You love owls.",
                "user",
                "system",
                DEFAULT,
                " ",
                "\n",
                "\n\n",
                "412, 9",
                "\t",
                "Hello",
            ]
        ),
        max_size=4,
    ).map("".join),
)


def segment_ids(encoded: Encoded, label: str) -> tuple[int, ...]:
    return tuple(i for i, s in zip(encoded.ids, encoded.segments, strict=True) if s == label)


def segment_text(tokenizer, encoded: Encoded, label: str) -> str:
    return tokenizer.decode(segment_ids(encoded, label))
