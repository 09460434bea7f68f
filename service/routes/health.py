"""Probes and metrics, at the root so that no proxy rule for the API is in their way."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.deps import StoreDep
from service.schemas import Health

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process answers")
def get_health() -> Health:
    return Health()


@router.get("/readyz", summary="The database answers and has the tables of this version")
def get_readiness(store: StoreDep) -> Health:
    store.check()
    return Health()


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_metrics(request: Request) -> Response:
    body, content_type = request.app.state.metrics.render()
    return Response(body, media_type=content_type)
