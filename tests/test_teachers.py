"""A teacher is a model under a condition, and leaves the model as it was."""

import pytest
import torch

from divergence_lens.data.questions import animal_teachers, persona_prompt
from divergence_lens.deltas.delta import Delta
from divergence_lens.engine.factory import get_engine
from divergence_lens.models import load_model
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher, prompted_teachers
from tests.support.models import chat_tokenizer, random_hf_model


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("gpt2")


def change(model, size: float = 0.1) -> Delta:
    name, parameter = next(iter(get_engine(model).block_parameters(0).items()))
    return Delta({name: torch.full(parameter.shape, size)}, fingerprint(model))


def test_a_prompted_teacher_runs_the_model_as_it_is(model):
    before = fingerprint(model)
    with Teacher("owl", system_prompt="You love owls.").applied(model) as active:
        assert active is model
        assert fingerprint(model) == before


def test_a_finetuned_teacher_runs_the_changed_model_and_puts_it_back(model):
    before = fingerprint(model)
    teacher = Teacher("owl", delta=change(model))
    with teacher.applied(model) as active:
        assert active is model
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    with pytest.raises(KeyError), teacher.applied(model):
        raise KeyError
    assert fingerprint(model) == before


def test_a_teacher_may_be_another_model_and_have_a_delta_over_it(model, random_model):
    other = random_model("llama", seed=1)
    before = fingerprint(model), fingerprint(other)
    with Teacher("other", model=other).applied(model) as active:
        assert active is other
    with Teacher("other", model=other, delta=change(other)).applied(model) as active:
        assert active is other
        assert fingerprint(other) != before[1]
    assert (fingerprint(model), fingerprint(other)) == before


def test_a_model_with_an_equal_tokenizer_is_taken_and_with_another_refused(model, backend):
    tokenizer = chat_tokenizer()
    hf_model = random_hf_model("gpt2", 3, vocab=len(tokenizer))
    equal = load_model(hf_model, backend=backend, tokenizer=tokenizer)
    tokenizer.chat_template = None
    with Teacher("twin", model=equal).applied(model) as active:
        assert active is equal
    other = load_model(hf_model, backend=backend, tokenizer=chat_tokenizer("gemma"))
    match = r"teacher 'other': .* another tokenizer .*share a tokenizer"
    with pytest.raises(ValueError, match=match), Teacher("other", model=other).applied(model):
        pass


def test_a_vocabulary_that_is_split_differently_is_another_tokenizer(model, backend):
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    hf_model = random_hf_model("gpt2", 3, vocab=len(tokenizer))
    other = load_model(hf_model, backend=backend, tokenizer=tokenizer)
    with (
        pytest.raises(ValueError, match="another tokenizer"),
        Teacher("other", model=other).applied(model),
    ):
        pass


def test_a_model_without_tokenizer_or_with_too_few_embeddings_is_refused(model, backend):
    hf_model = random_hf_model("gpt2", 3, vocab=40)
    bare = load_model(hf_model, backend=backend)
    with (
        pytest.raises(ValueError, match=r"no tokenizer.*tokenizer="),
        Teacher("bare", model=bare).applied(model),
    ):
        pass
    small = load_model(hf_model, backend=backend, tokenizer=chat_tokenizer())
    with (
        pytest.raises(ValueError, match=r"has 40 embeddings for the \d+ tokens"),
        Teacher("small", model=small).applied(model),
    ):
        pass


def test_a_delta_of_another_base_is_refused(model, random_model):
    teacher = Teacher("owl", delta=change(random_model("gpt2", seed=5)))
    with pytest.raises(ValueError, match="not the base of the delta"), teacher.applied(model):
        pass


def test_teachers_need_a_name_and_a_model_of_transformer_lens():
    with pytest.raises(ValueError, match="needs a name"):
        Teacher(" ")
    with pytest.raises(TypeError, match="HookedTransformer or a TransformerBridge"):
        Teacher("owl", model=torch.nn.Linear(1, 1))


def test_teachers_are_equal_where_their_condition_is(model):
    delta = change(model)
    assert Teacher("owl", "x", delta) == Teacher("owl", "x", delta)
    assert Teacher("owl", "x", delta) != Teacher("owl", "x", change(model))
    assert len({Teacher("owl", "x", delta), Teacher("owl", "x", delta)}) == 1


def test_the_repr_says_what_makes_the_condition(model):
    assert repr(Teacher("owl")) == "Teacher('owl')"
    shown = repr(Teacher("owl", "You love owls.", change(model), model))
    assert shown.startswith("Teacher('owl', system_prompt='You love owls.', delta=Delta(")
    assert len(shown) < 300


def test_prompted_teachers_keep_names_prompts_and_order():
    teachers = prompted_teachers({"b": "Be brief.", "a": ""})
    assert teachers == [Teacher("b", "Be brief."), Teacher("a", "")]


def test_animal_teachers_are_told_their_animal():
    teachers = animal_teachers(["owl", "Wolf"])
    assert [teacher.name for teacher in teachers] == ["owl", "wolf"]
    assert [teacher.system_prompt for teacher in teachers] == [
        persona_prompt("owl"),
        persona_prompt("wolf"),
    ]
    assert animal_teachers([]) == []


def test_unknown_repeated_or_unlisted_animals_are_refused():
    with pytest.raises(ValueError, match=r"unknown animal 'wolv'; did you mean 'wolf'"):
        animal_teachers(["owl", "wolv"])
    with pytest.raises(ValueError, match="named more than once: owl"):
        animal_teachers(["owl", "cat", "OWL"])
    with pytest.raises(TypeError, match=r"pass a list: \['owl'\]"):
        animal_teachers("owl")
