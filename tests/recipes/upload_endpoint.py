"""Take in uploads: of a client that goes away halfway nothing is left, and a request that is sent again does no harm."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Request, UploadFile
from fastapi.responses import JSONResponse

from staged import InvalidInput, StagedError, open_store


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with open_store(os.environ["LAKE"]) as app.state.store:
        yield


app = FastAPI(lifespan=lifespan)


@app.put("/files/{path:path}", status_code=201)
async def put(path: str, request: Request) -> dict[str, int]:
    """One file, as it comes in, of any size."""
    async with request.app.state.store.staged_write("overwrite_files") as tx:
        await tx.put_stream(path, request.stream())
    return {"bytes": tx.receipt.bytes}


@app.post("/batches", status_code=201)
async def post(files: list[UploadFile], request: Request, idempotency_key: Annotated[str, Header()]) -> dict[str, str]:
    """All files of a form, or none."""
    async with request.app.state.store.staged_write("append", key=idempotency_key) as tx:
        for file in files:
            await tx.put_stream(file.filename or "", file)
    return {"phase": tx.receipt.phase}


@app.exception_handler(StagedError)
async def refused(request: Request, error: StagedError) -> JSONResponse:
    status = 400 if isinstance(error, InvalidInput) else 503 if error.retryable else 409
    return JSONResponse({"detail": str(error), "outcome": error.outcome}, status)
