"""Rules that decide how many counterfactual teachers must differ at a divergence token."""

Rule = str | int
"""How many counterfactuals must differ: "any", "all", or at least that number."""


def required_count(rule: Rule, n: int) -> int:
    """Return how many of `n` counterfactuals must differ under a rule.

    Raises:
        ValueError: The rule is unknown or needs more counterfactuals than there are.
    """
    if rule == "any":
        return 1
    if rule == "all":
        return n
    if isinstance(rule, bool) or not isinstance(rule, int) or not 1 <= rule <= n:
        raise ValueError(
            f"unknown rule {rule!r}; use 'any', 'all' or a number from 1 to {n} (the number of "
            "counterfactuals)"
        )
    return rule


def check_rule(rule: Rule, n: int, min_margin: float) -> None:
    """Validate a rule and a margin for `n` counterfactuals.

    Raises:
        ValueError: The rule does not fit `n`, or the margin is negative.
    """
    required_count(rule, n)
    if not min_margin >= 0:
        raise ValueError(f"min_margin must be 0 or more, got {min_margin}")
