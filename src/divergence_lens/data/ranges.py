"""Validation of ranges of whole numbers."""


def check_least(name: str, value: int, least: int) -> None:
    """Refuse a value below `least`."""
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_range(name: str, low: int, high: int, *, least: int) -> None:
    """Refuse a range that is empty or starts below `least`."""
    check_least(f"the start of {name}", low, least)
    if high < low:
        raise ValueError(f"{name} is {low}..{high}, which is empty; end it at or above its start")
