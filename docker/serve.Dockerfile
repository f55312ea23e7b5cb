# The image that answers over HTTP and follows the object store: sonorant.inference, the server, no training libraries.
# `make images` builds it; by hand, from the checkout's root:
#   docker build -f docker/serve.Dockerfile --build-arg VERSION=0.1.0 -t sonorant-serve:0.1.0 .

FROM python:3.11-slim AS dependencies
# The environment has no pip of its own: the base's installs into it.
RUN python -m venv --without-pip /opt/venv
COPY docker/requirements-setuptools.txt docker/requirements-serve.txt docker/trim.sh /build/
# Everything is in the files, with its hash; nothing else is resolved or, for a package without a wheel, fetched to build
# it. Bytecode is made here: a read-only root takes none.
RUN --mount=type=cache,target=/root/.cache/pip \
  pip --python /opt/venv/bin/python install --no-deps --require-hashes -r /build/requirements-setuptools.txt && \
  pip --python /opt/venv/bin/python install --no-deps --require-hashes --no-build-isolation --use-pep517 \
    -r /build/requirements-serve.txt && \
  sh /build/trim.sh /opt/venv

FROM python:3.11-slim AS sonorant
RUN python -m venv --without-pip /opt/venv && python -m venv /opt/build
COPY docker/requirements-build.txt /build/docker/
RUN /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes -r /build/docker/requirements-build.txt
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . && \
  pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-index dist/*.whl

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home sonorant
COPY --from=dependencies /opt/venv /opt/venv
# A layer of its own: new code does not send the libraries again.
COPY --from=sonorant /opt/venv /opt/venv
COPY serving /app/serving
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN python -m compileall -q /app/serving
# Nothing is written when it runs: the root file system may be read-only.
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /app
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD \
  ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=5)"]
# The model is mounted at /model.
ENV SONORANT_SERVE_MODEL=/model SONORANT_SERVE_HOST=0.0.0.0
CMD ["python", "-m", "serving"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=""
LABEL org.opencontainers.image.title="sonorant-serve" \
      org.opencontainers.image.description="Speech embeddings and units over HTTP." \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.licenses="Apache-2.0"
