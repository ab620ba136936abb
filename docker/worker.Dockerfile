# The worker: one GPU, or CPUs, and the models it keeps warm.
#   docker build -f docker/worker.Dockerfile -t fewstep-worker .                          torch with CUDA, from PyPI
#   docker build -f docker/worker.Dockerfile -t fewstep-worker:cpu --build-arg DEVICE=cpu .   torch for CPUs, much smaller
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Weights from the Hugging Face Hub land in a volume and survive the container, and so does what was pulled when.
ENV HF_HOME=/var/cache/huggingface \
    FEWSTEP_LOCK_FILE=/var/cache/huggingface/fewstep.lock
RUN useradd --uid 10001 --create-home fewstep \
    && install -d -o fewstep -g fewstep "$HF_HOME"
VOLUME /var/cache/huggingface
WORKDIR /srv/fewstep

COPY constraints.txt ./
ARG DEVICE=cuda
# On CPUs a worker computes faster with tcmalloc, which it takes where it is installed.
RUN if [ "$DEVICE" = cpu ]; then \
        apt-get update && apt-get install -y --no-install-recommends libtcmalloc-minimal4 && rm -rf /var/lib/apt/lists/* && \
        pip install --no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch; \
    fi

# Dependencies before sources: a change of code rebuilds the last layers only.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY README.md LICENSE cli.py supervisor.py ./
COPY broker/ broker/
COPY models/ models/
COPY app/ app/
COPY commands/ commands/
COPY workers/ workers/
RUN pip install --no-deps .

USER fewstep
ENV FEWSTEP_WORKER_METRICS_HOST=0.0.0.0 \
    FEWSTEP_WORKER_METRICS_PORT=8001
EXPOSE 8001
# The metrics port answers from the start; /readyz of the gateway tells when the models are warm.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"FEWSTEP_WORKER_METRICS_PORT\"]}/metrics', timeout=2)"]
CMD ["fewstep", "worker"]
