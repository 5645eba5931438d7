"""One Ray for all tests of this folder that score through Ray Data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session(s3_server: str) -> Iterator[str]:
    """A local Ray whose workers see the S3 server of the tests."""
    import ray

    from cnn_ray.runners import start_ray

    start_ray()
    yield s3_server
    ray.shutdown()
