from collections.abc import Iterator

import pytest

from tests.helpers.workers import Workers

SIZE = 4


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """A pool of four processes; a test uses as many as it needs."""
    with Workers(SIZE) as pool:
        yield pool
