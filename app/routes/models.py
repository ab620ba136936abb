"""`/v1/models`: what can be asked for, and how fast it is right now. OpenAI clients can read it too."""

from __future__ import annotations

from fastapi import APIRouter

from app.admission import Admission
from app.dependencies import CallerDep, GatewayDep
from app.errors import raises
from app.fleet import find_warm
from app.schemas import Limit, ModelCard, ModelList, SizeCard, WorkerCosts
from broker.errors import BrokerError, BrokerUnavailable
from broker.messages import SizeCosts, WarmModel, WorkerInfo
from models.catalog import ModelSpec

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
@raises(BrokerUnavailable, BrokerError)
async def list_models(gateway: GatewayDep, caller: CallerDep) -> ModelList:
    """The models that the caller may use, and what the live workers measured."""
    workers, admission = await gateway.fleet.workers(), gateway.admission
    cards = [show_model(spec, workers) for spec in admission.models_of(caller).values()]
    return ModelList(default=gateway.default_model(caller), data=cards)


@router.get("/{model}")
@raises(Admission.find_model, BrokerUnavailable, BrokerError)
async def read_model(model: str, gateway: GatewayDep, caller: CallerDep) -> ModelCard:
    """One model of the catalog."""
    return show_model(gateway.admission.find_model(model, caller), await gateway.fleet.workers())


def show_model(spec: ModelSpec, workers: list[WorkerInfo]) -> ModelCard:
    warm = find_warm(workers, spec.name)
    sizes = [f"{width}x{height}" for width, height in spec.sizes]
    return ModelCard(
        id=spec.name,
        description=spec.description,
        ready=bool(warm),
        model_revision=warm[0][1].revision if warm else spec.public_revision,
        license=spec.license,
        license_note=spec.license_note,
        sizes=sizes,
        default_size=sizes[0],
        num_inference_steps=Limit.model_validate(spec.num_inference_steps, from_attributes=True),
        guidance=spec.guidance,
        guidance_scale=Limit.model_validate(spec.guidance_scale, from_attributes=True),
        schedulers=list(spec.schedulers),
        default_scheduler=spec.default_scheduler,
        max_num_images=spec.max_num_images,
        max_prompt_chars=spec.max_prompt_chars,
        has_tiny_decoder=spec.tiny_vae is not None,
        has_safety_checker=spec.safety_checker is not None,
        example_prompts=spec.example_prompts,
        deprecated=spec.deprecated.isoformat() if spec.deprecated else None,
        sunset=spec.sunset.isoformat() if spec.sunset else None,
        workers=[show_worker(worker, model) for worker, model in warm],
    )


def show_worker(worker: WorkerInfo, model: WarmModel) -> WorkerCosts:
    return WorkerCosts(
        worker_id=worker.worker_id,
        device=worker.device,
        dtype=worker.dtype,
        revision=model.revision,
        max_batch_size=model.max_batch_size,
        num_running=worker.num_running,
        text_ms=model.text_ms,
        sizes=[show_size(costs) for costs in model.sizes],
    )


def show_size(costs: SizeCosts) -> SizeCard:
    return SizeCard(
        size=f"{costs.width}x{costs.height}",
        max_rows=costs.max_rows,
        step_ms=costs.step_ms,
        decode_ms=costs.decode_ms,
        preview_ms=costs.preview_ms,
        check_ms=costs.check_ms,
    )
