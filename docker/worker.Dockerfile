# Image of the worker. Build from the repository's root: docker build -f docker/worker.Dockerfile -t tandem/worker:0.1.0 .
# The base is named by its digest, the packages by their hashes (scripts/lock.sh): what was tested is
# what is built.
FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c AS build
WORKDIR /src
# Dependencies first: their layer stays while only our code changes.
COPY docker/worker.txt docker/build.txt docker/
RUN python -m venv /opt/tandem \
 && /opt/tandem/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r docker/worker.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r docker/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY router router
COPY worker worker
COPY kernels kernels
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/tandem/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c
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
