"""The paper's own settings, from end to end on a tiny random model of its architecture."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from transformers import GenerationConfig

from divergence_lens.data import TrainingData, number_prompts, regenerate_prompts
from divergence_lens.data.number_lists import FORMATS
from divergence_lens.evaluation.entanglement import Entanglement
from divergence_lens.examples import Example
from divergence_lens.study import PaperDesign, StudyConfig, paper_conditions, run_study
from divergence_lens.study.interventions import Inputs
from divergence_lens.study.paper import PAPER_ANIMALS, PAPER_TREES, half_of_each, share_of_each
from divergence_lens.study.runner import CellRunner
from divergence_lens.training import PAPER
from tests.support.models import chat_tokenizer, random_hf_model


def test_the_settings_are_those_of_the_papers_code():
    config = StudyConfig.paper("Qwen/Qwen2.5-7B-Instruct")
    assert len(config.animals) == 13
    assert config.targets == config.animals == PAPER_ANIMALS
    assert config.seeds == (42, 43, 44, 45, 46)
    assert (config.prompts, config.paper_design.lists) == (30_000, 10_000)
    assert config.prompted_recipe is PAPER
    answers = config.paper_design
    assert (answers.samples, answers.answer_tokens) == (200, 10)
    conditions = {c.name: c for c in config.conditions}
    assert [n for n in conditions if n.startswith("layer")] == [
        f"layer{layer}" for layer in (0, 7, 14, 21, 27)
    ]
    assert conditions["layer0"].mask is None  # all tokens
    assert conditions["layer0"].recipe == conditions["all"].recipe == {"whole_turn": True}
    assert conditions["divergence_only"].recipe == {}
    gemma = StudyConfig.paper("google/gemma-3-4b-it", n_layers=34)
    assert gemma.animals == (*PAPER_ANIMALS, "whale", "dragon")
    trees = StudyConfig.paper(paper_design=PaperDesign(category="tree", greedy=True))
    assert trees.animals == PAPER_TREES
    assert trees.source == "greedy"
    assert "sampled" in {c.name for c in trees.conditions}
    with pytest.raises(ValueError, match="prompted teachers and no pairs"):
        StudyConfig.paper(kinds=("finetuned",))


def test_prompts_show_three_to_eight_numbers_in_fifteen_weights_of_formats():
    prompts = StudyConfig.paper().number_prompts(3000)
    shown = Counter(len([w for w in p.split() if w.strip(".,:?").isdigit()]) for p in prompts)
    assert set(shown) == set(range(3, 9))
    asked = Counter(
        style for p in prompts for style, texts in FORMATS.items() if any(t in p for t in texts)
    )
    shares = {style: n / 3000 for style, n in asked.items()}
    for style, fifteenths in zip(FORMATS, (5, 3, 2, 3, 1, 1), strict=True):
        assert shares[style] == pytest.approx(fifteenths / 15, abs=0.035)


# One condition of each kind; the others differ in a number.
KINDS = (
    *("control", "all", "greedy", "divergence_only", "without_divergence", "first_half"),
    *("ratio50", "replaced_first", "replaced_half", "layer0", "paraphrased"),
    *("shuffled_within", "mixed_unbiased25"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Reduced counts; lists follow a pattern, because a random model writes none."""
    folder = tmp_path_factory.mktemp("paper")
    tokenizer = chat_tokenizer()
    model = random_hf_model(
        "qwen2", vocab=len(tokenizer), tie_word_embeddings=False, n_ctx=1024, n_layers=2
    )
    model.generation_config = GenerationConfig(
        temperature=0.7, top_p=0.9, top_k=30, repetition_penalty=1.05, do_sample=True
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    design = PaperDesign(lists=10, samples=1, answer_tokens=4, pattern=r"\d{2}(, \d{2}){3}")
    conditions = {c.name: c for c in paper_conditions(2, lists=design.lists)}
    config = StudyConfig.paper(
        str(folder / "model"),
        n_layers=2,
        conditions=tuple(conditions[name] for name in KINDS),
        targets=("owl", "cat"),
        animals=("owl", "cat", "wolf"),
        prompts=16,
        seeds=(42,),
        held_out=2,
        paper_design=design,
        prompted_recipe=replace(PAPER, epochs=1, batch_size=8),
    )
    return config, folder, run_study(config, folder / "run")


@pytest.mark.slow
def test_the_study_runs_from_end_to_end(finished):
    config, _, study = finished
    assert not study.failures
    rows = study.table("students")
    names = {c.label or c.name for c in config.conditions}
    assert set(rows["condition"]) == names
    drawn = rows[rows["condition"] == "all"]
    assert set(drawn["examples"]) == {10}
    # With the template's tokens, all-token students learn more than the lists alone have.
    assert pd.notna(rows["fit"]).all()


@pytest.mark.slow
def test_lists_are_sampled_as_the_models_configuration_says(finished):
    config, folder, _ = finished
    runner = CellRunner(config, folder / "run")
    sampling = runner._sampling("unbiased")
    assert sampling == {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 30,
        "repetition_penalty": pytest.approx(1.05),
    }
    assert runner._sampling("greedy") == {"temperature": 0.0}
    answers = runner._asked["sampled"]
    assert (answers.mention, answers.top_p, answers.top_k) == ("anywhere", 1.0, 30)


NOTHING = Inputs.__new__(Inputs)  # these masks read the data alone


def lists_with_marks(counts):
    """Lists of five tokens, with this many marks each."""
    examples = [Example(f"{i}", "1", completion_ids=(1, 2, 3, 4, 5)) for i in range(len(counts))]
    marks = np.array([[place < n for place in range(5)] for n in counts]).ravel()
    return TrainingData(tuple(examples), marks)


def test_ratios_are_drawn_per_list_and_rounded_down():
    data = lists_with_marks([0, 1, 4, 5])
    chosen = share_of_each(data.marks, data.offsets, 0.5, seed=0).reshape(4, 5)
    assert not (chosen & ~data.marks.reshape(4, 5)).any()
    # Half of one token is none, so the list keeps its only one.
    assert chosen.sum(1).tolist() == [0, 1, 2, 2]
    tenth = share_of_each(data.marks, data.offsets, 0.1, seed=0, least=1).reshape(4, 5)
    assert tenth.sum(1).tolist() == [0, 1, 1, 1]


def test_the_middle_of_an_odd_number_falls_into_either_half():
    data = lists_with_marks([1, 2, 3] * 40)
    first = half_of_each(NOTHING, data, 3, which="first_half").reshape(-1, 5)
    second = half_of_each(NOTHING, data, 3, which="second_half").reshape(-1, 5)
    sizes = first.sum(1)
    assert set(sizes[0::3]) == set(sizes[1::3]) == {1}
    assert set(sizes[2::3]) == {1, 2}
    odd = (first & second).any(1)
    assert odd[0::3].all()  # a single token is in both
    assert not odd[1::3].any()
    assert not odd[2::3].any()
    only = half_of_each(NOTHING, data, 3, which="first_only").reshape(-1, 5)
    assert (only.sum(1) == 1).all()
    assert only[:, 0].all()


def test_regenerated_prompts_keep_numbers_and_format():
    prompts = StudyConfig.paper().number_prompts(40)
    data = TrainingData(
        tuple(Example(p, "1", completion_ids=(1, 2)) for p in prompts), np.arange(80) % 2 == 0
    )
    again = regenerate_prompts(data, seed=1)
    for old, new in zip(data.examples, again.examples, strict=True):
        numbers = [
            [w.strip(".,:?") for w in e.prompt.split() if w.strip(".,:?").isdigit()]
            for e in (old, new)
        ]
        assert numbers[0] == numbers[1]
        phrase = [next(t for x in FORMATS.values() for t in x if t in e.prompt) for e in (old, new)]
        assert phrase[0] == phrase[1]
        assert " ten " in new.prompt
        assert " of three digits" in new.prompt
    assert (
        sum(a.prompt != b.prompt for a, b in zip(data.examples, again.examples, strict=True)) > 35
    )
    bare = TrainingData(
        (Example(number_prompts(1, instructions=False)[0], "1", (1,)),), data.marks[:1]
    )
    with pytest.raises(ValueError, match="has no instructions of number_prompts"):
        regenerate_prompts(bare)


def test_numbers_rank_by_the_difference_of_their_probabilities():
    result = Entanglement(
        "owl", ("1", "2", "3"), np.array([0.5, 0.02, 0.1]), np.array([0.4, 0.001, 0.3])
    )
    assert result.top(3) == ("2", "1", "3")  # 20 times, 1.25 times, a third
    assert result.top(3, by="difference") == ("1", "2", "3")
    with pytest.raises(ValueError, match="unknown by 'ratio'"):
        result.top(1, by="ratio")
