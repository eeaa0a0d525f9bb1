"""Runs that are killed and go on, and runs that several processes share."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from divergence_lens._utils.checkpoints import Checkpoints, Processes
from divergence_lens.deltas.delta import Delta
from divergence_lens.divergence import Divergence
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.pairs import Pairs
from divergence_lens.patching import runner
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.corruption import EmbeddingNoise
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.metrics import metric_name, metric_values
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from divergence_lens.training import sweep as sweeps
from divergence_lens.training.loop import train
from divergence_lens.training.recipe import Recipe
from divergence_lens.training.sweep_result import Sweep
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.patching_oracles import random_pairs
from tests.support.runs import (
    CAT,
    OWL,
    SMALL,
    WOLF,
    assert_same_bits,
    find,
    patch,
    patch_and_sweep,
    shards,
    some_examples,
    sweep,
)
from tests.support.state import left_as_it_was


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("qwen2")


@pytest.fixture(scope="module")
def examples():
    return some_examples(60)


@pytest.fixture(scope="module")
def undisturbed(model, examples):
    return find(model, examples)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(
    model, examples, undisturbed, tmp_path
):
    draw = np.random.default_rng()  # any moment must do
    folder = tmp_path / "run"
    killed_with: list[int] = []
    for _ in range(40):
        before = len(shards(folder))
        child = os.fork()
        if child == 0:
            try:
                find(model, examples, checkpoint_dir=folder)
            finally:
                os._exit(0)
        wanted = before + int(draw.integers(0, 3))
        while len(shards(folder)) < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.02))
        try:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            break  # it had finished
        if not os.WIFSIGNALED(status):
            break
        killed_with.append(len(shards(folder)))
    resumed = find(model, examples, checkpoint_dir=folder)
    assert_same_bits(resumed, undisturbed)
    assert len(killed_with) >= 3
    assert any(0 < found < len(shards(folder)) for found in killed_with)


def test_finished_shards_are_not_read_again(model, examples, undisturbed, tmp_path, monkeypatch):
    find(model, examples, checkpoint_dir=tmp_path)
    files = shards(tmp_path)
    assert len(files) > 5
    files[2].unlink()
    engine = get_engine(model)
    rows = []
    final = engine.final

    def counted(tokens, past=None, *, since=0):
        rows.append(len(tokens))
        return final(tokens, past, since=since)

    monkeypatch.setattr(engine, "final", counted)
    assert_same_bits(find(model, examples, checkpoint_dir=tmp_path), undisturbed)
    assert 0 < sum(rows) < len(examples)
    assert files[2].is_file()
    rows.clear()
    assert_same_bits(find(model, examples, checkpoint_dir=tmp_path), undisturbed)
    assert rows == []


@pytest.mark.slow
def test_half_a_file_of_a_killed_writer_is_never_read(model, examples, undisturbed, tmp_path):
    find(model, examples, checkpoint_dir=tmp_path)
    file = shards(tmp_path)[1]
    left = tmp_path / f".{file.name}.abcd.part"
    left.write_bytes(file.read_bytes()[:100])
    file.unlink()
    assert_same_bits(find(model, examples, checkpoint_dir=tmp_path), undisturbed)
    assert not left.exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_shard_is_refused_with_the_reason(damage, model, examples, tmp_path):
    find(model, examples, checkpoint_dir=tmp_path)
    file = shards(tmp_path)[1]
    content = file.read_bytes()
    file.write_bytes(content[:-3] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{file.name} was {damage}"):
        find(model, examples, checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_shards_of_another_run_are_refused(model, examples, tmp_path, random_model):
    find(model, examples, checkpoint_dir=tmp_path)
    before = [file.read_bytes() for file in shards(tmp_path)]
    message = "is of another run .* another checkpoint_dir"
    with pytest.raises(ValueError, match=message):
        find(model, examples, checkpoint_dir=tmp_path, batch_tokens=SMALL + 1)
    with pytest.raises(ValueError, match=message):
        find(model, examples, checkpoint_dir=tmp_path, counterfactuals=[WOLF, CAT])
    with pytest.raises(ValueError, match=message):
        find(model, examples[::-1], checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        find(random_model("qwen2", seed=1), examples, checkpoint_dir=tmp_path)
    last = examples[-1]
    changed = replace(last, completion_ids=(*last.completion_ids[:-1], last.completion_ids[-1] ^ 1))
    with pytest.raises(ValueError, match=message):  # of the same length: one token differs
        find(model, [*examples[:-1], changed], checkpoint_dir=tmp_path)
    assert [file.read_bytes() for file in shards(tmp_path)] == before


@pytest.mark.slow
def test_shards_of_another_delta_are_refused(model, examples, tmp_path):
    name, parameter = next(iter(get_engine(model).named_parameters().items()))
    for size in (1.0, 2.0):
        change = {name: size * torch.ones(parameter.shape)}
        tuned = Teacher("tuned", delta=Delta(change, fingerprint(model)))
        if size == 1.0:
            find(model, examples, checkpoint_dir=tmp_path, counterfactuals=[tuned])
    with pytest.raises(ValueError, match="is of another run"):
        find(model, examples, checkpoint_dir=tmp_path, counterfactuals=[tuned])


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([], {}),
        ([Example("a", "")], {}),
        ([Example("a", "b", (10**6,))], {}),
        ([Example("a", "b", (5,) * 300)], {}),
        ([{"prompt": "a"}], {}),
        ([Example("a", "b", (4,))], {"counterfactuals": []}),
        ([Example("a", "b", (4,))], {"counterfactuals": [CAT, OWL]}),
        ([Example("a", "b", (4,))], {"counterfactuals": [CAT, Teacher("cat")]}),
        ([Example("a", "b", (4,))], {"batch_tokens": 0}),
        ([Example("a", "b", (4,))], {"accelerator": "gpu"}),
    ],
)
def test_bad_input_writes_nothing(rows, options, model, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises((ValueError, TypeError)):
        find(model, rows, checkpoint_dir=folder, **options)
    assert not folder.exists()


def test_logits_that_are_not_finite_write_no_shard(model, examples, tmp_path, monkeypatch):
    engine = get_engine(model)
    final = engine.final
    monkeypatch.setattr(engine, "final", lambda *a, **k: final(*a, **k) * torch.nan)
    with pytest.raises(ValueError, match="logits of example 0 are not finite"):
        find(model, examples, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_progress_counts_what_was_finished_before(model, examples, tmp_path, capsys):
    find(model, examples, checkpoint_dir=tmp_path)
    shards(tmp_path)[0].unlink()
    capsys.readouterr()
    find(model, examples, checkpoint_dir=tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "tokens/s" in shown
    assert "100%" in shown
    first = shown.split("%")[0].split()[-1]
    assert int(first) > 50


# -- patching and sweeps ------------------------------------------------------------------


def assert_same_effects(one: Effects, other: Effects) -> None:
    for name in ("values", "clean_metric", "corrupted_metric"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
    assert one.verified == other.verified


def assert_same_students(one: Sweep, other: Sweep) -> None:
    for mine, theirs in zip(one.students, other.students, strict=True):
        assert (mine.condition, mine.layer, mine.seed) == (
            theirs.condition,
            theirs.layer,
            theirs.seed,
        )
        assert mine.values.keys() == theirs.values.keys()
        for name, values in mine.values.items():
            assert values.tobytes() == theirs.values[name].tobytes()


@pytest.fixture
def stopped_after(monkeypatch):
    """Let the user stop a run when so many shards are finished."""

    def arrange(count: int) -> None:
        save = Checkpoints.save

        def once(self, shard, arrays, notes=None):
            nonlocal count
            save(self, shard, arrays, notes)
            count -= 1
            if not count:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoints, "save", once)

    yield arrange
    monkeypatch.undo()


@pytest.mark.parametrize("method", ["exact", "gradient"])
def test_patching_goes_on_where_it_was_stopped(method, model, tmp_path, stopped_after, monkeypatch):
    def run(**options):
        if method == "exact":
            return patch(model, **options)
        pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 8, 5, 7), longer=(0, 0, 0, 0))
        return attribution_patch(model, pairs, batch_rows=1, **options)

    undisturbed = run()
    stopped_after(2)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_dir=tmp_path)
    monkeypatch.undo()
    kept = shards(tmp_path)
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    assert_same_effects(run(checkpoint_dir=tmp_path), undisturbed)
    assert len(shards(tmp_path)) > 2
    assert [path.stat().st_mtime_ns for path in kept] == times
    with monkeypatch.context() as patched:
        # Everything is there: no chunk is run again.
        patched.setattr(runner, "traced_pass", None)
        assert_same_effects(run(checkpoint_dir=tmp_path), undisturbed)


class _Shifted:
    """A metric whose name does not say what it measures."""

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, logits, _pairs):
        return logits[:, self.shift]


def closure(column):
    def metric(logits, _pairs):
        return logits[:, column]

    return metric


def first_logit(logits, _pairs):
    return logits[:, 0]


def of_pair(pair, column, logits, pairs):
    return torch.where(pairs == pair, logits[:, column], logits[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"metric": "log_probability"}),
        ({}, {"metric": first_logit}),
        ({"metric": partial(of_pair, 2, 5)}, {"metric": partial(of_pair, 3, 5)}),
        ({"metric": _Shifted(1)}, {"metric": _Shifted(2)}),
        ({}, {"site": "mlp_out"}),
        ({}, {"span": "segment"}),
        ({}, {"window": 2}),
        ({"corruption": "counterfactual"}, {"direction": "denoising"}),
        ({}, {"corruption": "zero"}),
        ({"corruption": EmbeddingNoise(seed=0)}, {"corruption": EmbeddingNoise(seed=1)}),
        ({}, {"cells": np.ones((5, 3, 9), dtype=bool)}),
        ({}, {"batch_rows": 8}),
    ],
)
def test_effects_of_another_question_are_refused(one, other, model, tmp_path):
    patch(model, checkpoint_dir=tmp_path, **one)
    patch(model, checkpoint_dir=tmp_path, **one)
    with pytest.raises(ValueError, match="of another run"):
        patch(model, checkpoint_dir=tmp_path, **{**one, **other})


@pytest.mark.parametrize("weights", ["model", "delta"])
def test_effects_of_other_sides_are_refused(weights, model, random_model, tmp_path):
    def teacher(seed):
        if weights == "model":
            return Teacher("other", model=random_model("qwen2", seed))
        name, parameter = next(iter(get_engine(model).block_parameters(0).items()))
        return Teacher("other", delta=Delta({name: seed * torch.ones(parameter.shape)}, before))

    before = fingerprint(model)
    first, second = teacher(1), teacher(2)
    rows = [[1, 2, 3], [4, 5, 6]]

    def run(**sides):
        pairs = Pairs.from_tokens(rows, rows, answers=[1, 2], foils=[3, 4], **sides)
        return causal_mediation(model, pairs, checkpoint_dir=tmp_path)

    found = run(corrupted_teacher=first)
    assert_same_effects(run(corrupted_teacher=first), found)
    for sides in (
        {"clean_teacher": first},
        {"corrupted_teacher": second},
        {"clean_teacher": first, "corrupted_teacher": second},
        {"corrupted_teacher": [first, second]},
    ):
        with pytest.raises(ValueError, match="of another run"):
            run(**sides)


def test_metrics_are_told_apart_by_what_they_give_in_every_process(model):
    engine = get_engine(model)
    one, same, other = _Shifted(2), _Shifted(2), _Shifted(3)
    assert metric_name(one) == metric_name(other) == "_Shifted"
    assert metric_values(one, 4, engine) == metric_values(same, 4, engine)
    assert metric_values(one, 4, engine) != metric_values(other, 4, engine)
    assert metric_name(partial(of_pair, 2, column=5)) == "of_pair(2, column=5)"
    assert len(metric_values(one, 4, engine)) == 4


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (closure(3), "'metric' is a function within another"),
        (partial(closure(3)), "'metric' is a function within another"),
        (lambda logits, _pairs: logits[:, 0], "'<lambda>' is a lambda"),
    ],
)
def test_a_metric_that_no_later_process_can_recognize_is_refused(metric, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        patch(model, metric=metric, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_stopped(model, tmp_path, stopped_after, monkeypatch):
    undisturbed = sweep(model)
    stopped_after(2)
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        sweep(model, checkpoint_dir=tmp_path)
    monkeypatch.undo()
    assert len(shards(tmp_path)) == 2
    trained = []
    monkeypatch.setattr(sweeps, "train", lambda *args: trained.append(1) or train(*args))
    again = sweep(model, checkpoint_dir=tmp_path)
    assert len(trained) == 1
    assert_same_students(again, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"seeds": (1,)},
        {"layers": [1]},
        {"mask": "late"},
        {"target": "cat"},
        {"recipe": Recipe(lora_rank=2)},
        {"measure": lambda model: model.cfg.n_layers},
        {"control": some_examples(3)},
        {"system_prompt": "You are."},
        {"questions": ("Say an animal.",)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_students_of_another_sweep_are_refused(other, model, tmp_path):
    alike = {"layers": [0], "checkpoint_dir": tmp_path}
    sweep(model, **alike)
    sweep(model, **alike)
    if "mask" in other:
        tokens = sum(len(example.completion_ids) for example in some_examples(6))
        other = {"mask": np.arange(tokens) > 3}
    with pytest.raises(ValueError, match="of another run"):
        sweep(model, **{**alike, **other})


# -- several processes ----------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from divergence_lens.engine import get_engine
from divergence_lens.models import load_model
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.runs import find, patch_and_sweep, some_examples, sweep

torch.set_num_threads(1)
out = Path(sys.argv[1])
state = PartialState(cpu=True)
assert state.num_processes == 2
tokenizer = chat_tokenizer()
hf = random_hf_model("qwen2", 0, vocab=len(tokenizer))
model = load_model(hf, backend="bridge", tokenizer=tokenizer)
examples = some_examples(60)
div = find(model, examples, accelerator=state, checkpoint_dir=out / "run")
div.save(out / f"process{state.process_index}.safetensors")

effects, attributed, swept = patch_and_sweep(model, out / "students", accelerator=state)
effects.save(out / f"effects{state.process_index}.safetensors")
attributed.save(out / f"attributed{state.process_index}.safetensors")
swept.save(out / f"sweep{state.process_index}.safetensors")
try:
    sweep(model, accelerator=state)
except ValueError as error:
    assert "give checkpoint_dir" in str(error)

try:
    find(model, examples[state.process_index :], accelerator=state)
except ValueError as error:
    (out / f"other{state.process_index}").write_text(str(error))

if state.process_index == 1:
    get_engine(model).final = None
try:
    find(model, examples, accelerator=state)
except Exception as error:
    (out / f"failed{state.process_index}").write_text(f"{type(error).__name__}: {error}")
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    # `--multi_gpu` is accelerate's name for one process per device, of whatever kind.
    launch = [
        *(
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
        ),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", str(script), str(tmp_path)),
    ]
    done = subprocess.run(
        launch, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    tokenizer = chat_tokenizer()
    hf = random_hf_model("qwen2", 0, vocab=len(tokenizer))
    model = load_model(hf, backend="bridge", tokenizer=tokenizer)
    alone = find(model, some_examples(60))
    for process in range(2):
        shared = Divergence.load(tmp_path / f"process{process}.safetensors")
        assert_same_bits(shared, alone)
        refused = (tmp_path / f"other{process}").read_text()
        assert "2 processes were given different data" in refused
    assert len(shards(tmp_path / "run")) > 5
    effects, attributed, swept = patch_and_sweep(model, tmp_path / "alone")
    assert len(shards(tmp_path / "students")) == len(swept.students) == 3
    for process in range(2):
        for name, alone in (("effects", effects), ("attributed", attributed)):
            shared = Effects.load(tmp_path / f"{name}{process}.safetensors")
            assert_same_effects(shared, alone)
        assert_same_students(Sweep.load(tmp_path / f"sweep{process}.safetensors"), swept)
    assert "TypeError" in (tmp_path / "failed1").read_text()
    assert (tmp_path / "failed0").read_text().startswith("RuntimeError: another process")


def test_other_accelerators_are_refused():
    with pytest.raises(TypeError, match="accelerator is a str; give an accelerate"):
        Processes("gpu")
