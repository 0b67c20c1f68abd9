# docker build --target train -t mim-scale:train .      pre-training, on CPUs or GPUs: torch's wheel brings its CUDA
# docker build --target shards -t mim-scale:shards .    building stores: no torch, 1.1 GB of packages
# docker run --gpus all --ipc=host -v /data:/data mim-scale:train deepspeed launch/pretrain.py --config configs/base.yaml ...
FROM python:3.11-slim-bookworm AS base

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true
# The first pip that knows --group.
RUN pip install "pip>=25.1" \
    && useradd --uid 1000 --create-home mim
WORKDIR /opt/mim-scale

# Requirements first: a change of our code then reuses these layers.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir mim_scale data_pipeline && touch mim_scale/__init__.py data_pipeline/__init__.py

FROM base AS shards
# wget: KubeRay asks with it whether a pod's Ray is well.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*
RUN pip install -c constraints.txt --group shards \
    && pip install --no-deps -e .
COPY mim_scale mim_scale
COPY data_pipeline data_pipeline
COPY launch launch
COPY configs configs
USER 1000:1000
CMD ["mim-scale", "data", "--help"]

# The last target is the one that `docker build .` makes.
FROM base AS train
RUN pip install -c constraints.txt torch \
    && pip install -c constraints.txt -e .
COPY mim_scale mim_scale
COPY data_pipeline data_pipeline
COPY launch launch
COPY configs configs
COPY examples examples
USER 1000:1000
CMD ["mim-scale", "--help"]
