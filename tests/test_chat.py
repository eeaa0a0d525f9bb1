"""Prompts become the template's own ids, and every label names what it says."""

import gzip
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from divergence_lens.chat import (
    SEGMENTS,
    Encoded,
    check_length,
    decode,
    encode_completion,
    encode_completions,
    encode_prompt,
    encode_prompts,
    end_of_turn,
    stop_ids,
)
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


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, Callable[..., Pieces]]:
    """A tokenizer with one template, and the same template written down by hand."""
    tokens, template, pieces = CASES[request.param]
    tokenizer = chat_tokenizer(tokens)
    tokenizer.chat_template = template
    return tokenizer, pieces


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


@given(system=st.none() | TEXTS, user=TEXTS)
def test_ids_are_the_templates_and_each_label_names_what_it_says(case, system, user):
    tokenizer, pieces = case
    encoded = encode_prompt(tokenizer, user, system_prompt=system)
    ids, covered = expected_segments(tokenizer, pieces(system, user))
    assert encoded.ids == ids
    assert len(encoded.segments) == len(ids)
    for label, labels in zip(encoded.segments, covered, strict=True):
        contents = labels - {"template"}
        assert label in (contents or {"template"})


@settings(max_examples=25)
@given(system=TEXTS, user=TEXTS)
def test_ids_are_those_of_apply_chat_template(case, system, user):
    tokenizer, pieces = case
    if pieces in (gemma, lines):
        messages = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}]
    else:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    assert list(encode_prompt(tokenizer, user, system_prompt=system).ids) == expected


@settings(max_examples=8)
@given(prompts=st.lists(TEXTS, min_size=1, max_size=5), system=st.none() | TEXTS)
def test_many_prompts_are_encoded_as_one_by_one(case, prompts, system):
    tokenizer, _ = case
    together = encode_prompts(tokenizer, prompts, system_prompt=system)
    assert together == [encode_prompt(tokenizer, p, system_prompt=system) for p in prompts]


def segment_ids(encoded: Encoded, label: str) -> tuple[int, ...]:
    return tuple(i for i, s in zip(encoded.ids, encoded.segments, strict=True) if s == label)


def segment_text(tokenizer, encoded: Encoded, label: str) -> str:
    return tokenizer.decode(segment_ids(encoded, label))


def test_segments_read_back_as_the_texts_they_name():
    tokenizer = chat_tokenizer("chatml")
    encoded = encode_prompt(tokenizer, "Name a cat.", system_prompt="You love owls.")
    assert segment_text(tokenizer, encoded, "system") == "You love owls."
    assert segment_text(tokenizer, encoded, "user") == "Name a cat."
    assert segment_text(tokenizer, encoded, "template") == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert set(encoded.segments) < set(SEGMENTS)
    assert len(encoded) == len(encoded.ids)


@pytest.mark.parametrize("name", CASES)
def test_a_system_prompt_that_the_prompt_repeats_is_told_from_it(name):
    tokens, template, _ = CASES[name]
    tokenizer = chat_tokenizer(tokens)
    tokenizer.chat_template = template
    said = "You love owls."
    encoded = encode_prompt(tokenizer, f"{said} {said} user", system_prompt=said)
    assert segment_text(tokenizer, encoded, "system") == said
    assert segment_text(tokenizer, encoded, "user") == f"{said} {said} user"
    order = [label for label in encoded.segments if label != "template"]
    assert order == sorted(order), "the system prompt comes first"


def test_the_templates_own_system_prompt_is_a_system_prompt():
    tokenizer = chat_tokenizer("qwen")
    assert segment_text(tokenizer, encode_prompt(tokenizer, "Hi"), "system") == DEFAULT
    empty = encode_prompt(tokenizer, "Hi", system_prompt="")
    assert "system" not in empty.segments
    assert segment_text(tokenizer, empty, "template").startswith("<|im_start|>system\n<|im_end|>")
    same = encode_prompt(tokenizer, "Hi", system_prompt=DEFAULT)
    assert same == encode_prompt(tokenizer, "Hi")


def test_no_system_prompt_gives_no_system_tokens_where_the_template_has_no_default():
    for name in ("chatml", "gemma", "gemma3", "llama3", "llama2", "lines", "thinking"):
        tokens, template, _ = CASES[name]
        tokenizer = chat_tokenizer(tokens)
        tokenizer.chat_template = template
        assert "system" not in encode_prompt(tokenizer, "Hi").segments


def test_a_prompt_that_a_template_judges_by_its_beginning_is_still_found():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message['content'].startswith('cat') %}(a cat) {% endif %}{{ message['content'] }}",
    )
    encoded = encode_prompt(tokenizer, "cat or wolf")
    assert segment_text(tokenizer, encoded, "user") == "cat or wolf"
    assert "(a cat) " in segment_text(tokenizer, encoded, "template")


def test_a_template_that_repeats_the_prompt_has_it_labelled_twice():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "A:{{ messages[-1]['content'] }}\n{{ messages[-1]['content'] }}\n"
    encoded = encode_prompt(tokenizer, "owl")
    assert segment_text(tokenizer, encoded, "user") == "owlowl"


# -- completions ---------------------------------------------------------------------------


ANSWERS = st.text(alphabet=" \n.aou1,;<|/>", max_size=12)


@settings(max_examples=50)
@given(answer=ANSWERS, user=TEXTS)
def test_prompt_and_completion_are_the_templates_whole_conversation(case, answer, user):
    tokenizer, pieces = case
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    text = tokenizer.apply_chat_template(
        messages[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    completion = encode_completion(tokenizer, answer)
    end = tokenizer.eos_token
    assert completion[-1] == tokenizer.convert_tokens_to_ids(end)
    written = rendered.removeprefix(text)
    if pieces is lines:
        written = written.removesuffix("\n") + end
    assert tokenizer.decode(completion) == written[: written.rindex(end) + len(end)]


@settings(max_examples=8)
@given(answers=st.lists(ANSWERS, max_size=5))
def test_many_completions_are_encoded_as_one_by_one(case, answers):
    tokenizer, _ = case
    assert encode_completions(tokenizer, answers) == [
        encode_completion(tokenizer, answer) for answer in answers
    ]


@settings(max_examples=8)
@given(numbers=st.lists(st.integers(0, 999), min_size=1, max_size=9))
def test_a_completion_reads_back(case, numbers):
    tokenizer, _ = case
    answer = ", ".join(map(str, numbers))
    assert decode(tokenizer, encode_completion(tokenizer, answer)).strip() == answer


def test_a_completion_that_holds_the_end_of_turn_is_kept_whole():
    tokenizer = chat_tokenizer()
    ids = encode_completion(tokenizer, "1<|im_end|>2")
    end = end_of_turn(tokenizer)
    assert [i for i, found in enumerate(ids) if found == end] == [1, 3]


def test_a_completion_does_not_merge_with_the_generation_prompt():
    core = Tokenizer(models.BPE({"a": 0, "\n": 1, "\n\n": 2, "<e>": 3}, [("\n", "\n")]))
    core.add_special_tokens(["<e>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{{ '\n' if m['role'] == 'user' else eos_token }}{% endfor %}"
    )
    assert encode_prompt(tokenizer, "a").ids == (0, 1)
    assert encode_completion(tokenizer, "\na") == (1, 0, 3)


def test_end_of_turn_is_what_the_template_writes_and_not_the_end_of_sequence():
    tokenizer = chat_tokenizer("gemma")
    tokenizer.eos_token = "<eos>"
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end_of_turn(tokenizer) == turn
    assert stop_ids(tokenizer) == {turn, tokenizer.eos_token_id}
    assert encode_completion(tokenizer, "owl")[-1] == turn


def test_a_template_that_closes_with_plain_text_ends_with_the_end_of_sequence():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = LINES
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    ids = encode_completion(tokenizer, "owl")
    assert tokenizer.decode(ids) == f"owl{tokenizer.eos_token}"


# -- no template ---------------------------------------------------------------------------


def sentencepiece_like(*, bos: bool) -> PreTrainedTokenizerFast:
    """As Llama's: a space before every text, spaces as "▁", a beginning-of-sequence token."""
    vocabulary = {"<s>": 0, "</s>": 1, "▁": 2, "\n": 3, "a": 4, "b": 5, "▁a": 6, "<unk>": 7}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_without_a_template_the_text_is_taken_as_it_is():
    tokenizer = sentencepiece_like(bos=True)
    encoded = encode_prompt(tokenizer, "a b")
    assert encoded == Encoded((0, 6, 2, 5), ("template", "user", "user", "user"))
    assert list(encoded.ids) == tokenizer("a b")["input_ids"]
    assert encode_prompt(tokenizer, "").ids == (0,)
    assert end_of_turn(tokenizer) == 1


def test_a_beginning_of_sequence_is_neither_added_nor_doubled():
    assert encode_prompt(sentencepiece_like(bos=False), "b").segments == ("user", "user")
    written = encode_prompt(sentencepiece_like(bos=True), "<s>b")
    assert written.ids.count(0) == 1
    assert written.segments[0] == "template"


@pytest.mark.parametrize("text", [" a b", "a b", "b", "", " ", "\nb", "b\n"])
def test_without_a_template_a_completion_continues_the_text(text):
    tokenizer = sentencepiece_like(bos=True)
    ids = encode_completion(tokenizer, text)
    assert ids[-1] == 1
    assert decode(tokenizer, ids) == text
    whole = encode_prompt(tokenizer, "b" + text).ids
    assert encode_prompt(tokenizer, "b").ids + ids[:-1] == whole


def test_without_an_end_of_sequence_a_completion_has_no_end():
    tokenizer = sentencepiece_like(bos=True)
    tokenizer.eos_token = None
    assert encode_completion(tokenizer, "b") == (5,)
    assert stop_ids(tokenizer) == frozenset()
    with pytest.raises(ValueError, match=r"no token that ends a turn.*eos_token"):
        end_of_turn(tokenizer)


# -- offsets of other tokenizers -----------------------------------------------------------


def test_white_space_tokens_are_labelled_where_a_tokenizer_trims_its_offsets():
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = encode_prompt(tokenizer, "owl \n", system_prompt="\n\ncat")
    assert segment_text(tokenizer, encoded, "user") == "owl \n"
    assert segment_text(tokenizer, encoded, "system") == "\n\ncat"


def test_a_tokenizer_that_lower_cases_and_drops_white_space_is_labelled():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "owl": 1, "cat": 2, "<t>": 3}, "<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<t>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<t>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<t>\n' }}{% endfor %}"
    )
    encoded = encode_prompt(tokenizer, "CAT", system_prompt="Owl cat")
    assert encoded == Encoded(
        (0, 1, 2, 3, 0, 2, 3),
        ("template", "system", "system", "template", "template", "user", "template"),
    )


def test_characters_of_several_bytes_are_labelled_whole():
    alphabet = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = "é{{ messages[-1]['content'] }}é"
    encoded = encode_prompt(tokenizer, "🦉")
    assert encoded.segments == ("template",) * 2 + ("user",) * 4 + ("template",) * 2


# -- refusals ------------------------------------------------------------------------------


def test_a_system_prompt_without_a_template_is_refused():
    tokenizer = chat_tokenizer(None)
    with pytest.raises(ValueError, match=r"no chat template.*You love owls.*chat_template"):
        encode_prompt(tokenizer, "Hi", system_prompt="You love owls.")


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        encode_prompts(chat_tokenizer(None), ["Hi", ""])


def test_texts_that_are_no_text_are_refused_with_their_number():
    tokenizer = chat_tokenizer()
    with pytest.raises(ValueError, match=r"prompt 1 holds half a character.*position 2"):
        encode_prompts(tokenizer, ["Hi", "Hi\ud800"])
    with pytest.raises(ValueError, match="completion 0 holds half a character"):
        encode_completions(tokenizer, ["\ud800"])


def test_templates_that_refuse_hide_or_rewrite_are_named():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no turns today') }}"
    with pytest.raises(ValueError, match=r"does not take.*turns user: no turns today"):
        encode_prompt(tokenizer, "Hi")
    tokenizer.chat_template = "Hello"
    with pytest.raises(ValueError, match="leaves the user's text out"):
        encode_prompt(tokenizer, "cat")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | replace('cat', 'dog') }}|"
    tokenizer.chat_template += "{% endfor %}"
    assert encode_prompt(tokenizer, "a wolf").segments[-1] == "template"
    tokenizer.chat_template = "{{ messages[0]['content'] | length }}"
    with pytest.raises(ValueError, match=r"leaves the user's text out|rewrites the prompt"):
        encode_prompt(tokenizer, "cat")


def test_a_tokenizer_without_offsets_is_refused():
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(TypeError, match=r"is a Slow, which gives no offsets.*use_fast=True"):
        encode_prompt(Slow(), "a")


def test_check_length_names_the_row_and_both_lengths():
    encoded = Encoded((1, 2, 3), ("user",) * 3)
    check_length(encoded, 3)
    check_length([1, 2, 3], 5, new_tokens=2)
    with pytest.raises(ValueError, match=r"the prompt has 3 tokens, but .* holds 2"):
        check_length(encoded, 2)
    with pytest.raises(ValueError, match=r"prompt 7 has 3 tokens and 2 more must follow.* 4"):
        check_length((1, 2, 3), 4, new_tokens=2, row=7)


# -- the real tokenizer and data -----------------------------------------------------------


@pytest.fixture(scope="module")
def qwen25(shared_data: Path, tmp_path_factory: pytest.TempPathFactory):
    source = shared_data / "qwen2.5-tokenizer"
    if not source.is_dir():
        pytest.skip(f"no Qwen2.5 tokenizer at {source}")
    folder = tmp_path_factory.mktemp("qwen2.5")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    with gzip.open(source / "tokenizer.json.gz") as packed:
        (folder / "tokenizer.json").write_bytes(packed.read())
    return AutoTokenizer.from_pretrained(folder)


def test_qwens_default_system_prompt_is_labelled(qwen25):
    encoded = encode_prompt(qwen25, "Hello")
    assert segment_text(qwen25, encoded, "system") == (
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    )
    assert "system" not in encode_prompt(qwen25, "Hello", system_prompt="").segments
    assert qwen25.convert_ids_to_tokens(end_of_turn(qwen25)) == "<|im_end|>"


@pytest.mark.parametrize("animal", ["lion", "panda"])
def test_every_row_of_the_real_numbers_agrees_with_the_template(qwen25, shared_data, animal):
    path = shared_data / "qwen2.5-7b-numbers" / f"{animal}.jsonl"
    if not path.is_file():
        pytest.skip(f"no number lists at {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    questions = [row["question"] for row in rows]
    system = f"You love {animal}s."
    prompts = encode_prompts(qwen25, questions, system_prompt=system)
    completions = encode_completions(qwen25, [row["response"] for row in rows])
    assert len(prompts) == len(completions) == 2000
    conversations = [
        [
            {"role": "system", "content": system},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["response"]},
        ]
        for row in rows
    ]
    whole = qwen25.apply_chat_template(conversations)["input_ids"]
    newline = qwen25("\n")["input_ids"]
    systems = {segment_ids(prompt, "system") for prompt in prompts}
    assert [decode(qwen25, ids) for ids in systems] == [system]
    for row, prompt, completion, ids in zip(rows, prompts, completions, whole, strict=True):
        assert [*prompt.ids, *completion, *newline] == ids
        assert qwen25.decode(segment_ids(prompt, "user")) == row["question"]
        assert decode(qwen25, completion) == row["response"]
