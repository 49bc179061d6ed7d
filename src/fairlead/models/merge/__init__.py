"""Adapters merged into their base, checked, and written for others. Knows files and roles; trains nothing."""

from fairlead.models.merge.run import describe as describe
from fairlead.models.merge.run import merge as merge

__all__ = ["describe", "merge"]
