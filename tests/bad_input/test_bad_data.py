"""Bad models, teachers, prompts, examples and divergences: one exact error each.

The tests of each package have more; these tables collect what a user meets in one place.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

import divergence_lens as dl
from divergence_lens.data import TrainingData, paraphrase_by
from divergence_lens.evaluation.entanglement import entangled_numbers
from divergence_lens.study.steering import steering_vectors
from divergence_lens.tiny import tiny_folder
from tests.support.bad_input import Case, check_case, find, from_tokens
from tests.support.models import chat_tokenizer, random_hf_model

CASES: list[Case] = [
    # -- models
    ("a model of another type", lambda k: dl.load_model(7), TypeError, "source is a int"),
    (
        "an unknown class",
        lambda k: dl.load_model("tiny", backend="fast"),
        ValueError,
        "backend is 'fast'; use",
    ),
    (
        "a folder that is none",
        lambda k: dl.load_model("./nowhere"),
        FileNotFoundError,
        r"no folder './nowhere'",
    ),
    (
        "a folder without a configuration",
        lambda k: dl.load_model(k.file("nothing")),
        FileNotFoundError,
        "has no config.json",
    ),
    (
        "a folder with an empty configuration",
        lambda k: dl.load_model(k.file("model")),
        ValueError,
        "cannot load",
    ),
    (
        "a name that no hub has",
        lambda k: dl.load_model("no-such-model-anywhere"),
        ValueError,
        "a shipped name is one of tiny, tiny-qwen2",
    ),
    (
        "a plain Hugging Face model",
        lambda k: dl.generate(
            AutoModelForCausalLM.from_pretrained(tiny_folder("tiny")), ["a"], teacher=k.owl
        ),
        TypeError,
        "pass it through divergence_lens.load_model",
    ),
    (
        "a model without a chat template, told something",
        lambda k: dl.generate(
            dl.load_model(
                random_hf_model("llama", vocab=len(chat_tokenizer(None))),
                tokenizer=chat_tokenizer(None),
            ),
            ["a"],
            teacher=k.owl,
        ),
        ValueError,
        "chat template",
    ),
    # -- teachers and tasks
    ("an unknown animal", lambda k: dl.animal_teachers(["oowl"]), ValueError, "did you mean 'owl'"),
    (
        "animals as one string",
        lambda k: dl.animal_teachers("owl"),
        TypeError,
        r"pass a list: \['owl'\]",
    ),
    (
        "an animal twice",
        lambda k: dl.animal_teachers(["owl", "owl"]),
        ValueError,
        "named more than once: owl",
    ),
    ("a teacher without a name", lambda k: dl.Teacher(" "), ValueError, "needs a name, got ' '"),
    (
        "a teacher whose model is none",
        lambda k: dl.Teacher("a", model=torch.nn.Identity()),
        TypeError,
        "got Identity",
    ),
    (
        "a teacher with another tokenizer",
        lambda k: find(
            k,
            counterfactuals=[
                dl.Teacher(
                    "other",
                    model=dl.load_model(
                        random_hf_model("gpt2", vocab=len(chat_tokenizer())),
                        tokenizer=chat_tokenizer(),
                    ),
                )
            ],
        ),
        ValueError,
        "predicts ids below 164; check that it was written with the same tokenizer",
    ),
    ("no prompts to make", lambda k: dl.number_prompts(-1, seed=0), ValueError, "-1"),
    ("an unknown persona", lambda k: dl.persona_prompt("unicorn"), ValueError, "unicorn"),
    # -- generation
    (
        "prompts as one string",
        lambda k: dl.generate(k.model, "a list", teacher=k.owl),
        TypeError,
        "pass a list",
    ),
    (
        "a negative temperature",
        lambda k: dl.generate(k.model, ["a"], teacher=k.owl, temperature=-1.0),
        ValueError,
        "temperature",
    ),
    (
        "a share of the probability above one",
        lambda k: dl.generate(k.model, ["a"], teacher=k.owl, temperature=1.0, top_p=1.5),
        ValueError,
        "top_p",
    ),
    (
        "no new tokens",
        lambda k: dl.generate(k.model, ["a"], teacher=k.owl, max_new_tokens=0),
        ValueError,
        "max_new_tokens",
    ),
    (
        "a prompt over the context",
        lambda k: dl.generate(k.model, ["owl " * 300], teacher=k.owl),
        ValueError,
        "the model's context holds 128",
    ),
    # -- examples and their files
    ("no data", lambda k: find(k, []), ValueError, "the data is empty"),
    ("an empty file", lambda k: find(k, k.file("empty.jsonl")), ValueError, "empty"),
    (
        "a file that is not there",
        lambda k: dl.load_examples(k.file("no.jsonl")),
        FileNotFoundError,
        "no.jsonl",
    ),
    ("broken JSON", lambda k: dl.load_examples(k.file("broken.jsonl")), ValueError, "line 2"),
    (
        "a row that is a list",
        lambda k: dl.load_examples(k.file("list.jsonl")),
        TypeError,
        "line 1",
    ),
    ("JSON without end", lambda k: dl.load_examples(k.file("deep.jsonl")), ValueError, "line 1"),
    ("a row without the keys", lambda k: find(k, k.file("keys.jsonl")), ValueError, "line 2"),
    (
        "a prompt that is a number",
        lambda k: dl.load_examples(k.file("number.jsonl")),
        TypeError,
        "prompt",
    ),
    (
        "ids that are no integers",
        lambda k: dl.load_examples(k.file("ids.jsonl")),
        TypeError,
        "completion_ids",
    ),
    (
        "an unknown kind of file",
        lambda k: dl.load_examples(k.file("data.csv")),
        ValueError,
        "csv",
    ),
    (
        "a Parquet file that is none",
        lambda k: dl.load_examples(k.file("not.parquet")),
        ValueError,
        "not.parquet",
    ),
    ("data of another type", lambda k: find(k, 3), TypeError, "int"),
    (
        "an empty completion",
        lambda k: find(k, [dl.Example("a", "")]),
        ValueError,
        "example 0 has an empty completion",
    ),
    (
        "ids outside the vocabulary",
        lambda k: find(k, [dl.Example("a", "b", completion_ids=(10**6,))]),
        ValueError,
        "token id 1000000, but the model of teacher 'owl' predicts ids below 1,728",
    ),
    (
        "a completion over the context",
        lambda k: find(k, [dl.Example("a", "owl " * 200)]),
        ValueError,
        "context",
    ),
    # -- divergence
    ("no counterfactuals", lambda k: find(k, counterfactuals=[]), ValueError, "counterfactual"),
    (
        "the teacher among its counterfactuals",
        lambda k: find(k, counterfactuals=[k.owl]),
        ValueError,
        "owl",
    ),
    (
        "two teachers of one name",
        lambda k: find(k, counterfactuals=[k.cat, dl.Teacher("cat", system_prompt="Hm.")]),
        ValueError,
        "cat",
    ),
    (
        "one counterfactual without a list",
        lambda k: find(k, counterfactuals=k.cat),
        TypeError,
        r"counterfactuals is one Teacher; write counterfactuals=\[...\]",
    ),
    (
        "a counterfactual that is a name",
        lambda k: find(k, counterfactuals=[k.cat, "dog"]),
        TypeError,
        r"counterfactuals\[1\] is 'dog', not a Teacher",
    ),
    (
        "counterfactuals as one string",
        lambda k: find(k, counterfactuals="cat"),
        TypeError,
        "counterfactuals is one string; pass a list",
    ),
    (
        "a teacher that is a name",
        lambda k: find(k, teacher="owl"),
        TypeError,
        r"teacher is 'owl', not a Teacher; create one with Teacher\(name, .* or animal_teachers\(",
    ),
    (
        "a name that writes",
        lambda k: dl.generate(k.model, ["a"], teacher="owl"),
        TypeError,
        "teacher is 'owl', not a Teacher",
    ),
    (
        "a teacher and prompts that are swapped",
        lambda k: dl.generate(k.model, k.owl, teacher=["a"]),
        TypeError,
        "teacher is a list, not a Teacher",
    ),
    (
        "a name that is asked",
        lambda k: dl.preference(k.model, target="owl", teacher="owl"),
        TypeError,
        "teacher is 'owl', not a Teacher",
    ),
    (
        "a name that does the task",
        lambda k: dl.task_quality(k.model, k.examples, teacher="owl"),
        TypeError,
        "teacher is 'owl', not a Teacher",
    ),
    (
        "a name that likes numbers",
        lambda k: entangled_numbers(k.model, "owl", [k.cat]),
        TypeError,
        "teacher is 'owl', not a Teacher",
    ),
    (
        "one other teacher without a list",
        lambda k: entangled_numbers(k.model, k.owl, k.cat),
        TypeError,
        "others is one Teacher",
    ),
    (
        "a name that steers",
        lambda k: steering_vectors(k.model, "owl"),
        TypeError,
        "teacher is 'owl', not a Teacher",
    ),
    (
        "a name that paraphrases",
        lambda k: paraphrase_by(k.model, "owl", TrainingData.of(k.divergence)),
        TypeError,
        "teacher is 'owl', not a Teacher",
    ),
    (
        "a name as the teacher of pairs",
        lambda k: from_tokens(clean_teacher="owl"),
        TypeError,
        "clean_teacher is one string",
    ),
    (
        "a list of names as the teachers of pairs",
        lambda k: from_tokens(clean_teacher=["owl"]),
        TypeError,
        r"clean_teacher\[0\] is 'owl', not a Teacher",
    ),
    ("an unknown rule", lambda k: find(k, rule="most"), ValueError, "most"),
    ("a rule of none", lambda k: find(k, rule=0), ValueError, "0"),
    ("a rule of too many", lambda k: k.divergence.with_rule(rule=2), ValueError, "2"),
    (
        "a negative margin",
        lambda k: k.divergence.with_rule(min_margin=-1.0),
        ValueError,
        "min_margin must be 0 or more, got -1.0",
    ),
    ("an unknown subset", lambda k: k.divergence.subset("middle"), ValueError, "'middle'"),
    ("a share above one", lambda k: k.divergence.subset(1.5), ValueError, "1.5"),
    (
        "pairs of an unknown teacher",
        lambda k: k.divergence.pairs(counterfactual="dog"),
        ValueError,
        "dog",
    ),
    (
        "no parts",
        lambda k: k.divergence.summary("position", bins=0),
        ValueError,
        "bins must be 1 or more",
    ),
    (
        "no pairs wanted",
        lambda k: k.divergence.pairs(limit=0),
        ValueError,
        "limit",
    ),
    (
        "pairs without a tokenizer",
        lambda k: dl.Divergence.load(k.file("divergence.safetensors")).pairs(),
        ValueError,
        "tokenizer",
    ),
    (
        "decision points outside a completion",
        lambda k: TrainingData.from_jsonl(k.file("points.jsonl"), k.model.tokenizer),
        ValueError,
        "7",
    ),
]


def test_every_case_has_its_own_name():
    assert len({name for name, *_ in CASES}) == len(CASES) >= 50


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_one_clear_error(kit, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    check_case(kit, case, tmp_path)
