# The serving images, from the repository's root:
#   docker build --file deploy/docker/server.Dockerfile --tag convoy:cpu .
#   docker build --file deploy/docker/server.Dockerfile --tag convoy:gpu --build-arg EXTRAS=gpu,otel,remote \
#     --build-arg PACKAGES='onnxruntime-gpu[cuda,cudnn]' .    # the CUDA libraries come from PyPI, the driver from the node
# Pinned by version: add the digest that your registry gives (name:tag@sha256:...). Any image with Python 3.11 or newer
# and its venv module will do; base-image.sh makes one of Debian's packages where no registry can be reached.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG EXTRAS=cpu,otel,remote
ARG PACKAGES=
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY deploy/docker/strip.py /
COPY src src
COPY protos protos
COPY server server
COPY exporter exporter
# Two secrets that need not be there: pip.conf and a CA bundle for an index of your own (deploy/README.md).
# The clients of object stores want an older python-dateutil than the constraints name.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    python3 -m venv /opt/convoy \
    && sed '/^python-dateutil==/d' constraints.txt > /constraints.txt \
    && /opt/convoy/bin/pip install --constraint /constraints.txt "convoynet[${EXTRAS}] @ file:///src" ${PACKAGES} \
    && python3 /strip.py /opt/convoy

# No RUN from here on: what the running server does not need has never been in this image.
FROM ${BASE_IMAGE}
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Convoy" \
      org.opencontainers.image.description="Serves classic ConvNets over gRPC and HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/convoy /opt/convoy
# HOME is the one place that is written to, for what remote models are copied to: /tmp, which a read-only root file
# system has as a tmpfs.
ENV PATH=/opt/convoy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    CONVOY_HOST=0.0.0.0 \
    CONVOY_MODEL_REPOSITORY=/models
WORKDIR /tmp
USER 10001:10001
EXPOSE 8001 8000 8002
STOPSIGNAL SIGTERM
# Without TLS; where the server has it, or no HTTP port, say another one at `docker run` (deploy/README.md).
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["convoy"]
CMD ["serve"]
