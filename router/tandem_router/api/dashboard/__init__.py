"""The page at `/`: what the router decides, what it costs, which workers it has, and a playground.

No build step and nothing from elsewhere: the server fills in the numbers of the moment, so that
the page says something without scripts; an ES module then keeps it live from /admin. The content
security policy allows this origin's own files only, and all text is set as text, never as HTML.
"""

from __future__ import annotations

import html
from importlib import resources
from string import Template
from typing import Any

from fastapi import APIRouter, Response

from tandem_router.api.admin import router_state
from tandem_router.api.live_settings import LiveSettings
from tandem_router.proxy.context import Services

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
FILES = {"dashboard.mjs": "text/javascript", "charts.mjs": "text/javascript"}
FILES |= {"shown.mjs": "text/javascript", "why.mjs": "text/javascript"}
FILES["dashboard.css"] = "text/css"


def routes(services: Services, settings: LiveSettings) -> APIRouter:
    folder = resources.files(__name__)
    page = Template(folder.joinpath("page.html").read_text("utf-8"))
    files = {name: folder.joinpath(name).read_bytes() for name in FILES}
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        text = page.substitute(_fields(router_state(services, settings)))
        return Response(text, media_type="text/html; charset=utf-8", headers=HEADERS)

    for name, content in files.items():
        router.add_api_route(
            f"/dashboard/{name}",
            _file(content, FILES[name]),
            methods=["GET"],
            include_in_schema=False,
        )
    return router


def _file(content: bytes, media_type: str) -> Any:
    async def serve() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=HEADERS)

    return serve


def _fields(state: dict[str, Any]) -> dict[str, str]:
    """Values of the page's placeholders, escaped."""
    saved = state["cost_all_large_usd"] - state["cost_usd"]
    tiers = "".join(
        "<tr>"
        + _cell(tier["name"])
        + _cell(tier["served_model"])
        + _cell(str(tier["usable_workers"]))
        + _cell(str(tier["num_requests"]))
        + _cell(f"{tier['cost_usd']:.6f}")
        + "</tr>"
        for tier in state["tiers"]
    )
    return {
        "name": html.escape(state["name"]),
        "predictor": html.escape(state["predictor"]),
        "dearest": html.escape(state["dearest_tier"]),
        "requests": str(sum(tier["num_requests"] for tier in state["tiers"])),
        "cost": f"{state['cost_usd']:.6f}",
        "saved": f"{saved:.6f}",
        "price_note": html.escape(state["price_note"]),
        "tiers": tiers,
    }


def _cell(text: str) -> str:
    return f"<td>{html.escape(text)}</td>"
