# docker build -t countdown .                                   CPU
# docker build -t countdown --build-arg TORCH=cu130 .           CUDA; run with `--gpus all`
# docker run --rm -v "$PWD/runs:/work/runs" countdown train
FROM python:3.12-slim
ARG TORCH=cpu
RUN pip install --no-cache-dir "uv>=0.9,<1"
COPY . /src
RUN UV_NO_CACHE=1 uv pip install --system --torch-backend "${TORCH}" "/src[gguf]"
WORKDIR /work
ENTRYPOINT ["countdown"]
