# The exporter with PyTorch, from the repository's root:
#   docker build --file deploy/docker/exporter.Dockerfile --tag convoy:exporter .
# PyPI's torch brings CUDA, some 6 GB; --build-arg INDEX=https://download.pytorch.org/whl/cpu takes one for CPUs alone.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG EXTRAS=cpu,export
ARG INDEX=https://pypi.org/simple
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY protos protos
COPY server server
COPY exporter exporter
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    python3 -m venv /opt/convoy \
    && /opt/convoy/bin/pip install --constraint constraints.txt --extra-index-url "${INDEX}" "convoynet[${EXTRAS}] @ file:///src"

FROM ${BASE_IMAGE}
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Convoy exporter" \
      org.opencontainers.image.description="Turns classic ConvNets in PyTorch into verified ONNX models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/convoy /opt/convoy
# HOME holds downloaded weights: mount a volume at /tmp/.cache to keep them.
ENV PATH=/opt/convoy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
# A command that ends has no health to ask for.
HEALTHCHECK NONE
ENTRYPOINT ["convoy"]
CMD ["export", "--help"]
