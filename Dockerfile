# docker build -t mim-scale .            (CPU or GPU: the torch wheel brings its own CUDA libraries)
# docker run --gpus all --ipc=host -v /data:/data mim-scale deepspeed launch/pretrain.py --config configs/base.yaml ...
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /opt/mim-scale

# Requirements first: a change of our code then reuses this layer.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir mim_scale data_pipeline && touch mim_scale/__init__.py data_pipeline/__init__.py \
    && pip install -c constraints.txt torch \
    && pip install -c constraints.txt -e .

COPY mim_scale mim_scale
COPY data_pipeline data_pipeline
COPY launch launch
COPY configs configs
COPY examples examples

CMD ["mim-scale", "--help"]
