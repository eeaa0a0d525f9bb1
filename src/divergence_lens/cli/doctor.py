"""The command `doctor`: installed versions and devices, for bug reports."""

import os
import platform
from importlib.util import find_spec

import typer

from divergence_lens.cli.options import report_errors

PACKAGES = (
    *("divergence-lens", "transformer-lens", "torch", "transformers", "accelerate"),
    *("safetensors", "plotly", "peft", "kaleido", "matplotlib"),
)


@report_errors
def doctor() -> None:
    """Print installed versions, devices and image support, for a bug report.

    Example: divergence-lens doctor
    """
    import torch

    from divergence_lens.provenance import version_of

    rows = {"python": platform.python_version(), "system": platform.platform()}
    rows |= {name: str(version_of(name)) for name in PACKAGES}
    rows["CPU"] = f"{torch.get_num_threads()} threads on {os.cpu_count()} processors"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        rows[f"cuda:{index}"] = f"{properties.name}, {free:.0f} of {total:.0f} GiB free"
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        rows["GPU"] = "Apple (mps), untested" if mps else "none"
    images = [name for name in ("kaleido", "matplotlib") if find_spec(name) is not None]
    rows["images"] = " or ".join(images) or "none; pip install 'divergence-lens[images]'"
    for name, value in rows.items():
        typer.echo(f"{name:18} {value}")
