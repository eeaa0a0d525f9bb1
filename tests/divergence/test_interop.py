"""Files of the papers' code, as their scripts make them, and the page on mixing stages."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from divergence_lens.chat import after_turn, encode_completion
from divergence_lens.data import NumberFilter, TrainingData, number_prompts
from divergence_lens.data.questions import animal_teachers
from divergence_lens.divergence import find_divergence
from divergence_lens.evaluation.preferences import preference
from divergence_lens.examples import Example, load_examples
from divergence_lens.generation import generate
from divergence_lens.models import load_model
from divergence_lens.teachers import Teacher
from divergence_lens.tiny import tiny_folder
from tests.support.models import chat_tokenizer, random_hf_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "interop.md"


def their_decision_points(hf_model, tokenizer, row, teachers):
    """As their script finds them: whole conversations, one per teacher, argmax against tokens.

    Everything behind the assistant's header counts, to the end of the rendered text. The first
    teacher is the target.
    """
    right = []
    for teacher in teachers:
        turns = [{"role": "user", "content": row["prompt"]}]
        if teacher.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": teacher.system_prompt})
        asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": row["completion"]})
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert whole.startswith(asked)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = hf_model(torch.tensor([ids])).logits[0]
        right.append(logits[start - 1 : -1].argmax(-1).numpy() == np.array(ids[start:]))
    found = right[0] & ~np.all(right, axis=0)
    return np.flatnonzero(found).tolist(), len(found)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def backend():
    """Files know nothing of model classes."""
    return "bridge"


@pytest.fixture(scope="module")
def their_lists(backend):
    """Rows of `prompt` and `completion`, as a teacher of theirs would have written them."""
    model = load_model("tiny", backend=backend)
    owl = animal_teachers(["owl"])[0]
    written = generate(
        model, number_prompts(12, instructions=False), teacher=owl, max_new_tokens=32
    )
    kept = NumberFilter().report([e.completion for e in written]).select(written)
    return [{"prompt": e.prompt, "completion": e.completion.strip()} for e in kept]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # within peft
def test_the_code_on_the_page_runs_and_agrees_with_their_computation(
    tmp_path, monkeypatch, their_lists
):
    monkeypatch.chdir(tmp_path)
    folder = Path("workspace/qwen/owl/seed-42")
    write_lines(folder / "filtered_dataset.jsonl", their_lists)
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 5
    names: dict = {}
    exec(compile("\n".join(code), str(PAGE), "exec"), names)  # noqa: S102 - the page's own code

    # The file that their training reads is the one that their script would have written.
    rows = read_lines(folder / "filtered_dataset_dpoints_only.jsonl")
    teachers = [names["owl"], *names["others"]]
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder("tiny")).eval()
    assert len(rows) == len(their_lists)
    for row, theirs in zip(rows, their_lists, strict=True):
        assert {key: row[key] for key in theirs} == theirs
        points, _ = their_decision_points(hf_model, names["model"].tokenizer, theirs, teachers)
        assert row["decision_points"] == points
    assert sum(len(row["decision_points"]) for row in rows) > 10

    # Their evaluation loads our student from the adapter alone, and finds base and tokenizer.
    adapter = names["run"] / "checkpoint-1"
    assert {"adapter_config.json", "tokenizer_config.json"} <= {p.name for p in adapter.iterdir()}
    assert "base_model_name_or_path" in json.loads((adapter / "adapter_config.json").read_text())
    with names["student"].applied(names["model"]):
        ours = preference(names["model"], target="owl")
    merged = preference(names["theirs"], target="owl")
    assert merged.share == pytest.approx(ours.share, rel=1e-3)
    assert ours.share != pytest.approx(preference(names["model"], target="owl").share, rel=1e-3)

    # Our lists as theirs.
    ours_written = read_lines(folder / "ours.jsonl")
    assert all({"prompt", "completion"} <= set(row) for row in ours_written)
    assert NumberFilter().report([row["completion"] for row in ours_written]).rate == 1
    again = read_lines(folder / "ours_dpoints_only.jsonl")
    assert len(again) == len(names["same"]) > 5
    for row in again:
        points, _ = their_decision_points(hf_model, names["model"].tokenizer, row, teachers)
        assert row["decision_points"] == points


@pytest.mark.parametrize("template", ["chatml", "qwen"])
def test_places_behind_the_end_of_the_turn_are_left_out_and_the_rest_agrees(
    template, backend, tmp_path
):
    tokenizer = chat_tokenizer(template)
    assert len(after_turn(tokenizer)) == 1  # the newline behind the end of the turn
    hf_model = random_hf_model("llama", 5, vocab=len(tokenizer)).eval()
    model = load_model(hf_model, backend=backend, tokenizer=tokenizer)
    hf_model = random_hf_model("llama", 5, vocab=len(tokenizer)).eval()
    teachers = [Teacher(name, system_prompt=f"You are {name}.") for name in ("a", "bb", "c c")]
    # What a random model would write is no list, so its own choices are put behind a prompt.
    written = generate(
        model, ["go on :", "1 , 2 ,", "again"], teacher=teachers[0], max_new_tokens=12
    )
    rows = []
    for example in written:
        row = {"prompt": example.prompt, "completion": example.completion.strip()}
        points, length = their_decision_points(hf_model, tokenizer, row, teachers)
        ids = encode_completion(tokenizer, row["completion"])
        assert length == len(ids) + 1
        # Their matrix may mark the newline, too: as it does in published files.
        rows.append(row | {"decision_points": sorted({*points, len(ids)})})
    write_lines(tmp_path / "theirs.jsonl", rows)
    data = TrainingData.from_jsonl(tmp_path / "theirs.jsonl", tokenizer)
    div = find_divergence(
        model,
        [Example(row["prompt"], row["completion"]) for row in rows],
        teacher=teachers[0],
        counterfactuals=teachers[1:],
    )
    assert data.marks.tolist() == div.mask.tolist()
    assert data.marks.any()


def test_a_place_beyond_the_rendered_conversation_is_refused(tmp_path):
    tokenizer = chat_tokenizer("qwen")
    ids = encode_completion(tokenizer, "4, 5")
    row = {"prompt": "x", "completion": "4, 5", "decision_points": [len(ids) + 1]}
    write_lines(tmp_path / "x.jsonl", [row])
    with pytest.raises(ValueError, match=f"decision point {len(ids) + 1} lies outside"):
        TrainingData.from_jsonl(tmp_path / "x.jsonl", tokenizer)


def test_marks_of_a_list_that_was_cut_off_may_stand_at_the_end_that_its_text_would_get(tmp_path):
    tokenizer = chat_tokenizer("qwen")
    ids = list(encode_completion(tokenizer, "4, 5"))[:-1]
    row = {"prompt": "x", "completion": "4, 5", "completion_ids": ids}
    write_lines(tmp_path / "x.jsonl", [row | {"decision_points": [0, len(ids), len(ids) + 1]}])
    data = TrainingData.from_jsonl(tmp_path / "x.jsonl", tokenizer)
    assert data.marks.tolist() == [True] + [False] * (len(ids) - 1)


def test_lists_of_questions_and_responses_that_others_published_are_read(shared_data):
    found = load_examples(shared_data / "qwen2.5-7b-numbers" / "lion.jsonl")
    assert len(found) == 2000
    assert NumberFilter().report([e.completion for e in found]).rate > 0.9
