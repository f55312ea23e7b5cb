# The image that answers over HTTP: sonorant.inference and the server, no training libraries.
# Build from the checkout's root: docker build -f docker/serve.Dockerfile -t sonorant-serve:0.1.0 .

FROM python:3.11-slim AS build
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Libraries first: this layer is rebuilt only when they change.
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src/sonorant/__init__.py src/sonorant/
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]"
COPY src src
RUN pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.11-slim
LABEL org.opencontainers.image.title="sonorant-serve" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --create-home sonorant
COPY --from=build /opt/venv /opt/venv
COPY serving /app/serving
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# Nothing is written when it runs: the root file system may be read-only.
RUN python -m compileall -q /app/serving
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /app
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD \
  ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=5)"]
# The model is mounted at /model.
ENV SONORANT_SERVE_MODEL=/model SONORANT_SERVE_HOST=0.0.0.0
CMD ["python", "-m", "serving"]
