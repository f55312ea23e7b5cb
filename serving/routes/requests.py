"""What a request in hand holds: its deadline, its place in the queue, and whether its client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated

from anyio import to_thread
from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from serving.edge.visit import Visit
from serving.engine.batcher import ClosedError, FullError, Ticket, settle
from serving.engine.cards import Card
from serving.engine.engine import Wanted, Work
from serving.engine.service import Service
from serving.errors import ApiError, draining, overloaded, shorten
from serving.routes.intake import Clip
from sonorant.inference import LONG


def the_service(request: Request) -> Service:
    """The service of the app that answers."""
    service: Service = request.app.state.service
    return service


UsesService = Annotated[Service, Depends(the_service)]


def find_card(visit: Visit, service: Service, name: str | None) -> Card:
    """The model of that name, or the first. A request keeps the engine in which it finds it.

    ApiError 404 where there is none, 403 where the key is for others.
    """
    engine = service.engine
    cards = engine.cards
    if name is not None and name not in cards:
        raise ApiError(404, "no_such_model", f"model: found {shorten(name)}, wanted one of {', '.join(cards)}")
    card = next(iter(cards.values())) if name is None else cards[name]
    visit.allow(card.name)
    visit.exit.enter_context(engine.hold())
    visit.engine = engine
    return card


@contextmanager
def refusing() -> Iterator[None]:
    """The queue's refusals as answers."""
    try:
        yield
    except FullError as error:
        raise overloaded(str(error), error.retry_seconds) from None
    except ClosedError:
        raise draining() from None


def check_time(visit: Visit) -> None:
    """ApiError 429 where the queue is too long for anything to be done in time: before a body is read and decoded."""
    assert visit.engine is not None, "a model is found before anything is given to it"
    with refusing():
        visit.engine.batcher.check_time(visit.deadline)


async def admit(request: Request, service: Service, wanted: Wanted, clips: Sequence[Clip]) -> list[Work]:
    """Give the clips to the model. Their place in the queue is kept until the answer has been sent or the client gone.

    Raises ApiError where they are not taken.
    """
    if not clips:
        return []
    visit: Visit = request.state.visit
    assert visit.engine is not None, "a model is found before anything is given to it"
    visit.charge(sum(clip.seconds for clip in clips))
    clips = [await measured(wanted.card, clip) for clip in clips]
    with refusing():
        ticket, works = visit.engine.submit(wanted, clips, visit.deadline)
    visit.exit.enter_context(ticket)
    if service.tracing is not None:
        visit.exit.callback(service.tracing.record, ticket, service.tracing.here())
    service.metrics.audio_seconds.labels(request.scope["route"].path).inc(ticket.seconds)
    watch = asyncio.create_task(leave_with_the_client(request, ticket))
    visit.exit.callback(watch.cancel)
    return works


async def measured(card: Card, clip: Clip) -> Clip:
    """The clip, where it will be cut into windows with its moments: to find them takes a while."""
    if len(LONG.windows(len(clip.wave))) == 1:
        return clip
    return replace(clip, moments=await to_thread.run_sync(card.moments, clip.wave))


async def leave_with_the_client(request: Request, ticket: Ticket) -> None:
    """Once the client is gone, nothing more is done for it."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for item in ticket.items:
        settle(item, ClientDisconnect())
