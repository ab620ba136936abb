"""Whether the process lives, whether pictures can be drawn, and the numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.dependencies import GatewayDep
from app.errors import raises
from app.gateway import Gateway
from app.schemas import Liveness, Readiness
from broker.errors import BrokerError, BrokerUnavailable
from broker.messages import WorkerInfo

router = APIRouter(tags=["health"])


@router.get("/livez", responses={200: {"model": Liveness}, 503: {"model": Liveness}})
async def livez(gateway: GatewayDep) -> JSONResponse:
    """200 while this process works as it should; Redis or workers being away doesn't change that."""
    is_alive = gateway.replies.is_reading
    return JSONResponse({"status": "alive" if is_alive else "reader stopped"}, 200 if is_alive else 503)


@router.get("/readyz", responses={200: {"model": Readiness}, 503: {"model": Readiness}})
@raises(BrokerError)
async def readyz(gateway: GatewayDep) -> JSONResponse:
    """200 once some live worker has proven a model by a real generation; what the others do meanwhile."""
    try:
        workers = await gateway.broker.workers()
    except BrokerUnavailable:
        body = {"ready": False, "redis": "unavailable", "models": [], "failed": {}, "workers": []}
        return JSONResponse(body, 503)
    models = sorted({warm.model for worker in workers if worker.state == "ready" for warm in worker.warm_models})
    body = {
        "ready": bool(models),
        "redis": "ok",
        "models": models,
        "failed": find_failed(workers),
        "workers": [show_worker(worker) for worker in workers],
    }
    return JSONResponse(body, 200 if models else 503)


def find_failed(workers: list[WorkerInfo]) -> dict[str, dict[str, str]]:
    """Why, by model and worker."""
    failed: dict[str, dict[str, str]] = {}
    for worker in workers:
        for status in worker.models:
            if status.state == "failed":
                failed.setdefault(status.model, {})[worker.worker_id] = status.detail
    return failed


def show_worker(worker: WorkerInfo) -> dict[str, Any]:
    return {
        "worker_id": worker.worker_id,
        "state": worker.state,
        "detail": worker.detail,
        "device": worker.device,
        "warm_models": [warm.model for warm in worker.warm_models],
        "num_running": worker.num_running,
        "models": [asdict(status) for status in worker.models],
    }


@router.get("/metrics", response_class=PlainTextResponse)
@raises(BrokerError)
async def metrics(gateway: GatewayDep) -> Response:
    """Figures in Prometheus' text format. What Redis knows is read for each scrape; it is stale while Redis is away."""
    await refresh(gateway)
    return Response(gateway.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def refresh(gateway: Gateway) -> None:
    try:
        workers = await gateway.broker.workers()
        told = {status.model for worker in workers for status in worker.models}
        gateway.metrics.set_queue(await gateway.broker.depths(sorted(told.union(gateway.catalog))), workers)
        gateway.metrics.redis_up.set(1)
    except BrokerUnavailable:
        gateway.metrics.redis_up.set(0)
