# The gateway's image: no torch, no compiler, not root, two variants.
#   docker build --target cpu -t elis-gateway .              (the default target)
#   docker build --target cuda -t elis-gateway:cuda .        (the predictor on the GPU)
#   docker run -v ./gateway.yaml:/config.yaml:ro -p 8080:8080 elis-gateway
# The embedded engine and the load test are in it, too:
#   docker run elis-gateway sim-engine --host 0.0.0.0
#   docker run elis-gateway loadtest --help
# Without a container engine, `python -m deploy.rehearse` runs these steps in order in a scratch directory.

ARG PYTHON=python:3.12-slim
ARG CUDA=nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04

# ---- what is installed, made apart so that pip, its cache and the sources stay behind
FROM ${PYTHON} AS source
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY elis_gateway elis_gateway
COPY loadtest loadtest
COPY onnx_export onnx_export

FROM source AS build-cpu
RUN python -m venv /app
RUN /app/bin/pip install --no-cache-dir --progress-bar off '.[cpu,loadtest,otel]'

# ---- CPU: the default
FROM ${PYTHON} AS cpu
LABEL org.opencontainers.image.title="elis-gateway" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin elis
COPY --from=build-cpu /app /app
COPY config /etc/elis-gateway
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 8080
# In Kubernetes the probes do this. A listener with TLS, or on another port, says so in ELIS_HEALTH_URL.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(os.environ.get('ELIS_HEALTH_URL', 'http://127.0.0.1:8080/health'), timeout=2)"]
# SIGTERM lets requests finish for server.shutdown_grace seconds: give `docker stop -t` more than that.
STOPSIGNAL SIGTERM
ENTRYPOINT ["elis-gateway"]
CMD ["serve", "/config.yaml"]

# ---- CUDA: the same with onnxruntime's GPU build on NVIDIA's runtime libraries
FROM ${CUDA} AS cuda
LABEL org.opencontainers.image.title="elis-gateway" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY --from=source /src /src
RUN python3 -m venv /app
RUN /app/bin/pip install --no-cache-dir --progress-bar off '/src[gpu,loadtest,otel]' && rm -rf /src
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin elis
COPY config /etc/elis-gateway
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(os.environ.get('ELIS_HEALTH_URL', 'http://127.0.0.1:8080/health'), timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["elis-gateway"]
CMD ["serve", "/config.yaml"]

# Last, so that a build without --target makes it.
FROM cpu
