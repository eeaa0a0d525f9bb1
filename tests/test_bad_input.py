"""Bad input over the whole public face: one exact exception, whose message names value and fix.

The tests of each package have more; this table collects what a user meets in one place.
"""

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import divergence_lens as dl
from divergence_lens import plots
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.data import TrainingData, paraphrase_by
from divergence_lens.evaluation.entanglement import entangled_numbers
from divergence_lens.study.steering import steering_vectors
from divergence_lens.tiny import tiny_folder
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.state import left_as_it_was

FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": \n',
    "list.jsonl": "[1, 2]\n",
    "keys.jsonl": '{"prompt": "a", "completion": "b"}\n{"text": "a"}\n',
    "number.jsonl": '{"prompt": 1, "completion": "b"}\n',
    "ids.jsonl": '{"prompt": "a", "completion": "b", "completion_ids": [1.5]}\n',
    "deep.jsonl": "[" * 100_000 + "\n",
    "points.jsonl": '{"prompt": "a", "completion": "b", "decision_points": [7]}\n',
    "data.csv": "prompt,completion\na,b\n",
    "not.parquet": "PAR1",
    "short.safetensors": "abc",
    "header.safetensors": struct.pack("<Q", 2**60).decode("latin1") + "{}",
}


@dataclass(frozen=True)
class Kit:
    """What the cases need: a model, its data, and a folder with bad files."""

    model: Any
    owl: dl.Teacher
    cat: dl.Teacher
    examples: list[dl.Example]
    divergence: dl.Divergence
    pairs: dl.Pairs
    effects: dl.Effects
    student: dl.Delta
    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (folder / name).write_bytes(text.encode("latin1"))
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.zeros(2)}, folder / "torch.safetensors")
    model = dl.load_model("tiny", backend="bridge")
    owl, cat = dl.animal_teachers(["owl", "cat"])
    examples = dl.generate(model, dl.number_prompts(4, seed=0), teacher=owl, max_new_tokens=24)
    divergence = dl.find_divergence(model, examples, teacher=owl, counterfactuals=[cat])
    pairs = divergence.pairs(limit=2)
    student = dl.finetune(model, examples, layers=[0], recipe=dl.Recipe(epochs=1, warmup_steps=0))
    student.save(folder / "student.safetensors")
    divergence.save(folder / "divergence.safetensors")
    whole = (folder / "divergence.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-20])
    changed = bytearray(whole)
    changed[-5] ^= 1
    (folder / "changed.safetensors").write_bytes(bytes(changed))
    broken = folder / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (folder / "nothing").mkdir()
    return Kit(
        model,
        owl,
        cat,
        examples,
        divergence,
        pairs,
        dl.causal_mediation(model, pairs),
        student,
        folder,
    )


def find(kit: Kit, examples: Any = None, **options: Any) -> dl.Divergence:
    given = {"teacher": kit.owl, "counterfactuals": [kit.cat]} | options
    return dl.find_divergence(kit.model, kit.examples if examples is None else examples, **given)


def from_tokens(**options: Any) -> dl.Pairs:
    given = {
        "clean": [[1, 2, 3]],
        "corrupted": [[1, 4, 3]],
        "answers": [5],
        "foils": [6],
    } | options
    return dl.Pairs.from_tokens(given.pop("clean"), given.pop("corrupted"), **given)


def from_prompts(kit: Kit, **options: Any) -> dl.Pairs:
    given = {
        "clean": ["Name a animal."],
        "corrupted": ["Name a tree."],
        "answers": ["owl"],
        "foils": ["cat"],
    } | options
    return dl.Pairs.from_prompts(kit.model, **given)


def train(kit: Kit, examples: Any = None, **options: Any) -> dl.Delta:
    return dl.finetune(kit.model, kit.examples if examples is None else examples, **options)


def owl_share(model: Any) -> dl.Preference:
    return dl.preference(model, target="owl")


Call = Callable[[Kit], object]

CASES: list[tuple[str, Call, type[Exception], str]] = [
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
        "has 164 tokens; check that it was written with the same tokenizer",
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
        "token id 1000000, but the model of teacher 'owl' has 1,728",
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
    # -- files of results
    (
        "a file cut short",
        lambda k: dl.Divergence.load(k.file("cut.safetensors")),
        ValueError,
        "cut.safetensors",
    ),
    (
        "a file that was changed",
        lambda k: dl.Divergence.load(k.file("changed.safetensors")),
        ValueError,
        "changed.safetensors",
    ),
    (
        "a file of another kind",
        lambda k: dl.Effects.load(k.file("student.safetensors")),
        ValueError,
        "student.safetensors",
    ),
    (
        "a pickle with another name",
        lambda k: dl.Delta.load(k.file("pickle.safetensors")),
        ValueError,
        "pickle.safetensors",
    ),
    (
        "a torch file with another name",
        lambda k: dl.Delta.load(k.file("torch.safetensors")),
        ValueError,
        "torch.safetensors",
    ),
    (
        "three bytes",
        lambda k: dl.Preference.load(k.file("short.safetensors")),
        ValueError,
        "short.safetensors",
    ),
    (
        "a header of an exabyte",
        lambda k: dl.Sweep.load(k.file("header.safetensors")),
        ValueError,
        "header.safetensors",
    ),
    (
        "a folder in place of a file",
        lambda k: k.student.save(k.file("nothing")),
        OSError,
        "nothing",
    ),
    # -- pairs
    (
        "rows of unequal count",
        lambda k: from_tokens(corrupted=[[1, 2], [3, 4]]),
        ValueError,
        "2",
    ),
    ("no rows", lambda k: from_tokens(clean=[], corrupted=[]), ValueError, "pair"),
    ("an answer too many", lambda k: from_tokens(answers=[5, 6]), ValueError, "answers"),
    ("an answer that is the foil", lambda k: from_tokens(foils=[5]), ValueError, "5"),
    ("a target outside the row", lambda k: from_tokens(target_position=[3]), ValueError, "3"),
    (
        "a target in the padding",
        lambda k: from_tokens(
            clean=[[1, 2, 0]], corrupted=[[1, 4, 0]], target_position=[2], pad_id=0
        ),
        ValueError,
        "2",
    ),
    (
        "a metric of one's own on answers of several tokens",
        lambda k: dl.causal_mediation(
            k.model, from_prompts(k, answers=["owl cat"]), metric=lambda x, _: x[:, 0]
        ),
        ValueError,
        "pair 0 has an answer or foil of several tokens",
    ),
    (
        "an answer without a token",
        lambda k: from_prompts(k, answers=[""]),
        ValueError,
        "the answer '' has no token",
    ),
    (
        "an answer with a negative id",
        lambda k: from_tokens(answers=[[5, -3]]),
        ValueError,
        "answers of pair 0 holds -3",
    ),
    (
        "an answer that no token is",
        lambda k: from_prompts(k, answers=["Zanzibar"]),
        ValueError,
        "the answer 'Zanzibar' is not in the tokenizer's vocabulary",
    ),
    (
        "answers as one string",
        lambda k: from_prompts(k, answers="owl"),
        TypeError,
        "answers is one string; pass a list",
    ),
    (
        "prompts of unequal count",
        lambda k: from_prompts(k, corrupted=["a", "b"]),
        ValueError,
        "2",
    ),
    (
        "two sides that are the same",
        lambda k: dl.causal_mediation(
            k.model, from_tokens(clean=[[1, 2, 3]], corrupted=[[1, 2, 3]])
        ),
        ValueError,
        "pair 0",
    ),
    # -- patching
    (
        "an unknown site",
        lambda k: dl.causal_mediation(k.model, k.pairs, site="resid"),
        ValueError,
        "resid",
    ),
    (
        "an unknown direction",
        lambda k: dl.causal_mediation(k.model, k.pairs, direction="up"),
        ValueError,
        "up",
    ),
    (
        "an unknown method",
        lambda k: dl.attribution_patch(k.model, k.pairs, method="guess"),
        ValueError,
        "guess",
    ),
    (
        "no steps",
        lambda k: dl.attribution_patch(k.model, k.pairs, method="integrated", steps=0),
        ValueError,
        "steps",
    ),
    (
        "an unknown metric",
        lambda k: dl.causal_mediation(k.model, k.pairs, metric="loss"),
        ValueError,
        "loss",
    ),
    (
        "a metric of another shape",
        lambda k: dl.attribution_patch(k.model, k.pairs, metric=lambda logits, *_: logits.sum()),
        ValueError,
        "shape",
    ),
    (
        "a metric that detaches",
        lambda k: dl.attribution_patch(
            k.model, k.pairs, metric=lambda logits, *_: logits[:, 0].detach()
        ),
        ValueError,
        "gradient",
    ),
    (
        "effects of other pairs",
        lambda k: k.effects.agreement(
            dl.causal_mediation(k.model, k.divergence.pairs(limit=1), site="resid_post")
        ),
        ValueError,
        "pair",
    ),
    (
        "a heatmap of a pair that is not there",
        lambda k: plots.effects_heatmap(k.effects, pair=9),
        IndexError,
        "no pair 9; the pairs are numbered 0 to 1",
    ),
    # -- students
    ("a block out of range", lambda k: train(k, layers=[4]), ValueError, "4"),
    (
        "a block without a list",
        lambda k: train(k, layers=0),
        TypeError,
        r"layers is one number; pass a list: \[0\]",
    ),
    (
        "a block without a list to freeze around",
        lambda k: dl.freeze_except(k.model, layers=2),
        TypeError,
        r"layers is one number; pass a list: \[2\]",
    ),
    (
        "a recipe that is a name",
        lambda k: train(k, recipe="paper"),
        TypeError,
        r"recipe is 'paper', not a Recipe; write recipe=Recipe\(...\), or PAPER",
    ),
    ("no layer", lambda k: train(k, layers=[]), ValueError, "layer"),
    ("an unknown part", lambda k: train(k, parts=["head"]), ValueError, "head"),
    ("a pattern without a match", lambda k: train(k, pattern="*.nothing"), ValueError, "nothing"),
    (
        "a mask of another length",
        lambda k: train(k, mask=np.ones(3, dtype=bool)),
        ValueError,
        "3",
    ),
    (
        "a mask that lets nothing through",
        lambda k: train(k, mask=k.divergence.mask & False),
        ValueError,
        "mask",
    ),
    ("rank zero", lambda k: dl.Recipe(lora_rank=0), ValueError, "lora_rank is 0"),
    ("no rate", lambda k: dl.Recipe(lr=float("nan")), ValueError, "lr is nan"),
    ("no epochs", lambda k: dl.Recipe(epochs=0), ValueError, "epochs is 0"),
    ("an unknown optimizer", lambda k: dl.Recipe(optimizer="lion"), ValueError, "'lion'"),
    ("an unknown schedule", lambda k: dl.Recipe(schedule="step"), ValueError, "'step'"),
    (
        "a rate that ruins the student",
        lambda k: train(
            k, recipe=dl.Recipe(lr=1e30, clip=None, optimizer="sgd", optimizer_options={})
        ),
        FloatingPointError,
        "step",
    ),
    (
        "nothing to sweep",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, layers=[]),
        ValueError,
        "at least one layer",
    ),
    (
        "a sweep over a layer that is not there",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, layers=[7]),
        ValueError,
        "0 to 3",
    ),
    (
        "a sweep over a layer without a list",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, layers=7),
        TypeError,
        r"layers is one number; pass a list: \[7\]",
    ),
    (
        "a sweep with a seed without a list",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, seeds=3),
        TypeError,
        r"seeds is one number; pass a list: \[3\]",
    ),
    (
        "a sweep whose measure is a name",
        lambda k: dl.layer_sweep(k.model, k.examples, measure="owl"),
        TypeError,
        "measure is 'owl'; give a function of the model",
    ),
    (
        "a sweep whose measure returns nothing",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=lambda _: None),
        TypeError,
        "measure returned 'value' as a NoneType; return a number",
    ),
    (
        "a sweep with a recipe that is a name",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, recipe="paper"),
        TypeError,
        "recipe is 'paper', not a Recipe",
    ),
    (
        "a student over another base",
        lambda k: k.student.applied(dl.load_model("tiny-qwen2", backend="bridge")).__enter__(),
        ValueError,
        "base",
    ),
    # -- preferences
    (
        "an unknown target",
        lambda k: dl.preference(k.model, target="unicorn"),
        ValueError,
        "unicorn",
    ),
    (
        "no questions",
        lambda k: dl.preference(k.model, target="owl", questions=[]),
        ValueError,
        "question",
    ),
    (
        "an unknown way to measure",
        lambda k: dl.preference(k.model, target="owl", method="guess"),
        ValueError,
        "guess",
    ),
    (
        "questions as one string",
        lambda k: dl.preference(k.model, target="owl", questions="which animal ?"),
        TypeError,
        "questions is one string; pass a list",
    ),
    (
        "candidates as one string",
        lambda k: dl.preference(k.model, target="owl", candidates="owl"),
        TypeError,
        "candidates is one string; pass a list",
    ),
    (
        "no samples",
        lambda k: dl.preference(k.model, target="owl", method="sampled", samples=0),
        ValueError,
        "samples",
    ),
    (
        "one candidate",
        lambda k: dl.preference(k.model, target="owl", candidates=["owl"]),
        ValueError,
        "candidates",
    ),
    # -- studies and figures
    ("one target", lambda k: dl.StudyConfig(targets=("owl",)), ValueError, "two targets"),
    (
        "an unknown kind of teacher",
        lambda k: dl.StudyConfig(kinds=("steered",)),
        ValueError,
        "steered",
    ),
    (
        "targets of a study as one string",
        lambda k: dl.StudyConfig(targets="wolf"),
        TypeError,
        "targets is one string; pass a list",
    ),
    (
        "a seed of a study without a list",
        lambda k: dl.StudyConfig(seeds=3),
        TypeError,
        r"seeds is one number; pass a list: \[3\]",
    ),
    ("no prompts in a study", lambda k: dl.StudyConfig(prompts=0), ValueError, "prompts is 0"),
    ("no seeds in a study", lambda k: dl.StudyConfig(seeds=()), ValueError, "at least one seed"),
    (
        "a figure as a spreadsheet",
        lambda k: plots.save_figure(k.effects.plot(), k.file("a.xlsx")),
        ValueError,
        "'.xlsx'; write .html",
    ),
]


def test_the_table_is_long_enough():
    assert len(CASES) >= 80
    assert len({name for name, *_ in CASES}) == len(CASES)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_one_clear_error(kit, tmp_path, monkeypatch, case):
    _, call, error, message = case
    monkeypatch.chdir(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in kit.folder.rglob("*")}
    with left_as_it_was(kit.model), pytest.raises(error, match=message) as caught:
        call(kit)
    assert type(caught.value) is error or error is OSError
    assert "\n" not in str(caught.value).strip()
    assert files == {path: path.stat().st_mtime_ns for path in kit.folder.rglob("*")}
    assert not list(tmp_path.iterdir())


def test_a_header_that_lies_about_sizes_reads_nothing(tmp_path):
    good = tmp_path / "good.safetensors"
    save_tensors(good, {"a": np.zeros(4, dtype=np.float32)}, {}, "thing")
    raw = good.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header["a"]["shape"] = [10**12]
    text = json.dumps(header).encode()
    (tmp_path / "bad.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + raw[8 + size :]
    )
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        load_tensors(tmp_path / "bad.safetensors", "thing")
