# syntax=docker/dockerfile:1
# One image for the head, the workers, the jobs and the MLflow server. docs/clusters.md says how to
# build it. For a GPU the driver comes from the node; CUDA's libraries come with torch.
FROM python:3.11.13-slim-bookworm AS build

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mhe
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY configs configs
COPY launcher launcher
COPY mhe_dist mhe_dist
COPY pipelines pipelines
# boto3 and psycopg2 are the MLflow server's, for its store and its database.
RUN /opt/mhe/bin/pip install -c constraints.txt '.[s3,gcs,k8s,tensorboard]' boto3 psycopg2-binary==2.9.13


FROM python:3.11.13-slim-bookworm

# KubeRay's probes call wget. Triton builds C when a run with model.compile begins on a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev wget \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 mhe \
 && useradd --uid 1000 --gid 1000 --create-home --home-dir /home/mhe mhe
COPY --from=build /opt/mhe /opt/mhe
ENV PATH=/opt/mhe/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/mhe
CMD ["mhe", "--help"]
