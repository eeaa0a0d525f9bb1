"""Forward passes recorded for a backward pass, whose gradients are contracted immediately.

The gradient of a site is never stored: as soon as autograd computes it, a hook contracts it with
the site's change, which leaves one number per position (and head).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from divergence_lens.engine import Engine, Pass, SiteFunction
from divergence_lens.patching.relp import relevance_rules
from divergence_lens.patching.trace import Chunk, Trace, logits_at, states_at, traced_pass

Method = Literal[
    "gradient",
    "integrated",
    "integrated-left",
    "integrated-inputs",
    "qk",
    "graddrop",
    "atp*",
    "relp",
]
"""The methods of `attribution_patch`."""

QUERY_KEY_SITES = ("q", "k")
QUERY_KEY_METHODS = ("qk", "atp*")
DROP_METHODS = ("graddrop", "atp*")
PATH_METHODS = ("integrated", "integrated-left", "integrated-inputs")

SiteValues = dict[str, Float[Tensor, "layer rows pos ..."]]


class RecordedPass:
    """A forward pass whose sites contract their gradients during the backward pass.

    Args:
        engine: Runs the model.
        sites: The sites to attribute to.
        through: For each of them, the site whose gradient is contracted.
        drops: Whether a block's contribution can be dropped from the backward pass.

    Attributes:
        contract: For each site and layer, the function from gradient to values; set before
            `backward`.
    """

    def __init__(
        self, engine: Engine, sites: Sequence[str], through: dict[str, str], *, drops: bool = False
    ) -> None:
        self.engine, self.sites, self.through, self.drops = engine, sites, through, drops
        self.contract: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
        self._values: dict[tuple[str, int], Tensor] = {}
        self._dropped = -1
        self._leaf: Tensor

    def forward(
        self, state: Float[Tensor, "rows pos d_model"], run: Pass, rows: Tensor | None = None
    ) -> list[Float[Tensor, "rows pos d_model"]]:
        """Run all blocks from the embeddings `state`; return the residual at every boundary."""
        layers = range(self.engine.n_layers)
        hooks: list[tuple[int, str, SiteFunction]] = [
            (layer, self.through[site], self._site_hook(site, layer))
            for site in self.sites
            for layer in layers
        ]
        if self.drops:
            hooks += [(layer, "block_out", self._drop_hook(layer)) for layer in layers]
        self._leaf = state.detach().requires_grad_()
        with self.engine.hooked(hooks):
            resid = [self._leaf.clone()]  # not the leaf itself: its gradient hook must be called
            for layer in layers:
                resid.append(self.engine.block(layer, resid[-1], run, rows=rows))
        return resid

    def backward(
        self, metric: Float[Tensor, ""], *, drop: int = -1, last: bool = True
    ) -> SiteValues:
        """Run one backward pass and return the contracted gradients of each site.

        Args:
            metric: The sum of the metrics.
            drop: The layer whose contribution gets no gradient, or -1 for none.
            last: Whether to free the graph.
        """
        self._dropped = drop
        # The gradient of the embeddings is not needed; asking for it calls the hooks on the way.
        torch.autograd.grad(metric, self._leaf, retain_graph=not last)
        layers = range(self.engine.n_layers)
        return {
            site: torch.stack([self._values[site, layer] for layer in layers])
            for site in self.sites
        }

    def _site_hook(self, site: str, layer: int) -> SiteFunction:
        def contract(gradient: Tensor) -> None:
            self._values[site, layer] = self.contract[site, layer](gradient)

        def hook(activation: Tensor) -> Tensor:
            # `retain_grad` and tensor hooks are inert on an activation that the hook point reshapes
            # afterwards. Returning a view puts the hooked tensor into the graph.
            activation = activation.view_as(activation)
            activation.register_hook(contract)
            return activation

        return hook

    def _drop_hook(self, layer: int) -> SiteFunction:
        def drop(gradient: Tensor) -> Tensor:
            return torch.zeros_like(gradient) if layer == self._dropped else gradient

        def hook(contribution: Tensor) -> None:
            contribution.register_hook(drop)

        return hook


@dataclass(frozen=True)
class RecordedTrace(Trace):
    """A base run recorded for the backward pass, so that it is not run again.

    Attributes:
        record: The pass over the positions from the first difference on.
        live: The last residual at the states that are read, with its graph.
    """

    record: RecordedPass
    live: Float[Tensor, "states d_model"]


def recorded_base_run(
    engine: Engine, chunk: Chunk, noise: Tensor | None, sites: Sequence[str], method: Method
) -> RecordedTrace:
    """Run the base side of a chunk, recorded from the first difference on."""
    first = int(chunk.start.min())
    tokens = chunk.base  # [batch, pos]
    before: Trace | None = None
    if first:  # positions before the first difference do not change, so they need no gradient
        end = torch.full_like(chunk.base_target, first - 1)
        before = traced_pass(engine, tokens[:, :first], end, sites, store=True)
    corrected = method in QUERY_KEY_METHODS
    through = {site: "z" if corrected and site in QUERY_KEY_SITES else site for site in sites}
    record = RecordedPass(engine, sites, through, drops=method in DROP_METHODS)
    activations: dict[str, list[Tensor]] = {site: [] for site in sites}

    def recorder(site: str) -> SiteFunction:
        return lambda activation: activations[site].append(activation.detach())

    layers = range(engine.n_layers)
    recorders = [(layer, site, recorder(site)) for layer in layers for site in sites]
    with ExitStack() as stack:
        stack.enter_context(engine.frozen())
        stack.enter_context(torch.enable_grad())
        if method == "relp":
            stack.enter_context(relevance_rules(engine))
        stack.enter_context(engine.hooked(recorders))
        run = engine.begin(tokens[:, first:], before.past if before else None)
        state = run.resid if noise is None else run.resid + noise[:, first:].to(run.resid.dtype)
        resid = record.forward(state, run)
        rows = torch.arange(len(tokens), device=tokens.device)
        live = states_at(resid[-1], chunk.base_target - first, rows, chunk.readings)
        with torch.no_grad():
            logits = logits_at(engine, live)
    resid = [boundary.detach() for boundary in resid]  # [batch, pos - first, d_model] each
    if before is not None:  # prepend the positions that were run without gradients
        resid = [torch.cat(both, 1) for both in zip(before.resid, resid, strict=True)]
        activations = {
            site: [
                # The patterns of the first positions have fewer keys: the others get no attention.
                torch.cat([pad(start, (0, end.shape[-1] - start.shape[-1])), end], 1)
                for start, end in zip(before.sites[site], after, strict=True)
            ]
            for site, after in activations.items()
        }
    past = before.past if before else None
    return RecordedTrace(activations, resid, past, logits, record=record, live=live)
