"""Readings that are killed and resume, or are refused."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from divergence_lens.deltas.delta import Delta
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from tests.support.runs import (
    CAT,
    OWL,
    SMALL,
    WOLF,
    assert_same_bits,
    find,
    shards,
    some_examples,
)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("qwen2")


@pytest.fixture(scope="module")
def examples():
    return some_examples(60)


@pytest.fixture(scope="module")
def undisturbed(model, examples):
    return find(model, examples)


@pytest.mark.slow
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
    assert any(0 < count < len(shards(folder)) for count in killed_with)


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
    says = {"cut": "is not a safetensors file, or was cut short", "altered": "was altered"}[damage]
    with pytest.raises(ValueError, match=rf"{file.name} .*{says}"):
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
