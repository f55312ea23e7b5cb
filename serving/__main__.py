"""`python -m serving --model artifacts/model --host 127.0.0.1 --port 8000`, or `python -m serving key NAME`."""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from pydantic import ValidationError

from serving.engine.process import Process, places
from serving.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.edge.keys import Keys
    from serving.engine.service import Service


class Server(uvicorn.Server):
    """Stops admitting work the moment it is told to stop; what was admitted is still answered. SIGHUP reloads."""

    def __init__(self, config: uvicorn.Config, service: Service, keys: Keys) -> None:
        super().__init__(config)
        self.service, self.keys = service, keys

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop has come."""
        self.service.drain()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to stop."""
        return await super().on_tick(counter) or bool(self.service.failure)

    async def startup(self, sockets: list[object] | None = None) -> None:
        """Listen, and heed SIGHUP."""
        await super().startup(sockets)  # type: ignore[arg-type]
        tasks: set[asyncio.Task[bool]] = set()

        def reload() -> None:
            self.keys.reload()
            task = asyncio.get_running_loop().create_task(self.service.reload())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until told to stop; a fault in the settings, the keys or the model is one line and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["key"]:
        from serving.edge.keys import make_key

        make_key(arguments[1:])
        return
    parser = argparse.ArgumentParser("python -m serving", description="Serve a published model over HTTP.")
    parser.add_argument("--model", help="what `sonorant publish` wrote: PATH or NAME=PATH,… [artifacts/model]")
    parser.add_argument("--host", help="[127.0.0.1]")
    parser.add_argument("--port", type=int, help="[8000]")
    parser.add_argument("--num-workers", type=int, help="processes that run the model [one a core]")
    parser.add_argument("--precision", help="[float32]")
    parser.add_argument("--keys-file", help="API keys, made by `python -m serving key NAME` [open to all]")
    parser.add_argument("--log-format", help="json or text [text on a terminal, else json]")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        from serving.errors import describe_all

        sys.exit(f"settings: {describe_all(error.errors())}")
    for folder in settings.model.values():
        if not folder.is_dir():
            sys.exit(f"model {folder}: found no folder, wanted what `sonorant publish` wrote: name it with --model")
    if settings.keys_file is not None:
        from serving.edge.keys import read

        try:
            read(settings.keys_file)
        except ValueError as error:
            sys.exit(str(error))
    processes = [Process(place) for place in places(settings.num_workers, settings.device)]
    from serving.app import create_app  # while the processes load torch, not before

    try:
        app = create_app(settings, processes=processes)
    except ValueError as error:
        sys.exit(str(error))
    serve(app, settings)


def serve(app: FastAPI, settings: Settings) -> None:
    """Serve what `create_app` made until told to stop."""
    from serving.edge.protocol import HttpProtocol, WebSocketProtocol
    from serving.logs import start_log

    start_log(settings.log_format)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=partial(HttpProtocol, limits=settings, metrics=service.metrics),  # type: ignore[arg-type]
        ws=partial(WebSocketProtocol, limits=settings, metrics=service.metrics),  # type: ignore[arg-type]
        ws_max_size=2**20,  # of one message: a stream's are far smaller
        ws_ping_timeout=settings.request_seconds,  # a client that is slowed down answers late
        access_log=False,  # the gate writes a line with the request's id
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + 1,
    )
    Server(config, service, app.state.keys).run()
    if service.failure:
        sys.exit(service.failure)


if __name__ == "__main__":
    main()
