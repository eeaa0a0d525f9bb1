"""Attribution values of one chunk, from gradients at the base state or along a path from it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from divergence_lens.engine import Pass
from divergence_lens.patching.gradients import (
    DROP_METHODS,
    QUERY_KEY_METHODS,
    QUERY_KEY_SITES,
    Method,
    RecordedPass,
    RecordedTrace,
    SiteValues,
)
from divergence_lens.patching.query_key import QueryKey
from divergence_lens.patching.relp import relevance_rules
from divergence_lens.patching.trace import PatchingRun, logits_at, states_at


class AttributionPass:
    """Gradients of one chunk, at the base state or between the base and the source state."""

    def __init__(self, run: PatchingRun, sites: Sequence[str], batch_rows: int) -> None:
        self.run, self.engine, self.chunk, self.base = run, run.engine, run.chunk, run.base
        self.sites, self.batch_rows = sites, batch_rows
        # Positions before the first difference are the same in both runs: their keys and values
        # are reused, and only the later positions are run again.
        self.first = int(run.chunk.start.min())
        past = run.base.past
        self.past = past.upto(self.first) if past is not None and self.first else None
        self.rows = torch.arange(len(run.chunk.indices), device=run.chunk.base.device)
        self.differs = run.chunk.differs[:, self.first :]
        self._offset = 0.5  # of a node in its interval

    def values(self, method: Method, steps: int) -> SiteValues:
        """Values of the positions from the first difference on, by one of the methods."""
        if method in ("integrated", "integrated-left"):
            self._offset = 0.5 if method == "integrated" else 0.0
            layers = range(self.engine.n_layers)
            return {
                site: torch.stack([self._integrated_layer(site, layer, steps) for layer in layers])
                for site in self.sites
            }
        if method == "integrated-inputs":
            return self._integrated_inputs(steps)
        assert isinstance(self.base, RecordedTrace)
        record = self.base.record
        self._prepare(record, self.rows, corrected=method in QUERY_KEY_METHODS)
        # The final norm runs here, outside the recorded pass, and needs its rule too.
        with relevance_rules(self.engine) if method == "relp" else nullcontext():
            metric = self._metric(self.base.live, self.rows)
        if method in DROP_METHODS:
            return self._with_drops(record, metric)
        return record.backward(metric)

    def _with_drops(self, record: RecordedPass, metric: Float[Tensor, ""]) -> SiteValues:
        """GradDrop: one backward pass for each layer whose contribution is dropped."""
        layers = self.engine.n_layers
        dropped = [record.backward(metric, drop=layer, last=False) for layer in range(layers)]
        result = {}
        for site in self.sites:
            # A site inside the dropped block gets no gradient in that pass, which is not counted.
            inside = site not in ("resid_pre", "resid_post")
            passes = max(1, layers - 1) if inside else layers
            every = torch.stack([one[site] for one in dropped])  # [pass, layer, batch, pos, ...]
            every = self.chunk.merged(every, 2)  # magnitudes of a pair's two rows do not add up
            result[site] = torch.sign(every.sum(0)) * every.abs().sum(0) / passes
        return result

    def _integrated_inputs(self, steps: int) -> SiteValues:
        """All layers from one path: the embeddings move from the base to the source run's."""
        embeddings = self.base.resid[0][:, self.first :].detach()
        other = self.chunk.aligned(self.run.source.resid[0])[:, self.first :]
        change = self._masked(other.float() - embeddings.float())  # [batch, pos, d_model]
        result: SiteValues = {}
        for alphas in _nodes(
            steps, self._offset, self.batch_rows // len(self.rows), embeddings.device
        ):
            state = _between(embeddings, change, alphas)  # [nodes * batch, pos, d_model]
            rows = self.rows.repeat(len(alphas))
            record = RecordedPass(self.engine, self.sites, {site: site for site in self.sites})
            resid = record.forward(state, self._begin(), rows)[-1]
            self._prepare(record, rows, corrected=False)
            at = self.chunk.base_target[rows] - self.first
            read = states_at(resid, at, rows, self.chunk.readings)
            for site, part in record.backward(self._metric(read, rows)).items():
                # [layer, nodes * batch, pos, ...] -> [layer, batch, pos, ...]
                mean = part.unflatten(1, (len(alphas), len(self.rows))).sum(1) / steps
                result[site] = result[site] + mean if site in result else mean
        return result

    def by_cell(
        self, values: Float[Tensor, "layer batch rerun_pos ..."]
    ) -> Float[Tensor, "layer batch col ..."]:
        """Values of all cells: zero before the first difference.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        if not bool(torch.isfinite(values).all()):
            pair = int(self.chunk.indices[(~torch.isfinite(values)).nonzero()[0, 1]])
            raise ValueError(
                f"the gradient of the metric of pair {pair} holds NaN or infinity; the model or "
                "the metric is not differentiable there"
            )
        layers, batch, _, *heads = values.shape
        result = values.new_zeros(layers, batch, self.chunk.base.shape[1], *heads)
        result[:, :, self.first :] = values  # [layer, batch, pos, ...]
        missing = self.chunk.counterpart < 0
        result = result.masked_fill(missing.view(1, *missing.shape, *[1] * len(heads)), torch.nan)
        return self.chunk.sum_of(result)

    def _prepare(self, record: RecordedPass, rows: Tensor, *, corrected: bool) -> None:
        """Set how the gradient of each site and layer is contracted."""
        for site in self.sites:
            for layer in range(self.engine.n_layers):
                record.contract[site, layer] = self._contraction(
                    site, layer, rows, corrected=corrected and site in QUERY_KEY_SITES
                )

    def _contraction(
        self, site: str, layer: int, rows: Tensor, *, corrected: bool
    ) -> Callable[[Tensor], Tensor]:
        if corrected:
            return QueryKey(self.run, site, self._begin, self.first).contraction(layer)
        change = self._change(site, layer)
        return lambda gradient: (gradient.float() * change[rows]).sum(-1)  # [rows, pos, (head)]

    def _integrated_layer(
        self, site: str, layer: int, steps: int
    ) -> Float[Tensor, "batch pos ..."]:
        """One layer from a path over the state of its own site."""
        start = self.base.sites[site][layer][:, self.first :]
        change = self._change(site, layer)
        total: Tensor | None = None
        for alphas in _nodes(steps, self._offset, self.batch_rows // len(self.rows), start.device):
            rows = self.rows.repeat(len(alphas))
            state = _between(start, change, alphas).requires_grad_()
            metric = self._metric(self._from_state(site, layer, state, rows), rows)
            (gradient,) = torch.autograd.grad(metric, state)
            # [nodes * batch, pos, ...] -> [batch, pos, ...]
            part = gradient.float().unflatten(0, (len(alphas), len(self.rows))).sum(0)
            total = part if total is None else total + part
        assert total is not None
        return (total * change).sum(-1) / steps

    def _from_state(
        self, site: str, layer: int, state: Float[Tensor, "rows pos ..."], rows: Tensor
    ) -> Float[Tensor, "states d_model"]:
        """The last residual at the states that are read if the site of `layer` holds `state`."""
        run = self._begin()
        if site == "resid_pre":
            x, above = state, layer
        elif site == "resid_post":
            x, above = state, layer + 1
        else:
            below = self.base.resid[layer][:, self.first :][rows]
            with self.engine.hooked([(layer, site, lambda _: state)]):
                x, above = self.engine.block(layer, below, run, rows=rows), layer + 1
        at = self.chunk.base_target[rows] - self.first
        readings, last = self.chunk.readings, self.engine.n_layers - 1
        for upper in range(above, last):
            x = self.engine.block(upper, x, run, rows=rows)
        if above <= last and readings is None:
            return self.engine.last_block(x, run, at, rows=rows)
        if above <= last:
            x = self.engine.block(last, x, run, rows=rows)
        return states_at(x, at, rows, readings)

    def _begin(self) -> Pass:
        # A pass needs the number of positions, not the tokens, so one row is enough.
        return self.engine.begin(self.chunk.base[:1, self.first :], self.past)

    def _metric(self, resid: Float[Tensor, "states d_model"], rows: Tensor) -> Float[Tensor, ""]:
        """The sum of the metrics; each depends on its own row only, so gradients do not mix."""
        metric = self.run.measure(logits_at(self.engine, resid), rows)
        if not metric.requires_grad:
            raise ValueError(
                "the metric returned a result without a gradient; compute it from the logits with "
                "torch functions only, without detach, item, numpy or argmax"
            )
        return metric.sum()

    def _change(self, site: str, layer: int) -> Float[Tensor, "batch pos ..."]:
        """Source minus base activation in float32; zero before the first difference."""
        other = self.run.new(site, layer)[:, self.first :]
        return self._masked(other.float() - self.base.sites[site][layer][:, self.first :].float())

    def _masked(self, change: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        differs = self.differs.view(*self.differs.shape, *[1] * (change.ndim - 2))
        return torch.where(differs, change, 0.0)


def _between(
    start: Float[Tensor, "batch pos ..."],
    change: Float[Tensor, "batch pos ..."],
    alphas: Float[Tensor, " nodes"],
) -> Float[Tensor, "rows pos ..."]:
    """States on the line from `start` to `start + change`, the nodes stacked on the batch."""
    weight = alphas.view(-1, *[1] * start.ndim)  # [node, 1, 1, ...]
    # [node, batch, pos, ...] -> [node * batch, pos, ...]
    return (start.float() + weight * change).flatten(0, 1).to(start.dtype).detach()


def _nodes(steps: int, offset: float, at_once: int, device: torch.device) -> tuple[Tensor, ...]:
    """Points of `steps` equal intervals of [0, 1], in groups of `at_once`: 0.5 for midpoints."""
    # The midpoint rule: its error falls with steps^-2, that of left endpoints with steps^-1.
    nodes = (torch.arange(steps, device=device) + offset) / steps
    return torch.split(nodes, max(1, at_once))
