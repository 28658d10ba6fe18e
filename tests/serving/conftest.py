"""A browser, a server for it, and a page that is open. Per file: while playwright runs, no other event loop can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.browser import open_browser, serving
from tests.serving.fake_server import FakeServer
from tests.serving.visit import Visit, visit


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def fake() -> Iterator[tuple[FakeServer, str]]:
    server = FakeServer()
    with serving(server.app()) as url:
        yield server, url


@pytest.fixture
def server(fake: tuple[FakeServer, str]) -> FakeServer:
    """The fake server, as new."""
    fake[0].__init__()  # type: ignore[misc]
    return fake[0]


@pytest.fixture
def desk(browser: Any, fake: tuple[FakeServer, str], server: FakeServer) -> Iterator[Visit]:
    """The page at a desk."""
    with visit(browser, fake[1], viewport={"width": 1100, "height": 760}) as opened:
        yield opened
