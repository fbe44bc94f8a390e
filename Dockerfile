# The gateway's image: no torch, no compiler, not root.
#   docker run -v ./gateway.yaml:/config.yaml:ro -p 8080:8080 IMAGE
# The embedded engine and the load test live in the same image:
#   docker run IMAGE sim-engine --host 0.0.0.0
#   docker run IMAGE loadtest --help

FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /app
COPY pyproject.toml README.md LICENSE ./
COPY elis_gateway elis_gateway
COPY loadtest loadtest
COPY onnx_export onnx_export
RUN /app/bin/pip install --no-cache-dir '.[loadtest]'

FROM python:3.12-slim
LABEL org.opencontainers.image.title="elis-gateway" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin elis
COPY --from=build /app /app
COPY config /etc/elis-gateway
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER elis
EXPOSE 8080
ENTRYPOINT ["elis-gateway"]
CMD ["serve", "/config.yaml"]
