"""Fetches published files from the Hugging Face hub. An interrupted download is taken up again; knows no rows."""

from __future__ import annotations

from pathlib import Path

from fairlead.data.prepare.kind import Kind, Say
from fairlead.errors import DataError


def fetch(kind: Kind, say: Say) -> Path:
    """The folder in the hub's cache that holds the set's files at their newest commit, downloaded where they are not.

    The hub's client compares every file with the size and the hash the hub states. Raises DataError where the set is
    not on the hub or the hub cannot be reached.
    """
    source, give = kind.source, f"fairlead prepare {kind.name} --from PATH --out DIR"
    if not source.url:
        raise DataError(f"{kind.name} has no source to fetch", f"give a file or folder: {give}")
    say(f"{kind.name}: {source.url}, licence: {kind.licence}{' (research only)' if kind.research_only else ''}")
    if source.hub is None:
        raise DataError(
            f"{kind.name} is not fetched by itself; it is published at {source.url}",
            f"download it there, then: {give}",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.hub, repo_type="dataset", allow_patterns=list(source.files)))
    except Exception as error:  # the hub's client raises a different class for each way it can fail
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source.hub} cannot be fetched from {source.url}: {reason}",
            f"check the network, or give a local copy: {give}",
        ) from error
