"""Settings of a study as YAML: `divergence-lens study --print-config` and `--config`.

A file holds any of the fields of `StudyConfig`, with recipes as mappings of the fields of `Recipe`
that differ from its defaults. A paired study has the key `tier` instead of `conditions`, and
`category` for a trait.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from divergence_lens.study.config import StudyConfig
from divergence_lens.study.paired import PAIRED_MODELS
from divergence_lens.training import Recipe

_RECIPES = ("teacher_recipe", "student_recipe", "prompted_recipe")
_PYTHON_ONLY = ("paired", "paper_design")
_NAMES = tuple(f.name for f in dataclasses.fields(StudyConfig) if f.name not in _PYTHON_ONLY)


def config_to_yaml(config: StudyConfig, *, tier: str | None = None) -> str:
    """Write a configuration as YAML, every field with its value.

    Args:
        config: The configuration.
        tier: The tier of a paired study, from which its conditions follow.

    Raises:
        ValueError: The configuration holds a condition of your own, which is code.
        TypeError: A recipe's optimizer is a class.
    """
    settings: dict[str, Any] = {}
    for name in _NAMES:
        value = getattr(config, name)
        if name == "conditions" and config.paired is not None:
            settings["tier"] = tier or "core"
            if config.paired.category != "animal":
                settings["category"] = config.paired.category
        elif name == "conditions":
            own = [c.name for c in value if not isinstance(c, str)]
            if own:
                raise ValueError(
                    f"condition {own[0]!r} is an object, which YAML cannot hold; name conditions "
                    "of the registry, or configure the study in Python"
                )
            settings[name] = list(value)
        elif name in _RECIPES:
            settings[name] = None if value is None else _recipe_settings(value)
        else:
            settings[name] = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100)
    return text


def read_config(path: str | Path | None = None, **options: Any) -> StudyConfig:
    """Read a configuration from YAML.

    Fields that the file does not name have the values of `StudyConfig.for_model`, or of
    `StudyConfig.for_pairs` for a paired study.

    Args:
        path: The file; None for the options alone.
        options: Fields with which to override those of the file; also `model`, `tier` and
            `category`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not valid YAML, names an unknown field, or a value is not valid.
        TypeError: It holds something else than a mapping.
    """
    settings = ({} if path is None else _read_settings(Path(path))) | options
    model = str(settings.pop("model", "tiny"))
    tier = settings.pop("tier", None)
    if tier is not None or "category" in settings or model in PAIRED_MODELS:
        return StudyConfig.for_pairs(model, tier=tier or "core", **settings)
    return StudyConfig.for_model(model, **settings)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {lines}") from error
    if not isinstance(settings, dict):
        raise TypeError(f"{path} holds no settings; write lines such as 'seeds: [0, 1]'")
    _check_names(settings, (*_NAMES, "tier", "category"), str(path))
    for name in _RECIPES:
        recipe = settings.get(name)
        if isinstance(recipe, dict):
            known = tuple(field.name for field in dataclasses.fields(Recipe))
            _check_names(recipe, known, f"{name} in {path}")
            settings[name] = Recipe(**_as_tuples(recipe))
        elif recipe is not None:
            raise ValueError(f"{name} in {path} is {recipe!r}; write fields of Recipe below it")
    return _as_tuples(settings)


def _as_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """YAML has lists where the dataclasses have tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def _check_names(settings: dict[Any, Any], known: tuple[str, ...], source: str) -> None:
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"{source} has an unknown field {name!r}{hint}")


def _recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that differ from the default."""
    if not isinstance(recipe.optimizer, str):
        raise TypeError(
            f"the optimizer {recipe.optimizer.__name__} is a class, which YAML cannot hold; name "
            "adamw or sgd, or configure the study in Python"
        )
    changed = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(Recipe)
        if getattr(recipe, field.name) != getattr(Recipe(), field.name)
    }
    return {
        name: dict(value)
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in changed.items()
    }
