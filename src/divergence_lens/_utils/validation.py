"""Checks of arguments that several rooms share."""

from numbers import Number


def refuse_one_string(value: object, name: str) -> None:
    """Refuse a text where a list of texts is wanted; Python would take it letter by letter.

    Raises:
        TypeError: `value` is a string.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is one string; pass a list: [{value!r}]")


def refuse_one_number(value: object, name: str) -> None:
    """Refuse a number where a list of numbers is wanted.

    Raises:
        TypeError: `value` is a number.
    """
    if isinstance(value, Number):
        raise TypeError(f"{name} is one number; pass a list: [{value}]")
