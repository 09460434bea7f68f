"""A small client of the HTTP API: submit a job, wait for it, fetch its front and its best config.

```python
from prunefront.client import Client

with Client("http://127.0.0.1:8000") as client:
    job = client.submit({"kind": "search", "model": {"name": "digit_vit_patch6_48"}, "dataset": "digit-scenes"})
    client.wait(job["id"], progress=print)
    config = client.best(job["id"], max_latency_ms=12)
```

Documents come and go as the API describes them, as plain data; configs come as `PruneConfig`. An error carries the
sentence of the server's problem document.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from prunefront.config import ConfigSource, PruneConfig, load_config
from prunefront.errors import MissingExtraError, PrunefrontError
from prunefront.files import write_atomic

try:
    import httpx
except ImportError as error:
    raise MissingExtraError("prunefront.client needs httpx; install it with `pip install httpx`.") from error

JsonObject = dict[str, Any]
Fidelity = Literal["screened", "evaluated", "finetuned"]

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 30.0
FINISHED = frozenset({"succeeded", "failed", "cancelled"})


class ClientError(PrunefrontError, RuntimeError):
    """The server cannot be reached, or does not answer as prunefront's API does."""


class ApiError(ClientError):
    """A refusal of the server.

    Attributes:
        status: HTTP status.
        code: Stable name of the problem, such as ``unknown_name``.
        problem: The whole problem document.
    """

    def __init__(self, problem: JsonObject) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or "The server refused the request."))
        self.status = int(problem.get("status", 0))
        self.code = str(problem.get("code", "unknown"))
        self.problem = problem


class JobNotSucceededError(ClientError):
    """A job that was waited for ended without success.

    Attributes:
        job: The job as it ended.
    """

    def __init__(self, job: JsonObject) -> None:
        reason = (job.get("failure") or {}).get("message") or f"it was {job['state']}"
        super().__init__(f"Job {job['id']} did not succeed: {reason}")
        self.job = job


class Client:
    """A connection to one server; close it, or use it in a ``with`` statement.

    Args:
        url: Address of the server, without ``/api/v1``.
        timeout_s: Seconds to wait for any one answer.
        transport: Replaces the network, for tests.

    Raises:
        ClientError: If ``url`` is none.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ClientError(f"Expected the address of a service, such as {DEFAULT_URL}, but got {url!r}.")
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=f"{self.url}/api/v1", timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # Jobs ----------------------------------------------------------------------------------------------------------

    def submit(self, job: Mapping[str, Any], *, idempotency_key: str | None = None) -> JsonObject:
        """Submit a job body; with the same key and body again, the first job comes back.

        Raises:
            ApiError: If the server refuses it; the text says why.
        """
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._json("POST", "/jobs", json=dict(job), headers=headers)

    def job(self, job_id: str) -> JsonObject:
        """One job with its progress."""
        return self._json("GET", f"/jobs/{_id(job_id)}")

    def jobs(self, *, state: str | None = None, kind: str | None = None) -> Iterator[JsonObject]:
        """All jobs, newest first."""
        return self._pages("/jobs", {"state": state, "kind": kind})

    def act(self, job_id: str, verb: Literal["cancel", "pause", "resume", "retry", "clone"]) -> JsonObject:
        """Steer a job; ``clone`` returns the new one."""
        return self._json("POST", f"/jobs/{_id(job_id)}/{verb}")

    def delete(self, job_id: str) -> None:
        """Delete a finished job with its results and files."""
        self._request("DELETE", f"/jobs/{_id(job_id)}")

    def wait(
        self,
        job_id: str,
        *,
        progress: Callable[[JsonObject], object] | None = None,
        poll_s: float = 1.0,
        timeout_s: float | None = None,
    ) -> JsonObject:
        """Wait until a job has succeeded.

        Args:
            job_id: The job.
            progress: Called with the job whenever it changed.
            poll_s: Seconds between looks.
            timeout_s: Give up after so many seconds; the job itself goes on.

        Raises:
            JobNotSucceededError: If it failed or was cancelled.
            ClientError: If the time is up, or the server went away for longer than ``timeout_s`` of the client.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        seen = None
        while True:
            job = self.job(job_id)
            if progress is not None and job["updated_at"] != seen:
                progress(job)
            seen = job["updated_at"]
            if job["state"] == "succeeded":
                return job
            if job["state"] in FINISHED:
                raise JobNotSucceededError(job)
            if deadline is not None and time.monotonic() + poll_s > deadline:
                raise ClientError(
                    f"Job {job_id} is still {job['state']} after {timeout_s} s; wait longer, or look later."
                )
            time.sleep(poll_s)

    # Results -------------------------------------------------------------------------------------------------------

    def front(self, job_id: str, *, fidelity: Fidelity | None = None, device: str | None = None) -> JsonObject:
        """The front document (``prunefront/front/1``)."""
        return self._json("GET", f"/jobs/{_id(job_id)}/front", params=_given(fidelity=fidelity, device=device))

    def best(
        self,
        job_id: str,
        *,
        max_latency_ms: float | None = None,
        min_top1: float | None = None,
        min_speedup: float | None = None,
        fidelity: Fidelity | None = None,
        device: str | None = None,
    ) -> PruneConfig:
        """The best config under a limit, with its results.

        Raises:
            ApiError: With code ``no_feasible_point`` and ``problem["nearest"]`` when no point of the front fits.
        """
        limits = _given(
            max_latency_ms=max_latency_ms, min_top1=min_top1, min_speedup=min_speedup, fidelity=fidelity, device=device
        )
        return PruneConfig.model_validate(self._json("GET", f"/jobs/{_id(job_id)}/best", params=limits))

    def trials(self, job_id: str) -> Iterator[JsonObject]:
        """All candidates of a job with every number and its origin."""
        return self._pages(f"/jobs/{_id(job_id)}/trials", {})

    def config(self, job_id: str, trial: int) -> PruneConfig:
        """The config of one candidate."""
        return PruneConfig.model_validate(self._json("GET", f"/jobs/{_id(job_id)}/trials/{trial}/config"))

    def download_checkpoint(self, job_id: str, trial: int, path: str | Path) -> Path:
        """Save the fine-tuned weights of a candidate (safetensors); all or nothing."""
        return write_atomic(path, self._request("GET", f"/jobs/{_id(job_id)}/trials/{trial}/checkpoint").content)

    # Tables and names ----------------------------------------------------------------------------------------------

    def tables(self) -> Iterator[JsonObject]:
        """All latency tables without their entries, newest first."""
        return self._pages("/latency-tables", {})

    def table(self, table_id: str) -> JsonObject:
        """One latency table; its document is under ``document``."""
        return self._json("GET", f"/latency-tables/{_id(table_id)}")

    def push_table(self, document: Mapping[str, Any]) -> JsonObject:
        """Store a latency table that was built here."""
        return self._json("POST", "/latency-tables", params={"source": "push"}, json=dict(document))

    def predict(self, table_id: str, config: ConfigSource) -> float:
        """Latency of a config by a table, in ms per forward pass of the table's batch."""
        body = {"config": load_config(config).model_dump(mode="json")}
        return float(self._json("POST", f"/latency-tables/{_id(table_id)}/predict", json=body)["predicted_ms"])

    def devices(self) -> list[JsonObject]:
        """Devices that jobs may name."""
        return list(self._json("GET", "/devices")["items"])

    def models(self) -> JsonObject:
        """Models and checkpoints that jobs may name."""
        return self._json("GET", "/models")

    def methods(self) -> list[JsonObject]:
        """Token-reduction methods."""
        return list(self._json("GET", "/methods")["items"])

    def datasets(self) -> list[JsonObject]:
        """Datasets that jobs may name."""
        return list(self._json("GET", "/datasets")["items"])

    # Transport -----------------------------------------------------------------------------------------------------

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TimeoutException as error:
            raise ClientError(
                f"No answer from {self.url} in time; check its log, or allow more with timeout_s."
            ) from error
        except httpx.HTTPError as error:
            raise ClientError(
                f"Nothing answers at {self.url} ({error}); start it with `prunefront serve`, or pass another url."
            ) from error
        if response.is_success:
            return response
        if response.headers.get("content-type", "").startswith("application/problem+json"):
            raise ApiError(response.json())
        raise ClientError(
            f"{self.url} answered {response.status_code} without a problem document; is it prunefront's API?"
        )

    def _json(self, method: str, path: str, **options: Any) -> JsonObject:
        response = self._request(method, path, **options)
        try:
            document = response.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise ClientError(f"{self.url} did not answer with a JSON object; is it prunefront's API?")
        return document

    def _pages(self, path: str, params: Mapping[str, str | None]) -> Iterator[JsonObject]:
        cursor: str | None = None
        while True:
            page = self._json("GET", path, params=_given(**params, cursor=cursor, limit=100))
            yield from page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return


def _id(text: str) -> str:
    """An id as a part of a path; anything else would be read as another path."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise ClientError(f"Expected an id such as 9f0a3c5d7e21b846, but got {text!r}.")
    return text


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
