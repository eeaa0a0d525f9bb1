"""Files of results: safetensors with a JSON header, written atomically and verified when read.

Every result is one safetensors file. Its metadata holds the kind of result, the version of the
layout, the caller's JSON header (settings, names, package versions) and a SHA-256 of all of it.
There is no pickle, so opening an untrusted file runs no code.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "divergence-lens"
FORMAT_VERSION = 1


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray | Tensor],
    header: Mapping[str, Any],
    kind: str,
) -> None:
    """Write `tensors` and `header` to one file, atomically.

    The file appears under its name once it is complete: a run that is killed leaves the old file or
    the new one. Missing folders are created.

    Args:
        path: Where to write.
        tensors: Arrays of numbers or bools by name, on any device. At least one.
        header: JSON values without NaN or infinity; `load_tensors` returns it.
        kind: Kind of result ("divergence", "effects", "delta", "preference", ...).

    Raises:
        ValueError: No tensors, or a header that JSON cannot hold.
        TypeError: An array that is not of numbers or bools.
    """
    path = Path(path)
    if not tensors:
        raise ValueError(f"Nothing to save in {path}: the result holds no tensors.")
    plain = _plain_tensors(tensors)
    try:
        text = json.dumps(dict(header), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The header of {path} cannot be written as JSON: {error}.") from error
    label = {
        "version": FORMAT_VERSION,
        "kind": kind,
        "checksum": _checksum(plain, kind, text),
        "header": text,
    }
    # One entry, because safetensors writes several in an order that differs from run to run.
    metadata = {FORMAT: json.dumps(label)}

    def write(temporary: Path) -> None:
        save_file(plain, temporary, metadata=metadata)

    write_file(path, write)


def load_tensors(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_tensors` wrote, after checking all of it.

    Returns:
        The tensors (on the CPU, in the types they were saved in) and the header.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not safetensors, was cut short or altered, is of another kind
            or format version, or was not written by this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {kind} file at {path}.")
    metadata = _read_metadata(path)
    if FORMAT not in metadata:
        raise ValueError(
            f"{path} is a safetensors file but was not saved by divergence-lens; "
            f"expected a file of kind {kind!r}."
        )
    altered = f"{path} was altered after it was saved (its checksum does not match); recompute it."
    try:
        label = json.loads(metadata[FORMAT])
        version, stored_kind, text = label["version"], label["kind"], str(label["header"])
        checksum = label["checksum"]
        header = json.loads(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(altered) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r} and this library reads {FORMAT_VERSION}; "
            "load it with the release that wrote it, or recompute it."
        )
    if stored_kind != kind:
        raise ValueError(f"{path} holds {stored_kind!r}, not {kind!r}.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(altered) from error
    if _checksum(tensors, kind, text) != checksum:
        raise ValueError(altered)
    return tensors, header


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically. Missing folders are created."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", newline="\n")

    write_file(Path(path), write)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically; missing folders are created.

    Args:
        path: The file.
        write: Called with the path of an empty temporary file, which is renamed to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes private files; results get the permissions of any new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain_tensors(tensors: Mapping[str, np.ndarray | Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors requires."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biuf":
                raise TypeError(
                    f"Tensor {name!r} is an array of {value.dtype}; only numbers and bools are "
                    "saved as tensors (put text into the header)."
                )
            tensor = torch.from_numpy(np.array(value, order="C"))
        else:
            tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _checksum(tensors: Mapping[str, Tensor], kind: str, text: str) -> str:
    """SHA-256 over kind, header and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256()
    # The length of each part comes first, so that different files give different byte strings.
    for part in (kind, text):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    for name in sorted(tensors):
        tensor = tensors[name]
        label = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        digest.update(len(label).to_bytes(8, "little") + label)
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata; safetensors checks the table of tensors against the size of the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size:,} bytes) is not a safetensors file, or was cut short or altered "
            f"({error}); recompute it"
        ) from error
