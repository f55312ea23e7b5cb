# The image every step of the workflow runs in: sonorant with its training, synthesis and Kubeflow libraries.
# Build from the checkout's root: docker build -f docker/train.Dockerfile -t sonorant-train:0.1.0 .

FROM python:3.11-slim AS build
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Libraries first: this layer is rebuilt only when they change.
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src/sonorant/__init__.py src/sonorant/
ARG EXTRAS=train,synthesis,pipelines
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"
COPY src src
RUN pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.11-slim
LABEL org.opencontainers.image.title="sonorant-train" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --create-home sonorant && install --directory --owner sonorant /runs
COPY --from=build /opt/venv /opt/venv
# Checkpoints go where the pipeline mounts the volume that outlives a pod.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
ENV SONORANT_RUNS=/runs
USER 10001
WORKDIR /home/sonorant
CMD ["sonorant", "--help"]
