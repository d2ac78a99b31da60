# jaxrlhf on TPUs: TPU VMs and GKE.
#   docker build -f scripts/docker/tpu.Dockerfile -t jaxrlhf:tpu .
#   docker run --privileged --net host -v "$PWD/runs:/work/runs" jaxrlhf:tpu demo
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY models ./models
COPY sharding ./sharding
COPY kernels ./kernels
COPY jaxrlhf ./jaxrlhf
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim-bookworm
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir "$(echo /wheel/jaxrlhf-*.whl)[tpu,serve]"
ENV PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["jaxrlhf"]
CMD ["--help"]
