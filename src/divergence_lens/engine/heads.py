"""The weights of attention heads, and the modules around them, in one layout for both classes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from divergence_lens.engine.fused_classes import linear_map
from divergence_lens.models import is_hooked, lens_model

if TYPE_CHECKING:
    from divergence_lens.engine.base import Engine


@dataclass(frozen=True)
class HeadMap:
    """The map from the normed residual to the queries, keys or values of each head."""

    weight: Float[Tensor, "head d_model d_head"]
    bias: Float[Tensor, "head d_head"] | None


@dataclass(frozen=True)
class BlockParts:
    """The current parameters of a block's heads, and its modules.

    Attributes:
        maps: The maps to the sites `q`, `k` and `v`; the last two have one head per group.
        out: The map from each head's output (site `z`) to the residual.
        attention_norm: The norm that attention reads through.
        mlp_norm: The norm that the MLP reads through; None without an MLP.
        mlp: The MLP; None if there is none.
    """

    maps: dict[str, HeadMap]
    out: Float[Tensor, "head d_head d_model"]
    attention_norm: nn.Module
    mlp_norm: nn.Module | None
    mlp: nn.Module | None


def block_parts(engine: "Engine", layer: int) -> BlockParts:
    """Return the parts of a block that read the residual and write to it.

    Raises:
        ValueError: The attention is not made of linear maps and a norm.
    """
    block: Any = lens_model(engine.model).blocks[layer]
    try:
        maps, out = (_hooked_maps if is_hooked(engine.model) else _bridge_maps)(engine, block.attn)
        norm = block.ln1
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"the attention of this model is not made of linear maps after a norm ({error}), so "
            "that heads cannot be separated; only whole layers can be patched"
        ) from error
    mlp = getattr(block, "mlp", None)
    # Blocks such as GPT-J's have one norm, which attention and MLP both read.
    return BlockParts(maps, out, norm, None if mlp is None else getattr(block, "ln2", norm), mlp)


def _hooked_maps(engine: "Engine", attn: Any) -> tuple[dict[str, HeadMap], Tensor]:
    # A model that ungroups its keys repeats them for every query head, also in W_K.
    grouped = engine.n_kv_heads != engine.n_heads
    names = {"q": "Q", "k": "K", "v": "V"}
    maps = {}
    for site, letter in names.items():
        prefix = "_" if grouped and site != "q" else ""
        weight, bias = getattr(attn, f"{prefix}W_{letter}"), getattr(attn, f"{prefix}b_{letter}")
        maps[site] = HeadMap(weight, bias)  # [head, d_model, d_head]
    return maps, attn.W_O


def _bridge_maps(engine: "Engine", attn: Any) -> tuple[dict[str, HeadMap], Tensor]:
    maps = {}
    for site in ("q", "k", "v"):
        matrix, bias = linear_map(getattr(attn, site))
        maps[site] = HeadMap(
            rearrange(matrix, "d (head e) -> head d e", e=engine.d_head),
            None if bias is None else rearrange(bias, "(head e) -> head e", e=engine.d_head),
        )
    matrix, _ = linear_map(attn.o)
    return maps, rearrange(matrix, "(head e) d -> head e d", e=engine.d_head)
