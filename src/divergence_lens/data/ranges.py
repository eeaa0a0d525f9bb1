"""Validation of ranges of whole numbers."""


def check_least(what: str, value: int, least: int) -> None:
    """Validate a lower bound.

    Raises:
        ValueError: `value` is below `least`.
    """
    if value < least:
        msg = f"{what} is {value}; it must be at least {least}"
        raise ValueError(msg)


def check_range(what: str, low: int, high: int, *, least: int) -> None:
    """Validate a range that is not empty and starts at `least` or above.

    Raises:
        ValueError: It is empty or starts too low.
    """
    check_least(f"the start of {what}", low, least)
    if high < low:
        msg = f"{what} is {low}..{high}, which holds nothing; its end must not be below its start"
        raise ValueError(msg)
