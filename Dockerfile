# syntax=docker/dockerfile:1
# qadeploy serve, without torch. Targets: cpu (the default), gpu, and baked, which is one of these with a bundle inside.
# docs/container.md shows how to build and run them; tests/container_steps.py runs the steps of the cpu target.
# A tag may be moved, so the digest decides (of the index for all machines). Dependabot proposes newer ones.
ARG PYTHON_IMAGE=python:3.12.14-slim-trixie@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea
ARG TARGET=cpu

FROM ${PYTHON_IMAGE} AS source
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY requirements ./requirements
COPY qadeploy ./qadeploy
# The container does not serve the models that ship: empty folders replace them to keep the wheel small.
RUN mkdir -p models/minilm-l6-qa models/minilm-l6-qa-int8
# Every package is checked by its hash. Only qadeploy is built from source; its build tools stay in this stage.
RUN python -m venv /src/tools && /src/tools/bin/pip install --no-cache-dir --require-hashes --only-binary=:all: -r requirements/build.txt
RUN /src/tools/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /src/wheels .
RUN python -m venv /opt/venv

FROM source AS build-cpu
RUN /opt/venv/bin/pip install --no-cache-dir --require-hashes --only-binary=:all: -r requirements/cpu.txt
RUN /opt/venv/bin/pip install --no-deps --no-index /src/wheels/*.whl

FROM source AS build-gpu
RUN /opt/venv/bin/pip install --no-cache-dir --require-hashes --only-binary=:all: -r requirements/gpu.txt
RUN /opt/venv/bin/pip install --no-deps --no-index /src/wheels/*.whl

FROM ${PYTHON_IMAGE} AS runtime
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    QADEPLOY_CACHE=/tmp/qadeploy \
    QADEPLOY_HOST=0.0.0.0 \
    QADEPLOY_PORT=8000
# Kubernetes' runAsNonRoot needs a numeric user. Only /tmp is written.
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
