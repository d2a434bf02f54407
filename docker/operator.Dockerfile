# Image of the operator. Build from the repository's root: docker build -f docker/operator.Dockerfile -t tandem/operator:0.1.0 .
# The base is named by its digest, the packages by their hashes (scripts/lock.sh): what was tested is
# what is built.
FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c AS build
WORKDIR /src
# Dependencies first: their layer stays while only our code changes.
COPY docker/operator.txt docker/build.txt docker/
RUN python -m venv /opt/tandem \
 && /opt/tandem/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r docker/operator.txt \
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
COPY --from=build /opt/tandem /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["python", "-m", "tandem_operator"]
