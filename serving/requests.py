"""What a request in hand holds: its deadline, its place in the queue, and whether its client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from serving.batcher import Ticket, settle
from serving.intake import Clip
from serving.service import Service, Wanted, Work


def the_service(request: Request) -> Service:
    """The service of the app that answers."""
    service: Service = request.app.state.service
    return service


UsesService = Annotated[Service, Depends(the_service)]


async def admit(request: Request, service: Service, wanted: Wanted, clips: Sequence[Clip]) -> list[Work]:
    """Give the clips to the model. Their place in the queue is kept until the answer has been sent or the client gone.

    Raises ApiError where they are not taken.
    """
    if not clips:
        return []
    visit = request.state.visit
    visit.charge(sum(clip.seconds for clip in clips))
    ticket, works = service.submit(wanted, clips, visit.deadline)
    visit.exit.enter_context(ticket)
    if service.tracing is not None:
        visit.exit.callback(service.tracing.record, ticket, service.tracing.here())
    service.metrics.audio_seconds.labels(request.scope["route"].path).inc(ticket.seconds)
    watch = asyncio.create_task(leave_with_the_client(request, ticket))
    visit.exit.callback(watch.cancel)
    return works


async def leave_with_the_client(request: Request, ticket: Ticket) -> None:
    """Once the client is gone, nothing more is done for it."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for item in ticket.items:
        settle(item, ClientDisconnect())
