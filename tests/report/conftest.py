from pathlib import Path

import pytest
from tests.report.run_directories import write_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pipeline's folder; not to be written to."""
    return write_pipeline(tmp_path_factory.mktemp("runs") / "demo")
