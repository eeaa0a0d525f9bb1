"""Tests, and the run-time type checker that they run under: beartype by mypy's rule for numbers.

An int is taken where a float is asked for (PEP 484): `Recipe(lr=1)` is no mistake.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
