"""create_app(settings): wiring only. Who serves what is in `service.routes`."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from service import problems
from service.deps import refuse_unknown_parameters
from service.metrics import Metrics, RequestMeter
from service.routes import catalog, devices, events, fronts, health, jobs, pages, tables, trials
from service.security import Gatekeeper
from service.settings import Settings
from service.web import STATIC_DIR
from store import open_store

API_PREFIX = "/api/v1"
API_VERSION = "1.0.0"
API_ROUTERS: tuple[APIRouter, ...] = (
    jobs.router,
    events.router,
    trials.router,
    fronts.router,
    tables.router,
    devices.router,
    catalog.router,
)
DESCRIPTION = """Find token schedules for Vision Transformers that are faster on your device.

Submit a job, watch it, fetch its front and the best config. Jobs name registered ids, never paths or URLs. Ratios are
0-1, latencies are milliseconds per forward pass of a batch. Query parameters that an operation does not list are
refused with 422. Every refusal is a problem document (RFC 9457) with a stable `code` and one sentence in `detail`."""


def create_app(settings: Settings) -> FastAPI:
    """Build the application; the store is opened when it starts.

    Args:
        settings: Where the data is and who may ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = open_store(settings.database_url)
        app.state.store = store
        app.state.metrics.watch_store(store)
        try:
            yield
        finally:
            app.state.is_stopping.set()
            store.close()

    metrics = Metrics()
    app = FastAPI(
        title="prunefront",
        version=API_VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        # The interactive pages of FastAPI load scripts from elsewhere; our own page and docs/rest-api.md stand in.
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
        middleware=[
            Middleware(Gatekeeper, settings=settings),
            Middleware(RequestMeter, metrics=metrics),
            Middleware(GZipMiddleware, minimum_size=2048),
        ],
    )
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.is_stopping = threading.Event()
    problems.install(app)
    strict = [Depends(refuse_unknown_parameters)]
    for router in API_ROUTERS:
        app.include_router(router, prefix=API_PREFIX, responses=problems.RESPONSES, dependencies=strict)
    app.include_router(health.router, responses=problems.RESPONSES, dependencies=strict)
    # The page and its files read no parameters; links to them may carry what others append.
    app.include_router(pages.router, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC_DIR), name="static")
    return app
