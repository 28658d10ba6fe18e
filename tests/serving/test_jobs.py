"""What a job keeps of a request that is refused."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.serving.jobs import Job


class Body:
    """Stands for a gigabyte."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_refused_body_is_let_go_at_once() -> None:
    """The error's traceback refers to the frames that read it, and the job to the error."""
    bodies: list[weakref.ref[Body]] = []

    async def work() -> Job:
        async def read() -> None:
            body = Body()
            bodies.append(weakref.ref(body))
            try:
                raise ValueError("inside")
            except ValueError as error:
                raise RequestError("it is wrong.", param="messages") from error

        job = Job("a", None, 1)  # type: ignore[arg-type]
        job.start(read, lambda _: None)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"it is wrong\."):
            await job.result()
        return job

    job = asyncio.run(work())
    assert isinstance(job.failure, RequestError)
    assert job.failure.param == "messages"
    assert bodies[0]() is None
