"""What a gateway measures of itself, in Prometheus' words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from broker.messages import Completed, Job, LoggedEvent, Timings, WorkerInfo

# From 1 ms: a few-step picture on a GPU takes less than the smallest bucket of most servers.
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STAGES = ("text", "denoise", "decode", "check", "encode")
MAX_TRACKED = 20_000


class Metrics:
    """One registry per app, so that two apps in one process don't meet.

    Outcomes and times are counted by the gateway that submitted a request, so a sum over gateways counts each once.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._submitted: dict[str, tuple[str, float, bool]] = {}
        self._add_process_metrics()
        self._add_http_metrics()
        self._add_request_metrics()
        self._add_live_metrics()

    def _add_process_metrics(self) -> None:
        ProcessCollector(namespace="fewstep_gateway", registry=self.registry)
        self.redis_up = Gauge("fewstep_redis_up", "1 while Redis answers this gateway.", registry=self.registry)

    def _add_http_metrics(self) -> None:
        self.request_duration = self._histogram(
            "fewstep_request_duration_seconds", "HTTP requests until their last byte.", "route", "status"
        )
        self.rejected = self._counter("fewstep_rejected", "Requests refused before they got into the queue.", "reason")
        self.prompt_check = self._histogram("fewstep_prompt_check_seconds", "The operator's prompt check.", "result")

    def _add_request_metrics(self) -> None:
        self.queue_wait = self._histogram("fewstep_queue_wait_seconds", "From submit to a worker's hands.", "model")
        self.first_preview = self._histogram(
            "fewstep_first_preview_seconds", "From submit to a first preview.", "model"
        )
        self.stage = self._histogram("fewstep_stage_seconds", "Each stage of a completed request.", "model", "stage")
        self.generation = self._histogram("fewstep_generation_seconds", "From submit to the pictures.", "model")
        self.admitted = self._counter(
            "fewstep_admitted", "Requests that got in; origin tells the drawn ones from shared ones.", "model", "origin"
        )
        self.outcomes = self._counter("fewstep_outcomes", "How requests ended.", "model", "outcome")
        self.superseded = self._counter("fewstep_superseded", "Live requests overtaken by a newer prompt.", "model")
        self.queued = self._gauge("fewstep_queue_depth", "Requests that wait for a worker.", "model")
        self.running = self._gauge("fewstep_running_requests", "Requests in workers' hands.", "model")
        self.warm_workers = self._gauge("fewstep_warm_workers", "Live workers that hold the model warm.", "model")

    def _add_live_metrics(self) -> None:
        self.live_connections = Gauge("fewstep_live_connections", "Open live sockets.", registry=self.registry)
        self.live_frames = self._counter("fewstep_live_frames", "Pictures sent over live sockets.", "type")
        self.live_dropped = self._counter("fewstep_live_dropped_frames", "Pictures that a slow reader lost.", "type")
        self.live_ack = self._histogram("fewstep_live_ack_seconds", "From sending a live picture to its ack.")

    def submitted(self, job: Job) -> None:
        """Starts the clock of a request; its events end it."""
        if len(self._submitted) >= MAX_TRACKED:
            del self._submitted[next(iter(self._submitted))]
        self._submitted[job.request_id] = (job.model, time.monotonic(), False)

    def forget(self, request_id: str) -> None:
        """The submit was refused after all."""
        self._submitted.pop(request_id, None)

    def observe(self, logged: LoggedEvent) -> None:
        """Counts an event of a request that this gateway submitted."""
        event = logged.event
        if (known := self._submitted.get(event.request_id)) is None:
            return
        model, since, has_preview = known
        match event.type:
            case "accepted" | "started":
                return
            case "preview":
                if not has_preview:
                    self.first_preview.labels(model).observe(time.monotonic() - since)
                    self._submitted[event.request_id] = (model, since, True)
                return
            case "superseded":
                self.superseded.labels(model).inc()
        del self._submitted[event.request_id]
        self.outcomes.labels(model, event.type).inc()
        if isinstance(event, Completed):
            self.generation.labels(model).observe(time.monotonic() - since)
            self._observe_timings(model, event.timings)

    def _observe_timings(self, model: str, timings: Timings) -> None:
        self.queue_wait.labels(model).observe(timings.queue_ms / 1000)
        for stage in STAGES:
            ms = getattr(timings, f"{stage}_ms")
            if ms or stage != "check":  # a stage that most models don't have
                self.stage.labels(model, stage).observe(ms / 1000)

    def set_queue(self, depths: Mapping[str, Mapping[str, int]], workers: Iterable[WorkerInfo]) -> None:
        """Fills in what only Redis knows, right before a scrape. A model that nobody names any more is gone."""
        for gauge in (self.queued, self.running, self.warm_workers):
            gauge.clear()
        warm = [warm.model for worker in workers if worker.state == "ready" for warm in worker.warm_models]
        for model, depth in depths.items():
            self.queued.labels(model).set(depth["queued"])
            self.running.labels(model).set(depth["running"])
            self.warm_workers.labels(model).set(warm.count(model))

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=BUCKETS_S)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)
