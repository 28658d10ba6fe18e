"""The server's routes: OpenAI's chat completions, completions and models; health, readiness, metrics; the web page."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from megatron_vita.errors import VitaError
from megatron_vita.serving.answer import answer
from megatron_vita.serving.errors import HttpError, status_and_object
from megatron_vita.serving.guard import Guard
from megatron_vita.serving.page import page_router
from megatron_vita.serving.reader import Kind
from megatron_vita.serving.service import Service


def create_app(service: Service) -> FastAPI:
    """The routes over a service; its model may still be loading."""
    app = FastAPI(title="megatron_vita", docs_url=None, redoc_url=None, openapi_url=None)
    settings = service.settings
    app.include_router(page_router())
    app.add_middleware(Guard, api_key=settings.api_key, hosts=settings.hosts)

    app.include_router(page_router())

    async def counted(request: Request, kind: Kind) -> Response:
        status = 500
        try:
            result = await answer(service, request, kind)
            status = result.status_code
            return result
        except ClientDisconnect:
            status = 499
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            status, body, headers = status_and_object(error)
            if status < 500:
                service.refused(request.url.path, status, error)
            return JSONResponse(body, status, headers)
        finally:
            service.metrics.requests.labels(request.url.path, str(status)).inc()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await counted(request, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await counted(request, "completion")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model:
            raise HttpError(404, f"there is no model {name!a}, only {service.model!a}.", code="model_not_found")
        return service.describe()

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if service.state == "failed" else 200)

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"state": service.state}, 200 if service.state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return {
            "model": service.model,
            "max_model_len": service.longest,
            "state": service.state,
            "vision": service.vision,
            "api_key": settings.api_key is not None,
            "limits": settings.limits.to_dict(),
        }

    @app.exception_handler(VitaError)
    async def refused(request: Request, error: VitaError) -> Response:
        status, body, headers = status_and_object(error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        words = f"{request.method} {request.url.path[:200]!a}: {error.detail}."
        status, body, headers = status_and_object(HttpError(error.status_code, words, headers=error.headers))
        return JSONResponse(body, status, headers)

    return app
