# syntax=docker/dockerfile:1
# qadeploy serve, without torch. Targets: cpu (the default), gpu, and baked, which is either of them with a bundle inside.
# docs/container.md shows how they are built and run; benchmarks/container_steps.py runs the steps of the cpu target.
ARG PYTHON=3.12
ARG TARGET=cpu

FROM python:${PYTHON}-slim AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY qadeploy ./qadeploy
# The base model is for training: an empty folder stands in its place, so that the wheel is small.
RUN mkdir -p models/minilm-l6-qa
RUN python -m venv /opt/venv

FROM source AS build-cpu
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt '.[cpu,serve]'

FROM source AS build-gpu
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt '.[gpu,serve]'

FROM python:${PYTHON}-slim AS runtime
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    QADEPLOY_CACHE=/tmp/qadeploy \
    QADEPLOY_HOST=0.0.0.0 \
    QADEPLOY_PORT=8000
# A number, so that Kubernetes' runAsNonRoot can tell; nothing but /tmp is written.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"QADEPLOY_PORT\"]}/health/ready', timeout=2)"]
ENTRYPOINT ["qadeploy", "serve"]
CMD ["/bundle"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/venv /opt/venv

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv

FROM ${TARGET} AS baked
ARG BUNDLE=bundles/handbook-int8
COPY ${BUNDLE} /bundle

FROM cpu AS default
