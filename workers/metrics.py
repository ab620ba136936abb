"""The worker's own Prometheus metrics, on a port of its own."""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from models.compiling.compiler import Compiler
from workers.engine import Aborted
from workers.engine.runner import ModelRunner

BUCKETS_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192, 16.384)


class WorkerMetrics:
    """One registry per worker."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.step = Histogram(
            "fewstep_step_seconds", "Time of one engine step", ["rows"], buckets=BUCKETS_S, registry=registry
        )
        self.check = Histogram(
            "fewstep_check_seconds",
            "Time of one batch in the safety checker",
            ["rows"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.blocked = Counter(
            "fewstep_blocked_requests",
            "Requests whose pictures the safety checker blocked",
            ["model"],
            registry=registry,
        )
        self.outcomes = Counter(
            "fewstep_worker_requests", "Requests ended here", ["model", "outcome"], registry=registry
        )
        self.redeliveries = Counter(
            "fewstep_redeliveries", "Requests received again after a lost lease", registry=registry
        )
        self.stopped_steps = Counter(
            "fewstep_stopped_steps", "Steps computed for requests that were then stopped", ["model"], registry=registry
        )
        self.late_steps = Counter(
            "fewstep_late_steps", "Steps computed for requests already asked to stop", ["model"], registry=registry
        )
        self.rows = Counter("fewstep_rows", "Rows computed, over all steps", ["model"], registry=registry)
        self.stopped_rows = Counter(
            "fewstep_stopped_rows", "Rows computed for requests that were then stopped", ["model"], registry=registry
        )
        self.prompts = Counter(
            "fewstep_prompts", "Prompts by whether the cache had them encoded", ["result"], registry=registry
        )
        self.switches = Histogram(
            "fewstep_lora_switch_seconds",
            "Time of one change of the LoRAs in a model's weights",
            ["model"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.resident_loras = Gauge(
            "fewstep_resident_loras", "Style LoRAs that are in memory", ["model"], registry=registry
        )
        self.running = Gauge("fewstep_running_rows", "Rows held by the engine", registry=registry)
        self.warm = Gauge("fewstep_warm_model", "1 for each model that is warm here", ["model"], registry=registry)
        self.model_state = Gauge(
            "fewstep_model_state", "1 for the state that each model is in", ["model", "state"], registry=registry
        )
        self.model_memory = Gauge(
            "fewstep_model_memory_bytes", "Memory of each model's weights", ["model", "figure"], registry=registry
        )
        self.networks_to_compile = Gauge(
            "fewstep_networks_to_compile", "Networks that wait to be compiled or are being compiled", registry=registry
        )
        self.gpu_memory = Gauge("fewstep_gpu_memory_bytes", "GPU memory that tensors take", registry=registry)

    def observe_step(self, model: str, num_rows: int, seconds: float) -> None:
        self.step.labels(num_rows).observe(seconds)
        self.rows.labels(model).inc(num_rows)

    def observe_check(self, num_rows: int, seconds: float) -> None:
        self.check.labels(num_rows).observe(seconds)

    def observe_stop(self, output: Aborted) -> None:
        """What was computed in vain for a request that was stopped."""
        request = output.request
        self.stopped_steps.labels(request.model).inc(len(request.steps_ms))
        self.stopped_rows.labels(request.model).inc(len(request.steps_ms) * request.num_rows)
        self.late_steps.labels(request.model).inc(output.is_late)

    def watch_loras(self, model: str, runner: ModelRunner) -> None:
        runner.observe_switch = self.switches.labels(model).observe
        self.resident_loras.labels(model).set_function(lambda: runner.pipeline.loras.num_resident)

    def watch_compiler(self, compiler: Compiler) -> None:
        self.networks_to_compile.set_function(lambda: compiler.num_open)

    def observe_prompts(self, hits: int, misses: int) -> None:
        self.prompts.labels("hit").inc(hits)
        self.prompts.labels("miss").inc(misses)

    def serve(self, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
        return start_http_server(port, addr=host, registry=self.registry)
