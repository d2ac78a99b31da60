# jaxrlhf on NVIDIA GPUs. CUDA comes with jax; the host has the driver and the NVIDIA Container Toolkit.
#   docker build -f scripts/docker/cuda.Dockerfile -t jaxrlhf:cuda .     (--build-arg EXTRA=cuda13 for CUDA 13)
#   docker run --gpus all --shm-size 16g -v "$PWD/runs:/work/runs" jaxrlhf:cuda demo
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY models ./models
COPY sharding ./sharding
COPY kernels ./kernels
COPY jaxrlhf ./jaxrlhf
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim-bookworm
ARG EXTRA=cuda
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir "$(echo /wheel/jaxrlhf-*.whl)[${EXTRA},serve]"
# The image has no CUDA of its own, so the toolkit must be asked for the driver.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["jaxrlhf"]
CMD ["--help"]
