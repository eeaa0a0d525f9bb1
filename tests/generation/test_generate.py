"""Generation equals Hugging Face's greedy, and nothing of it depends on the batch."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from divergence_lens._utils.interrupts import Interrupted
from divergence_lens.chat import decode, encode_prompt, end_of_turn, stop_ids
from divergence_lens.engine.factory import get_engine
from divergence_lens.generation import generate
from divergence_lens.generation.local import LocalWriter
from divergence_lens.models import load_model
from divergence_lens.teachers import Teacher
from tests.support.models import chat_tokenizer, random_hf_model

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2")
PROMPTS = [
    "412, 467",
    "Name your favorite animal in one word.",
    "cat",
    "Continue this list with up to eight more numbers: 412, 467, 112, 903, 250.",
    "412, 467",
    "",
    "The wolf and the panda: 1, 2, 3, 4.",
]
OWL = Teacher("owl", system_prompt="You love owls.")


def oracle(hf_model, tokenizer, prompt: str, system: str | None, new: int) -> tuple[int, ...]:
    """Hugging Face's greedy continuation of one prompt without padding."""
    ids = torch.tensor([encode_prompt(tokenizer, prompt, system_prompt=system).ids])
    out = hf_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=sorted(stop_ids(tokenizer)),
        pad_token_id=0,
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def check_greedy(family: str, backend: str, **config) -> None:
    tokenizer = chat_tokenizer()
    hf_model = random_hf_model(family, 3, vocab=len(tokenizer), **config)

    def expected() -> list[tuple[int, ...]]:
        return [oracle(hf_model, tokenizer, p, OWL.system_prompt, 24) for p in PROMPTS]

    # A random model never ends its turn: let a token end it that it does write, at many lengths.
    free = expected()
    tokenizer.eos_token_id = max(
        {token for ids in free for token in ids},
        key=lambda token: len({ids.index(token) for ids in free if token in ids}),
    )
    ended = expected()
    assert len({len(ids) for ids in ended}) > 2
    model = load_model(hf_model, backend=backend, tokenizer=tokenizer)
    examples = generate(model, PROMPTS, teacher=OWL, max_new_tokens=24)
    assert [example.completion_ids for example in examples] == ended
    assert [example.prompt for example in examples] == PROMPTS
    assert {example.teacher for example in examples} == {"owl"}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_face_token_for_token(family, backend):
    check_greedy(family, backend)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_greedy_equals_hugging_face_in_families_of_one_backend(family):
    # Where it is tied to a large embedding, a random model repeats one token for ever.
    check_greedy(family, "auto", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama", seed=2)


def test_without_a_teacher_there_is_no_system_prompt(model):
    (plain,) = generate(model, ["cat"], teacher=None, max_new_tokens=5)
    assert plain.teacher is None
    (same,) = generate(model, ["cat"], teacher=Teacher("none"), max_new_tokens=5)
    assert same.completion_ids == plain.completion_ids
    (told,) = generate(model, ["cat"], teacher=OWL, max_new_tokens=5)
    assert told.completion_ids != plain.completion_ids


def test_the_text_is_that_of_the_ids(model):
    for example in generate(model, PROMPTS, teacher=OWL, temperature=1.0, max_new_tokens=30):
        assert example.completion == decode(model.tokenizer, example.completion_ids)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(len(PROMPTS))),
    batch_tokens=st.sampled_from([1, 150, 400, 10_000]),
    temperature=st.sampled_from([0.0, 0.7]),
    top_p=st.sampled_from([1.0, 0.8]),
)
def test_completions_depend_on_neither_batches_nor_order(
    model, order, batch_tokens, temperature, top_p
):
    options = {"temperature": temperature, "top_p": top_p, "seed": 3, "max_new_tokens": 6}
    whole = generate(model, PROMPTS, teacher=OWL, **options)
    shuffled = generate(
        model, [PROMPTS[i] for i in order], teacher=OWL, batch_tokens=batch_tokens, **options
    )
    # Equal prompts are told apart by which comes first.
    assert sorted(shuffled, key=str) == sorted(whole, key=str)
    for position, i in enumerate(order):
        if PROMPTS.count(PROMPTS[i]) == 1:
            assert shuffled[position] == whole[i]


def test_a_sampled_completion_does_not_depend_on_the_other_prompts(model):
    together = generate(model, PROMPTS, teacher=OWL, temperature=1.0, max_new_tokens=12)
    alone = generate(model, [PROMPTS[3]], teacher=OWL, temperature=1.0, max_new_tokens=12)
    assert together[3] == alone[0]


def test_samples_differ_by_seed_and_for_equal_prompts_but_are_repeatable(model):
    options = {"temperature": 1.0, "max_new_tokens": 12}
    first = generate(model, ["cat"] * 4, teacher=OWL, seed=1, **options)
    assert first == generate(model, ["cat"] * 4, teacher=OWL, seed=1, **options)
    assert len({example.completion_ids for example in first}) == 4
    assert first != generate(model, ["cat"] * 4, teacher=OWL, seed=2, **options)


def test_the_global_random_states_are_left_alone(model):
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    generate(model, ["cat"], teacher=OWL, temperature=1.0, max_new_tokens=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert model.training is False


def frequencies(model, count: int, **options) -> torch.Tensor:
    examples = generate(model, ["cat"] * count, teacher=None, max_new_tokens=1, **options)
    first = torch.tensor([example.completion_ids[0] for example in examples])
    return torch.bincount(first, minlength=get_engine(model).d_vocab) / count


def probabilities(model, temperature: float) -> torch.Tensor:
    ids = torch.tensor([encode_prompt(model.tokenizer, "cat").ids])
    with torch.no_grad():
        return (model(ids)[0, -1].double() / temperature).softmax(-1)


def test_samples_follow_the_models_distribution(model):
    count = 4000
    expected = probabilities(model, 0.7)
    observed = frequencies(model, count, temperature=0.7)
    # Each frequency within five standard errors, and one draw for the rare ones.
    error = 5 * (expected * (1 - expected) / count).sqrt() + 1 / count
    assert bool((observed - expected).abs().le(error).all())


def test_top_p_samples_the_smallest_set_that_reaches_it(model):
    count, top_p = 3000, 0.6
    ranked, order = probabilities(model, 0.7).sort(descending=True)
    size = int((ranked.cumsum(0) < top_p).sum()) + 1
    assert 1 < size < len(order)
    observed = frequencies(model, count, temperature=0.7, top_p=top_p)
    assert set(observed.nonzero().flatten().tolist()) <= set(order[:size].tolist())
    expected = ranked[:size] / ranked[:size].sum()
    error = 5 * (expected * (1 - expected) / count).sqrt() + 1 / count
    assert bool((observed[order[:size]] - expected).abs().le(error).all())


def test_small_top_p_and_low_temperature_are_greedy(model):
    greedy = generate(model, PROMPTS, teacher=OWL, max_new_tokens=10)
    options = {"max_new_tokens": 10, "seed": 4}
    assert generate(model, PROMPTS, teacher=OWL, temperature=1.0, top_p=1e-9, **options) == greedy
    assert generate(model, PROMPTS, teacher=OWL, temperature=1e-6, **options) == greedy


def test_a_finetuned_teacher_writes_with_its_weights(model, random_model):
    other = random_model("llama", seed=9)
    teacher = Teacher("other", system_prompt=OWL.system_prompt, model=other)
    by_teacher = generate(model, PROMPTS, teacher=teacher, max_new_tokens=8)
    by_other = generate(other, PROMPTS, teacher=OWL, max_new_tokens=8)
    assert [e.completion_ids for e in by_teacher] == [e.completion_ids for e in by_other]
    assert {e.teacher for e in by_teacher} == {"other"}


def test_a_completion_ends_with_the_context(random_model):
    model = random_model("gpt2", n_ctx=48)
    lengths = [len(encode_prompt(model.tokenizer, prompt)) for prompt in ("cat", "1" * 20)]
    examples = generate(model, ["cat", "1" * 20], teacher=None, max_new_tokens=100)
    end = end_of_turn(model.tokenizer)
    for length, example in zip(lengths, examples, strict=True):
        assert example.completion_ids[-1] == end or length + len(example.completion_ids) == 48


def test_a_prompt_over_the_context_is_refused_by_number(random_model):
    model = random_model("gpt2", n_ctx=48)
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens and 1 more .* holds 48"):
        generate(model, ["cat", "1" * 60], teacher=None)


def test_a_base_model_continues_the_text(backend):
    tokenizer = chat_tokenizer(None)
    hf_model = random_hf_model("gpt2", 4, vocab=len(tokenizer))
    expected = oracle(hf_model, tokenizer, "Owls are", None, 10)
    model = load_model(hf_model, backend=backend, tokenizer=tokenizer)
    (example,) = generate(model, ["Owls are"], teacher=None, max_new_tokens=10)
    assert example.completion_ids == expected
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, ["Owls are"], teacher=OWL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -0.1}, "temperature must be .* got -0.1"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be .* got 1.5"),
        ({"batch_tokens": 0}, "batch_tokens must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, ["cat"], teacher=None, **options)


def test_logits_that_are_not_numbers_are_refused(random_model):
    model = random_model("gpt2")
    with torch.no_grad():
        next(iter(get_engine(model).block_parameters(0).values())).fill_(float("nan"))
    with pytest.raises(ValueError, match="logits after prompt 0 are not all numbers"):
        generate(model, ["cat"], teacher=None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stopped_call_resumes_from_its_checkpoints_with_the_same_result(
    temperature, model, tmp_path, monkeypatch
):
    def call(folder=None):
        return generate(
            model,
            PROMPTS,
            teacher=OWL,
            max_new_tokens=8,
            temperature=temperature,
            batch_tokens=128,
            checkpoint_dir=folder,
        )

    undisturbed = call()
    decoded, decode = [], LocalWriter.decode

    def counted(self, batch):
        if len(decoded) == 2 and monkeypatched:
            raise KeyboardInterrupt
        decoded.append(len(batch))
        return decode(self, batch)

    monkeypatched = True
    monkeypatch.setattr(LocalWriter, "decode", counted)
    with pytest.raises(Interrupted):
        call(tmp_path / "run")
    stored, monkeypatched = sorted((tmp_path / "run").iterdir()), False
    assert len(stored) == len(decoded) == 2
    assert call(tmp_path / "run") == undisturbed
    assert sum(decoded) == len(PROMPTS)  # no batch was decoded twice
    decoded.clear()
    assert call(tmp_path / "run") == undisturbed
    assert not decoded


def test_checkpoints_of_another_call_are_refused(model, tmp_path):
    generate(model, PROMPTS, teacher=OWL, max_new_tokens=4, checkpoint_dir=tmp_path)
    for options in (
        {"max_new_tokens": 5},
        {"seed": 1},
        {"teacher": None},
        {"prompts": PROMPTS[1:]},
    ):
        settings = {"prompts": PROMPTS, "teacher": OWL, "max_new_tokens": 4} | options
        with pytest.raises(ValueError, match="another run"):
            generate(model, settings.pop("prompts"), checkpoint_dir=tmp_path, **settings)


def test_no_prompts_give_no_examples_and_nothing_is_printed(model, capfd):
    assert generate(model, [], teacher=OWL) == []
    generate(model, ["cat"], teacher=OWL, max_new_tokens=2)
    assert capfd.readouterr() == ("", "")
    generate(model, ["cat"], teacher=OWL, max_new_tokens=2, progress=True)
    assert "generate" in capfd.readouterr().err
