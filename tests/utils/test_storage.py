"""Files come back as they were saved, and a damaged file is refused with its reason."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from divergence_lens._utils import storage
from divergence_lens._utils.storage import load_tensors, save_tensors, write_text

HEADER = {"name": "owl", "list": [1, 2.5, None], "deep": {"ü": True}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "result.safetensors"
    save_tensors(
        path,
        {"ints": np.arange(12).reshape(3, 4), "mask": np.array([True, False])},
        HEADER,
        "divergence",
    )
    return path


def test_tensors_and_header_come_back_unchanged(tmp_path: Path) -> None:
    tensors = {
        "f32": np.linspace(-1, 1, 7, dtype=np.float32),
        "i64": np.arange(6).reshape(2, 3)[:, ::2],
        "bool": np.array([[True], [False]]),
        "bf16": torch.randn(5, 3).to(torch.bfloat16),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "scalar": torch.tensor(3.5),
    }
    save_tensors(tmp_path / "a" / "b.safetensors", tensors, HEADER, "effects")
    loaded, header = load_tensors(tmp_path / "a" / "b.safetensors", "effects")
    assert header == HEADER
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        expected = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name], expected)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    save_tensors(tmp_path / "x", {"a": whole, "b": whole, "c": whole[2:5]}, {}, "delta")
    loaded, _ = load_tensors(tmp_path / "x", "delta")
    assert torch.equal(loaded["a"], whole)
    assert torch.equal(loaded["b"], whole)
    assert torch.equal(loaded["c"], whole[2:5])


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_tensors(tmp_path / name, {"a": np.arange(3)}, HEADER, "delta")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no divergence file at .*nothing"):
        load_tensors(tmp_path / "nothing", "divergence")


def test_another_kind_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="holds 'divergence', not 'effects'"):
        load_tensors(saved, "effects")


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FORMAT_VERSION", 99)
    save_tensors(tmp_path / "later", {"a": np.arange(3)}, {}, "delta")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 99"):
        load_tensors(tmp_path / "later", "delta")


def test_another_librarys_safetensors_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not saved by divergence-lens"):
        load_tensors(tmp_path / "foreign", "delta")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"hello, this is text\n", bytes(64), b"\x89PNG\r\n\x1a\n" * 8]
)
def test_files_of_another_sort_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_tensors(tmp_path / "odd", "delta")


def test_every_cut_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut short|not a safetensors"):
            load_tensors(saved, "divergence")


def test_bytes_added_at_the_end_are_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="was cut short or altered"):
        load_tensors(saved, "divergence")


def test_every_flipped_bit_of_the_data_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content)):
        altered = bytearray(content)
        altered[place] ^= 1
        saved.write_bytes(altered)
        with pytest.raises(ValueError, match="was altered"):
            load_tensors(saved, "divergence")


def test_an_edited_header_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    assert b"owl" in content
    saved.write_bytes(content.replace(b"owl", b"cat"))
    with pytest.raises(ValueError, match="was altered"):
        load_tensors(saved, "divergence")


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "x"
    save_tensors(path, {"a": np.arange(5), "b": np.ones(2)}, HEADER, "delta")
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    try:
        tensors, header = load_tensors(path, "delta")
    except ValueError:
        return
    # A blank inside the table may change without meaning; the result may not.
    assert header == HEADER
    assert torch.equal(tensors["a"], torch.arange(5))
    assert torch.equal(tensors["b"], torch.ones(2, dtype=torch.float64))


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(saved, {"a": np.arange(3)}, {}, "divergence")
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("header", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
def test_headers_that_json_cannot_hold_are_refused(
    tmp_path: Path, header: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        save_tensors(tmp_path / "x", {"a": np.arange(3)}, header, "delta")
    assert list(tmp_path.iterdir()) == []


def test_text_arrays_and_empty_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="array of <U3"):
        save_tensors(tmp_path / "x", {"a": np.array(["owl"])}, {}, "delta")
    with pytest.raises(ValueError, match="Nothing to save"):
        save_tensors(tmp_path / "x", {}, {}, "delta")
    assert list(tmp_path.iterdir()) == []


def test_saved_files_have_ordinary_permissions(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~mask


def test_text_is_written_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.json", json.dumps({"ü": 1}, ensure_ascii=False) + "\n")
    assert json.loads((tmp_path / "deep" / "a.json").read_text(encoding="utf-8")) == {"ü": 1}
