"""How the blocks of a model read the residual stream and write to it, part by part.

1. Find each block's norms, MLP, and the weights of each head (`engine.block_parts`).
2. Check on a short probe that the parts add up: queries, keys and values are linear maps of the
   normed residual; the heads' outputs and the MLP's output, added to the residual, give the next
   one. Models with a norm or a scale after the heads (Gemma 2, OLMo 2, Granite) fail here.
3. Read with other inputs: `read` computes one head's queries, keys or values from any residual, and
   `reading` runs a block whose parts read other residuals than its own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from divergence_lens.circuits.graph import READS, Graph
from divergence_lens.engine import (
    BlockParts,
    Engine,
    SiteFunction,
    block_parts,
    pass_tolerance,
    probe_tokens,
)

Change = Callable[[Tensor], Tensor | None]
"""From an activation (of `q`, `k`, `v`, or the residual that the MLP reads) to its replacement."""


class Blocks:
    """The blocks of a model as senders and receivers.

    Attributes:
        engine: Runs the model.
        graph: The model's graph.

    Args:
        engine: Runs the model.
        check: Whether to run the probe; once per call is enough, because weights of one shape add
            up like any others.

    Raises:
        ValueError: The parts of a block do not add up to it.
    """

    def __init__(self, engine: Engine, *, check: bool = True) -> None:
        self.engine = engine
        self.graph = Graph(
            n_layers=engine.n_layers,
            n_heads=engine.n_heads,
            n_kv_heads=engine.n_kv_heads,
            mlps="mlp_out" in engine.sites,
            parallel="mlp_out" in engine.sites and "resid_mid" not in engine.sites,
        )
        absent = [site for site in (*READS, "z", "attn_out") if site not in engine.sites]
        if absent:
            raise ValueError(
                f"this model has no sites {', '.join(absent)}, so that its heads cannot be "
                "separated; only whole layers can be patched"
            )
        self._parts = lru_cache(maxsize=None)(self._load)
        if check:
            self._check()

    def _load(self, layer: int) -> BlockParts:
        return block_parts(self.engine, layer)

    def parts(self, layer: int) -> BlockParts:
        """The weights and modules of a block."""
        return self._parts(layer)

    # -- what parts write -------------------------------------------------------------------

    def written(
        self, layer: int, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch head pos d_model"]:
        """What each head adds to the residual."""
        out = self.parts(layer).out.to(z.dtype)
        return torch.einsum("bphe,hed->bhpd", z, out)

    def written_sum(
        self, layer: int, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What all heads together add to the residual, without the bias."""
        return z.flatten(2) @ self.parts(layer).out.to(z.dtype).flatten(0, 1)

    # -- what parts read --------------------------------------------------------------------

    def normed(self, layer: int, read: str, resid: Float[Tensor, "*batch d_model"]) -> Tensor:
        """The norm through which `q`, `k`, `v` or `mlp` read the residual."""
        parts = self.parts(layer)
        norm = parts.mlp_norm if read == "mlp" else parts.attention_norm
        assert norm is not None
        # Norms act on each position alone; they expect [batch, pos, d_model].
        flat: Tensor = norm(resid.reshape(1, -1, resid.shape[-1]))
        return flat.reshape(resid.shape)

    def read(
        self, layer: int, read: str, resid: Float[Tensor, "batch head pos d_model"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries, keys or values of a layer whose heads read one residual each."""
        head_map = self.parts(layer).maps[read]
        normed = self.normed(layer, read, resid)
        result = torch.einsum("bhpd,hde->bphe", normed, head_map.weight)
        return result if head_map.bias is None else result + head_map.bias

    def read_by(
        self,
        layer: int,
        read: str,
        head: Int64[Tensor, " rows"],
        resid: Float[Tensor, "rows pos d_model"],
    ) -> Float[Tensor, "rows pos d_head"]:
        """Queries, keys or values of one head for each row."""
        head_map = self.parts(layer).maps[read]
        result = torch.bmm(self.normed(layer, read, resid), head_map.weight[head])
        return result if head_map.bias is None else result + head_map.bias[head][:, None]

    @contextmanager
    def reading(self, layer: int, changes: Mapping[str, Change]) -> Iterator[None]:
        """Make the parts of a block read something else within the context.

        Args:
            layer: The block.
            changes: For `q`, `k` and `v` a function of the site's activation, and for `mlp` of the
                residual that the MLP reads, [batch, pos, d_model]; each returns the replacement, or
                None to leave it. Other sites are hooked as well.
        """
        hooks: list[tuple[int, str, SiteFunction]] = [
            (layer, site, change) for site, change in changes.items() if site != "mlp"
        ]
        with ExitStack() as stack:
            if "mlp" in changes:
                inputs: list[Tensor] = []
                site = "resid_pre" if self.graph.parallel else "resid_mid"
                hooks.append((layer, site, inputs.append))
                mlp = self.parts(layer).mlp
                assert mlp is not None

                def replace(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                    changed = changes["mlp"](inputs.pop())
                    if changed is None:
                        return None
                    return (self.normed(layer, "mlp", changed), *args[1:])

                stack.callback(mlp.register_forward_pre_hook(replace).remove)
            stack.enter_context(self.engine.hooked(hooks))
            yield

    # -- the check --------------------------------------------------------------------------

    @torch.no_grad()
    def _check(self) -> None:
        """Refuse a model whose parts do not add up to its blocks."""
        engine = self.engine
        tolerance = max(10 * pass_tolerance(engine.dtype), 1e-3)
        run = engine.begin(probe_tokens(engine.model))
        resid = run.resid
        sites = (*READS, "z", "attn_out") + ("mlp_out",) * self.graph.mlps
        for layer in range(engine.n_layers):
            states: dict[str, Tensor] = {}

            def store(site: str, states: dict[str, Tensor] = states) -> Change:
                return lambda activation: states.update({site: activation.clone()})

            watched = {site: store(site) for site in sites}
            mlp_input: list[Tensor] = []
            parts = self.parts(layer)
            with ExitStack() as stack:
                if parts.mlp is not None:
                    watched["mlp"] = store("mlp")
                    hook = parts.mlp.register_forward_pre_hook(
                        lambda _module, args, inputs=mlp_input: inputs.append(args[0])
                    )
                    stack.callback(hook.remove)
                stack.enter_context(self.reading(layer, watched))
                after = engine.block(layer, resid, run)
            self._check_observed(layer, {*sites} - {*states}, mlp_called=bool(mlp_input))
            compared = {}
            for read, name in zip(READS, ("queries", "keys", "values"), strict=True):
                own = resid[:, None].expand(-1, self.graph.heads(read), -1, -1)
                compared[name] = (states[read], self.read(layer, read, own))
            added = states["attn_out"] + states.get("mlp_out", 0)
            compared["output"] = (after - resid, added)
            # The output bias belongs to no head: compare differences between positions.
            written = self.written(layer, states["z"]).sum(1)
            compared["heads' sum"] = (
                states["attn_out"] - states["attn_out"][:1, :1],
                written - written[:1, :1],
            )
            if parts.mlp is not None:
                compared["MLP's input"] = (
                    mlp_input[0],
                    self.normed(layer, "mlp", states["mlp"]),
                )
                if self.graph.mlps:
                    compared["MLP's output"] = (
                        states["mlp_out"],
                        engine.mlp_out(layer, states["mlp"]),
                    )
            for name, (own, ours) in compared.items():
                if own.shape != ours.shape:
                    self._refuse(name, layer, f"shapes {list(own.shape)} and {list(ours.shape)}")
                difference = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
                if not difference <= tolerance:
                    self._refuse(name, layer, f"relative difference {difference:.2g}")
            resid = after

    def _check_observed(self, layer: int, absent: set[str], *, mlp_called: bool) -> None:
        if absent:
            self._refuse("output", layer, f"its {', '.join(sorted(absent))} is not observable")
        if self.graph.mlps and not mlp_called:  # OPT's layers call the MLP's two maps themselves
            self._refuse("MLP's input", layer, "its MLP is not called as one module")

    def _refuse(self, name: str, layer: int, why: str) -> None:
        raise ValueError(
            f"the {name} of block {layer} cannot be divided among its heads and its MLP ({why}); "
            "edges need a block whose output is the plain sum of its heads and its MLP, without a "
            "norm or a scale after them: patch the model's nodes instead"
        )
