"""Configurations of other toolkits as recipes, and what of them a recipe cannot hold."""

from __future__ import annotations

from pathlib import Path

from fairlead.config_file import read_mapping, suggest
from fairlead.errors import ConfigError
from fairlead.migration.draft import Imported
from fairlead.migration.trlx import import_trlx
from fairlead.runner import resolve

TOOLKITS = {"trlx": import_trlx}


def import_config(toolkit: str, file: str | Path) -> Imported:
    """The recipe of a configuration: ``toolkit`` is a name of TOOLKITS, ``file`` YAML or JSON.

    Raises ConfigError for a file that is no configuration of it, for what Fairlead cannot train, and where the recipe
    would be refused.
    """
    if toolkit not in TOOLKITS:
        raise ConfigError(f"no configurations of {toolkit!r} are known", hint=suggest(toolkit, TOOLKITS))
    path = Path(file)
    imported = TOOLKITS[toolkit](read_mapping(path)[0], path.name)
    resolve(imported.recipe)
    return imported
