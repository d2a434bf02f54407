"""What a person or an operator asks of a router beside inference, served by FastAPI."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from tandem_router.api import admin, dashboard
from tandem_router.api.api_keys import Authenticator
from tandem_router.api.live_settings import LiveSettings
from tandem_router.errors import DOC_URL, ApiError, explanations
from tandem_router.proxy.context import Services


def control_app(
    services: Services,
    keys: Authenticator,
    settings: LiveSettings,
    is_ready: Callable[[], bool],
    running: Callable[[], AbstractAsyncContextManager[None]],
) -> FastAPI:
    """Health, metrics, administration and the dashboard.

    Args:
        is_ready: Whether requests should be sent to the router.
        running: The router's work beside requests; lasts as long as the application.
    """
    api = FastAPI(
        title="Tandem router",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lambda _: running(),
    )

    @api.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return _error_response(ApiError(error.status_code, str(error.detail)))

    @api.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return _error_response(error)

    @api.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _error_response(ApiError(400, f"{where}: {first['msg']}"))

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/ready")
    async def ready() -> JSONResponse:
        tiers = services.config.tiers
        usable = {tier.name: services.picker.num_usable(tier.name) for tier in tiers}
        good = is_ready()
        return JSONResponse(
            {"ready": good, "usable_workers": usable}, status_code=200 if good else 503
        )

    @api.get(DOC_URL + "{code}")
    async def explain(code: str) -> Response:
        said = explanations().get(code)
        if said is None:
            known = ", ".join(explanations())
            raise ApiError(404, f"there is no code {code[:100]!r}; there are {known}")
        return PlainTextResponse(said)

    @api.get("/metrics")
    async def metrics() -> Response:
        admin.refresh_gauges(services)
        return Response(
            services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    api.include_router(admin.routes(services, keys, settings))
    api.include_router(dashboard.routes(services, settings))
    return api


def _error_response(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(
        error.body(), status_code=error.status, media_type="application/json", headers=headers
    )
