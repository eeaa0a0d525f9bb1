"""Checks of arguments that several rooms share."""


def refuse_one_string(value: object, name: str) -> None:
    """Refuse a text where a list of texts is wanted; Python would take it letter by letter.

    Raises:
        TypeError: `value` is a string.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is one string; pass a list: [{value!r}]")
