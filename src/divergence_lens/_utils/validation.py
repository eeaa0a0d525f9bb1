"""Checks of arguments that several packages share."""

from numbers import Number


def refuse_one_string(value: object, name: str) -> None:
    """Refuse a string where a list of strings is expected; Python would iterate its letters.

    Raises:
        TypeError: `value` is a string.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is one string; pass a list: [{value!r}]")


def refuse_one_number(value: object, name: str) -> None:
    """Refuse a number where a list of numbers is expected.

    Raises:
        TypeError: `value` is a number.
    """
    if isinstance(value, Number):
        raise TypeError(f"{name} is one number; pass a list: [{value}]")
