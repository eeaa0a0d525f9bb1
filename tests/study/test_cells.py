"""Cells on disk: computed once, told apart by their settings, safe from deaths and neighbours."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from divergence_lens.study.cells import Cell, CellError, CellStore


@pytest.fixture
def store(tmp_path):
    store = CellStore(tmp_path)
    yield store
    store.close()


def _counting(calls, value=1):
    def make(cell):
        calls.append(cell.name)
        return {"value": value}

    return make


def test_a_cell_is_computed_once(store):
    calls = []
    cell = Cell("a/b-0", {"seed": 0})
    for _ in range(3):
        assert store.get(cell, _counting(calls)) == {"value": 1}
    assert calls == ["a/b-0"]
    # Another process, later, has another CellStore of the same folder.
    assert CellStore(store.folder.parent).get(cell, _counting(calls)) == {"value": 1}
    assert len(calls) == 1


def test_a_changed_setting_is_another_cell(store):
    calls = []
    for lr in (0.1, 0.2, 0.1):
        store.get(Cell("a", {"lr": lr}), _counting(calls, value=lr))
    assert len(calls) == 2
    assert store.read(Cell("a", {"lr": 0.2})) == {"value": 0.2}
    assert store.read(Cell("a", {"lr": 0.3})) is None


def test_a_file_with_other_settings_or_damage_is_not_taken_for_the_result(store):
    cell = Cell("a", {"lr": 0.1})
    store.get(cell, _counting([]))
    record = json.loads(store.path(cell).read_text())
    store.path(cell).write_text(json.dumps(record | {"settings": {"lr": 0.2}}))
    assert store.read(cell) is None
    store.path(cell).write_text(json.dumps(record)[:-10])
    calls = []
    assert store.get(cell, _counting(calls)) == {"value": 1}
    assert calls


def test_a_failure_is_written_down_and_not_tried_again_in_the_run(store):
    calls = []

    def broken(cell):
        calls.append(cell)
        raise ValueError("no such thing\nand more")

    cell = Cell("a", {})
    assert store.attempt(cell, broken, wait=True)
    assert store.attempt(cell, broken, wait=True)
    assert len(calls) == 1
    assert store.failure(cell)["error"] == "ValueError: no such thing"
    assert "broken" in store.failure(cell)["traceback"]
    with pytest.raises(CellError, match="a: ValueError: no such thing"):
        store.get(cell, broken)
    store.forget_failures()
    assert store.get(cell, _counting([])) == {"value": 1}
    assert store.failure(cell) is None


def test_what_json_cannot_hold_is_a_failure_and_leaves_no_file(store):
    cell = Cell("a", {})
    assert store.attempt(cell, lambda _c: {"value": float("nan")}, wait=True)
    assert not store.has(cell)
    assert "ValueError" in store.failure(cell)["error"]


def test_a_cell_may_need_another_and_itself_again(store):
    inner, outer = Cell("inner", {}), Cell("outer", {})

    def make(_cell):
        with store.reserved(outer, wait=True) as mine:
            assert mine
        return {"twice": 2 * store.get(inner, _counting([]))["value"]}

    assert store.get(outer, make) == {"twice": 2}


def _hold(folder, ready, seconds):
    store = CellStore(folder)
    with store.reserved(Cell("a", {}), wait=True):
        ready.set()
        time.sleep(seconds)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs locks of POSIX")
def test_a_busy_cell_is_left_alone_and_one_whose_owner_died_is_free(store):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    owner = context.Process(target=_hold, args=(store.folder.parent, ready, 60))
    owner.start()
    assert ready.wait(30)
    cell = Cell("a", {})
    assert not store.attempt(cell, _counting([]), wait=False)
    assert store.attempt(Cell("b", {}), _counting([]), wait=False)
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    assert store.attempt(cell, _counting([]), wait=True)
    assert store.read(cell) == {"value": 1}


def test_freed_memory_is_returned_after_each_computation(store, monkeypatch):
    calls = []
    monkeypatch.setattr("divergence_lens.study.cells.return_freed_memory", lambda: calls.append(1))
    cell = Cell("students/memory", {"seed": 0})
    store.get(cell, lambda _cell: {"value": 1})
    store.get(cell, lambda _cell: {"value": 1})  # read, not computed
    assert len(calls) == 1
    with pytest.raises(CellError):
        store.get(Cell("students/memory", {"seed": 1}), lambda _cell: {}["missing"])
    assert len(calls) == 2
