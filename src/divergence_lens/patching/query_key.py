"""The query-key correction of AtP* (Kramar et al. 2024, arXiv 2403.00745)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from divergence_lens.engine import Pass, SiteFunction
from divergence_lens.patching.trace import PatchingRun


class QueryKey:
    """Effects of queries and keys through the softmax, exact up to the attention's output.

    The gradient through a saturated softmax is nearly zero even if a patch has a large effect. So
    the attention is recomputed with the patched query or key, and only the computation after it is
    linearized: the effect is the gradient of `z` times the exact change of `z`.

    Args:
        run: The chunk and its traces.
        site: `q` or `k`.
        begin: Begins a pass over the positions from `first` on.
        first: The first position that is recomputed.
    """

    def __init__(self, run: PatchingRun, site: str, begin: Callable[[], Pass], first: int) -> None:
        self._run, self._site, self._begin, self._first = run, site, begin, first

    @torch.no_grad()
    def contraction(
        self, layer: int
    ) -> Callable[[Float[Tensor, "batch pos head d_head"]], Float[Tensor, "batch pos heads"]]:
        """A function from the gradient of `z` of one layer to the values of its queries or keys."""
        base, patched = self._attention(layer, patched=False), self._attention(layer, patched=True)
        if self._site == "q":  # the query of one position changes the z of that position only
            change = patched["z"] - base["z"]  # [batch, pos, head, d_head]
            return lambda gradient: (gradient.float() * change).sum(-1)
        weight = self._key_weight(base, patched)  # [batch, head, query, key]
        z, values = base["z"], base["v"]
        groups = z.shape[2] // values.shape[2]  # query heads per key head
        values = values.repeat_interleave(groups, dim=2)  # [batch, key, head, d_head]

        def contract(gradient: Tensor) -> Tensor:
            # Sum over queries i of g_i . w_ij (v_j - z_i), without storing v_j - z_i.
            gradient = gradient.float()
            to_values = torch.einsum("bihd,bjhd->bhij", gradient, values)
            to_z = torch.einsum("bihd,bihd->bhi", gradient, z)
            per_key = (weight * (to_values - to_z[..., None])).sum(2)  # [batch, head, key]
            # Grouped-query attention: a key head gets the sum over its query heads.
            summed: Tensor = per_key.unflatten(1, (-1, groups)).sum(2)  # [batch, key head, key]
            return summed.movedim(1, -1)  # [batch, key, key head]

        return contract

    def _key_weight(
        self, base: dict[str, Tensor], patched: dict[str, Tensor]
    ) -> Float[Tensor, "batch head query key"]:
        """The weight w by which a patched key j moves z_i towards its value: w (v_j - z_i).

        If only the score s_j changes, to s_j', and R is the sum of e^s over all other keys, then
        w = (e^s_j' - e^s_j) / (R + e^s_j').
        """
        scores, changed = base["attn_scores"].double(), patched["attn_scores"].double()
        total = scores.logsumexp(-1, keepdim=True)  # [batch, head, query, 1]
        # Both relative to the total; the clamp keeps e^300 finite.
        old, new = (scores - total).exp(), (changed - total).clamp(max=300.0).exp()
        # Where one key has all the weight, 1 - weight is lost to rounding: add up the others.
        largest = scores.argmax(-1, keepdim=True)
        others = scores.scatter(-1, largest, -torch.inf).logsumexp(-1, keepdim=True) - total
        rest = (1 - old).scatter(-1, largest, others.exp())
        weight = torch.where(old + new > 0, (new - old) / (rest + new), 0.0)
        return weight[..., self._first :].float()

    def _attention(self, layer: int, *, patched: bool) -> dict[str, Tensor]:
        """Activations of one block's attention at the recomputed positions."""
        run, first = self._run, self._first
        activations: dict[str, Tensor] = {}

        def recorder(name: str) -> Callable[[Tensor], None]:
            def record(activation: Tensor) -> None:
                activations[name] = activation.float()

            return record

        names = ("z",) if self._site == "q" else ("z", "v", "attn_scores", "pattern")
        functions: list[tuple[int, str, SiteFunction]] = [(layer, n, recorder(n)) for n in names]
        if patched:
            new = run.new(self._site, layer)[:, first:]  # [batch, pos, head, d_head]
            differs = run.chunk.differs[:, first:, None, None]
            functions.append((layer, self._site, lambda old: torch.where(differs, new, old)))
        with run.engine.hooked(functions):
            resid = run.base.resid[layer][:, first:]
            rows = torch.arange(len(resid), device=resid.device)
            run.engine.block(layer, resid, self._begin(), rows=rows)
        if "pattern" in activations and not patched:
            _check_softmax(activations)
        return activations


def _check_softmax(activations: dict[str, Tensor]) -> None:
    if not torch.allclose(
        activations["attn_scores"].softmax(-1), activations["pattern"].transpose(1, 2), atol=0.02
    ):
        raise ValueError(
            "this model's attention pattern is not the softmax of the scores that it exposes; "
            'use method="graddrop" for its keys, which needs no scores'
        )
