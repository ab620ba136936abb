# The gateway: HTTP in, events out. It holds no model and installs no torch.
#   docker build -f docker/gateway.Dockerfile -t fewstep-gateway .
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

RUN useradd --uid 10001 --create-home fewstep
WORKDIR /srv/fewstep

# The part of pyproject.toml's dependencies that this side imports; constraints.txt has the exact versions.
COPY constraints.txt ./
RUN pip install -c constraints.txt \
    fastapi "uvicorn[standard]" websockets pydantic pydantic-settings "redis[hiredis]" prometheus-client limits itsdangerous typer rich httpx

COPY pyproject.toml README.md LICENSE cli.py supervisor.py ./
COPY broker/ broker/
COPY models/__init__.py models/catalog.toml models/
COPY models/catalog models/catalog
COPY app/ app/
COPY commands/ commands/
RUN pip install --no-deps .

USER fewstep
ENV FEWSTEP_HOST=0.0.0.0 \
    FEWSTEP_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"FEWSTEP_PORT\"]}/livez', timeout=2)"]
CMD ["fewstep", "gateway"]
