# Image of the worker. Build from the repository's root: docker build -f docker/worker.Dockerfile -t tandem/worker:0.1.0 .
FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
# Dependencies first: their layer stays while only our code changes.
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN python -m venv /opt/tandem \
 && mkdir -p operator/tandem_operator router/tandem_router worker/tandem_worker kernels/tandem_kernels \
 && touch operator/tandem_operator/__init__.py router/tandem_router/__init__.py \
    worker/tandem_worker/__init__.py kernels/tandem_kernels/__init__.py \
 && /opt/tandem/bin/pip install --no-cache-dir -c constraints.txt ".[worker,otel]"
COPY operator operator
COPY router router
COPY worker worker
COPY kernels kernels
RUN /opt/tandem/bin/pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.12.12-slim-bookworm
# Triton compiles its launchers with the C compiler when a kernel first runs. The version is that of
# the base image's Debian release, so it is not named again.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/tandem /opt/tandem
# What examples/01-hybrid names by image:///opt/tandem/examples.
COPY examples/models/small /opt/tandem/examples/models/small
COPY examples/models/large /opt/tandem/examples/models/large
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["tandem-worker"]
