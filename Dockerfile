# The page (the default) and the trainings, on CPU or an NVIDIA GPU. The package's index has torch with CUDA inside;
# that of --build-arg TORCH_INDEX is asked for torch alone.
#   GPU:   docker build -t fixclip .                  docker run --gpus all -p 7860:7860 fixclip
#   CPU:   docker build -t fixclip --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   Train: docker run --gpus all --ipc=host -v "$PWD:/data" fixclip \
#              fixclip train encoder builtin:own_data data.source=captions.jsonl
# Without --ipc=host a container has 64 MB of shared memory, in which not even one batch of pictures has room.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=""
ARG EXTRAS=app,caption,compel,parquet,train
# A context without .git has no tags to tell the version from.
ARG VERSION=0.2.0.dev0

ENV PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    HF_HOME=/data/.cache/huggingface \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_ANALYTICS_ENABLED=False

# hadolint ignore=DL3013
RUN if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" torch torchvision; fi

COPY . /opt/fixclip
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_FIXCLIP="$VERSION" pip install "/opt/fixclip[$EXTRAS]" \
    && useradd --create-home --uid 1000 fixclip \
    && mkdir /data \
    && chown fixclip /data

USER 1000
WORKDIR /data
EXPOSE 7860
HEALTHCHECK --start-period=2m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/config')"]
CMD ["fixclip-app", "--host", "0.0.0.0", "--port", "7860"]
