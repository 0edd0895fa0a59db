# The product's images, from the root of the repository:
#   docker build -f infra/images/rewatch.Dockerfile --target processors -t rewatch/processors .
#   docker build -f infra/images/rewatch.Dockerfile --target detector -t rewatch/detector .
# `processors` runs every stage and the command line, without torch: 83 packages. `detector` has torch for CUDA.
ARG PYTHON_IMAGE=python:3.13.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS tools
WORKDIR /src
COPY bootstrap.lock ./
RUN python3 -m venv /opt/tools && \
    /opt/tools/bin/python -m pip install --no-cache-dir --require-hashes -r bootstrap.lock
ENV PATH=/opt/tools/bin:$PATH VIRTUAL_ENV=/opt/rewatch UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
RUN uv venv --python "$(command -v python3)" /opt/rewatch

# The packages lie in a layer of their own: a change of the product does not bring them again.
FROM tools AS processors-build
COPY infra/images/processors.lock ./
RUN uv pip install --no-cache --require-hashes -r processors.lock
COPY . .
RUN uv pip install --no-cache --no-deps --no-build-isolation .

FROM tools AS detector-build
COPY infra/images/detector.lock ./
RUN uv pip install --no-cache --require-hashes -r detector.lock
COPY . .
RUN uv pip install --no-cache --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE} AS base
# Volumes take the owner of the folder that they are mounted on.
RUN groupadd --gid 65532 rewatch && \
    useradd --uid 65532 --gid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin rewatch && \
    install -d -o 65532 -g 65532 /data /images /inbox /models /etc/rewatch
# rewatch.yaml is read from the working directory, if somebody mounts one.
WORKDIR /etc/rewatch
ENV PATH=/opt/rewatch/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    REWATCH_DATA_DIR=/data REWATCH_INGEST__FOLDER__ROOT=/inbox REWATCH_LOG__FORMAT=json
USER 65532:65532

FROM base AS processors
COPY --from=processors-build /opt/rewatch /opt/rewatch
# A stage is named by the command: ingest, gateway, detect, batch, enrich, analyze, sink, telemetry, replay.
ENTRYPOINT ["python", "-m", "infra.container"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 CMD ["python", "-m", "infra.healthy"]

FROM base AS detector
COPY --from=detector-build /opt/rewatch /opt/rewatch
EXPOSE 8090
ENTRYPOINT ["rewatch"]
CMD ["serve", "detector"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-m", "infra.healthy", "--url", "http://127.0.0.1:8090/health"]
