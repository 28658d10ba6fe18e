"""A server on any layout of ranks: rank 0 listens, the others follow its engine."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import uvicorn

from megatron_vita.errors import ConfigError
from megatron_vita.inference.leader import leads
from megatron_vita.inference.openai import ReadOptions
from megatron_vita.inference.settings import EngineSettings
from megatron_vita.serving.app import create_app
from megatron_vita.serving.protocol import protocol_class
from megatron_vita.serving.service import Service
from megatron_vita.serving.settings import ServerSettings

if TYPE_CHECKING:
    from megatron_vita.inference.engine import Engine
    from megatron_vita.serving.engine_loop import EngineLoop

log = logging.getLogger(__name__)


def serve(model: str, engine: EngineSettings, settings: ServerSettings, *, video_backend: str = "auto") -> None:
    """Serve a model until SIGTERM or SIGINT. Every rank of the layout calls it.

    The port is opened before the model is loaded: /health answers at once, /ready when requests are taken. After the
    signal no new request is taken, those that run get `drain_timeout` seconds, and a second signal ends it at once.

    Args:
        model: checkpoint or Hugging Face folder.
        engine: layout over ranks, dtype, cache and scheduling.
        settings: of the server.
        video_backend: what decodes videos; see `open_video`.

    Raises:
        ConfigError, CheckpointError: a port that is taken, a model that cannot be opened.
        VitaError: a rank has ended, or a step failed.
    """
    if not leads():
        _follow(model, engine, video_backend)
        return
    listener = _listen(settings)
    from megatron_vita.inference.opening import model_name

    service = Service(settings, model_name(model))

    def load() -> Engine:
        from megatron_vita.inference.engine import Engine  # only now: importing torch takes seconds

        return Engine.load(model, engine, video_backend=video_backend)

    asyncio.run(serve_engine(service, listener, load))


def _follow(model: str, settings: EngineSettings, video_backend: str) -> None:
    """Compute what rank 0 says. A signal for all ranks is rank 0's to obey: it lets the others go."""
    from megatron_vita.inference.engine import Engine

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    Engine.load(model, settings, video_backend=video_backend).follow()


def _listen(settings: ServerSettings) -> socket.socket:
    """The open port. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off: it would hold every answer back for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"--host {settings.host}: no address of this machine ({error.strerror or error}). Give one, or leave "
                "the flag out for 127.0.0.1."
            ) from None
        raise ConfigError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}. Choose another --port."
        ) from None
    return listener


async def serve_engine(service: Service, listener: socket.socket, load: Callable[[], Engine]) -> None:
    """Answer on an open port until `uvicorn.Server.should_exit`, a signal or an error of the engine.

    Args:
        service: its state, not used before.
        listener: bound, not listening.
        load: gives the engine; it is called in the thread that runs it.

    Raises:
        Exception: what `load` or a step raised.
    """
    settings = service.settings
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            http=protocol_class(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # its warnings are of clients that speak no HTTP
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
        )
    )
    worker = _EngineThread(service, server, load)
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d, loading %s", f"[{host}]" if ":" in host else host, port, service.model)
    with _signals(service, server):
        worker.start()
        await server._serve([listener])  # `serve` would take the signals, and raise them again at its end
    service.finish()
    worker.stop()
    await asyncio.to_thread(worker.join, 60.0)
    if worker.error is not None:
        raise worker.error


@contextmanager
def _signals(service: Service, server: uvicorn.Server) -> Iterator[None]:
    """The first SIGTERM or SIGINT drains, the second ends; so does `service.stop`, whose caller may be any thread."""
    events = asyncio.get_running_loop()

    def obey(name: str) -> None:
        if server.should_exit:
            server.force_exit = True
            return
        log.info("%s: no new requests; those that run get %.0f s", name, service.settings.drain_timeout)
        service.drain()
        server.should_exit = True

    def stop() -> None:
        events.call_soon_threadsafe(obey, "stop")

    service.stop = stop
    # Tests run a server in another thread, which gets no signals.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    for number in numbers:
        events.add_signal_handler(number, obey, number.name)
    try:
        yield
    finally:
        service.stop = service.drain
        for number in numbers:
            events.remove_signal_handler(number)


class _EngineThread(threading.Thread):
    """Loads the model and runs its loop."""

    def __init__(self, service: Service, server: uvicorn.Server, load: Callable[[], Engine]) -> None:
        super().__init__(name="engine", daemon=True)  # a rank that hangs must not keep the process
        self._service, self._server, self._load = service, server, load
        self._events = asyncio.get_running_loop()
        self._ending = threading.Event()
        self._loop: EngineLoop | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Until `stop` is called, or a step fails."""
        try:
            self._work()
        except Exception as error:  # raised again by the main thread
            self.error = lost = error
            self._post(lambda: self._service.lose(lost))
            self._post(lambda: self._events.call_later(1.0, self._end))  # the errors are sent first

    def stop(self) -> None:
        """Let the loop return after its step."""
        self._ending.set()
        if self._loop is not None:
            self._loop.stop()

    def _work(self) -> None:
        begun = time.monotonic()
        engine = self._load()
        from megatron_vita.serving.engine_loop import EngineLoop
        from megatron_vita.serving.reader import Reader

        settings = self._service.settings
        options = ReadOptions(
            strict=False,
            media_root=settings.media_root,
            limits=settings.limits,
            vocab_size=engine.config.vocab_size,
            template_options=engine.tokenizer.template.options,
        )
        loop = self._loop = EngineLoop(engine, self._post)
        reader = Reader(engine.open, options, fetch_timeout=settings.fetch_timeout if settings.allow_fetch else None)
        self._post(lambda: self._service.attach(engine, loop, reader))
        log.info("%s is loaded in %.1f s and ready", self._service.model, time.monotonic() - begun)
        if self._ending.is_set():
            loop.stop()
        loop.run()

    def _post(self, act: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the event loop is closed: the server has ended
            self._events.call_soon_threadsafe(act)

    def _end(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
