"""refimg in a backend: start, follow, cancel, and get references with their scores.

    uvicorn --factory backend.app:create_app --app-dir examples --timeout-graceful-shutdown 5

Run it in one process only. It does not authenticate clients.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from refimg import Pipeline
from refimg.storage.journal import Journal

from .generations import (
    ENDED,
    GenerationId,
    Generations,
    Order,
    Record,
    State,
    Taken,
    Unreadable,
)

router = APIRouter()


# answers


class Status(BaseModel):
    """The state and progress of a generation."""

    generation_id: str
    state: State
    percent: float  # 0 to 100; never falls
    message: str | None  # for people; None: nothing has begun
    scene: int | None  # the one that the message is about, from 1
    scenes: int
    error: str | None  # why it failed
    unscored: str | None  # why images are not scored; None: they are


class VariationView(BaseModel):
    """One image and its scores."""

    url: str
    overall: float | None  # 0 to 100; None: unscored
    metrics: dict[str, float | None]
    rank: int | None  # 1 is best
    selected: bool
    seed: int | None


class SceneView(BaseModel):
    """One scene: its reference, and the variations that it was selected from."""

    scene: int
    prompt: str
    enhanced_prompt: str
    reference_from: str
    below_threshold: bool | None
    warnings: list[str]
    variations: list[VariationView]


class ResultView(BaseModel):
    """The result of a generation."""

    generation_id: str
    references: list[str]  # one URL per scene, in the order of the story
    scenes: list[SceneView]
    sandbox: bool  # True: stand-ins took part
    cost: float | None  # USD; None: unknown


class NewGeneration(Order):
    """An order with an optional name; the same order and name are the same generation."""

    generation_id: GenerationId | None = None


# dependencies


def generations(request: Request) -> Generations:
    """Return the service of this application."""
    return request.app.state.generations


Service = Annotated[Generations, Depends(generations)]


def find(generation_id: GenerationId, service: Service) -> Record:
    """Return the generation that the URL names, or answer 404."""
    if record := service.find(generation_id):
        return record
    raise HTTPException(404, "no such generation")


def find_done(record: Annotated[Record, Depends(find)]) -> Record:
    """Return the same, or answer 409 if it has no result."""
    if record.state != "done":
        raise HTTPException(409, f"the generation is {record.state}, it has no result")
    return record


Known = Annotated[Record, Depends(find)]
Done = Annotated[Record, Depends(find_done)]


def status(record: Record, service: Generations) -> Status:
    """Describe the generation as clients see it."""
    last = record.steps[-1] if record.steps else None
    return Status(
        generation_id=record.generation_id, state=record.state, percent=record.percent,
        message=last and last.message, scene=last and last.scene,
        scenes=len(record.order.scenes), error=record.error,
        unscored=record.unscored if record.state in ENDED else service.unscored)


# the application


@router.post("/generations", status_code=202)
async def start(body: NewGeneration, service: Service) -> Status:
    """Start a generation; the same request again returns the same generation."""
    order = Order.model_validate(body.model_dump(exclude={"generation_id"}))
    try:
        return status(await service.start(order, body.generation_id), service)
    except Taken as error:
        raise HTTPException(409, str(error)) from error
    except ValueError as error:
        raise HTTPException(422, str(error)) from error


@router.get("/generations/{generation_id}")
async def read_status(record: Known, service: Service) -> Status:
    """Return state and progress of a generation."""
    return status(record, service)


@router.get("/generations/{generation_id}/events", response_class=EventSourceResponse)
async def events(
    record: Known, service: Service, last_event_id: Annotated[int, Header(ge=0)] = 0
) -> AsyncIterator[ServerSentEvent]:
    """Send the status after each step (`progress`) and at the end (`end`), from the last id on."""
    async for now in service.follow(record.generation_id, last_event_id):
        event = "end" if now.state in ENDED else "progress"
        yield ServerSentEvent(data=status(now, service), event=event, id=str(len(now.steps)))


@router.post("/generations/{generation_id}/cancel", status_code=202)
async def cancel(record: Known, service: Service) -> Status:
    """Cancel a generation: make no new call, and cancel predictions at the providers."""
    service.cancel(record.generation_id)
    return status(service.find(record.generation_id), service)


@router.get("/generations/{generation_id}/result")
def read_result(record: Done, service: Service) -> ResultView:
    """Return references and scores of a generation."""
    result, base = service.result(record.generation_id), f"/generations/{record.generation_id}"
    scenes = [
        SceneView(
            scene=scene.scene, prompt=scene.prompt,
            enhanced_prompt=scene.enhancement.final_prompt,
            reference_from=scene.reference_from, below_threshold=scene.below_threshold,
            warnings=scene.warnings,
            variations=[
                VariationView(
                    url=f"{base}/scenes/{scene.scene}/variations/{number}",
                    overall=made.scores.overall, metrics=made.scores.metrics, rank=made.rank,
                    selected=made.selected, seed=made.image.seed)
                for number, made in enumerate(scene.variations, start=1)
            ])
        for scene in result.scenes
    ]
    references = [f"{base}/scenes/{scene.scene}/reference" for scene in result.scenes]
    return ResultView(generation_id=record.generation_id, references=references, scenes=scenes,
                      sandbox=result.sandbox, cost=result.cost)


@router.get("/generations/{generation_id}/scenes/{scene}/reference")
def read_reference(record: Done, scene: int, service: Service) -> FileResponse:
    """Return the reference of a scene."""
    return image(service.result(record.generation_id).references, scene)


@router.get("/generations/{generation_id}/scenes/{scene}/variations/{variation}")
def read_variation(record: Done, scene: int, variation: int, service: Service) -> FileResponse:
    """Return one of the variations of a scene."""
    scenes = service.result(record.generation_id).scenes
    made = scenes[scene - 1].variations if 1 <= scene <= len(scenes) else []
    return image([item.image.image_path for item in made], variation)


def image(paths: list[Path], number: int) -> FileResponse:
    """Return the image of that number, from 1; clients name numbers, never files."""
    if not 1 <= number <= len(paths):
        raise HTTPException(404, "no such image")
    return FileResponse(paths[number - 1], media_type="image/png")


@router.post("/uploads", status_code=201, max_body_size=20_000_000)
async def upload(request: Request, service: Service) -> dict[str, str]:
    """Keep the PNG, JPEG or WebP in the body, to be the first reference of a story."""
    data = await request.body()
    try:
        return {"image": await run_in_threadpool(service.keep_upload, data)}
    except ValueError as error:
        raise HTTPException(422, str(error)) from error


@router.get("/health")
async def health(service: Service) -> dict[str, str | int | None]:
    """Count the running generations, and say why their images would not be scored."""
    running = sum(live.record.state not in ENDED for live in service.live.values())
    return {"live": running, "unscored": service.unscored}


async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong with a request, without repeating what was sent."""
    problems = [{key: item[key] for key in ("loc", "msg", "type")} for item in error.errors()]
    return JSONResponse({"detail": problems}, status_code=422)


async def tell_unreadable(request: Request, error: Unreadable) -> JSONResponse:
    """Say that a file of the service is damaged, without its content."""
    return JSONResponse({"detail": str(error)}, status_code=500)


def create_app(pipeline: Pipeline | None = None, folder: Path | None = None) -> FastAPI:
    """Make the application; missing arguments are taken from the environment."""
    home = folder or Path(os.environ.get("REFIMG_BACKEND_FOLDER", "output/backend"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models = pipeline or Pipeline.from_env(journal=Journal(home / "journal"))
        async with Generations(models, home) as app.state.generations:
            yield

    app = FastAPI(title="refimg", lifespan=lifespan, max_body_size=1_000_000)
    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(Unreadable, tell_unreadable)
    app.include_router(router)
    return app
