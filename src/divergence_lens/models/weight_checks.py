"""Check that loaded weights are those of the model, and that they are finite numbers.

1. `check_no_pointer`: the files are weights, not Git LFS pointers.
2. `check_checkpoint_names`: every tensor of the checkpoint became a parameter, and every parameter
   came from the checkpoint. Transformers fills gaps with random values and only logs them.
3. `check_checkpoint_shapes`: every tensor has the shape that the configuration gives it.
4. `check_weights`: no parameter is NaN, infinite, or without data.
"""

import os
from collections.abc import Iterable, Sequence

import torch
from torch import nn

_LISTED = 10


def check_checkpoint_names(missing: Iterable[str], unexpected: Iterable[str], *, name: str) -> None:
    """Refuse a checkpoint whose tensors are not those of the model.

    Args:
        missing: Parameters that the checkpoint lacks.
        unexpected: Tensors of the checkpoint that the model lacks.
        name: The checkpoint, for the message.

    Raises:
        ValueError: Names the first ten of each kind, and a prefix that explains them.
    """
    absent = sorted(missing)
    extra = sorted(unexpected)
    if not absent and not extra:
        return
    parts = []
    if absent:
        parts.append(f"lacks {_listed(absent)}")
    if extra:
        parts.append(f"has {_listed(extra)}, which the architecture does not have")
    prefix = _common_prefix(absent, extra)
    if prefix is not None:
        hint = f"every name carries the prefix {prefix!r}: remove it from the checkpoint's names"
    else:
        hint = "such weights would be random or ignored; save the model with save_pretrained"
    raise ValueError(f"the checkpoint {name!r} {' and '.join(parts)}; {hint}")


def check_checkpoint_shapes(
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], *, name: str
) -> None:
    """Refuse a checkpoint with tensors of other shapes than the configuration gives them.

    Args:
        mismatched: Name, shape in the checkpoint and shape in the model of each such tensor.
        name: The checkpoint, for the message.

    Raises:
        ValueError: Names the first ten, with both shapes.
    """
    wrong = [f"{key} {list(own)} instead of {list(wanted)}" for key, own, wanted in mismatched]
    if wrong:
        raise ValueError(
            f"the shapes in the checkpoint {name!r} do not fit its config.json: {_listed(wrong)}; "
            "use the configuration that the weights were saved with"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({shown}{more})"


def _common_prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """Return the prefix without which every unexpected name is a missing one, or None.

    Not every missing name needs an unexpected one: tied tensors are never stored.
    """
    for parameter in missing:
        for name in unexpected[:1]:
            prefix = name.removesuffix(parameter)
            stripped = {other.removeprefix(prefix) for other in unexpected}
            if prefix not in {"", name} and stripped <= set(missing):
                return prefix
    return None


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse parameters without data and values that are not finite.

    Raises:
        ValueError: Names the first such parameter.
    """
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{parameter_name} of {name!r} is on the meta device and has no values; load the "
                "weights first (from_pretrained without device_map='meta')"
            )
        # A sum is finite only if every term is, and needs no mask in memory. In half precision
        # the sum of finite values can overflow, so every value of such a tensor is tested.
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(
            torch.isfinite(parameter.detach()).all()
        ):
            bad = int((~torch.isfinite(parameter.detach())).sum())
            raise ValueError(
                f"{bad:,} of {parameter.numel():,} values of {parameter_name} of {name!r} are NaN "
                "or infinite; the checkpoint is damaged, or its training diverged"
            )


def check_no_pointer(path: str | os.PathLike[str]) -> None:
    """Refuse a folder whose weights are Git LFS pointers instead of weights.

    Raises:
        ValueError: Names the file and the command that fetches it.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.endswith((".safetensors", ".bin")) or not entry.is_file():
                continue
            if entry.stat().st_size > 1024:
                continue
            with open(entry.path, "rb") as file:  # noqa: PTH123 - an entry of scandir
                if file.read(40).startswith(b"version https://git-lfs"):
                    raise ValueError(
                        f"{entry.path} is a Git LFS pointer, not weights; run `git lfs pull` there"
                    )
