# Image of the operator. Build from the repository's root: docker build -f docker/operator.Dockerfile -t tandem/operator:0.1.0 .
FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY operator operator
COPY router router
COPY worker worker
COPY kernels kernels
RUN python -m venv /opt/tandem \
 && /opt/tandem/bin/pip install --no-cache-dir -c constraints.txt ".[operator]"

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/tandem /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["python", "-m", "tandem_operator"]
