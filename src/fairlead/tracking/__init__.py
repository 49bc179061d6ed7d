"""What a run leaves behind: run directory, metrics log, console line, copies for trackers."""

from fairlead.tracking.console import Console
from fairlead.tracking.log import MetricsLog
from fairlead.tracking.run_directory import RunDirectory, file_sha256, tree_sha256
from fairlead.tracking.sinks import open_sink

__all__ = ["Console", "MetricsLog", "RunDirectory", "file_sha256", "open_sink", "tree_sha256"]
