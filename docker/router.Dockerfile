# Image of the router. Build from the repository's root: docker build -f docker/router.Dockerfile -t tandem/router:0.1.0 .
FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
# Dependencies first: their layer stays while only our code changes.
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN python -m venv /opt/tandem \
 && mkdir -p operator/tandem_operator router/tandem_router worker/tandem_worker kernels/tandem_kernels \
 && touch operator/tandem_operator/__init__.py router/tandem_router/__init__.py \
    worker/tandem_worker/__init__.py kernels/tandem_kernels/__init__.py \
 && /opt/tandem/bin/pip install --no-cache-dir -c constraints.txt ".[router,otel]"
COPY operator operator
COPY router router
COPY worker worker
COPY kernels kernels
RUN /opt/tandem/bin/pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/tandem /opt/tandem
# What examples/01-hybrid names by image:///opt/tandem/examples.
COPY examples/01-hybrid/predictor /opt/tandem/examples/01-hybrid/predictor
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["tandem-router"]
