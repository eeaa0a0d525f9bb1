"""The command `doctor`: what is installed, which devices there are, and what works here."""

import json
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergence_lens.cli.options import FAILED, Device, DType, Precision, report_errors
from divergence_lens.engine import get_engine

if TYPE_CHECKING:
    from divergence_lens.models import Backend

BACKENDS: "tuple[Backend, ...]" = ("hooked", "bridge")
PACKAGES = (
    *("divergence-lens", "transformer-lens", "torch", "transformers", "accelerate", "datasets"),
    *("safetensors", "plotly", "peft"),
)
_GIB = 2**30


@report_errors
def doctor(
    out: Annotated[Path | None, typer.Option(help="Write it as JSON, too.")] = None,
    device: Device = None,
    dtype: DType = Precision.float32,
) -> None:
    """Say what is installed, how much memory there is, and what works here.

    Each shipped model is loaded in each class and a teacher is read through it, on the device and
    in the type that are given. The exit code is 1 if something that should work does not.

    Example: divergence-lens doctor
    """
    from divergence_lens.tiny import TINY_MODELS

    found = {**_installed(), **_machine()}
    for name, value in found.items():
        typer.echo(f"{name:20} {value}")
    works: dict[str, str] = {}
    failed = False
    for name in TINY_MODELS:
        for backend in BACKENDS:
            works[f"{name} ({backend})"], fine = _tried(name, backend, device, dtype)
            failed |= not fine
            typer.echo(f"{f'{name} ({backend})':20} {works[f'{name} ({backend})']}")
    if out is not None:
        from divergence_lens._utils.storage import write_text

        write_text(out, json.dumps(found | works, indent=1) + "\n")
    if failed:
        raise typer.Exit(FAILED)


def _installed() -> dict[str, str]:
    from divergence_lens.provenance import version_of

    versions = {name: str(version_of(name)) for name in PACKAGES}
    return {"python": platform.python_version(), "system": platform.platform(), **versions}


def _machine() -> dict[str, str]:
    import torch

    from divergence_lens.plots.export import BrowserError, find_browser

    found = {"threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors"}
    memory = _memory()
    if memory is not None:
        found["memory"] = memory
    disk = shutil.disk_usage(Path.cwd())
    found["disk"] = f"{disk.free / _GIB:.0f} GiB free in this folder"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0] / _GIB
        found[f"cuda:{index}"] = (
            f"{card.name}, {card.total_memory / _GIB:.0f} GiB, {free:.0f} of them free"
        )
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        found["GPU"] = "Apple (mps), not tested" if mps else "none; models run on the CPU"
    try:
        found["browser"] = f"{find_browser()} (draws PNG, SVG and PDF)"
    except BrowserError as error:
        found["browser"] = f"none, so figures are HTML pages only: {error}"
    return found


def _memory() -> str | None:
    """Memory of this machine in words; None where the system does not say."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES") / _GIB
        free = page * os.sysconf("SC_AVPHYS_PAGES") / _GIB
    except (AttributeError, ValueError, OSError):
        return None
    return f"{total:.0f} GiB, {free:.0f} of them unused"


def _tried(name: str, backend: "Backend", device: str | None, dtype: Precision) -> tuple[str, bool]:
    """Whether a model loads, its pass equals its own forward, and divergence tokens can be found.

    Returns:
        What happened, in words; and whether that is as it should be (TransformerLens 4 has one
        class less).
    """
    import torch

    import divergence_lens as dl
    from divergence_lens.models import HookedTransformer

    if backend == "hooked" and HookedTransformer is None:
        return "not in this TransformerLens", True
    try:
        kind: Any = getattr(torch, dtype.value)
        model = dl.load_model(name, backend=backend, device=device, dtype=kind)
        owl, cat = dl.animal_teachers(["owl", "cat"])
        row = dl.Example("Continue: 12, 14, 16.", completion="18, 20, 22")
        found = dl.find_divergence(model, [row], teacher=owl, counterfactuals=[cat])
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return f"fails: {error}", False
    engine = get_engine(model)
    return (
        f"{type(model).__name__} of {engine.n_layers} blocks runs on {engine.device} "
        f"({len(found.tokens)} tokens read)"
    ), True
