"""Files that were made to do harm are refused: nothing is run, nothing is written."""

import errno
import itertools
import json
import logging
import os
import struct

import numpy as np
import pytest

import divergence_lens as dl
from divergence_lens._utils.storage import save_tensors
from divergence_lens.examples import iter_examples
from divergence_lens.models import describe_model
from tests.support.models import random_hf_model
from tests.support.runs import assert_same_bits, find, shards, some_examples

LOADERS = {
    "divergence": dl.Divergence.load,
    "effects": dl.Effects.load,
    "delta": dl.Delta.load,
    "sweep": dl.Sweep.load,
}


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


@pytest.fixture(autouse=True)
def _nothing_else_is_written(tmp_path):
    yield
    assert not (tmp_path.parent / "harm").exists()


def test_a_deeply_nested_table_is_refused(load, tmp_path):
    body = b"{" + b"[" * 200_000
    path = tmp_path / "deep.safetensors"
    path.write_bytes(struct.pack("<Q", len(body)) + body)
    with pytest.raises(ValueError, match="not a safetensors file, or was cut short or altered"):
        load(path)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_deeply_nested_header_with_a_true_checksum_is_refused(kind, tmp_path, monkeypatch):
    path = tmp_path / "deep.safetensors"
    dumps = json.dumps
    depth = "[" * 200_000 + "]" * 200_000

    def bomb(value, **options):
        # What the header alone becomes; the label around it, and the checksum, are made as usual.
        return depth if value == {"harm": 1} else dumps(value, **options)

    with monkeypatch.context() as patched:
        patched.setattr("divergence_lens._utils.storage.json.dumps", bomb)
        save_tensors(path, {"x": np.zeros(2)}, {"harm": 1}, kind)
    with pytest.raises(ValueError, match="altered"):
        LOADERS[kind](path)


def test_a_table_that_promises_terabytes_is_refused(load, tmp_path):
    table = {"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    body = json.dumps(table).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(struct.pack("<Q", len(body)) + body + b"\0" * 64)
    with pytest.raises(ValueError, match="cut short"):
        load(path)


def test_a_pickle_under_another_name_is_not_run(load, tmp_path):
    harm = tmp_path.parent / "harm"
    pickle = b"cos\nsystem\n(S'touch " + str(harm).encode() + b"'\ntR."
    path = tmp_path / "pickle.safetensors"
    path.write_bytes(pickle)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(path)


@pytest.mark.slow
def test_a_row_of_a_million_columns_is_read_by_its_keys(tmp_path):
    columns = {str(number): number for number in range(10**6)}
    path = tmp_path / "wide.jsonl"
    path.write_text(json.dumps(columns | {"prompt": "a", "completion": "b"}))
    assert dl.load_examples(path) == [dl.Example("a", completion="b")]
    path.write_text(json.dumps(dict(list(columns.items())[:100_000])))
    with pytest.raises(ValueError, match="line 1 has no prompt") as caught:
        dl.load_examples(path)
    assert len(str(caught.value)) < 500


def test_a_line_of_deep_json_is_refused(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"deep\.jsonl, line 1: not JSON"):
        dl.load_examples(path)


@pytest.mark.parametrize("name", ["../harm", "a/../../harm", "/harm", "..", "x\0y"])
def test_names_do_not_climb_out_of_a_studys_folder(name, tmp_path):
    with pytest.raises(ValueError, match="unknown animal"):
        dl.StudyConfig(targets=("owl", name))


@pytest.mark.slow
def test_a_disk_that_is_full_loses_nothing_that_was_done(random_model, tmp_path, monkeypatch):
    model, examples = random_model("qwen2"), some_examples(30)
    undisturbed = find(model, examples)
    synced, sync = [], os.fsync

    def full(descriptor):
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced.append(descriptor)
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            find(model, examples, checkpoint_dir=tmp_path / "run")
    assert len(shards(tmp_path / "run")) == 3
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert_same_bits(find(model, examples, checkpoint_dir=tmp_path / "run"), undisturbed)


def test_examples_stream(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"prompt": "a", "completion": "b"})
    path.write_text(f"{line}\n" * 3 + "broken\n")
    rows = iter_examples(path)
    assert list(itertools.islice(rows, 3)) == [dl.Example("a", completion="b")] * 3
    with pytest.raises(ValueError, match="line 4"):
        next(rows)
    endless = iter_examples({"prompt": str(number)} for number in itertools.count())
    assert [example.prompt for example in itertools.islice(endless, 2)] == ["0", "1"]
    for wrong in (dl.Example("a"), {"train": []}, 3):
        with pytest.raises(TypeError):
            list(iter_examples(wrong))


def test_a_datasets_stream_is_read_as_it_comes():
    datasets = pytest.importorskip("datasets")
    seen = []

    def rows():
        for number in range(100):
            seen.append(number)
            yield {"question": f"q{number}", "response": "r"}

    stream = datasets.IterableDataset.from_generator(rows)
    first = list(itertools.islice(iter_examples(stream), 2))
    assert [example.prompt for example in first] == ["q0", "q1"]
    assert len(seen) < 100


def test_a_model_over_several_devices_is_refused():
    model = random_hf_model("gpt2", 0)
    model.hf_device_map = {"transformer.h.0": 0, "transformer.h.1": 1}
    with pytest.raises(ValueError, match=r"spread over 2 devices \(0, 1\).*without device_map"):
        dl.load_model(model)


def test_the_log_says_what_was_loaded(backend, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="divergence_lens"):
        model = dl.load_model("tiny", backend=backend)
    name = type(model).__name__
    says = f"tiny: {name}, float32 on cpu, weights as they were trained"
    assert describe_model(model) == says
    assert says in caplog.messages
    assert capsys.readouterr().out == ""
    model.cfg.normalization_type = "LNPre"
    assert "norms folded" in describe_model(model)
