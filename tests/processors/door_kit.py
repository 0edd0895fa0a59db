"""What the tests of the gateway's door share: one that asks for a key, and one that only this machine reaches."""

import pytest

from processors.gateway.fakes import FakeSource
from tests.processors.gateway_kit import KEY, client_of
from tests.processors.test_gateway_api import FRONT, app_of, event


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(cameras=[FRONT], events=[event()])


@pytest.fixture
async def keyed(source: FakeSource):
    """A client of a gateway that asks for a key."""
    async with client_of(app_of(source, api_key=KEY)) as client:
        yield client


@pytest.fixture
async def open_(source: FakeSource):
    """A client of a gateway that only this machine reaches."""
    async with client_of(app_of(source)) as client:
        yield client
