# syntax=docker/dockerfile:1
# An image for GPU clusters.
#   docker build -t megatron_vita .                              PyTorch's CUDA development image, extras compiled (slow)
#   docker build --build-arg BASE=<NVIDIA's PyTorch image> \
#                --build-arg EXTRAS=[serve,evaluate] -t megatron_vita .   it has Transformer Engine, flash-attn, Apex
#   docker build --build-arg BASE=python:3.11-slim --target cpu -t megatron_vita:cpu .   no GPU: tests and the quickstart
ARG BASE=pytorch/pytorch:2.9.0-cuda13.0-cudnn9-devel

FROM ${BASE} AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends build-essential make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron_vita
COPY . .
RUN make .venv/bin/.installed
ENV PATH=/opt/megatron_vita/.venv/bin:$PATH
CMD ["make", "quickstart"]

FROM ${BASE} AS cuda
ARG EXTRAS=[cuda,serve,evaluate]
WORKDIR /opt/megatron_vita
COPY . .
# --no-build-isolation: what compiles must compile against the image's own torch, which stays as it is.
RUN pip install --no-cache-dir --no-build-isolation -e ".${EXTRAS}"
CMD ["torchrun", "--help"]
